"""When the night's run is due: the schedule, and the deadline by which it must have arrived."""

from datetime import date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg

from tutormax_assets.runs.tags import RANGE_END_TAG, RANGE_START_TAG
from tutormax_assets.settings import Settings

SCHEDULE_SUFFIX = "_at_night"
"""What the name of the schedule has after that of its job."""

SCHEDULE_HOUR = 2
"""Hour of the reference date at which it is computed: the platform's day is closed by then."""

VERIFICATION_HOUR = 5
"""Hour at which stored dates are compared with a full computation."""

DEADLINE_HOUR = 4
"""Hour by which its metrics must be in the table: retries of a bad night take less."""


def nightly_schedule(job: Any, settings: Settings) -> Any:
    """The schedule that computes each reference date in its first hours.

    Hour and timezone follow the partitions of the job; the tick of a date is for that date, and for
    as many dates before as the settings say, which one run computes again from one look at the
    platform.

    A job on a schedule, and not declarative automation: the platform's tables are external assets
    that report no updates, so a condition could wait for nothing but the clock. And a night is one
    run of one job, which alerts, the freshness policy and a re-execution refer to.

    Args:
        job: The asset job, partitioned by reference date.
        settings: How many earlier dates, and whether it runs unless it is stopped in the UI.
    """
    name = f"{job.name}{SCHEDULE_SUFFIX}"
    description = (
        f"Computes the reference date that has just begun, at {SCHEDULE_HOUR:02}:00 in the"
        " timezone of the partitions."
    )
    default_status = (
        dg.DefaultScheduleStatus.RUNNING
        if settings.automation
        else dg.DefaultScheduleStatus.STOPPED
    )
    if not settings.late_days:
        return dg.build_schedule_from_partitioned_job(
            job,
            name=name,
            hour_of_day=SCHEDULE_HOUR,
            description=description,
            default_status=default_status,
        )

    @dg.schedule(
        name=name,
        job=job,
        cron_schedule=f"0 {SCHEDULE_HOUR} * * *",
        execution_timezone=settings.timezone,
        description=f"{description} The {settings.late_days} dates before it are computed again.",
        default_status=default_status,
    )
    def with_late_days(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        last = context.scheduled_execution_time.astimezone(ZoneInfo(settings.timezone)).date()
        first = max(last - timedelta(days=settings.late_days), settings.first_date)
        return dg.RunRequest(
            run_key=str(last), tags={RANGE_START_TAG: str(first), RANGE_END_TAG: str(last)}
        )

    return with_late_days


def weekly_schedules(verification: Any, settings: Settings) -> list[dg.ScheduleDefinition]:
    """The schedule that compares stored dates with a full computation; none if it is never due.

    Args:
        verification: The job.
        settings: The day of the week, and whether it runs unless it is stopped in the UI.
    """
    if settings.verify_weekday == "never":
        return []
    schedule = dg.ScheduleDefinition(
        name=f"{verification.name}_every_week",
        job=verification,
        cron_schedule=f"0 {VERIFICATION_HOUR} * * {settings.verify_weekday[:3]}",
        execution_timezone=settings.timezone,
        description="Compares the last dates with a full computation and writes nothing.",
        default_status=(
            dg.DefaultScheduleStatus.RUNNING
            if settings.automation
            else dg.DefaultScheduleStatus.STOPPED
        ),
    )
    return [schedule]


def nightly_freshness(*, timezone: str) -> dg.FreshnessPolicy:
    """What makes a missed night show in the UI: a materialization since midnight by the deadline.

    Dagster looks at the newest materialization of any partition, so a backfill of old dates hides
    a missed night here. The sensor for late nights looks at the date itself.
    """
    return dg.FreshnessPolicy.cron(
        deadline_cron=f"0 {DEADLINE_HOUR} * * *",
        lower_bound_delta=timedelta(hours=DEADLINE_HOUR),
        timezone=timezone,
    )


def newest_due_date(now: datetime, *, timezone: str) -> date:
    """The newest reference date whose deadline has passed."""
    local = now.astimezone(ZoneInfo(timezone))
    is_due = local.time() >= time(DEADLINE_HOUR)
    return local.date() if is_due else local.date() - timedelta(days=1)


def next_tick(now: datetime, *, timezone: str) -> datetime:
    """When the schedule is due next."""
    local = now.astimezone(ZoneInfo(timezone))
    today = datetime.combine(local.date(), time(SCHEDULE_HOUR), ZoneInfo(timezone))
    return today if local < today else today + timedelta(days=1)
