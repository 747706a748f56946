"""The schedule, and the deadline of a night."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import pytest

from tutormax_assets.definitions import JOB_NAME, VERIFICATION_JOB_NAME, build_definitions
from tutormax_assets.defs.automation.schedule import (
    SCHEDULE_SUFFIX,
    newest_due_date,
    nightly_freshness,
)
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.tags import RANGE_END_TAG, RANGE_START_TAG, will_be_retried
from tutormax_assets.settings import load_settings


@pytest.fixture
def definitions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
    """The definitions in the timezone of the test's parameter, UTC if it has none."""
    monkeypatch.setenv("TUTORMAX_TIMEZONE", getattr(request, "param", ""))
    return build_definitions(load_settings())


def the_schedule(definitions: dg.Definitions) -> dg.ScheduleDefinition:
    return definitions.get_repository_def().get_schedule_def(f"{JOB_NAME}{SCHEDULE_SUFFIX}")


# Dagster's own partitioned schedule calls it.
@pytest.mark.filterwarnings("ignore:Function `JobDefinition.run_request_for_partition`")
@pytest.mark.parametrize(
    ("definitions", "tick", "expected"),
    [
        ("UTC", "2025-11-07T02:00+00:00", "2025-11-07"),
        # Still the evening before in UTC, and already the date after.
        ("Asia/Tokyo", "2025-11-07T02:00+09:00", "2025-11-07"),
        ("Pacific/Pago_Pago", "2025-11-07T02:00-11:00", "2025-11-07"),
        # There is no 02:00 on this date, so Dagster ticks at 03:00.
        ("America/New_York", "2025-03-09T03:00-04:00", "2025-03-09"),
        ("Europe/Berlin", "2025-03-30T03:00+02:00", "2025-03-30"),
        # There are two in Berlin on this date; Dagster ticks at the second.
        ("America/New_York", "2025-11-02T02:00-05:00", "2025-11-02"),
        ("Europe/Berlin", "2025-10-26T02:00+01:00", "2025-10-26"),
        # The day begins at 01:00.
        ("America/Santiago", "2025-09-07T02:00-03:00", "2025-09-07"),
    ],
    indirect=["definitions"],
)
def test_a_tick_runs_the_reference_date_that_has_just_begun(
    definitions: dg.Definitions, tick: str, expected: str
) -> None:
    at = datetime.fromisoformat(tick)

    schedule = the_schedule(definitions)
    result = schedule.evaluate_tick(dg.build_schedule_context(scheduled_execution_time=at))

    [request] = result.run_requests or []
    assert schedule.job_name == JOB_NAME
    assert request.partition_key == expected
    assert request.tags["dagster/partition"] == expected
    # Dagster starts one run per key and tick.
    assert request.run_key == expected
    assert request.run_config == {}


@pytest.mark.parametrize("definitions", ["America/New_York"], indirect=True)
def test_it_ticks_at_two_in_the_timezone_of_the_partitions(definitions: dg.Definitions) -> None:
    schedule = the_schedule(definitions)

    assert schedule.cron_schedule == "0 2 * * *"
    assert schedule.execution_timezone == "America/New_York"


@pytest.mark.parametrize(
    ("setting", "running"), [(None, False), ("", False), ("false", False), ("true", True)]
)
def test_schedule_and_sensors_run_by_themselves_where_the_setting_says_so(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, running: bool
) -> None:
    if setting is not None:
        monkeypatch.setenv("TUTORMAX_AUTOMATION", setting)

    repository = build_definitions(load_settings()).get_repository_def()

    expected = "RUNNING" if running else "STOPPED"
    every: list[Any] = [*repository.schedule_defs, *repository.sensor_defs]
    statuses = {one.name: one.default_status.value for one in every}
    # They look at the platform all day, so they have a switch of their own.
    assert [statuses.pop(name) for name in ("late_data", "stale_dates")] == ["STOPPED"] * 2
    assert "refresh_verification_every_week" in statuses
    assert statuses
    assert {name: status for name, status in statuses.items() if status != expected} == {}


@pytest.mark.parametrize("definitions", ["Asia/Tokyo"], indirect=True)
def test_a_night_computes_late_days_again(
    definitions: dg.Definitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_LATE_DAYS", "7")
    monkeypatch.setenv("TUTORMAX_LATE_DATA", "true")
    monkeypatch.setenv("TUTORMAX_FIRST_DATE", "2025-11-03")
    repository = build_definitions(load_settings()).get_repository_def()
    schedule = repository.get_schedule_def(f"{JOB_NAME}{SCHEDULE_SUFFIX}")

    for tick, first, last in (
        ("2025-11-20T02:00+09:00", "2025-11-13", "2025-11-20"),
        # There is no date before the first one.
        ("2025-11-07T02:00+09:00", "2025-11-03", "2025-11-07"),
    ):
        at = datetime.fromisoformat(tick)
        context = dg.build_schedule_context(scheduled_execution_time=at)
        [request] = schedule.evaluate_tick(context).run_requests or []
        assert {RANGE_START_TAG: first, RANGE_END_TAG: last}.items() <= request.tags.items()

    plain = the_schedule(definitions)
    assert (schedule.name, schedule.job_name, schedule.cron_schedule) == (
        plain.name,
        plain.job_name,
        plain.cron_schedule,
    )
    assert schedule.execution_timezone == "Asia/Tokyo"
    for name in ("late_data", "stale_dates"):
        sensor = repository.get_sensor_def(name)
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING


@pytest.mark.parametrize(
    ("weekday", "cron"), [(None, "0 5 * * sun"), ("friday", "0 5 * * fri"), ("never", None)]
)
def test_refreshes_are_verified_once_a_week(
    monkeypatch: pytest.MonkeyPatch, weekday: str | None, cron: str | None
) -> None:
    if weekday is not None:
        monkeypatch.setenv("TUTORMAX_VERIFY_WEEKDAY", weekday)
    monkeypatch.setenv("TUTORMAX_TIMEZONE", "Europe/Berlin")

    schedules = build_definitions(load_settings()).get_repository_def().schedule_defs

    found = [one for one in schedules if one.job_name == VERIFICATION_JOB_NAME]
    assert [one.cron_schedule for one in found] == ([] if cron is None else [cron])
    assert {one.execution_timezone for one in found} <= {"Europe/Berlin"}


@pytest.mark.parametrize("definitions", ["Europe/Berlin"], indirect=True)
def test_a_missed_night_shows_on_the_table(definitions: dg.Definitions) -> None:
    policies = {
        spec.key.to_user_string(): spec.freshness_policy
        for spec in definitions.resolve_all_asset_specs()
        if spec.freshness_policy is not None and spec.partitions_def is not None
    }

    assert policies == {
        "tutor_performance_metrics": dg.FreshnessPolicy.cron(
            deadline_cron="0 4 * * *",
            lower_bound_delta=timedelta(hours=4),
            timezone="Europe/Berlin",
        )
    }
    assert nightly_freshness(timezone="UTC") != policies["tutor_performance_metrics"]


@pytest.mark.parametrize(
    ("timezone", "now", "expected"),
    [
        ("UTC", "2025-11-07T03:59:59+00:00", date(2025, 11, 6)),
        ("UTC", "2025-11-07T04:00:00+00:00", date(2025, 11, 7)),
        ("America/New_York", "2025-11-07T08:59:59+00:00", date(2025, 11, 6)),
        ("America/New_York", "2025-11-07T09:00:00+00:00", date(2025, 11, 7)),
        # The clocks went back, and forth, in the night before.
        ("America/New_York", "2025-11-02T08:59:59+00:00", date(2025, 11, 1)),
        ("America/New_York", "2025-11-02T09:00:00+00:00", date(2025, 11, 2)),
        ("America/New_York", "2025-03-09T07:59:59+00:00", date(2025, 3, 8)),
        ("America/New_York", "2025-03-09T08:00:00+00:00", date(2025, 3, 9)),
    ],
)
def test_a_date_is_due_at_four_in_its_timezone(timezone: str, now: str, expected: date) -> None:
    at = datetime.fromisoformat(now)

    assert newest_due_date(at, timezone=timezone) == expected
    for zone in (UTC, ZoneInfo("Asia/Tokyo")):
        assert newest_due_date(at.astimezone(zone), timezone=timezone) == expected


def test_the_instance_runs_again_what_crashed_and_not_what_failed(tmp_path: Path) -> None:
    @dg.op
    def fails() -> None:
        raise ValueError

    @dg.job
    def failing() -> None:
        fails()

    with dagster_instance(load_settings()) as instance:
        crashed = instance.create_run_for_job(failing)
        instance.report_run_failed(crashed)
        failed = failing.execute_in_process(instance=instance, raise_on_error=False)
        runs = [instance.get_run_by_id(run_id) for run_id in (crashed.run_id, failed.run_id)]

    assert (tmp_path / ".tutormax" / "dagster" / "dagster.yaml").is_symlink()
    assert [will_be_retried(run) for run in runs if run is not None] == [True, False]
