"""``tutormax cleanup`` and ``tutormax restore``: old metrics to the archive and back."""

import json
import re
from datetime import date, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tutormax_assets.cli.arguments import AsJson
from tutormax_assets.cli.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    Failed,
    fail,
    log_to_stderr,
    sentences,
    settings,
    show,
    table,
)

if TYPE_CHECKING:
    from tutormax_assets.database.restore import RestoredDate
    from tutormax_assets.runs.retention import CleanupReport

_SHOWN_TUTORS = 10
_MOST_DAYS = 36_500


def cleanup(
    retention_days: Annotated[
        int | None,
        typer.Option(
            "--retention-days",
            min=1,
            max=_MOST_DAYS,
            help="Age in days up to which metrics stay; TUTORMAX_RETENTION_DAYS when left out.",
        ),
    ] = None,
    release_month: Annotated[
        list[str] | None,
        typer.Option(
            "--release-month",
            metavar="YYYY-MM",
            help="Archive a restored month now, before its day has come. May be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go and change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Move old metrics from the table to the archive, and delete old Parquet partitions and runs.

    A month that `tutormax restore` brought back stays until its day. Metrics that another table
    refers to stay as long as it does.

    Exit code: 0 done, 1 something failed, 2 wrong use.
    """
    log_to_stderr()
    for month in release_month or ():
        _check_month("--release-month", month)
    environment = settings()
    with sentences():
        from tutormax_assets.api import retention

        report = retention.cleanup(
            environment,
            retention_days=retention_days,
            released_months=release_month or (),
            dry_run=dry_run,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        show(cleanup_block(report))
    if report.refusals:
        raise typer.Exit(EXIT_FAILED)


def restore(
    month: Annotated[str, typer.Option("--month", help="The archived month, YYYY-MM.")],
    keep_days: Annotated[
        int,
        typer.Option(
            "--keep-days",
            min=1,
            max=_MOST_DAYS,
            help="Days from today for which no cleanup archives the month again.",
        ),
    ] = 30,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would come back and change nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the archived metrics of a month back into the table; rows that are there stay.

    The month stays for --keep-days; then the next cleanup archives it again. Restoring it once more
    sets another day, and `tutormax cleanup --release-month` archives it at once.

    Exit code: 0 done, 1 something failed, 2 wrong use.
    """
    log_to_stderr()
    _check_month("--month", month)
    environment = settings()
    restored: list[RestoredDate] = []
    try:
        with sentences():
            from tutormax_assets.api import retention
            from tutormax_assets.dates import today

            until = today(timezone=environment.timezone) + timedelta(days=keep_days)
            for of_date in retention.restore(environment, month, until=until, dry_run=dry_run):
                restored.append(of_date)
    except Failed as error:
        # The dates before the one that failed are back in the table.
        report = _restore_report(month, restored, until=until, dry_run=dry_run)
        if restored and not as_json:
            show(_restore_block(report))
        error.report |= report
        raise
    report = _restore_report(month, restored, until=until, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        show(_restore_block(report))


def _check_month(option: str, text: str) -> None:
    try:
        date.fromisoformat(f"{text}-01")
        is_month = re.fullmatch(r"\d{4}-\d\d", text) is not None
    except ValueError:
        is_month = False
    if not is_month:
        fail(f"{option} {text!r} is not a month; expected YYYY-MM.", code=EXIT_USAGE)


def cleanup_block(report: "CleanupReport") -> Table:
    """The report as a person reads it."""
    kept = report.retention
    size = sum(partition.size_bytes for partition in report.partitions) / 1e6
    days = sorted(report.rows_by_date)
    months = {
        month: sum(rows for day, rows in report.rows_by_date.items() if f"{day:%Y-%m}" == month)
        for month in report.months
    }
    went = "would go" if report.dry_run else "went"
    block = table(f"What {went}", unnamed=2)
    block.add_row("Metrics before", str(kept.metrics_from))
    block.add_row("Rows", str(report.rows))
    block.add_row("Dates", f"{len(days)} ({days[0]} to {days[-1]})" if days else "0")
    for month, rows in months.items():
        block.add_row(f"Rows of {month}", str(rows))
    if report.rows_left:
        block.add_row("Rows that stay", str(report.rows_left))
    for name, rows in report.due.rows_referred.items():
        block.add_row("Rows that stay", f"{rows}, {name} refers to them")
    if report.due.rows_undated:
        block.add_row("Rows that stay", f"{report.due.rows_undated}, timestamps cannot be read")
    for month, until in report.due.months_restored.items():
        block.add_row(f"Restored {month}", f"stays until {until}")
    block.add_row("Archive", kept.archive_path)
    block.add_row("Parquet before", str(kept.partitions_from))
    block.add_row("Parquet partitions", f"{len(report.partitions)} ({size:.1f} MB)")
    if kept.runs_from is not None:
        block.add_row("Runs before", str(kept.runs_from.date()))
        block.add_row("Runs", str(report.runs.deleted))
        block.add_row("Runs that keep results", str(report.runs.trimmed))
        block.add_row("Events without a run", str(report.runs.runless_events))
    return block


def _restore_report(
    month: str, restored: "list[RestoredDate]", *, until: date, dry_run: bool
) -> dict[str, Any]:
    unknown = {tutor_id for of_date in restored for tutor_id in of_date.unknown_tutors}
    return {
        "dry_run": dry_run,
        "month": month,
        "stays_until": until.isoformat(),
        "dates": len(restored),
        "rows_archived": sum(of_date.rows_archived for of_date in restored),
        "rows_restored": sum(of_date.rows_restored for of_date in restored),
        "rows_kept": sum(of_date.rows_kept for of_date in restored),
        "rows_of_unknown_tutors": sum(of_date.rows_of_unknown_tutors for of_date in restored),
        "unknown_tutors": sorted(unknown),
    }


def _restore_block(report: dict[str, Any]) -> Table:
    """The report as a person reads it."""
    came = "would come back" if report["dry_run"] else "came back"
    block = table(f"What {came} of {report['month']}", unnamed=2)
    block.add_row("Dates", str(report["dates"]))
    block.add_row("Rows in the archive", str(report["rows_archived"]))
    block.add_row("Rows restored", str(report["rows_restored"]))
    block.add_row("Rows that were there", str(report["rows_kept"]))
    block.add_row("Stays until", report["stays_until"])
    if unknown := report["unknown_tutors"]:
        block.add_row("Rows of unknown tutors", str(report["rows_of_unknown_tutors"]))
        shown = ", ".join(unknown[:_SHOWN_TUTORS])
        more = len(unknown) - _SHOWN_TUTORS
        block.add_row("Unknown tutors", f"{shown}, {more} more" if more > 0 else shown)
    return block
