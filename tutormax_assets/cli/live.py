"""``tutormax live``: the metrics up to now."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutormax_assets.cli.arguments import AsJson
from tutormax_assets.cli.terminal import (
    EXIT_FAILED,
    log_to_stderr,
    output,
    sentences,
    settings,
    show,
    table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from tutormax_assets.compute.tasks.live import LiveReport


def live(
    tutors: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of tutors; all when left out.", metavar="TUTOR"),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Refresh every TUTORMAX_LIVE_SECONDS, until somebody stops it."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compute the metrics up to now, and replace them in the table tutor_live_metrics.

    The windows end now instead of at the beginning of a date, and each day of them has 24 hours.
    Shows the metrics of the tutors, or how many tutors are in each tier. With --watch, a failure
    that may pass is logged, and --json prints one object per refresh.

    Exit code: 0 done, 1 it failed, or some of the tutors are unknown or not active, 2 wrong use, or
    none of the tutors is known.
    """
    environment = settings()
    log_to_stderr()
    with sentences(), ExitStack() as stack:
        from tutormax_assets.api.live import compute_live_metrics, watch_live_metrics
        from tutormax_assets.defs.resources import parse_options

        tutor_ids = parse_options(tutor_ids=tutors or None).tutor_ids or ()
        if not watch:
            report = compute_live_metrics(environment, tutor_ids=tutor_ids)
            _show(report, tutor_ids, as_json=as_json)
            if report.unknown or report.inactive:
                raise typer.Exit(EXIT_FAILED)
            return
        reports = watch_live_metrics(environment, tutor_ids=tutor_ids)
        if as_json or not output.is_terminal:
            for report in reports:
                _show(report, tutor_ids, as_json=as_json, is_line=True)
        else:
            _redraw(reports, tutor_ids, stack)


def _show(
    report: "LiveReport", tutor_ids: Sequence[str], *, as_json: bool, is_line: bool = False
) -> None:
    if as_json:
        typer.echo(json.dumps(_to_dict(report, tutor_ids), default=str))
    elif is_line and not tutor_ids:
        show(_sentence(report))
    else:
        for block in _blocks(report, tutor_ids):
            show(block)


def _redraw(reports: "Iterator[LiveReport]", tutor_ids: Sequence[str], stack: ExitStack) -> None:
    """Show each refresh in place of the one before."""
    from rich.console import Group
    from rich.live import Live

    display = stack.enter_context(Live(console=output, auto_refresh=False))
    for report in reports:
        display.update(Group(*_blocks(report, tutor_ids)), refresh=True)


def _to_dict(report: "LiveReport", tutor_ids: Sequence[str]) -> dict[str, Any]:
    from tutormax_assets.compute.tasks.tiers import tier_counts

    found: dict[str, Any] = {
        "calculated_at": report.calculated_at.isoformat(),
        "tutors": report.tiers["tutor_id"].n_unique(),
        "tiers": tier_counts(report.tiers),
        "rows_changed": report.rows_changed,
        "seconds": round(report.seconds, 3),
    }
    if tutor_ids:
        found["metrics"] = report.tiers.to_dicts()
        found["unknown"] = list(report.unknown)
        found["inactive"] = list(report.inactive)
    return found


def _blocks(report: "LiveReport", tutor_ids: Sequence[str]) -> "Iterator[str | Table]":
    if not tutor_ids:
        yield _tiers(report)
    for (tutor_id,), of_tutor in (
        report.tiers.group_by(["tutor_id"], maintain_order=True) if tutor_ids else ()
    ):
        windows = of_tutor["window"].to_list()
        block = table(str(tutor_id), "Metric", *windows, right=windows)
        for name in of_tutor.columns:
            if name not in ("tutor_id", "window"):
                block.add_row(name, *(_shown(value) for value in of_tutor[name]))
        yield block
    for ids, what in ((report.unknown, "Unknown"), (report.inactive, "Not active")):
        if ids:
            yield f"{what}: {', '.join(ids)}"
    yield _sentence(report)


def _tiers(report: "LiveReport") -> "Table":
    from tutormax_assets.compute.tasks.tiers import tier_counts

    counts = tier_counts(report.tiers)
    block = table("Tutors by tier", "Tier", *counts, right=list(counts))
    for tier in next(iter(counts.values()), {}):
        block.add_row(tier, *(str(of_window[tier]) for of_window in counts.values()))
    return block


def _sentence(report: "LiveReport") -> str:
    tutors = report.tiers["tutor_id"].n_unique()
    return (
        f"{report.calculated_at:%Y-%m-%d %H:%M:%S} UTC: {tutors} tutors,"
        f" {report.rows_changed} rows written, {report.seconds:.2f} s"
    )


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
