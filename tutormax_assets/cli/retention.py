"""``tutormax cleanup`` and ``tutormax restore``: old metrics to the archive and back."""

import json
import re
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tutormax_assets.cli.arguments import AsJson
from tutormax_assets.cli.terminal import (
    EXIT_USAGE,
    fail,
    log_to_stderr,
    output,
    sentences,
    settings,
)

if TYPE_CHECKING:
    from tutormax_assets.automation.retention import CleanupReport
    from tutormax_assets.platform.archive import RestoredDate

_SHOWN_TUTORS = 10


def cleanup(
    retention_days: Annotated[
        int | None,
        typer.Option(
            "--retention-days",
            min=1,
            max=36_500,
            help="Age in days up to which metrics stay; TUTORMAX_RETENTION_DAYS when left out.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go and change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Move old metrics from the table to the archive, and delete old Parquet partitions.

    Exit code: 0 done, 1 something failed, 2 wrong use.
    """
    log_to_stderr()
    environment = settings()
    with sentences():
        from tutormax_assets import aggregation

        report = aggregation.cleanup(environment, retention_days=retention_days, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        output.print(_cleanup_block(report))


def restore(
    month: Annotated[str, typer.Option("--month", help="The archived month, YYYY-MM.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would come back and change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the archived metrics of a month back into the table; rows that are there stay.

    The next cleanup archives them again, so raise TUTORMAX_RETENTION_DAYS to keep them.

    Exit code: 0 done, 1 something failed, 2 wrong use.
    """
    log_to_stderr()
    if not _is_month(month):
        fail(f"--month {month!r} is not a month; expected YYYY-MM.", code=EXIT_USAGE)
    environment = settings()
    with sentences():
        from tutormax_assets import aggregation
        from tutormax_assets.platform.archive import archived_dates

        days = archived_dates(environment.archive_path, month)
        restored = list(aggregation.restore(environment, days, dry_run=dry_run))
    if as_json:
        typer.echo(json.dumps(_restore_report(month, restored, dry_run=dry_run)))
    else:
        output.print(_restore_block(month, restored, dry_run=dry_run))


def _is_month(text: str) -> bool:
    try:
        date.fromisoformat(f"{text}-01")
    except ValueError:
        return False
    return re.fullmatch(r"\d{4}-\d\d", text) is not None


def _cleanup_block(report: "CleanupReport") -> Table:
    """The report as a person reads it."""
    kept = report.retention
    size = sum(partition.size_bytes for partition in report.partitions) / 1e6
    days = sorted(report.rows_by_date)
    months = {
        month: sum(rows for day, rows in report.rows_by_date.items() if f"{day:%Y-%m}" == month)
        for month in report.months
    }
    went = "would go" if report.dry_run else "went"
    table = Table(title=f"What {went}", title_justify="left", show_header=False)
    table.add_row("Metrics before", str(kept.metrics_from))
    table.add_row("Rows", str(report.rows))
    table.add_row("Dates", f"{len(days)} ({days[0]} to {days[-1]})" if days else "0")
    for month, rows in months.items():
        table.add_row(f"Rows of {month}", str(rows))
    if report.rows_left:
        table.add_row("Rows that stay", str(report.rows_left))
    table.add_row("Archive", Text(kept.archive_path))
    table.add_row("Parquet before", str(kept.partitions_from))
    table.add_row("Parquet partitions", f"{len(report.partitions)} ({size:.1f} MB)")
    return table


def _restore_report(month: str, restored: "list[RestoredDate]", *, dry_run: bool) -> dict[str, Any]:
    unknown = {tutor_id for of_date in restored for tutor_id in of_date.unknown_tutors}
    return {
        "dry_run": dry_run,
        "month": month,
        "dates": len(restored),
        "rows_archived": sum(of_date.rows_archived for of_date in restored),
        "rows_restored": sum(of_date.rows_restored for of_date in restored),
        "rows_kept": sum(of_date.rows_kept for of_date in restored),
        "rows_of_unknown_tutors": sum(of_date.rows_of_unknown_tutors for of_date in restored),
        "unknown_tutors": sorted(unknown),
    }


def _restore_block(month: str, restored: "list[RestoredDate]", *, dry_run: bool) -> Table:
    """The report as a person reads it."""
    report = _restore_report(month, restored, dry_run=dry_run)
    came = "would come back" if dry_run else "came back"
    table = Table(title=f"What {came} of {month}", title_justify="left", show_header=False)
    table.add_row("Dates", str(report["dates"]))
    table.add_row("Rows in the archive", str(report["rows_archived"]))
    table.add_row("Rows restored", str(report["rows_restored"]))
    table.add_row("Rows that were there", str(report["rows_kept"]))
    if unknown := report["unknown_tutors"]:
        table.add_row("Rows of unknown tutors", str(report["rows_of_unknown_tutors"]))
        shown = ", ".join(unknown[:_SHOWN_TUTORS])
        more = len(unknown) - _SHOWN_TUTORS
        table.add_row("Unknown tutors", Text(f"{shown}, {more} more" if more > 0 else shown))
    return table
