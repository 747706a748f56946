"""``tutormax drift``: compares stored dates with the platform."""

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.arguments import AsJson, dates_in_words, reference_date
from tutormax_assets.cli.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    fail,
    sentences,
    settings,
    show,
    table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from tutormax_assets.api.drift import Drift


def drift(
    first: Annotated[str, typer.Option("--from", help="First reference date, YYYY-MM-DD.")],
    last: Annotated[
        str | None, typer.Option("--to", help="Last reference date; today when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how stored dates differ from the platform, and why.

    Recomputes the dates from one read of the platform and writes nothing.

    Exit code: 0 nothing differs, 1 something does, 2 wrong use, or none of the dates is stored.
    """
    environment = settings()
    with sentences():
        start = reference_date("--from", first, environment)
        end = reference_date("--to", last, environment)
        if end < start:
            fail(f"--to {end} lies before --from {start}.", code=EXIT_USAGE)
        from tutormax_assets.api.drift import find_drift

        days = [start + timedelta(days=n) for n in range((end - start).days + 1)]
        found = find_drift(environment, days)
    if as_json:
        typer.echo(json.dumps(_report(found), default=str))
    else:
        _show(found)
    if not found.values.is_empty():
        raise typer.Exit(EXIT_FAILED)


def _report(found: "Drift") -> dict[str, object]:
    return {
        "dates": found.dates,
        "not_stored": found.not_stored,
        "windows_not_compared": found.windows,
        "counts": found.counts().to_dicts(),
        "values": found.values.to_dicts(),
    }


def _show(found: "Drift") -> None:
    if not found.values.is_empty():
        show(_table(found))
    differing = found.values["reference_date"].unique()
    tutors = found.values["tutor_id"].n_unique()
    show(
        f"{len(differing)} of {len(found.dates)} dates differ, {tutors} tutors."
        if len(differing)
        else f"{dates_in_words(found.dates)}: no differences from the platform."
    )
    if found.not_stored:
        show(f"Not stored: {dates_in_words(found.not_stored)}")
    if found.windows:
        show(f"Windows that only one side has: {', '.join(found.windows)}")


def _table(found: "Drift") -> "Table":
    block = table(
        "Stored values that differ", "Date", "Metric", "Cause", "Tutors", right=["Tutors"]
    )
    for day, metric, cause, tutors in found.counts().iter_rows():
        block.add_row(str(day), metric, cause, str(tutors))
    return block
