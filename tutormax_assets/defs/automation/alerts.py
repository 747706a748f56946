"""Telling the people on call: of a failed run, of checks that did not pass, of a late night.

What belongs together is one message: all that failed in a run, and all dates of a range that are
run one by one. A run that ``tutormax`` executes itself is reported by that process, since it may
run where no daemon is.
"""

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta

import dagster as dg

from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.defs.automation.messages import (
    findings_of,
    message_about_late_dates,
    message_about_runs,
    message_about_single_days,
)
from tutormax_assets.defs.automation.receivers import send
from tutormax_assets.defs.automation.schedule import newest_due_date
from tutormax_assets.runs.tags import RANGE_DATES_TAG, RANGE_RUN_TAG, is_attended, will_be_retried
from tutormax_assets.settings import Settings

INTERVAL_SECONDS = 15
"""Seconds between two looks at the runs that ended; five of them are dealt with in each."""

LATE_INTERVAL_SECONDS = 300
"""Seconds between two looks at whether a date is late."""


def _now() -> datetime:
    return datetime.now(UTC)


def alert_sensors(
    settings: Settings, *, now: Callable[[], datetime] = _now
) -> list[dg.SensorDefinition]:
    """The sensors that send alerts.

    Args:
        settings: Receivers, the timezone of the reference dates, and whether the sensors run until
            someone stops them in the UI.
        now: The clock.
    """
    timezone = settings.timezone
    status = (
        dg.DefaultSensorStatus.RUNNING if settings.automation else dg.DefaultSensorStatus.STOPPED
    )

    @dg.run_failure_sensor(
        name="alert_on_failed_runs",
        description="Sends one message for a run that failed.",
        default_status=status,
        minimum_interval_seconds=INTERVAL_SECONDS,
    )
    def failed_runs(context: dg.RunFailureSensorContext) -> None:
        tell_of_ended_run(context.instance, context.dagster_run, settings, context.log)

    @dg.run_status_sensor(
        run_status=dg.DagsterRunStatus.SUCCESS,
        name="alert_on_checks",
        description="Sends one message for a run that succeeded, but for some of its checks.",
        default_status=status,
        minimum_interval_seconds=INTERVAL_SECONDS,
    )
    def checks(context: dg.RunStatusSensorContext) -> None:
        tell_of_ended_run(context.instance, context.dagster_run, settings, context.log)

    @dg.sensor(
        name="alert_on_late_nights",
        description="Sends one message when a date's metrics are not there by the deadline.",
        default_status=status,
        minimum_interval_seconds=LATE_INTERVAL_SECONDS,
    )
    def late_nights(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        due = newest_due_date(now(), timezone=timezone)
        # What was due before anyone looked is not known to be wanted.
        seen = date.fromisoformat(context.cursor) if context.cursor else due
        late = late_dates(context.instance, after=seen, up_to=due)
        # Before the message is sent: a message too few is in the log, one too many every five
        # minutes would be muted.
        context.update_cursor(due.isoformat())
        if not late:
            return dg.SkipReason(f"The metrics of {due} are there, or it was looked at before.")
        send(
            message_about_late_dates(late, timezone=timezone, ui_url=settings.ui_url),
            settings,
            context.log,
        )
        return dg.SkipReason(f"Late: {', '.join(map(str, late))}")

    return [failed_runs, checks, late_nights]


def tell_of_ended_run(
    instance: dg.DagsterInstance, run: dg.DagsterRun, settings: Settings, log: logging.Logger
) -> None:
    """Send the message that the end of a run calls for, if any.

    A run that Dagster runs again, or whose own process tells of it, calls for none. The run of a
    date of a failed range does once it is the last one of them to end.
    """
    if is_attended(run) or will_be_retried(run):
        return
    if RANGE_RUN_TAG in run.tags:
        runs = _all_runs_of_range(instance, run)
        if runs is None:
            return
        message = message_about_single_days(
            [findings_of(instance, one) for one in runs],
            range_run_id=run.tags[RANGE_RUN_TAG],
            ui_url=settings.ui_url,
        )
        send(message, settings, log)
    else:
        tell_of_runs(instance, [run.run_id], settings, log)


def tell_of_runs(
    instance: dg.DagsterInstance,
    run_ids: Sequence[str],
    settings: Settings,
    log: logging.Logger,
) -> None:
    """Send one message about runs that belong together, if anything went wrong in any of them."""
    runs = [run for run in map(instance.get_run_by_id, run_ids) if run is not None]
    message = message_about_runs(
        [findings_of(instance, run) for run in runs], ui_url=settings.ui_url
    )
    if message is not None:
        send(message, settings, log)


def late_dates(instance: dg.DagsterInstance, *, after: date, up_to: date) -> list[date]:
    """The reference dates of a period whose metrics have never been materialized."""
    days = [after + timedelta(days=n) for n in range(1, (up_to - after).days + 1)]
    return [
        day
        for day in days
        if not instance.fetch_materializations(
            dg.AssetRecordsFilter(
                asset_key=dg.AssetKey(METRICS_TABLE), asset_partitions=[day.isoformat()]
            ),
            limit=1,
        ).records
    ]


def _all_runs_of_range(
    instance: dg.DagsterInstance, run: dg.DagsterRun
) -> list[dg.DagsterRun] | None:
    """The newest run of each date, if all have ended and the given run was the last to."""
    records = instance.get_run_records(
        dg.RunsFilter(tags={RANGE_RUN_TAG: run.tags[RANGE_RUN_TAG]}), ascending=True
    )
    newest = {record.dagster_run.tags["dagster/partition"]: record for record in records}
    if len(newest) < int(run.tags[RANGE_DATES_TAG]) or not all(
        record.dagster_run.is_finished and not will_be_retried(record.dagster_run)
        for record in newest.values()
    ):
        return None
    last = max(newest.values(), key=lambda record: (record.end_time or 0, record.storage_id))
    if last.dagster_run.run_id != run.run_id:
        return None
    return [newest[key].dagster_run for key in sorted(newest)]
