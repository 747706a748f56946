"""``tutormax run`` and ``tutormax backfill``: compute reference dates and keep them."""

import gc
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tutormax_assets.cli.arguments import AsJson, reference_date
from tutormax_assets.cli.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    fail,
    log_to_stderr,
    messages,
    output,
    sentences,
    settings,
)

logger = logging.getLogger("tutormax_assets")

if TYPE_CHECKING:
    from tutormax_assets.aggregation import AggregationSummary
    from tutormax_assets.resources import RunOptions
    from tutormax_assets.settings import Settings

Tutors = Annotated[
    list[str] | None,
    typer.Option("--tutors", help="Only these tutors, ids separated by commas.", metavar="A,B"),
]
Tutor = Annotated[
    list[str] | None,
    typer.Option(
        "--tutor",
        help="Only this tutor, the id taken as it is, commas and spaces included; may be repeated.",
        metavar="ID",
    ),
]
IncludeInactive = Annotated[
    bool, typer.Option("--include-inactive", help="Tutors of any status, not only active ones.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Tutors that are written in one transaction.")
]
MaxRetries = Annotated[
    int,
    typer.Option("--max-retries", min=0, help="How often reading or writing is tried again."),
]
RetryDelay = Annotated[
    float, typer.Option("--retry-delay", min=0, help="Seconds before the first retry; doubles.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Dagster does as well.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]


def run(
    day: Annotated[
        str | None,
        typer.Option("--date", help="Reference date, YYYY-MM-DD; today when left out."),
    ] = None,
    tutors: Tutors = None,
    tutor: Tutor = None,
    include_inactive: IncludeInactive = False,
    cleanup: Annotated[
        bool, typer.Option("--cleanup", help="Do `tutormax cleanup` afterwards.")
    ] = False,
    retention_days: Annotated[
        int | None,
        typer.Option(
            "--retention-days", min=1, max=36_500, help="Age in days up to which --cleanup keeps."
        ),
    ] = None,
    batch_size: BatchSize = 1_000,
    max_retries: MaxRetries = 3,
    retry_delay: RetryDelay = 5,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compute the metrics of one reference date and keep them.

    Exit code: 0 all saved, 1 something failed, 2 wrong use.
    """
    environment = _prepare(verbose=verbose, quiet=quiet)
    with sentences():
        from tutormax_assets import aggregation
        from tutormax_assets.resources import checked_options

        [summary] = with_progress(
            environment,
            [reference_date("--date", day, environment)],
            checked_options(
                tutor_ids=_tutor_ids(tutors, tutor),
                include_inactive=include_inactive,
                batch_size=batch_size,
                max_retries=max_retries,
                retry_delay_seconds=retry_delay,
            ),
            source="tutormax run",
            quiet=quiet,
        )
    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
    elif not quiet:
        output.print(summary_block(summary))
    is_cleaned_up = True
    if cleanup and summary.successful:
        with sentences():
            report = aggregation.cleanup(environment, retention_days=retention_days)
        is_cleaned_up = not report.refusals
    if not (summary.all_saved and is_cleaned_up):
        raise typer.Exit(EXIT_FAILED)


def backfill(
    first: Annotated[str, typer.Option("--from", help="First reference date, YYYY-MM-DD.")],
    last: Annotated[
        str | None, typer.Option("--to", help="Last reference date; today when left out.")
    ] = None,
    tutors: Tutors = None,
    tutor: Tutor = None,
    include_inactive: IncludeInactive = False,
    batch_size: BatchSize = 1_000,
    max_retries: MaxRetries = 3,
    retry_delay: RetryDelay = 5,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compute a range of reference dates, a month in one run.

    A date that cannot be computed does not lose the others.

    Exit code: 0 all saved, 1 something failed, 2 wrong use.
    """
    environment = _prepare(verbose=verbose, quiet=quiet)
    with sentences():
        from tutormax_assets.resources import checked_options

        start = reference_date("--from", first, environment)
        end = reference_date("--to", last, environment)
        if end < start:
            fail(f"--to {end} lies before --from {start}.", code=EXIT_USAGE)
        summaries = with_progress(
            environment,
            [start + timedelta(days=n) for n in range((end - start).days + 1)],
            checked_options(
                tutor_ids=_tutor_ids(tutors, tutor),
                include_inactive=include_inactive,
                batch_size=batch_size,
                max_retries=max_retries,
                retry_delay_seconds=retry_delay,
            ),
            source="tutormax backfill",
            quiet=quiet,
        )
    failed = [summary for summary in summaries if not summary.all_saved]
    if as_json:
        report = {
            "from": start.isoformat(),
            "to": end.isoformat(),
            "dates": len(summaries),
            "failed_dates": len(failed),
            "summaries": [summary.to_dict() for summary in summaries],
        }
        typer.echo(json.dumps(report))
    elif not quiet:
        output.print(_backfill_table(summaries))
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _prepare(*, verbose: bool, quiet: bool) -> "Settings":
    if verbose and quiet:
        fail("--verbose and --quiet exclude each other.", code=EXIT_USAGE)
    log_to_stderr(verbose=verbose, quiet=quiet)
    # What is imported stays: looking for garbage among it takes a fifth of the time.
    gc.disable()
    try:
        environment = settings()
        with sentences():
            import tutormax_assets.aggregation  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
    return environment


def _tutor_ids(lists: list[str] | None, ids: list[str] | None) -> list[str] | None:
    named = [[part.strip() for part in text.split(",") if part.strip()] for text in lists or ()]
    if not all(named):
        fail("--tutors names no tutor; expected ids separated by commas.", code=EXIT_USAGE)
    return [*(tutor_id for of_list in named for tutor_id in of_list), *(ids or ())] or None


def with_progress(
    environment: "Settings",
    days: Sequence[date],
    options: "RunOptions",
    *,
    source: str,
    quiet: bool = False,
) -> "list[AggregationSummary]":
    """Compute reference dates, with a progress bar where a person watches."""
    from tutormax_assets.aggregation import aggregate, steps
    from tutormax_assets.platform.connection import database_url, describe
    from tutormax_assets.resources import load_policy

    # What is wrong with the settings is said before a run is on record.
    url = database_url(environment)
    load_policy(environment)
    if environment.database_source == "embedded":
        logger.info("Database: %s (%s)", describe(url), environment.whence)
    if quiet or not messages.is_terminal:
        return aggregate(environment, days, options, source=source)
    with _progress(total=steps(environment, len(days))):
        return aggregate(environment, days, options, source=source)


@contextmanager
def _progress(*, total: int) -> Iterator[None]:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task("starting", total=total)

        class StepHandler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                event = record.__dict__.get("dagster_event")
                if event is not None and event.is_step_start:
                    progress.update(task, description=event.step_key)
                elif event is not None and event.is_step_success:
                    progress.advance(task)

        handler = StepHandler()
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


def summary_block(summary: "AggregationSummary") -> Table:
    """The summary of one reference date as a person reads it."""
    table = Table(title="Daily aggregation summary", title_justify="left", show_header=False)
    table.add_row("Run date", str(summary.run_date.date()))
    table.add_row("Total tutors", str(summary.total_tutors))
    table.add_row("Successful", str(summary.successful))
    table.add_row("Failed", str(summary.failed))
    table.add_row("Metrics saved", str(summary.total_metrics_saved))
    table.add_row("Success rate", f"{summary.success_rate}%")
    table.add_row("Values set aside", str(summary.values_set_aside))
    table.add_row("Runtime", f"{summary.total_runtime_seconds:.2f}s")
    for tutor_id, error in summary.first_errors():
        table.add_row(Text(f"Error {tutor_id}"), Text(error))
    return table


def _backfill_table(summaries: "list[AggregationSummary]") -> Table:
    table = Table(title="Backfill summary", title_justify="left")
    for column in ("Run date", "Tutors", "Successful", "Failed", "Metrics saved", "Error"):
        table.add_column(column, justify="left" if column in ("Run date", "Error") else "right")
    for summary in summaries:
        table.add_row(
            str(summary.run_date.date()),
            str(summary.total_tutors),
            str(summary.successful),
            str(summary.failed),
            str(summary.total_metrics_saved),
            Text(summary.errors[0]["error"] if summary.errors else ""),
        )
    return table
