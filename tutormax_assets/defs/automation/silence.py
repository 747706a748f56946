"""Schedules and sensors that fail or no longer tick, which Dagster tells nobody."""

import json
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from tutormax_assets.defs.automation.messages import message_about_silence
from tutormax_assets.defs.automation.receivers import send
from tutormax_assets.defs.automation.schedule import SCHEDULE_SUFFIX
from tutormax_assets.runs.failures import error_sentence
from tutormax_assets.settings import Settings

SENSOR_NAME = "alert_on_silence"

INTERVAL_SECONDS = 300

FAILED_TICKS = 3
"""Ticks of a sensor in a row that fail before it counts as failing; of a schedule one is enough."""

_MOST_INTERVALS = 5
_LEAST_SECONDS = 600
"""A sensor is silent after so many of its intervals, and not before so many seconds."""

_SLACK = timedelta(hours=1)


def _now() -> datetime:
    return datetime.now(UTC)


def silence_sensor(
    settings: Settings,
    periods: dict[str, timedelta | None],
    *,
    now: Callable[[], datetime] = _now,
) -> dg.SensorDefinition:
    """Build the sensor that sends one message when schedules or sensors fail or do not tick.

    It alerts when it finds the same twice in a row, since after a restart of the daemon each
    sensor is silent for a moment.

    Args:
        settings: Receivers, and whether the sensor runs unless it is stopped.
        periods: The schedules and sensors to watch, as ``find_silent`` takes them.
        now: The clock.
    """

    @dg.sensor(
        name=SENSOR_NAME,
        description="Sends one message when schedules or sensors fail or do not tick.",
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=(
            dg.DefaultSensorStatus.RUNNING
            if settings.automation
            else dg.DefaultSensorStatus.STOPPED
        ),
    )
    def alert_on_silence(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        found = dict(find_silent(context.instance, periods, now=now()))
        before: dict[str, int] = json.loads(context.cursor) if context.cursor else {}
        times = {name: before.get(name, 0) + 1 for name in found}
        context.update_cursor(json.dumps(times))
        new = [found[name] for name, count in times.items() if count == 2]
        if new:
            send(message_about_silence(new, ui_url=settings.ui_url), settings, context.log)
        return dg.SkipReason(" ".join(found.values()) or "All schedules and sensors tick.")

    return alert_on_silence


def periods_of(schedules: Collection[str], sensors: Collection[str]) -> dict[str, timedelta | None]:
    """How often schedules tick, by name; None for sensors, whose interval is on record.

    Args:
        schedules: Names of schedules, each nightly or weekly.
        sensors: Names of sensors.
    """
    night, week = timedelta(days=1), timedelta(days=7)
    return {
        **{name: night if name.endswith(SCHEDULE_SUFFIX) else week for name in schedules},
        **dict.fromkeys(sensors),
    }


def find_silent(
    instance: dg.DagsterInstance, periods: dict[str, timedelta | None], *, now: datetime
) -> Iterator[tuple[str, str]]:
    """Name and a sentence for each schedule and sensor that is on and fails or does not tick.

    Args:
        instance: Where ticks are on record.
        periods: How often each schedule ticks, by name, and None for each sensor.
        now: The time.
    """
    for state in sorted(instance.all_instigator_state(), key=lambda one: one.instigator_name):
        name = state.instigator_name
        if name not in periods or state.status.value == "STOPPED":
            continue
        ticks = instance.get_ticks(
            state.instigator_origin_id, state.selector_id, limit=FAILED_TICKS
        )
        kind = "Sensor" if periods[name] is None else "Schedule"
        longest = _longest_silence(state, periods[name])
        what = _failing(ticks, wanted=FAILED_TICKS if kind == "Sensor" else 1)
        if what := what or _silent(ticks, longest, now):
            yield name, f"{kind} {name} {what}"


def _failing(ticks: Any, *, wanted: int) -> str | None:
    last = ticks[:wanted]
    if len(last) < wanted or any(tick.status.value != "FAILURE" for tick in last):
        return None
    error = last[0].error
    why = error_sentence(error) if error else "it gave no reason"
    return f"failed at {_shown(last[0].timestamp)}: {why.rstrip('.')}."


def _longest_silence(state: Any, period: timedelta | None) -> timedelta:
    if period is not None:
        return period + _SLACK
    interval = getattr(state.instigator_data, "min_interval", None) or 0
    return timedelta(seconds=max(_MOST_INTERVALS * interval, _LEAST_SECONDS))


def _silent(ticks: Any, longest: timedelta, now: datetime) -> str | None:
    # Without a tick it has been on for less than its first interval, or the daemon does not run.
    if not ticks or now - datetime.fromtimestamp(ticks[0].timestamp, UTC) <= longest:
        return None
    minutes = longest / timedelta(minutes=1)
    return f"last ticked at {_shown(ticks[0].timestamp)}, expected within {minutes:.0f} minutes."


def _shown(timestamp: float) -> str:
    return f"{datetime.fromtimestamp(timestamp, UTC):%Y-%m-%d %H:%M} UTC"
