"""The Python API over the job: run a reference date and get its summary.

Names, arguments and defaults are those of the service that this project replaces.
"""

import asyncio
from collections.abc import Sequence
from datetime import date

import polars as pl
import sqlalchemy as sa

from tutormax_assets.api.retention import cleanup
from tutormax_assets.api.runs import aggregate
from tutormax_assets.api.summary import AggregationResult, AggregationSummary
from tutormax_assets.database.connection import engine_of
from tutormax_assets.database.tables import tutor_performance_metrics
from tutormax_assets.dates import parse_reference_date, today
from tutormax_assets.defs.resources import RunOptions, parse_options
from tutormax_assets.settings import Settings, check_retention_days, load_settings
from tutormax_assets.storage.partition import scan_partition
from tutormax_assets.storage.store import partition_path


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
        self.reference_date = parse_reference_date(
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
        return parse_options(
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
    check_retention_days(retention_days)
    aggregator = DailyMetricsAggregator(reference_date=reference_date)
    summary = await aggregator.run(tutor_ids=tutor_ids, include_inactive=include_inactive)
    if cleanup_old_metrics and summary.successful:
        await aggregator.cleanup_old_metrics(retention_days=retention_days)
    return summary


def _results(
    settings: Settings, summary: AggregationSummary, options: RunOptions
) -> list[AggregationResult]:
    roster = scan_partition(
        partition_path(settings.storage_path, "tutor_roster", str(summary.run_date.date()))
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
    with engine_of(settings) as engine, engine.connect() as connection:
        for tutor_id, window, metric_id in connection.execute(rows):
            if tutor_id in results and results[tutor_id].success:
                results[tutor_id].metrics_saved.append(metric_id)
                results[tutor_id].windows_processed.append(window)
    return list(results.values())
