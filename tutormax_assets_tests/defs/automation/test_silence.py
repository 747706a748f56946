"""Schedules and sensors that fail or fall silent are found, and alerted about once."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from tutormax_assets.defs.automation import silence
from tutormax_assets.defs.automation.receivers import Message
from tutormax_assets.defs.automation.silence import find_silent, periods_of, silence_sensor
from tutormax_assets.settings import Settings

NOW = datetime(2025, 11, 7, 12, tzinfo=UTC)
PERIODS = periods_of(["daily_metrics_at_night", "verification_every_week"], ["late_data"])
ERROR = SimpleNamespace(message="SensorError: out of luck.\n", cls_name="SensorError", cause=None)


def tick(*, hours: float, status: str = "SKIPPED") -> Any:
    """A tick so many hours ago."""
    at = (NOW - timedelta(hours=hours)).timestamp()
    error = ERROR if status == "FAILURE" else None
    return SimpleNamespace(timestamp=at, status=SimpleNamespace(value=status), error=error)


def recorded(name: str, *ticks: Any, status: str = "DECLARED_IN_CODE", interval: int = 300) -> Any:
    """The part of an instance that holds one schedule or sensor and its ticks, newest first."""
    state = SimpleNamespace(
        instigator_name=name,
        status=SimpleNamespace(value=status),
        instigator_data=SimpleNamespace(min_interval=interval),
        instigator_origin_id="origin",
        selector_id="selector",
    )
    return SimpleNamespace(
        all_instigator_state=lambda: [state], get_ticks=lambda *_, limit: list(ticks)[:limit]
    )


@pytest.mark.parametrize(
    ("name", "ticks"),
    [
        ("late_data", []),
        ("late_data", [tick(hours=0.4)]),
        # A failure that passes.
        ("late_data", [tick(hours=n / 10, status="FAILURE") for n in (1, 2)]),
        ("late_data", [tick(hours=0), *(tick(hours=n, status="FAILURE") for n in (1, 2))]),
        ("daily_metrics_at_night", [tick(hours=24.5)]),
        ("verification_every_week", [tick(hours=7 * 24)]),
        ("of_another_version", [tick(hours=1_000)]),
    ],
)
def test_what_ticks_is_not_named(name: str, ticks: list[Any]) -> None:
    assert list(find_silent(recorded(name, *ticks), PERIODS, now=NOW)) == []


@pytest.mark.parametrize(
    ("name", "ticks", "sentence"),
    [
        (
            "late_data",
            [tick(hours=0.5)],
            "Sensor late_data last ticked at 2025-11-07 11:30 UTC, expected within 25 minutes.",
        ),
        (
            "late_data",
            [tick(hours=n / 10, status="FAILURE") for n in (0, 1, 2)],
            "Sensor late_data failed at 2025-11-07 12:00 UTC: SensorError: out of luck.",
        ),
        (
            "daily_metrics_at_night",
            [tick(hours=10, status="FAILURE")],
            "Schedule daily_metrics_at_night failed at 2025-11-07 02:00 UTC: SensorError: out of"
            " luck.",
        ),
        (
            "daily_metrics_at_night",
            [tick(hours=34)],
            "Schedule daily_metrics_at_night last ticked at 2025-11-06 02:00 UTC, expected within"
            " 1500 minutes.",
        ),
    ],
)
def test_what_fails_or_is_silent_is_named(name: str, ticks: list[Any], sentence: str) -> None:
    assert list(find_silent(recorded(name, *ticks), PERIODS, now=NOW)) == [(name, sentence)]


def test_what_is_turned_off_is_not_silent() -> None:
    instance = recorded("late_data", tick(hours=9), status="STOPPED")

    assert list(find_silent(instance, PERIODS, now=NOW)) == []


def test_one_alert_is_sent_for_what_is_found_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Message] = []
    found = {"late_data": "Sensor late_data failed."}
    monkeypatch.setattr(silence, "send", lambda message, *_: sent.append(message))
    monkeypatch.setattr(silence, "find_silent", lambda *_, **__: iter(found.items()))
    sensor = silence_sensor(Settings(automation=True), PERIODS, now=lambda: NOW)
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING

    with dg.DagsterInstance.ephemeral() as instance:
        cursor, counts = None, []
        for _ in range(4):
            result = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=cursor))
            cursor = result.cursor
            counts.append(len(sent))
        found.clear()
        result = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=cursor))

    assert counts == [0, 1, 1, 1]
    assert sent[0].title == "tutormax: a schedule or sensor failing or silent"
    assert "- Sensor late_data failed." in sent[0].body
    assert json.loads(result.cursor or "") == {}
    assert result.skip_message == "All schedules and sensors tick."
