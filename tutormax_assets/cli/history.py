"""``tutormax history`` and ``tutormax table``: earlier versions of the metrics of a date."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.arguments import AsJson, reference_date
from tutormax_assets.cli.terminal import EXIT_USAGE, fail, sentences, settings, show

if TYPE_CHECKING:
    import polars as pl

    from tutormax_assets.api.history import Version

_RUN_ID_DIGITS = 8


def history(
    tutor: Annotated[str, typer.Argument(help="The id of the tutor.", metavar="TUTOR")],
    day: Annotated[
        str | None,
        typer.Option("--date", help="Reference date, YYYY-MM-DD; today when left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the versions of a tutor's metrics of a date, and the run that wrote each.

    Exit code: 0 shown, 1 the table or the archive cannot be read, 2 wrong use, or there is nothing.
    """
    environment = settings()
    with sentences():
        from tutormax_assets.api.history import read_history

        date = reference_date("--date", day, environment)
        found = read_history(environment, tutor, date)
    if as_json:
        versions = [asdict(version) for version in found]
        report = {"tutor_id": tutor, "date": str(date), "versions": versions}
        typer.echo(json.dumps(report, default=lambda one: one.isoformat()))
        return
    show(f"{tutor} on {date}")
    for line in _lines(found):
        show(line)


def _lines(found: "Sequence[Version]") -> Iterator[str]:
    before: Version | None = None
    for version in found:
        if before is None or before.window != version.window:
            before = None
            yield f"{version.window}:"
        tier = version.values["performance_tier"]
        yield f"  from {version.known_from:%Y-%m-%d %H:%M:%S %Z}: {tier}"
        for name in version.changed:
            was = before.values[name] if before else None
            yield f"    {name}: {_shown(was)} -> {_shown(version.values[name])}"
        if version.run_id:
            yield (f"    by run {version.run_id[:_RUN_ID_DIGITS]}, policy {version.policy_digest}")
        before = version


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def table(
    day: Annotated[
        str | None,
        typer.Option("--date", help="Reference date, YYYY-MM-DD; today when left out."),
    ] = None,
    instant: Annotated[
        str | None,
        typer.Option(
            "--known-at",
            help="Instant such as 2025-11-07T02:00; now when left out.",
            metavar="INSTANT",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--output", help="A .csv or .parquet file; else CSV is printed.", metavar="FILE"
        ),
    ] = None,
) -> None:
    """Give the rows of a reference date as the metrics table had them at an instant.

    Exit code: 0 given, 1 the table or the archive cannot be read, 2 wrong use, or there were none.
    """
    if file is not None and file.suffix not in (".csv", ".parquet"):
        fail(f"--output: found {file.name}, expected a .csv or .parquet file.", code=EXIT_USAGE)
    environment = settings()
    with sentences():
        from tutormax_assets.api.history import parse_instant, table_known_at

        rows = table_known_at(
            environment,
            reference_date("--date", day, environment),
            None if instant is None else parse_instant(instant, timezone=environment.timezone),
        )
        if file is None:
            typer.echo(rows.write_csv(), nl=False)
            return
        _write(file, rows)
    show(f"Written: {file}, {len(rows)} rows")


def _write(path: Path, rows: "pl.DataFrame") -> None:
    from tutormax_assets.storage.files import open_private_file

    with open_private_file(path) as file:
        if path.suffix == ".csv":
            rows.write_csv(file)
        else:
            rows.write_parquet(file)
