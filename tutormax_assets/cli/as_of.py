"""``tutormax run`` and ``tutormax backfill`` with ``--as-of``: metrics as of an instant."""

import json
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    fail,
    sentences,
    show,
    table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from tutormax_assets.api.as_of import AsOfSummary
    from tutormax_assets.defs.resources import RunOptions
    from tutormax_assets.settings import Settings

AsOf = Annotated[
    str | None,
    typer.Option(
        "--as-of",
        help=(
            "Compute what could be known at this instant, or at the end of the windows of"
            " each-date, and store it apart as tutor_metrics_as_of."
        ),
        metavar="INSTANT",
    ),
]


def expect_no_other_options(**options: object) -> None:
    """Exit with 2 if an option was given that has no meaning beside ``--as-of``.

    Args:
        **options: Their values, by the names of their parameters.
    """
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]:
        fail(
            f"--as-of reads and computes tutors of any status, and stores their metrics apart;"
            f" leave out {' and '.join(given)}.",
            code=EXIT_USAGE,
        )


def run_as_of(
    environment: "Settings",
    days: Sequence[date],
    options: "RunOptions",
    *,
    as_of: str,
    source: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compute reference dates as of an instant and show what became of them; exit 1 if one failed.

    Args:
        environment: The settings.
        days: Consecutive reference dates, ascending.
        options: Options of the run.
        as_of: The instant, or ``each-date``.
        source: What started the runs, for their tags.
        quiet: Whether nothing is shown.
        as_json: Whether JSON is printed.
    """
    from upath import UPath

    from tutormax_assets.api.as_of import compute_as_of
    from tutormax_assets.dates import AsOfError

    with sentences():
        try:
            summaries = compute_as_of(environment, days, options, as_of=as_of, source=source)
        except AsOfError as error:
            fail(f"--as-of {error}", code=EXIT_USAGE)
    failed = [summary for summary in summaries if summary.errors]
    if as_json:
        report = {
            "dates": len(summaries),
            "failed_dates": len(failed),
            "summaries": [summary.to_dict() for summary in summaries],
        }
        typer.echo(json.dumps(report))
    elif not quiet:
        show(_block(summaries))
        if stored := [one.path for one in summaries if one.path]:
            show(f"Stored in {UPath(stored[0]).parent}")
        for line in dict.fromkeys(one.errors[0]["error"] for one in failed):
            show(f"Failed: {line}")
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _block(summaries: "list[AsOfSummary]") -> "Table":
    block = table("Metrics as of an instant", "Run date", "As of", "Rows", right=("Rows",))
    for summary in summaries:
        rows = "failed" if summary.errors else str(summary.rows)
        as_of = summary.as_of.isoformat(sep=" ", timespec="seconds")
        block.add_row(str(summary.reference_date), as_of, rows)
    return block
