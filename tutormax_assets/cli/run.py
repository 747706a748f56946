"""``tutormax run`` and ``tutormax backfill``: compute reference dates and keep them."""

import gc
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tutormax_assets.cli.arguments import AsJson, command_again, dates_in_words, reference_date
from tutormax_assets.cli.as_of import AsOf, expect_no_other_options, run_as_of
from tutormax_assets.cli.retention import cleanup_block
from tutormax_assets.cli.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Failed,
    fail,
    log_to_stderr,
    messages,
    sentences,
    settings,
    show,
    table,
)

logger = logging.getLogger("tutormax_assets")

if TYPE_CHECKING:
    from tutormax_assets.api.summary import AggregationSummary
    from tutormax_assets.defs.resources import RunOptions
    from tutormax_assets.runs.retention import CleanupReport
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
Full = Annotated[
    bool,
    typer.Option(
        "--full", help="Read all tutors of a stored date, not only those that have changed."
    ),
]
Cleanup = Annotated[bool, typer.Option("--cleanup", help="Do `tutormax cleanup` afterwards.")]
RetentionDays = Annotated[
    int | None,
    typer.Option(
        "--retention-days", min=1, max=36_500, help="Age in days up to which --cleanup keeps."
    ),
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
_SHOWN_REASONS = 20

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Dagster does as well.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]


def run(
    context: typer.Context,
    day: Annotated[
        str | None,
        typer.Option("--date", help="Reference date, YYYY-MM-DD; today when left out."),
    ] = None,
    tutors: Tutors = None,
    tutor: Tutor = None,
    include_inactive: IncludeInactive = False,
    full: Full = False,
    as_of: AsOf = None,
    cleanup: Cleanup = False,
    retention_days: RetentionDays = None,
    batch_size: BatchSize = 1_000,
    max_retries: MaxRetries = 3,
    retry_delay: RetryDelay = 5,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compute the metrics of one reference date and keep them.

    A run of a stored date reads only the tutors whose rows have changed in the platform.

    Exit code: 0 all saved, 1 something failed, 2 wrong use.
    """
    if retention_days is not None and not cleanup:
        fail(
            "--retention-days is the age up to which --cleanup keeps metrics; add --cleanup, or"
            " leave it out.",
            code=EXIT_USAGE,
        )
    if full and (tutors or tutor):
        fail("--full reads all tutors; leave it out, or --tutors and --tutor.", code=EXIT_USAGE)
    if as_of is not None:
        expect_no_other_options(full=full, cleanup=cleanup, include_inactive=include_inactive)
    environment = _prepare(verbose=verbose, quiet=quiet)
    date_of_run = reference_date("--date", day, environment)
    if as_of is not None:
        run_as_of(
            environment,
            [date_of_run],
            _run_options(context),
            as_of=as_of,
            source="tutormax run",
            quiet=quiet,
            as_json=as_json,
        )
        return
    with sentences():
        [summary] = with_progress(
            environment,
            [date_of_run],
            _run_options(context),
            source="tutormax run",
            quiet=quiet,
            again=lambda days: command_again(context, day=str(days[0])),
            changed_only=not full,
        )
    is_shown = not as_json and not quiet
    if is_shown:
        show(_unchanged(summary) if summary.is_unchanged else summary_block(summary))
    report = summary.to_dict()
    cleaned = None
    if cleanup:
        cleaned = _clean_up(environment, summary, retention_days)
        report["cleanup"] = cleaned.to_dict() if cleaned else None
        if cleaned and is_shown:
            show(cleanup_block(cleaned))
    if as_json:
        typer.echo(json.dumps(report))
    if not summary.all_saved or (cleaned is not None and cleaned.refusals):
        raise typer.Exit(EXIT_FAILED)


def _unchanged(summary: "AggregationSummary") -> str:
    day = summary.run_date.date()
    return f"{day} is up to date: nothing has changed in the platform since it was read."


def _clean_up(
    environment: "Settings", summary: "AggregationSummary", retention_days: int | None
) -> "CleanupReport | None":
    if not summary.successful and not summary.is_unchanged:
        logger.warning("Nothing was cleaned up, because nothing was saved.")
        return None
    try:
        with sentences():
            from tutormax_assets.api import retention

            return retention.cleanup(environment, retention_days=retention_days)
    except Failed as error:
        error.report |= summary.to_dict()
        raise


def backfill(
    context: typer.Context,
    first: Annotated[str, typer.Option("--from", help="First reference date, YYYY-MM-DD.")],
    last: Annotated[
        str | None, typer.Option("--to", help="Last reference date; today when left out.")
    ] = None,
    tutors: Tutors = None,
    tutor: Tutor = None,
    include_inactive: IncludeInactive = False,
    as_of: AsOf = None,
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
    if as_of is not None:
        expect_no_other_options(include_inactive=include_inactive)
    environment = _prepare(verbose=verbose, quiet=quiet)
    start = reference_date("--from", first, environment)
    end = reference_date("--to", last, environment)
    if end < start:
        fail(f"--to {end} lies before --from {start}.", code=EXIT_USAGE)
    days = [start + timedelta(days=n) for n in range((end - start).days + 1)]
    if as_of is not None:
        run_as_of(
            environment,
            days,
            _run_options(context),
            as_of=as_of,
            source="tutormax backfill",
            quiet=quiet,
            as_json=as_json,
        )
        return
    with sentences():
        summaries = with_progress(
            environment,
            days,
            _run_options(context),
            source="tutormax backfill",
            quiet=quiet,
            again=lambda days: command_again(context, first=str(days[0]), last=str(days[-1])),
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
        show(_backfill_table(summaries))
        for line in _reasons(summaries):
            show(line)
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
            import tutormax_assets.api.runs  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
    return environment


def _run_options(context: typer.Context) -> "RunOptions":
    """The options of a run, from the parameters that `run` and `backfill` have in common."""
    from tutormax_assets.defs.resources import parse_options

    given = context.params
    return parse_options(
        tutor_ids=_tutor_ids(given["tutors"], given["tutor"]),
        include_inactive=given["include_inactive"],
        batch_size=given["batch_size"],
        max_retries=given["max_retries"],
        retry_delay_seconds=given["retry_delay"],
    )


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
    again: Callable[[Sequence[date]], str] | None = None,
    changed_only: bool = False,
) -> "list[AggregationSummary]":
    """Compute reference dates, with a progress bar where a person watches.

    Args:
        environment: The settings.
        days: The dates.
        options: Options of the run.
        source: What started the runs, for their tags.
        quiet: Whether there is no bar.
        again: The command that computes some of the dates, for who interrupts this one.
        changed_only: As ``aggregate`` takes it.
    """
    from tutormax_assets.api.runs import aggregate, steps
    from tutormax_assets.database.connection import database_url, describe
    from tutormax_assets.defs.resources import load_policy

    # What is wrong with the settings is said before a run is on record.
    url = database_url(environment)
    load_policy(environment)
    if environment.database_source == "embedded":
        logger.info("Database: %s (%s)", describe(url), environment.whence)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.fields[saved]} of {task.fields[dates]} dates saved, time left"),
        TimeRemainingColumn(),
    )
    is_shown = messages.is_terminal and not quiet
    total = steps(environment, len(days)) if is_shown else None
    with Progress(*columns, console=messages, transient=True, disable=not is_shown) as bar:
        watch = _Watch(bar, total=total, dates=len(days))
        logger.addHandler(watch)
        try:
            return aggregate(environment, days, options, source=source, changed_only=changed_only)
        except KeyboardInterrupt:
            _fail_interrupted(days, watch.saved, again)
        finally:
            logger.removeHandler(watch)


class _Watch(logging.Handler):
    """Notes in the log of a run which dates are saved, and moves a progress bar."""

    def __init__(self, bar: Progress, *, total: int | None, dates: int) -> None:
        super().__init__()
        self.saved: set[date] = set()
        self._bar = bar
        self._task = bar.add_task("starting", total=total, saved=0, dates=dates)

    def emit(self, record: logging.LogRecord) -> None:
        from tutormax_assets.database.tables import METRICS_TABLE

        event = record.__dict__.get("dagster_event")
        if event is None:
            return
        if event.is_step_start:
            self._bar.update(self._task, description=event.step_key)
        elif event.is_step_success:
            self._bar.advance(self._task)
        elif event.is_step_materialization and event.asset_key.path[-1] == METRICS_TABLE:
            self.saved.add(date.fromisoformat(event.partition))
            self._bar.update(self._task, saved=len(self.saved))


def _fail_interrupted(
    days: Sequence[date], saved: set[date], again: Callable[[Sequence[date]], str] | None
) -> NoReturn:
    left = [day for day in days if day not in saved]
    command = again(left) if again is not None and left else None
    fail(
        f"It was interrupted. Saved: {dates_in_words(saved) or 'no date'}."
        f" Not saved: {dates_in_words(left) or 'no date'}."
        + (f" Continue with: {command}" if command else ""),
        code=EXIT_INTERRUPTED,
        saved_dates=sorted(map(str, saved)),
        unsaved_dates=[str(day) for day in left],
        command=command,
    )


def summary_block(summary: "AggregationSummary") -> Table:
    """The summary of one reference date as a person reads it."""
    block = table("Daily aggregation summary", unnamed=2)
    block.add_row("Run date", str(summary.run_date.date()))
    block.add_row("Read", summary.read)
    block.add_row("Total tutors", str(summary.total_tutors))
    block.add_row("Successful", str(summary.successful))
    block.add_row("Failed", str(summary.failed))
    block.add_row("Metrics saved", str(summary.total_metrics_saved))
    block.add_row("Success rate", f"{summary.success_rate}%")
    block.add_row("Values set aside", str(summary.values_set_aside))
    block.add_row("Runtime", f"{summary.total_runtime_seconds:.2f}s")
    for warning in summary.warnings:
        block.add_row("Warning", warning)
    for tutor_id, error in summary.first_errors():
        block.add_row(f"Error {tutor_id}", error)
    return block


def _backfill_table(summaries: "list[AggregationSummary]") -> Table:
    numbers = ("Tutors", "Successful", "Failed", "Metrics saved", "Warnings")
    block = table("Backfill summary", "Run date", *numbers, right=numbers)
    for summary in summaries:
        block.add_row(
            str(summary.run_date.date()),
            str(summary.total_tutors),
            str(summary.successful),
            str(summary.failed),
            str(summary.total_metrics_saved),
            str(len(summary.warnings)),
        )
    return block


def _reasons(summaries: "list[AggregationSummary]") -> Iterator[str]:
    """Why dates failed: each reason once, with the dates and the number of tutors."""
    found: dict[str, tuple[set[date], Counter[bool]]] = {}
    from tutormax_assets.api.summary import SYSTEM

    for summary in summaries:
        day = summary.run_date.date()
        for error in summary.errors:
            # The same check says the same of several dates, but for the date.
            reason = error["error"].replace(str(day), "the date")
            days, tutors = found.setdefault(reason, (set(), Counter()))
            days.add(day)
            tutors[error["tutor_id"] != SYSTEM] += 1
    for reason, (days, tutors) in list(found.items())[:_SHOWN_REASONS]:
        of = f", {tutors[True]} tutors" if tutors[True] else ""
        yield f"Failed: {dates_in_words(days)}{of}: {reason}"
    if len(found) > _SHOWN_REASONS:
        yield f"{len(found) - _SHOWN_REASONS} more reasons are in the log and in --json."
