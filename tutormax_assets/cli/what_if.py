"""``tutormax what-if``: who would change tier under another policy."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.arguments import AsJson, dates_in_words, reference_date
from tutormax_assets.cli.terminal import EXIT_USAGE, fail, sentences, settings, show, table

if TYPE_CHECKING:
    from rich.table import Table

    from tutormax_assets.api.what_if import Comparison, WindowComparison

_SHOWN_MOVERS = 10


def what_if(
    policy: Annotated[Path, typer.Argument(help="A policy in TOML, as TUTORMAX_POLICY names one.")],
    day: Annotated[
        str | None,
        typer.Option("--date", help="Reference date, YYYY-MM-DD; today when left out."),
    ] = None,
    days: Annotated[
        int,
        typer.Option("--days", min=1, max=366, help="Dates to look through for changes of tier."),
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Show who would change tier under another policy, and how often tiers would have changed.

    Stored dates are judged again; nothing is read from the platform and nothing is written.

    Exit code: 0 shown, 2 wrong use, or the date has not been computed.
    """
    environment = settings()
    try:
        text = policy.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        fail(f"{policy} cannot be read: {why}.", code=EXIT_USAGE)
    with sentences():
        from tutormax_assets.api.what_if import compare
        from tutormax_assets.metrics.policy import Policy

        date = reference_date("--date", day, environment)
        found = compare(environment, Policy.from_toml(text), date, days=days)
    if as_json:
        typer.echo(json.dumps({"policy": str(policy), **asdict(found)}, default=str))
        return
    for block in _blocks(found):
        show(block)


def _blocks(found: "Comparison") -> Iterator["str | Table"]:
    from tutormax_assets.api.what_if import FLAPPING

    for one in found.windows:
        movers = len(one.movers)
        up = sum(mover["steps"] < 0 for mover in one.movers)
        yield f"{one.window} on {found.reference_date}: {up} would move up, {movers - up} down"
        yield _matrix(one)
        for mover in one.movers[:_SHOWN_MOVERS]:
            yield f"  {mover['tutor_id']}: {mover['tier']} -> {mover['other_tier']}"
        if movers > _SHOWN_MOVERS:
            yield f"  {movers - _SHOWN_MOVERS} more are in --json."
        yield (
            f"Changes of tier from date to date: {one.flaps} as judged, {one.other_flaps} under"
            f" this policy; tutors with {FLAPPING} or more: {one.flapping}, {one.other_flapping}."
        )
        yield ""
    yield f"Dates: {dates_in_words(found.dates)}"
    if found.only_one:
        yield f"Not compared, as only one of the policies has them: {', '.join(found.only_one)}"


def _matrix(one: "WindowComparison") -> "Table":
    from tutormax_assets.metrics.schemas import TIERS

    counts = {(row["tier"], row["other_tier"]): row["tutors"] for row in one.matrix}
    block = table("", "As judged", *TIERS, right=TIERS)
    block.title = "Under this policy"
    for tier in TIERS:
        block.add_row(tier, *(str(counts.get((tier, other), "-")) for other in TIERS))
    return block
