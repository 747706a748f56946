"""The sensor for late data asks for runs of the tutors who have changed, and for no other run."""

from datetime import date

import dagster as dg
import pytest

from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.defs.automation import late_data
from tutormax_assets.defs.automation.late_data import late_data_sensor
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.tags import PARTITION_TAG
from tutormax_assets.settings import load_settings
from tutormax_assets_tests.conftest import Platform

DAY = "2025-11-07"


def test_late_data_is_asked_for_once(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_data, "today", lambda timezone: date.fromisoformat(DAY))
    settings = load_settings()
    sensor = late_data_sensor(settings, JOB_NAME)
    job = build_definitions(settings).resolve_job_def(JOB_NAME)
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED
    with dagster_instance(settings) as instance:

        def tutors(request: dg.RunRequest) -> list[str]:
            found: list[str] = request.run_config["resources"]["run_options"]["config"]["tutor_ids"]
            return found

        def tick() -> dg.RunRequest | str:
            [result] = [sensor(dg.build_sensor_context(instance=instance))]
            assert isinstance(result, dg.RunRequest | dg.SkipReason)
            return str(result.skip_message) if isinstance(result, dg.SkipReason) else result

        assert tick() == f"{DAY} is not stored yet; the night's run computes it."
        small_platform.run(DAY)
        assert str(tick()).startswith(f"Nothing of {DAY} has changed since ")

        small_platform.execute(
            "UPDATE sessions SET no_show = NOT no_show WHERE tutor_id = 'T000003'"
        )
        request = tick()
        assert isinstance(request, dg.RunRequest)
        assert tutors(request) == ["T000003"]
        done = job.execute_in_process(
            instance=instance, run_config=request.run_config, partition_key=request.partition_key
        )
        assert done.success
        again = tick()
        # A transaction of another test may be older than the change.
        if isinstance(again, dg.RunRequest):
            assert tutors(again) == ["T000003"]
        else:
            assert again.startswith(f"Nothing of {DAY} has changed since ")

        small_platform.execute("UPDATE sessions SET no_show = NOT no_show")
        whole = tick()
        assert isinstance(whole, dg.RunRequest)
        assert (whole.partition_key, whole.run_config, whole.run_key) == (DAY, {}, None)
        # Where it cannot be told who has changed, a date is read as a whole once.
        small_platform.execute("CLUSTER sessions USING sessions_pkey")
        once = tick()
        assert isinstance(once, dg.RunRequest)
        assert (once.run_config, once.run_key) == ({}, f"late_data:{DAY}:all tutors")

        run = instance.create_run_for_job(
            job, status=dg.DagsterRunStatus.STARTED, tags={PARTITION_TAG: DAY}
        )
        assert tick() == f"Run {run.run_id[:8]} of {DAY} is under way."
        instance.delete_run(run.run_id)
        small_platform.execute("ALTER TABLE sessions RENAME TO lessons")
        assert "table sessions" in str(tick())
