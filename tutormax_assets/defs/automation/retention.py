"""What is too old goes: metrics from the table to the archive, Parquet and old runs for good.

Dagster goes on showing the partitions as materialized, since they were; an observation of each
says what became of its rows or its file.
"""

from collections.abc import Sequence

import dagster as dg
from pydantic import Field

from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.dates import today
from tutormax_assets.defs.assets import PLATFORM_POOL
from tutormax_assets.runs.partitions import partitions_before
from tutormax_assets.runs.retention import (
    MAX_DATES_PER_RUN,
    Retention,
    log_rest,
    observation_of_date,
    observation_of_partition,
)
from tutormax_assets.settings import Settings
from tutormax_assets.source.platform import PlatformDatabase

JOB_NAME = "retention"

_CHECK_EVERY_SECONDS = 900


class RetentionOptions(dg.Config):
    """Options of one run of the job."""

    max_dates: int = Field(
        default=MAX_DATES_PER_RUN,
        ge=1,
        description="Dates to deal with, the oldest first; what is left is for the next run.",
    )


def retention_job(settings: Settings, parquet_assets: Sequence[dg.AssetKey]) -> dg.JobDefinition:
    """Build the job ``retention``."""

    @dg.op(
        description="Moves metrics older than their retention to the archive.", pool=PLATFORM_POOL
    )
    def archive_metrics(
        context: dg.OpExecutionContext,
        config: RetentionOptions,
        database: dg.ResourceParam[PlatformDatabase],
    ) -> None:
        retention = Retention.as_of_today(settings, parquet_assets)
        due = retention.due_dates(database.engine, context.instance)
        due.log(context.log)
        now = due.stored[: config.max_dates]
        refused = []
        for archived in retention.archive_dates(database.engine, now, log=context.log):
            context.log_event(observation_of_date(archived))
            if archived.refusal is not None:
                refused.append(str(archived.day))
        log_rest(context.log, len(due.stored) - len(now))
        if refused:
            raise MetricsTableError(
                f"Metrics of {', '.join(refused)} stay in the table, since they could not be"
                " restored. The log says what keeps them out."
            )

    @dg.op(description="Deletes Parquet partitions older than their retention.", pool=PLATFORM_POOL)
    def delete_parquet(
        context: dg.OpExecutionContext,
        config: RetentionOptions,
        database: dg.ResourceParam[PlatformDatabase],
    ) -> None:
        retention = Retention.as_of_today(settings, parquet_assets)
        due = retention.due_partitions(context.instance)
        dates = list(dict.fromkeys(partition.partition_key for partition in due))
        days = set(dates[: config.max_dates])
        now = [partition for partition in due if partition.partition_key in days]
        for partition in retention.delete_partitions(database.engine, now, log=context.log):
            context.log_event(observation_of_partition(partition))
        log_rest(context.log, len(dates) - len(days))

    @dg.op(description="Deletes runs older than their retention from Dagster's record.")
    def delete_runs(context: dg.OpExecutionContext) -> None:
        Retention.as_of_today(settings, parquet_assets).delete_runs(
            context.instance, log=context.log
        )

    # None waits for another: an archive that is out of reach does not let the disk fill up.
    @dg.job(name=JOB_NAME, description=_description(settings))
    def retention() -> None:
        archive_metrics()
        delete_parquet()
        if settings.run_retention_days is not None:
            delete_runs()

    return retention


def _description(settings: Settings) -> str:
    runs = settings.run_retention_days
    return (
        f"Move metrics older than {settings.retention_days} days to the archive, and delete"
        f" Parquet partitions older than {settings.snapshot_retention_days} days"
        + ("." if runs is None else f" and runs older than {runs} days.")
    )


def retention_sensor(
    settings: Settings, parquet_assets: Sequence[dg.AssetKey], *, running: bool
) -> dg.SensorDefinition:
    """Build the sensor that launches the job once a day, when something is too old.

    Args:
        settings: What is too old.
        parquet_assets: The assets whose partitions are Parquet.
        running: Whether it runs until someone stops it in the UI, or is stopped until someone
            starts it.
    """

    @dg.sensor(
        name="retention_when_due",
        # By name, because Dagster copies a sensor that holds a job and warns of a beta in doing so.
        job_name=JOB_NAME,
        description="Launches the job once a day, when something is older than its retention.",
        minimum_interval_seconds=_CHECK_EVERY_SECONDS,
        default_status=(
            dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED
        ),
    )
    def retention_when_due(
        context: dg.SensorEvaluationContext, database: dg.ResourceParam[PlatformDatabase]
    ) -> dg.RunRequest | dg.SkipReason:
        day = today(timezone=settings.timezone).isoformat()
        # So that the rest of the day's ticks need not look.
        if context.cursor == day:
            return dg.SkipReason(f"It was launched for {day} already.")
        retention = Retention.as_of_today(settings, parquet_assets)
        try:
            is_due = retention.is_due(database.engine)
        except MetricsTableError as error:
            return dg.SkipReason(str(error))
        is_due = is_due or bool(
            partitions_before(
                retention.storage_path, retention.parquet_assets, retention.partitions_from
            )
        )
        runs_from = retention.runs_from
        if not is_due and (runs_from is None or not retention.has_due_runs(context.instance)):
            return dg.SkipReason(
                f"There are no metrics before {retention.metrics_from} and no Parquet partitions"
                f" before {retention.partitions_from}"
                + ("." if runs_from is None else f", and no runs before {runs_from.date()}.")
            )
        context.update_cursor(day)
        return dg.RunRequest(run_key=f"{JOB_NAME}:{day}")

    return retention_when_due
