"""The Python API over the job: run a reference date and get its summary.

Names, arguments and defaults are those of the service that this project replaces.
"""

import asyncio
import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import partial
from time import perf_counter
from typing import Any

import dagster as dg
import polars as pl
import sqlalchemy as sa

from tutormax_assets.assets import PLATFORM_POOL
from tutormax_assets.assets.metrics_table import SUMMARY_METADATA
from tutormax_assets.assets.snapshots import SET_ASIDE_BY_RUN_METADATA, SET_ASIDE_METADATA
from tutormax_assets.automation.alerts import tell_of_runs
from tutormax_assets.automation.retention import (
    CleanupReport,
    Retention,
    clean_up,
    observation_of_restored_date,
)
from tutormax_assets.automation.single_days import (
    ATTENDED_TAG,
    RANGE_END_TAG,
    RANGE_START_TAG,
    SOURCE_TAG,
)
from tutormax_assets.checks import is_blocked_by, sentence
from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.event_log import event_log_kept_open
from tutormax_assets.failures import (
    error_sentence,
    is_blocking_check,
    is_interrupted,
    is_of_every_date,
    step_failure,
)
from tutormax_assets.instance import (
    dagster_home,
    dagster_instance,
    make_pool,
    runs_of_code_location,
)
from tutormax_assets.killed_runs import PROCESS_TAG, end_killed_runs, this_process
from tutormax_assets.log import LOGGER
from tutormax_assets.partitions import checked_reference_date, midnight, today
from tutormax_assets.parts import scan_partition
from tutormax_assets.platform.archive import (
    RestoredDate,
    archived_dates,
    keep_month,
    restore_date,
)
from tutormax_assets.platform.connection import Timeouts, create_engine, database_url
from tutormax_assets.platform.snapshot import SourceError
from tutormax_assets.platform.sources import UnknownTutorsError, source_of, unknown_tutors
from tutormax_assets.platform.tables import METRICS_TABLE, tutor_performance_metrics
from tutormax_assets.resources import RunOptions, checked_options
from tutormax_assets.settings import Settings, checked_retention_days, load_settings
from tutormax_assets.storage import partition_path

MOST_ERRORS_SHOWN = 100
"""Errors of a date that are logged and printed one by one."""

_UNKNOWN_TUTOR = "The tutor is not in the platform's tutors. Check the id."

SYSTEM = "SYSTEM"
"""Stands in place of a tutor's id in the error of a run that failed as a whole."""

logger = logging.getLogger(LOGGER)

# Dagster configures Python's logging anew for each run, and two threads that do so at once can
# wait for each other for ever. Processes need no such lock.
_one_run_of_this_process = threading.Lock()


@dataclass
class AggregationResult:
    """What became of one tutor.

    Attributes:
        tutor_id: The tutor.
        success: Whether all windows are in the table.
        metrics_saved: Ids of the tutor's rows for the date.
        error: Why the tutor was not saved.
        windows_processed: The windows of those rows, such as ``30day``.
    """

    tutor_id: str
    success: bool
    metrics_saved: list[str] = field(default_factory=list)
    error: str | None = None
    windows_processed: list[str] = field(default_factory=list)


@dataclass
class AggregationSummary:
    """What became of a reference date.

    Attributes:
        run_date: The instant that the reference date stands for.
        total_tutors: Tutors that the run was about.
        successful: Tutors that are in the table with all windows.
        failed: Tutors that are not.
        total_metrics_saved: Rows of those tutors that the table holds now.
        total_runtime_seconds: Seconds from the start of the run to its end.
        errors: ``tutor_id`` and ``error`` of each failure; the id is ``SYSTEM`` where the run
            failed as a whole.
        results: One result per tutor.
        warnings: What the checks say that warned of the date.
        set_aside: ``source_table``, ``column``, ``reason`` and number of the ``values`` that break
            the source contract and were not used.
    """

    run_date: datetime
    total_tutors: int = 0
    successful: int = 0
    failed: int = 0
    total_metrics_saved: int = 0
    total_runtime_seconds: float = 0.0
    errors: list[dict[str, str]] = field(default_factory=list)
    results: list[AggregationResult] = field(default_factory=list)
    set_aside: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def success_rate(self) -> float:
        """Successful tutors in percent of all, to two decimals; 0 when there are none."""
        if self.total_tutors == 0:
            return 0.0
        return round(100 * self.successful / self.total_tutors, 2)

    @property
    def values_set_aside(self) -> int:
        """Number of values that were not used."""
        return sum(reason["values"] for reason in self.set_aside)

    @property
    def all_saved(self) -> bool:
        """Whether nothing failed."""
        return not self.errors

    def first_errors(self) -> Iterator[tuple[str, str]]:
        """Whom or what the first errors are of, and what they say; how many more there are."""
        for error in self.errors[:MOST_ERRORS_SHOWN]:
            yield error["tutor_id"], error["error"]
        more = len(self.errors) - MOST_ERRORS_SHOWN
        if more > 0:
            yield f"and {more} more", "the run in the Dagster UI shows all of them, as does --json"

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON can hold it, without the results by tutor."""
        return {
            "run_date": self.run_date.isoformat(),
            "total_tutors": self.total_tutors,
            "successful": self.successful,
            "failed": self.failed,
            "total_metrics_saved": self.total_metrics_saved,
            "total_runtime_seconds": round(self.total_runtime_seconds, 2),
            "success_rate": self.success_rate,
            "errors": self.errors,
            "warnings": self.warnings,
            "set_aside": self.set_aside,
        }

    def __str__(self) -> str:
        """The summary in one line, as the log shows it."""
        return (
            f"Run date {self.run_date.date()}: {self.total_tutors} tutors, "
            f"{self.successful} successful, {self.failed} failed, "
            f"{self.total_metrics_saved} metrics saved, success rate {self.success_rate}%, "
            f"{self.values_set_aside} values set aside, "
            f"runtime {self.total_runtime_seconds:.2f}s"
        )


class DailyMetricsAggregator:
    """Computes and keeps the metrics of one reference date."""

    def __init__(
        self,
        reference_date: date | str | None = None,
        max_retries: int = 3,
        retry_delay_seconds: float = 5,
        batch_size: int = RunOptions.model_fields["batch_size"].default,
    ) -> None:
        """Say which date, and how it is written.

        Args:
            reference_date: A date, also as YYYY-MM-DD, or a datetime whose date counts; today when
                left out.
            max_retries: How often reading or writing is tried again if that may help.
            retry_delay_seconds: Seconds before the first retry; doubles with each further one.
            batch_size: Tutors that are written in one transaction.

        Raises:
            ReferenceDateError: It is no date, or lies in the future or before the first partition.
            OptionsError: Another argument is unusable.
        """
        self.settings = load_settings()
        self.reference_date = checked_reference_date(
            today(timezone=self.settings.timezone) if reference_date is None else reference_date,
            first=self.settings.first_date,
            timezone=self.settings.timezone,
        )
        self.max_retries = max_retries
        self.retry_delay_seconds = retry_delay_seconds
        self.batch_size = batch_size
        self._options()

    async def run(
        self, tutor_ids: Sequence[str] | None = None, include_inactive: bool = False
    ) -> AggregationSummary:
        """Compute the date for the active tutors, or for the given ones.

        Args:
            tutor_ids: Only these tutors, at least one; the others' rows stay as they are.
            include_inactive: Tutors of any status.

        Returns:
            The summary, with one result per tutor. A failure is in its errors and is not raised.

        Raises:
            OptionsError: An argument is unusable.
            UnknownTutorsError: None of the tutors is in the platform's tutors.
        """
        options = self._options(tutor_ids, include_inactive)
        return await asyncio.to_thread(self._run, options)

    async def cleanup_old_metrics(self, session: object = None, retention_days: int = 90) -> int:
        """Move the metrics of dates older than so many days before today to the archive.

        Parquet partitions that are older than the settings allow are deleted, too.

        Args:
            session: Not used; callers of the replaced service pass their database session.
            retention_days: Age in days up to which metrics stay in the table.

        Returns:
            Number of rows that left the table.

        Raises:
            OptionsError: ``retention_days`` is not from 1 to 36,500.
            ArchiveError: The archive cannot be written, or not read back; its rows are in the
                table.
        """
        report = await asyncio.to_thread(cleanup, self.settings, retention_days=retention_days)
        return report.rows

    def _options(
        self, tutor_ids: Sequence[str] | None = None, include_inactive: bool = False
    ) -> RunOptions:
        return checked_options(
            tutor_ids=tutor_ids,
            include_inactive=include_inactive,
            batch_size=self.batch_size,
            max_retries=self.max_retries,
            retry_delay_seconds=self.retry_delay_seconds,
        )

    def _run(self, options: RunOptions) -> AggregationSummary:
        [summary] = aggregate(self.settings, [self.reference_date], options)
        if summary.total_tutors:
            summary.results = _results(self.settings, summary, options)
        return summary


async def run_daily_aggregation(
    reference_date: date | str | None = None,
    tutor_ids: Sequence[str] | None = None,
    include_inactive: bool = False,
    cleanup_old_metrics: bool = False,
    retention_days: int = 90,
) -> AggregationSummary:
    """Compute a date, and archive old metrics afterwards if asked to and anything was saved.

    Args:
        reference_date: A date, also as YYYY-MM-DD, or a datetime whose date counts; today when left
            out.
        tutor_ids: Only these tutors, at least one; the others' rows stay as they are.
        include_inactive: Tutors of any status.
        cleanup_old_metrics: Whether to move old metrics to the archive afterwards.
        retention_days: Age in days up to which metrics stay in the table.

    Returns:
        The summary, with one result per tutor.

    Raises:
        ReferenceDateError: It is no date, or lies in the future or before the first partition.
        OptionsError: Another argument is unusable.
        UnknownTutorsError: None of the tutors is in the platform's tutors.
        ArchiveError: The date is saved, but the archive cannot be written or not read back.
    """
    checked_retention_days(retention_days)
    aggregator = DailyMetricsAggregator(reference_date=reference_date)
    summary = await aggregator.run(tutor_ids=tutor_ids, include_inactive=include_inactive)
    if cleanup_old_metrics and summary.successful:
        await aggregator.cleanup_old_metrics(retention_days=retention_days)
    return summary


def steps(settings: Settings, dates: int) -> int:
    """Number of steps in which so many consecutive reference dates are computed."""
    job = build_definitions(settings).resolve_job_def(JOB_NAME)
    return len(job.nodes) * -(-dates // (settings.max_dates_per_run or dates))


def aggregate(
    settings: Settings, days: Sequence[date], options: RunOptions, *, source: str = "Python API"
) -> list[AggregationSummary]:
    """Run the job for consecutive reference dates, many in one run, and log each summary.

    When a run of several dates fails, each of them is run by itself, so that one date that cannot
    be computed does not lose the others; unless it failed for a reason that has nothing to do with
    the dates, such as a database that is down.

    The runs that count are told of in one alert, if anything went wrong in any of them. So are
    earlier ones whose process was killed before it could tell.

    Args:
        settings: Where everything is.
        days: Consecutive reference dates, ascending.
        options: Options of the run. Tutors who are not in the platform's tutors are left out of it
            and named in the errors of each summary.
        source: What started the runs, for their tags.

    Returns:
        One summary per date.

    Raises:
        UnknownTutorsError: None of the tutors is known; no run is on record.
        KeyboardInterrupt: Someone stopped the process; what ran until then is on record.
    """
    options, unknown = _known_only(settings, options)
    job = build_definitions(settings).resolve_job_def(JOB_NAME)
    summaries = []
    run_ids = []
    home = dagster_home(settings)
    with (
        dagster_instance(settings) as instance,
        event_log_kept_open(instance),
        runs_of_code_location(instance, code_location=settings.code_location, job_name=JOB_NAME),
        this_process(home) as process,
    ):
        make_pool(instance, PLATFORM_POOL)
        tell_of_runs(instance, end_killed_runs(instance, home, logger), settings, logger)
        # Its failure is dealt with here, so that neither the sensors nor the daemon need to.
        tags = {ATTENDED_TAG: "true", SOURCE_TAG: source, PROCESS_TAG: process}
        run = partial(_run_job, job, instance, settings, options=options, tags=tags)
        try:
            for chunk in _chunks(days, settings.max_dates_per_run or len(days)):
                result, done = run(chunk)
                of_chunk = [result.run_id]
                if (
                    len(chunk) > 1
                    and any(_failed_as_a_whole(summary) for summary in done)
                    and not is_of_every_date(result.all_events)
                ):
                    logger.warning(
                        "The run of %s to %s failed; running each date by itself",
                        chunk[0],
                        chunk[-1],
                    )
                    of_days = [run([day]) for day in chunk]
                    of_chunk = [result.run_id for result, _ in of_days]
                    done = [summary for _, [summary] in of_days]
                summaries += done
                run_ids += of_chunk
        finally:
            tell_of_runs(instance, run_ids, settings, logger)
    for summary in summaries:
        summary.total_tutors += len(unknown)
        summary.failed += len(unknown)
        summary.errors += [{"tutor_id": one, "error": _UNKNOWN_TUTOR} for one in unknown]
        logger.info("%s", summary)
        for tutor_id, error in summary.first_errors():
            logger.error("%s: %s", tutor_id, error)
    return summaries


def _known_only(settings: Settings, options: RunOptions) -> tuple[RunOptions, list[str]]:
    """The options without tutors who are not in the platform's tutors, and those tutors."""
    if options.tutor_ids is None:
        return options, []
    try:
        unknown = unknown_tutors(source_of(settings), options.tutor_ids)
    except SourceError:
        # The run meets it too: it tries again, and puts it on record.
        return options, []
    known = [one for one in dict.fromkeys(options.tutor_ids) if one not in set(unknown)]
    if not known:
        shown = ", ".join(map(repr, unknown[:MOST_ERRORS_SHOWN]))
        more = len(unknown) - MOST_ERRORS_SHOWN
        raise UnknownTutorsError(
            f"None of the tutors is in the platform's tutors: {shown}"
            f"{f' and {more} more' if more > 0 else ''}. Check the ids; on the command line,"
            " --tutor takes an id with a comma or outer spaces as it is."
        )
    return RunOptions(**{**options.model_dump(), "tutor_ids": known}), unknown


def cleanup(
    settings: Settings,
    *,
    retention_days: int | None = None,
    released_months: Collection[str] = (),
    dry_run: bool = False,
) -> CleanupReport:
    """Remove what is too old: metrics into the archive, Parquet partitions for good.

    Args:
        settings: Where everything is, and how long it is kept.
        retention_days: Age in days up to which metrics stay, in place of the settings'.
        released_months: Restored months, as ``YYYY-MM``, that go like any other from now on.
        dry_run: Only look.

    Raises:
        OptionsError: ``retention_days`` is not from 1 to 36,500.
        ArchiveError: The archive cannot be written, or not read back; its rows are in the table. Or
            a released month is not restored.
        MetricsTableError: The table is missing or not as this version expects it.
        StorageError: The Parquet partitions cannot be reached.
    """
    specs = build_definitions(settings).resolve_all_asset_specs()
    retention = Retention.as_of_today(
        settings,
        sorted(spec.key for spec in specs if "parquet" in spec.kinds),
        retention_days=retention_days,
    )
    with _engine(settings) as engine, dagster_instance(settings) as instance:
        return clean_up(
            retention,
            engine,
            instance,
            log=logger,
            released_months=released_months,
            dry_run=dry_run,
        )


def restore(
    settings: Settings, month: str, *, until: date, dry_run: bool = False
) -> Iterator[RestoredDate]:
    """Bring archived metrics of a month back into the table, one date after the other.

    Args:
        settings: Where everything is.
        month: The month as ``YYYY-MM``.
        until: The first day on which a cleanup archives the month again.
        dry_run: Only look.

    Raises:
        ArchiveError: The archive does not hold the month, or a file cannot be read.
        MetricsTableError: The table is missing or refuses the rows of a date.
    """
    days = archived_dates(settings.archive_path, month)
    if not dry_run:
        # Before the rows: a cleanup on another machine must not take them at once.
        keep_month(settings.archive_path, month, until)
    timeouts = Timeouts.of(settings)
    with _engine(settings) as engine, dagster_instance(settings) as instance:
        for day in days:
            restored = restore_date(
                engine, settings.archive_path, day, timeouts=timeouts, dry_run=dry_run
            )
            if restored.rows_restored and not dry_run:
                instance.report_runless_asset_event(observation_of_restored_date(restored))
            yield restored


def end_killed_process(settings: Settings, pid: int, reason: str) -> None:
    """Put the runs of a process of this host that is gone on record as failed, and alert.

    Args:
        settings: Where everything is.
        pid: The process.
        reason: Why it is gone.
    """
    home = dagster_home(settings)
    with dagster_instance(settings) as instance:
        ended = end_killed_runs(instance, home, logger, pid=pid, reason=reason)
        tell_of_runs(instance, ended, settings, logger)


def _run_job(
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    settings: Settings,
    days: Sequence[date],
    *,
    options: RunOptions,
    tags: Mapping[str, str],
) -> tuple[dg.ExecuteInProcessResult, list[AggregationSummary]]:
    started = perf_counter()
    keys = [day.isoformat() for day in days]
    tags = {**tags, "dagster/max_retries": "0"}
    if len(keys) > 1:
        tags |= {RANGE_START_TAG: keys[0], RANGE_END_TAG: keys[-1]}
    with _one_run_of_this_process:
        result = job.execute_in_process(
            instance=instance,
            run_config={
                "resources": {"run_options": {"config": options.model_dump()}},
                "loggers": {"line": {}},
            },
            raise_on_error=False,
            partition_key=keys[0] if len(keys) == 1 else None,
            tags=tags,
        )
    if is_interrupted(result.all_events):
        # Dagster catches what Ctrl-C and SIGTERM raise, to put it on record.
        raise KeyboardInterrupt
    saved = {
        event.partition: event.step_materialization_data.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey(METRICS_TABLE)
    } | {
        # Of a date whose writing was broken off.
        event.partition: event.asset_observation_data.asset_observation.metadata
        for event in result.get_asset_observation_events()
        if event.asset_key == dg.AssetKey(METRICS_TABLE)
    }
    set_aside = _set_aside(result)
    blocked = _blocked(result)
    warnings = _warnings(result)
    error = _failure(result) or " ".join(blocked.values()) or None
    summaries = []
    for day in days:
        summary = AggregationSummary(run_date=midnight(day, timezone=settings.timezone))
        summary.total_runtime_seconds = (perf_counter() - started) / len(days)
        summary.set_aside = set_aside.get(day.isoformat(), [])
        summary.warnings = warnings.get(day.isoformat(), [])
        if day.isoformat() in saved:
            values: Any = saved[day.isoformat()][SUMMARY_METADATA].value
            for name in ("total_tutors", "successful", "failed", "total_metrics_saved", "errors"):
                setattr(summary, name, values[name])
            # What was saved may be wrong, or not known to be right.
            said = blocked.get(day.isoformat(), None if blocked else error)
        else:
            said = blocked.get(day.isoformat(), error)
        if said is not None and not summary.errors:
            summary.errors.append({"tutor_id": SYSTEM, "error": said})
        summaries.append(summary)
    return result, summaries


def _set_aside(result: dg.ExecuteInProcessResult) -> dict[str | None, list[dict[str, Any]]]:
    """What each snapshot says that it could not use, by partition key."""
    reasons: dict[str | None, list[dict[str, Any]]] = {}
    for event in result.get_asset_materialization_events():
        metadata = event.step_materialization_data.materialization.metadata
        found = metadata.get(SET_ASIDE_BY_RUN_METADATA, metadata.get(SET_ASIDE_METADATA))
        if isinstance(found, dg.TableMetadataValue):
            of_table = [dict(record.data) for record in found.records]
            reasons.setdefault(event.partition, []).extend(of_table)
    return reasons


def _blocked(result: dg.ExecuteInProcessResult) -> dict[str | None, str]:
    """What the checks say that blocked a date, by partition key."""
    said: dict[str | None, list[str]] = {}
    for evaluation in result.get_asset_check_evaluations():
        if is_blocked_by(evaluation):
            said.setdefault(evaluation.partition, []).append(sentence(evaluation))
    return {key: " ".join(sentences) for key, sentences in said.items()}


def _warnings(result: dg.ExecuteInProcessResult) -> dict[str | None, list[str]]:
    """What the checks say that warned of a date, by partition key."""
    said: dict[str | None, list[str]] = {}
    for evaluation in result.get_asset_check_evaluations():
        if not evaluation.passed and not is_blocked_by(evaluation):
            said.setdefault(evaluation.partition, []).append(sentence(evaluation))
    return said


def _failure(result: dg.ExecuteInProcessResult) -> str | None:
    if result.success:
        return None
    failures = result.get_step_failure_events()
    for event in failures:
        if not is_blocking_check(event):
            return step_failure(event)
    if failures:
        return None
    error = result.get_run_failure_event().job_failure_data.error
    return "the run failed before its first step" if error is None else error_sentence(error)


def _failed_as_a_whole(summary: AggregationSummary) -> bool:
    return any(error["tutor_id"] == SYSTEM for error in summary.errors)


def _chunks(days: Sequence[date], size: int) -> Iterator[Sequence[date]]:
    return (days[start : start + size] for start in range(0, len(days), size))


def _results(
    settings: Settings, summary: AggregationSummary, options: RunOptions
) -> list[AggregationResult]:
    roster = scan_partition(
        partition_path(
            settings.storage_path, dg.AssetKey("tutor_roster"), str(summary.run_date.date())
        )
    )
    if options.tutor_ids:
        roster = roster.filter(pl.col("tutor_id").is_in(options.tutor_ids))
    results = {
        tutor_id: AggregationResult(tutor_id, success=True)
        for tutor_id in roster.collect()["tutor_id"]
    }
    for error in summary.errors:
        result = results.setdefault(
            error["tutor_id"], AggregationResult(error["tutor_id"], success=False)
        )
        result.success, result.error = False, error["error"]
    table = tutor_performance_metrics
    rows = sa.select(table.c.tutor_id, table.c.window, table.c.metric_id).where(
        table.c.calculation_date == summary.run_date
    )
    with _engine(settings) as engine, engine.connect() as connection:
        for tutor_id, window, metric_id in connection.execute(rows):
            if tutor_id in results and results[tutor_id].success:
                results[tutor_id].metrics_saved.append(metric_id)
                results[tutor_id].windows_processed.append(window)
    return list(results.values())


@contextmanager
def _engine(settings: Settings) -> Iterator[sa.Engine]:
    engine = create_engine(database_url(settings))
    try:
        yield engine
    finally:
        engine.dispose()
