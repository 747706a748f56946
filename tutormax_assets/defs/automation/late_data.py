"""The sensor that refreshes today's metrics when late data arrives."""

import dagster as dg

from tutormax_assets.dates import today
from tutormax_assets.defs.refresh import Refresh, plan_refresh
from tutormax_assets.runs.tags import partition_keys
from tutormax_assets.settings import Settings
from tutormax_assets.source.streams import SourceError
from tutormax_assets.storage.files import StorageError

SENSOR_NAME = "late_data"

_UNDER_WAY = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def late_data_sensor(settings: Settings, job_name: str) -> dg.SensorDefinition:
    """Build the sensor that refreshes today's reference date for the tutors who have changed.

    Changes made during a run are found by the first tick after it.

    Args:
        settings: How often it looks, and whether it runs unless it is stopped.
        job_name: The job that computes a date.
    """

    @dg.sensor(
        name=SENSOR_NAME,
        job_name=job_name,
        description=(
            "Refreshes today's reference date for the tutors whose rows have changed in the"
            " platform since."
        ),
        minimum_interval_seconds=60 * settings.late_data_minutes,
        default_status=(
            dg.DefaultSensorStatus.RUNNING if settings.late_data else dg.DefaultSensorStatus.STOPPED
        ),
    )
    def late_data(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        day = today(timezone=settings.timezone)
        if run := _run_under_way(context.instance, str(day)):
            return dg.SkipReason(f"Run {run.run_id[:8]} of {day} is under way.")
        try:
            refresh = plan_refresh(settings, context.instance, day, include_inactive=False)
        except (SourceError, StorageError) as error:
            return dg.SkipReason(str(error))
        return _request(refresh, str(day))

    return late_data


def _request(refresh: Refresh, key: str) -> dg.RunRequest | dg.SkipReason:
    if refresh.tutor_ids is None:
        if not refresh.why:
            return dg.SkipReason(f"{key} is not stored yet; the night's run computes it.")
        # At most one full run per date: some sources never support finding changes.
        run_key = None if refresh.is_known else f"{SENSOR_NAME}:{key}:all tutors"
        return dg.RunRequest(run_key=run_key, partition_key=key)
    if not refresh.tutor_ids:
        return dg.SkipReason(f"Nothing of {key} has changed since {refresh.why}.")
    options = {"tutor_ids": list(refresh.tutor_ids), "read_state": refresh.read_state}
    return dg.RunRequest(
        partition_key=key,
        run_config={"resources": {"run_options": {"config": options}}},
    )


def _run_under_way(instance: dg.DagsterInstance, key: str) -> dg.DagsterRun | None:
    runs = instance.get_runs(dg.RunsFilter(statuses=_UNDER_WAY))
    return next((run for run in runs if key in partition_keys(run)), None)
