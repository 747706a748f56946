"""The dates of a failed range run, one by one.

A range run stands or falls as a whole, so that one date which cannot be computed takes the others
with it. These sensors run each date of such a run by itself; ``tutormax backfill`` does the same
without them.
"""

from collections.abc import Sequence, Set
from typing import Any

import dagster as dg

from tutormax_assets.runs.failures import is_of_every_date
from tutormax_assets.runs.tags import (
    RANGE_DATES_TAG,
    RANGE_RUN_TAG,
    is_attended,
    partition_keys,
    will_be_retried,
)

MAX_DATES = 366
"""Dates of a range run that are run one by one: a longer one would fill the queue for a day."""

_UI_JOB = "__ASSET_JOB"


def runs_of_single_days(
    run: dg.DagsterRun,
    *,
    job_name: str,
    asset_keys: Set[dg.AssetKey],
    failures: Sequence[dg.DagsterEvent] = (),
) -> list[dg.RunRequest] | dg.SkipReason:
    """One run per date of a failed range run, or why there are none.

    Each has the range run's selection and config, and tags that lead to it. None of them is a
    range run, so their failures lead to no further runs.

    Args:
        run: The failed run.
        job_name: The job that computes a date.
        asset_keys: The assets of that job.
        failures: The events that say why it failed.
    """
    if is_attended(run):
        return dg.SkipReason("The process that ran it runs the dates one by one.")
    selected = run.asset_selection
    if run.job_name not in (job_name, _UI_JOB) or (selected and not selected <= asset_keys):
        return dg.SkipReason(f"It is no run of {job_name} or its assets.")
    if will_be_retried(run):
        return dg.SkipReason("Dagster runs it again.")
    keys = partition_keys(run)
    if len(keys) < 2:
        return dg.SkipReason("It is no run of several dates.")
    if len(keys) > MAX_DATES:
        return dg.SkipReason(
            f"It is a run of {len(keys)} dates, and at most {MAX_DATES} are run one by one;"
            " run it again in smaller ranges."
        )
    if is_of_every_date(failures):
        return dg.SkipReason("It failed for a reason that each of its dates would fail for.")
    checks = run.asset_check_selection
    return [
        dg.RunRequest(
            run_key=f"{run.run_id}:{key}",
            partition_key=key,
            run_config=run.run_config,
            asset_selection=None if selected is None else sorted(selected),
            asset_check_keys=None if checks is None else sorted(checks),
            tags={RANGE_RUN_TAG: run.run_id, RANGE_DATES_TAG: str(len(keys))},
        )
        for key in keys
    ]


def single_days_sensors(
    job: Any,
    assets: Sequence[dg.AssetsDefinition],
    *,
    running: bool,
) -> list[dg.SensorDefinition]:
    """The sensors that run the dates of a failed range run one by one.

    There are two, because Dagster shows a sensor either the runs of its own code location, or
    those of all. A run that ``dagster asset materialize`` executed belongs to no code location.

    Args:
        job: The asset job that computes a date.
        assets: Its assets.
        running: Whether they run until someone stops them in the UI.
    """
    status = dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED
    asset_keys = frozenset(key for asset in assets for key in asset.keys)

    def requests(context: dg.RunFailureSensorContext) -> list[dg.RunRequest] | dg.SkipReason:
        return runs_of_single_days(
            context.dagster_run,
            job_name=job.name,
            asset_keys=asset_keys,
            failures=[context.failure_event, *context.get_step_failure_events()],
        )

    @dg.run_failure_sensor(
        name="single_days_of_failed_ranges",
        description="Runs each date of a failed range run by itself, so that none is lost.",
        request_job=job,
        default_status=status,
        minimum_interval_seconds=10,
    )
    def of_this_location(
        context: dg.RunFailureSensorContext,
    ) -> list[dg.RunRequest] | dg.SkipReason:
        return requests(context)

    @dg.run_failure_sensor(
        name="single_days_of_failed_command_line_ranges",
        description=(
            "Runs each date of a failed `dagster asset materialize --partition-range` by itself."
        ),
        request_job=job,
        default_status=status,
        minimum_interval_seconds=10,
        monitor_all_code_locations=True,
    )
    def of_no_location(
        context: dg.RunFailureSensorContext,
    ) -> list[dg.RunRequest] | dg.SkipReason:
        if context.dagster_run.remote_job_origin is not None:
            return dg.SkipReason("It is a run of a code location.")
        return requests(context)

    return [of_this_location, of_no_location]
