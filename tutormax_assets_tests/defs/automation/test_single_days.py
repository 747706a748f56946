"""The dates of a failed range run, one by one."""

from collections.abc import Iterator
from datetime import date
from typing import Any

import dagster as dg
import pytest

from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.defs.automation.single_days import MAX_DATES
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.tags import (
    ATTENDED_TAG,
    RANGE_DATES_TAG,
    RANGE_END_TAG,
    RANGE_RUN_TAG,
    RANGE_START_TAG,
    partition_keys,
)
from tutormax_assets.settings import load_settings
from tutormax_assets_tests.conftest import Platform

IN_LOCATION = "single_days_of_failed_ranges"
ON_COMMAND_LINE = "single_days_of_failed_command_line_ranges"
RANGE = {RANGE_START_TAG: "2025-11-05", RANGE_END_TAG: "2025-11-07"}
DAYS = ["2025-11-05", "2025-11-06", "2025-11-07"]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def evaluated(
    instance: dg.DagsterInstance, run: dg.DagsterRun, sensor: str = IN_LOCATION
) -> list[dg.RunRequest] | str:
    """The runs that a sensor asks for, or why it asks for none."""
    definitions = build_definitions(load_settings())
    event = dg.DagsterEvent("PIPELINE_FAILURE", job_name=run.job_name)
    with dg.build_run_status_sensor_context(
        sensor_name=sensor, dagster_event=event, dagster_instance=instance, dagster_run=run
    ) as context:
        result: Any = definitions.get_repository_def().get_sensor_def(sensor)(
            context.for_run_failure()
        )
    if isinstance(result, dg.SkipReason):
        return str(result.skip_message)
    return list(result)


def failed_run(tags: dict[str, str], **fields: Any) -> dg.DagsterRun:
    return dg.DagsterRun(
        **{"job_name": JOB_NAME, **fields}, tags=tags, status=dg.DagsterRunStatus.FAILURE
    )


def test_one_bad_date_of_a_range_does_not_lose_the_others(small_platform: Platform) -> None:
    # A file cannot take the place of this folder.
    obstacle = small_platform.storage / "tutor_events_set_aside" / f"{DAYS[1]}.json"
    obstacle.mkdir(parents=True)
    job = build_definitions(small_platform.settings).resolve_job_def(JOB_NAME)
    config = {
        "resources": {"run_options": {"config": {"batch_size": 7}}},
        "loggers": {"line": {}},
    }
    with dagster_instance(small_platform.settings) as instance:
        ranged = job.execute_in_process(
            instance=instance, run_config=config, tags=RANGE, raise_on_error=False
        )
        run = instance.get_run_by_id(ranged.run_id)
        assert run is not None
        assert run.status is dg.DagsterRunStatus.FAILURE
        assert small_platform.metrics().is_empty()

        requests = evaluated(instance, run)

        assert isinstance(requests, list)
        assert [request.partition_key for request in requests] == DAYS
        successes = []
        for request in requests:
            assert request.run_key == f"{run.run_id}:{request.partition_key}"
            assert request.run_config == config
            assert request.tags == {RANGE_RUN_TAG: run.run_id, RANGE_DATES_TAG: "3"}
            result = job.execute_in_process(
                instance=instance,
                run_config=dict(request.run_config),
                partition_key=request.partition_key,
                tags=dict(request.tags),
                raise_on_error=False,
            )
            successes.append(result.success)
            of_day = instance.get_run_by_id(result.run_id)
            assert of_day is not None
            # So that it never goes on for ever.
            assert evaluated(instance, of_day) == "It is no run of several dates."

    assert successes == [True, False, True]
    dates = small_platform.metrics()["calculation_date"].dt.date().unique().sort().to_list()
    assert dates == [date(2025, 11, 5), date(2025, 11, 7)]


def test_runs_of_the_ui_keep_their_selection(instance: dg.DagsterInstance) -> None:
    tiers, roster = dg.AssetKey("tutor_tiers"), dg.AssetKey("tutor_roster")
    check = dg.AssetCheckKey(tiers, "a_check")
    run = failed_run(
        RANGE,
        job_name="__ASSET_JOB",
        asset_selection=frozenset({tiers, roster}),
        asset_check_selection=frozenset({check}),
    )

    requests = evaluated(instance, run)

    assert isinstance(requests, list)
    assert [request.partition_key for request in requests] == DAYS
    assert {tuple(request.asset_selection or ()) for request in requests} == {(roster, tiers)}
    assert {tuple(request.asset_check_keys or ()) for request in requests} == {(check,)}


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (failed_run({"dagster/partition": DAYS[0]}), "It is no run of several dates."),
        # So does the UI start the backfill of one date.
        (
            failed_run({RANGE_START_TAG: DAYS[0], RANGE_END_TAG: DAYS[0]}),
            "It is no run of several dates.",
        ),
        (failed_run({}), "It is no run of several dates."),
        (failed_run({**RANGE, "dagster/will_retry": "true"}), "Dagster runs it again."),
        (
            failed_run({**RANGE, ATTENDED_TAG: "true"}),
            "The process that ran it runs the dates one by one.",
        ),
        (failed_run(RANGE, job_name="other"), "It is no run of daily_metrics or its assets."),
        (
            failed_run(
                RANGE, job_name="__ASSET_JOB", asset_selection=frozenset({dg.AssetKey("other")})
            ),
            "It is no run of daily_metrics or its assets.",
        ),
        (
            failed_run({RANGE_START_TAG: "2024-01-01", RANGE_END_TAG: "2025-01-01"}),
            "It is a run of 367 dates, and at most 366 are run one by one; run it again in smaller"
            " ranges.",
        ),
    ],
)
def test_other_runs_are_left_alone(
    instance: dg.DagsterInstance, run: dg.DagsterRun, reason: str
) -> None:
    assert evaluated(instance, run) == reason


def test_a_range_that_fails_whatever_the_date_is_left_alone(small_platform: Platform) -> None:
    small_platform.execute("ALTER TABLE sessions RENAME TO gone")
    job = build_definitions(small_platform.settings).resolve_job_def(JOB_NAME)
    options = {"resources": {"run_options": {"config": {"max_retries": 0}}}}
    with dagster_instance(small_platform.settings) as instance:
        result = job.execute_in_process(
            run_config=options, instance=instance, raise_on_error=False, tags=RANGE
        )
        said = evaluated(instance, result.dagster_run)
    assert said == "It failed for a reason that each of its dates would fail for."


def test_the_longest_range_is_bounded(instance: dg.DagsterInstance) -> None:
    run = failed_run({RANGE_START_TAG: "2024-01-01", RANGE_END_TAG: "2024-12-31"})

    assert len(evaluated(instance, run)) == MAX_DATES == 366


def test_ranges_of_the_command_line_have_a_sensor_of_their_own(
    instance: dg.DagsterInstance,
) -> None:
    """``dagster asset materialize`` runs outside of any code location."""
    requests = evaluated(instance, failed_run(RANGE, job_name="__ASSET_JOB"), ON_COMMAND_LINE)

    assert isinstance(requests, list)
    assert [request.partition_key for request in requests] == DAYS


def test_the_dates_of_a_run() -> None:
    assert partition_keys(failed_run(RANGE)) == DAYS
    assert partition_keys(failed_run({"dagster/partition": "2025-11-07"})) == ["2025-11-07"]
    assert partition_keys(failed_run({})) == []
