"""``tutormax status`` and ``tutormax db psql``."""

import json
import os
import subprocess
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tutormax_assets.defs.automation import stale_dates
from tutormax_assets.defs.automation.nights import last_nights
from tutormax_assets.defs.automation.schedule import next_tick
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets_tests.cli.conftest import DAY, Invoke, words
from tutormax_assets_tests.conftest import PASSWORD, Platform

NOON = datetime(2025, 11, 8, 12, tzinfo=UTC)


def test_the_last_nights_are_good_missing_or_failed(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    home = small_platform.settings.home_path / "dagster"
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("TUTORMAX_ALERTS", f"json://reader:{PASSWORD}@127.0.0.1:1/")
    settings = small_platform.settings.model_copy(update={"dagster_home": home})
    own = Platform(settings, small_platform.engine)
    own.run(DAY)

    with dagster_instance(settings) as instance:
        before = last_nights(instance, settings, days=3, now=NOON)
        own.execute("ALTER TABLE sessions RENAME TO elsewhere")
        own.run("2025-11-08")
        after = last_nights(instance, settings, days=3, now=NOON)
        at_first = last_nights(instance, settings, days=1, now=NOON.replace(day=7))

    assert (before.last_good, before.missing, before.failed) == (
        date(2025, 11, 7),
        [date(2025, 11, 6), date(2025, 11, 8)],
        [],
    )
    assert (after.last_good, after.failed) == (date(2025, 11, 7), [date(2025, 11, 8)])
    assert (after.is_well, at_first.is_well) == (False, True)
    assert (after.is_scheduled, after.has_daemon) == (False, False)

    shown = invoke("status")
    assert shown.exit_code == 1
    for part in ("Last good date │ none", "none, the schedule is off", "receiver 1 (json)"):
        assert part in shown.stdout.replace("  ", "")
    report = invoke("status", "--days", "2", "--json")
    assert report.exit_code == 1
    found = json.loads(report.stdout)
    assert (len(found["missing_dates"]), found["receivers"]) == (2, ["receiver 1 (json)"])
    assert found["database"].endswith(" (from TUTORMAX_DATABASE_URL)")
    assert found["dagster_home"] == str(home)
    assert PASSWORD not in shown.output + report.output


def test_where_nothing_was_computed_status_makes_nothing(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("status", "--json")

    assert result.exit_code == 1
    assert "there is no Dagster home at" in json.loads(result.stdout)["error"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2025-11-08T00:30-05:00", "2025-11-08T02:00:00-05:00"),
        ("2025-11-08T02:00-05:00", "2025-11-09T02:00:00-05:00"),
        ("2025-11-02T00:30-04:00", "2025-11-02T02:00:00-05:00"),
    ],
)
def test_the_next_tick_is_at_night_in_the_timezone(now: str, expected: str) -> None:
    tick = next_tick(datetime.fromisoformat(now), timezone="America/New_York")

    assert tick.isoformat() == expected


def test_psql_is_led_to_the_database_by_the_environment(
    platform: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *call: called.append(call))
    monkeypatch.setenv("PATH", "")

    result = invoke("db", "psql", "--", "-Atc", "SELECT current_database()")

    assert result.exit_code == 0
    [(program, arguments, environment)] = called
    assert arguments == ["psql", "-Atc", "SELECT current_database()"]
    assert environment["PGPASSWORD"] == PASSWORD
    said = subprocess.run(
        [program, *arguments[1:]], env=environment, capture_output=True, text=True, check=True
    )
    assert words(said.stdout) == platform.url.database


def test_the_platform_is_asked_which_dates_it_has_changed(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    home = small_platform.settings.home_path / "dagster"
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    last = date.fromisoformat(DAY)
    monkeypatch.setattr(stale_dates, "today", lambda timezone: last)
    settings = small_platform.settings.model_copy(update={"dagster_home": home})
    own = Platform(settings, small_platform.engine)
    own.run(DAY)
    cursor: str | None = None

    def report() -> list[Any]:
        found = json.loads(invoke("status", "--changed", "--json").stdout)
        names = ("changed_dates", "unchanged_dates", "unknown_dates", "stale_since")
        return [found[name] for name in names]

    def tick(hour: int) -> list[tuple[str | None, object]]:
        """The partitions that the sensor observes at an hour, and whether they are stale."""
        nonlocal cursor
        now = datetime(2030, 1, 1, hour, tzinfo=UTC)
        sensor = stale_dates.stale_dates_sensor(settings, now=lambda: now)
        with dagster_instance(settings) as instance:
            result = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=cursor))
            cursor = result.cursor
            for event in result.asset_events:
                instance.report_runless_asset_event(event)
        return [
            (event.partition, event.metadata["is_stale"].value) for event in result.asset_events
        ]

    assert tick(0) == []
    assert report() == [[], [DAY], {}, {}]
    small_platform.execute("DELETE FROM tutor_events WHERE tutor_id = 'T000003'")
    assert report() == [[DAY], [], {}, {}]
    assert tick(1) == [(DAY, True)]
    assert tick(2) == []
    since = "2030-01-01T01:00:00+00:00"
    assert report() == [[DAY], [], {}, {DAY: since}]
    assert words(f"Changed since read │ {DAY}, stale since 2030-01-01 01:00 UTC") in words(
        invoke("status", "--changed").stdout
    )
    own.run(DAY)
    assert tick(3) == [(DAY, False)]
    small_platform.execute("DELETE FROM tutor_events WHERE tutor_id = 'T000004'")
    assert report() == [[DAY], [], {}, {}]
    assert tick(4) == [(DAY, True)]
    small_platform.execute(
        "ALTER TABLE tutor_events RENAME TO e; CREATE VIEW tutor_events AS TABLE e"
    )
    changed, unchanged, unknown, _ = report()
    assert (changed, unchanged) == ([], [])
    assert "tutor_events is a view" in unknown[DAY]
    assert tick(5) == []
