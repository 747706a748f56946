"""``tutormax explain``: why a tutor is in a tier, since when, what moved, and how sure that is."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutormax_assets.cli.arguments import AsJson, reference_date
from tutormax_assets.cli.terminal import sentences, settings, show, table

if TYPE_CHECKING:
    from rich.table import Table

    from tutormax_assets.api.explanation import (
        Explanation,
        WindowExplanation,
    )
    from tutormax_assets.api.movement import WindowChange
    from tutormax_assets.settings import Settings

_SHOWN_ROWS = 20
_NUMBERS = ("Value", "95 %", "Rows")
_UNITS = {"score_sum": 10**9}
"""Sums that are kept in smaller units than a person reads them in."""

_PARTS = {
    "came_in": "came in",
    "aged_out": "aged out",
    "corrected_from": "corrected, was",
    "corrected_to": "corrected, is",
}


def explain(
    tutor: Annotated[str, typer.Argument(help="The id of the tutor.", metavar="TUTOR")],
    day: Annotated[
        str | None,
        typer.Option("--date", help="Reference date, YYYY-MM-DD; today when left out."),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option("--window", help="Only this window, such as 30day.", metavar="WINDOW"),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", help="Write a page that may be handed to the tutor.", metavar="FILE"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show why a tutor is in a tier, since when, what moved, and how sure that is.

    Exit code: 0 shown, 1 the page cannot be written, 2 wrong use, or the date or tutor has not been
    computed.
    """
    environment = settings()
    with sentences():
        from tutormax_assets.api import explanation

        found = explanation.explain(
            environment, tutor, reference_date("--date", day, environment), window=window
        )
    if html is not None:
        with sentences():
            _write_page(html, found, environment)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    if html is not None:
        show(f"Written: {html}")
        return
    for block in _blocks(found):
        show(block)


def _write_page(path: Path, found: "Explanation", environment: "Settings") -> None:
    from tutormax_assets.api.pages import explanation_page
    from tutormax_assets.defs.resources import load_policy
    from tutormax_assets.storage.files import open_private_file

    page = explanation_page(found, load_policy(environment))
    with open_private_file(path) as file:
        file.write(page.encode())


def _blocks(found: "Explanation") -> Iterator["str | Table"]:
    from tutormax_assets.api.explanation import distance_in_words

    read_at = f", as read {found.read_at:%Y-%m-%d %H:%M %Z}" if found.read_at else ""
    yield f"{found.tutor_id} on {found.reference_date}{read_at}"
    for one in found.windows:
        yield ""
        yield f"{one.window}: {one.tier}{_since(one)}"
        yield f"Evidence: {one.evidence}, {one.sessions} sessions"
        yield _metrics(one)
        if any(metric.certainty == "within_noise" for metric in one.metrics):
            yield "A flag with ? is within noise: its interval, if any, reaches across the bound."
        parts = [f"{n} {'-' if v is None else f'{v:g}'}" for n, v in one.engagement.items()]
        if parts:
            yield f"engagement_score is made of {', '.join(parts)}."
        for name, distance in (("Better", one.better), ("Worse", one.worse)):
            if (words := distance_in_words(distance)) is not None:
                yield f"{name}: {words}"
        for change in one.changes:
            yield from _change(change)
        if not one.changes:
            dates = ", ".join(found.compared_with)
            yield f"Moved: nothing since {dates}" if dates else "Moved: not compared with any date"
    for note in (*found.notes, *found.problems):
        yield ""
        yield f"Note: {note}"


def _since(one: "WindowExplanation") -> str:
    if one.run is None:
        return ", not in the table"
    before = f", before that {one.run.previous_tier}" if one.run.previous_tier else ""
    first = "" if before else ", the first date that the table has"
    missing = f", {one.run.dates_missing} of them missing" if one.run.dates_missing else ""
    days = f"{one.run.held_days} day{'' if one.run.held_days == 1 else 's'}"
    return f" since {one.run.tier_since} ({days}{missing}){before or first}"


def _metrics(one: "WindowExplanation") -> "Table":
    from rich import box

    columns = ("Metric", "Value", "95 %", "Rows", "Flag", "Green", "Red")
    block = table("", *columns, right=_NUMBERS)
    block.box, block.title, block.padding, block.pad_edge = box.SIMPLE_HEAD, None, (0, 0), False
    for metric in one.metrics:
        block.add_row(
            metric.metric,
            "-" if metric.value is None else f"{metric.value:g}",
            "-" if metric.low is None else f"{metric.low:g}-{metric.high:g}",
            str(metric.denominator),
            (metric.flag or "-") + ("?" if metric.certainty == "within_noise" else ""),
            f"{'>=' if metric.higher_is_better else '<='} {metric.green_bound:g}",
            f"{'<' if metric.higher_is_better else '>'} {metric.red_bound:g}",
        )
    return block


def _change(change: "WindowChange") -> Iterator[str]:
    was = f" from {change.tier_before}" if change.tier_before else ""
    yield f"Moved since {change.compared_with}: {change.move}{was}"
    said: set[str] = set()
    for split in change.splits:
        if split["metric"] not in said:
            said.add(split["metric"])
            yield f"  {split['metric']}: {_side(split, '_before')} -> {_side(split, '')}"
        for role in ("numerator", "denominator"):
            unit = _UNITS.get(split[role], 1)
            before, came_in, aged_out, corrected, after = (
                f"{split[f'{role}_{part}'] / unit:.12g}"
                for part in ("before", "came_in", "aged_out", "corrected", "after")
            )
            yield (
                f"    {split[role]}: {before} + {came_in} came in - {aged_out} aged out"
                f" + {corrected} corrected = {after}"
            )
    for row in change.rows[:_SHOWN_ROWS]:
        # Logins have no id.
        session = [row["session_id"] or "(id unknown)"] if "session_id" in row else []
        yield f"    {row['date']} {_PARTS[row['part']]}: {' '.join([*session, _values(row)])}"
    if len(change.rows) > _SHOWN_ROWS:
        yield f"    {len(change.rows) - _SHOWN_ROWS} more are in --json."


def _side(split: Mapping[str, Any], suffix: str) -> str:
    value, flag = split[f"value{suffix}"], split[f"flag{suffix}"]
    return f"{'-' if value is None else f'{value:g}'} {flag or 'no flag'}"


def _values(row: Mapping[str, Any]) -> str:
    known = ("metric", "part", "date", "session_id")
    return ", ".join(
        f"{name} {'-' if value is None else value}"
        for name, value in row.items()
        if name not in known
    )
