"""``tutormax quality``: the quality of the data of a range of dates."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.arguments import AsJson, dates_in_words, reference_date
from tutormax_assets.cli.terminal import EXIT_USAGE, fail, sentences, settings, show, table

if TYPE_CHECKING:
    from rich.table import Table

    from tutormax_assets.report.quality import QualityReport

_DEFAULT_DATES = 30


def quality(
    first: Annotated[
        str | None,
        typer.Option(
            "--from",
            help=f"First reference date, YYYY-MM-DD; {_DEFAULT_DATES} dates when left out.",
        ),
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", help="Last reference date; today when left out.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the checks, set-aside shares and anomalies of a range of dates.

    Reads what the newest run of each date has recorded; nothing is checked again.

    Exit code: 0 shown, 1 the page cannot be written, 2 wrong use, or no date is on record.
    """
    environment = settings()
    with sentences():
        end = reference_date("--to", last, environment)
        earliest = max(environment.first_date, end - timedelta(days=_DEFAULT_DATES - 1))
        start = earliest if first is None else reference_date("--from", first, environment)
        if end < start:
            fail(f"--to {end} lies before --from {start}.", code=EXIT_USAGE)
        from tutormax_assets.defs.resources import load_policy
        from tutormax_assets.report.quality import collect_quality
        from tutormax_assets.runs.instance import dagster_instance

        days = [start + timedelta(days=n) for n in range((end - start).days + 1)]
        with dagster_instance(environment) as instance:
            found = collect_quality(instance, days, load_policy(environment))
        if not found.dates:
            fail(
                f"Nothing is on record of {start} to {end}. `tutormax backfill --from {start}"
                f" --to {end}` computes these dates.",
                code=EXIT_USAGE,
            )
        if html is not None:
            _write(html, found)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    for block in _blocks(found):
        show(block)
    if html is not None:
        show(f"Written: {html}")


def _write(path: Path, found: "QualityReport") -> None:
    from tutormax_assets.report.quality_page import quality_page
    from tutormax_assets.storage.files import open_private_file

    with open_private_file(path) as opened:
        opened.write(quality_page(found).encode())


def _blocks(found: "QualityReport") -> "Iterator[str | Table]":
    numbers = ("Passed", "Warned", "Failed", "Set aside")
    block = table(
        f"Data quality from {found.first} to {found.last}",
        "Date", *numbers, "Anomalies",
        right=numbers,
    )  # fmt: skip
    for one in found.dates:
        failed = sum(check.severity == "ERROR" for check in one.problems)
        anomalies = [
            f"{measure.name} {measure.value:.2f}" for measure in one.measures if measure.is_anomaly
        ]
        block.add_row(
            str(one.day),
            str(len(one.checks) - len(one.problems)),
            str(len(one.problems) - failed),
            str(failed),
            f"{one.set_aside_share:.2%}",
            ", ".join(anomalies) or "none",
        )
    yield block
    for problem in found.problems:
        of_check = f"{problem.severity} {problem.asset}, {problem.name}"
        yield f"{of_check}, {dates_in_words(problem.days)}. The last one: {problem.says}"
    if found.missing:
        yield f"Not on record: {dates_in_words(found.missing)}"
