"""Which ends of runs and which nights are told of, in how many messages, and what they say."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime
from typing import Any
from uuid import uuid4

import dagster as dg
import pytest

from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.defs.automation.alerts import alert_sensors, late_dates, tell_of_runs
from tutormax_assets.defs.automation.messages import first_sentence
from tutormax_assets.defs.checks import ADVICE_METADATA
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.tags import (
    ATTENDED_TAG,
    RANGE_DATES_TAG,
    RANGE_END_TAG,
    RANGE_RUN_TAG,
    RANGE_START_TAG,
)
from tutormax_assets.settings import load_settings
from tutormax_assets_tests.conftest import Platform, captured_log
from tutormax_assets_tests.defs.automation.conftest import TOKEN, WebhookServer

DAY = "2025-11-07"
UI = "http://127.0.0.1:3000/runs"
DAILY = dg.DailyPartitionsDefinition("2025-11-01", end_date="2025-12-01")

BAD: dict[str, str] = {}
"""What is wrong with which date of the small job below."""


@dg.asset(partitions_def=DAILY)
def sessions(context: dg.AssetExecutionContext) -> None:
    if BAD.get(context.partition_key) in ("source", "both"):
        raise dg.Failure("The source is away. It says nothing more.", allow_retries=False)


@dg.asset(partitions_def=DAILY)
def events(context: dg.AssetExecutionContext) -> None:
    if BAD.get(context.partition_key) == "both":
        raise ValueError("no events\nand more that nobody needs")


@dg.asset(partitions_def=DAILY, deps=[sessions])
def tiers() -> None: ...


@dg.asset_check(asset=sessions, blocking=True)
def they_are_new(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    wrong = BAD.get(context.run.tags["dagster/partition"])
    severities = {"blocked": dg.AssetCheckSeverity.ERROR, "warned": dg.AssetCheckSeverity.WARN}
    return dg.AssetCheckResult(
        passed=wrong not in severities,
        severity=severities.get(str(wrong), dg.AssetCheckSeverity.ERROR),
        description="They are 9.5 days old. Ask the platform's people.",
        metadata={ADVICE_METADATA: "Ask the platform's people."},
    )


@dg.asset_check(asset=events)
def there_are_some(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=BAD.get(context.run.tags["dagster/partition"]) != "warned",
        severity=dg.AssetCheckSeverity.WARN,
    )


SMALL = dg.Definitions(
    assets=[sessions, events, tiers],
    asset_checks=[they_are_new, there_are_some],
    jobs=[dg.define_asset_job(JOB_NAME)],
    executor=dg.in_process_executor,
)


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setattr(f"{__name__}.BAD", {})
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def run_of(instance: dg.DagsterInstance, day: str, **tags: str) -> dg.DagsterRun:
    result = SMALL.resolve_job_def(JOB_NAME).execute_in_process(
        instance=instance, partition_key=day, tags=tags, raise_on_error=False
    )
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    return run


def evaluate(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Let the sensor see the end of a run that is meant to."""
    failed = run.status is dg.DagsterRunStatus.FAILURE
    name = "alert_on_failed_runs" if failed else "alert_on_checks"
    [sensor] = [one for one in sensors() if one.name == name]
    event = dg.DagsterEvent(
        "PIPELINE_FAILURE" if failed else "PIPELINE_SUCCESS", job_name=run.job_name
    )
    with dg.build_run_status_sensor_context(
        sensor_name=name, dagster_event=event, dagster_instance=instance, dagster_run=run
    ) as context:
        told: Any = sensor(context.for_run_failure() if failed else context)
    # Otherwise Dagster would deal with one run in each evaluation.
    assert told is None


def sensors(now: str | None = None) -> list[dg.SensorDefinition]:
    settings = load_settings()
    if now is None:
        return alert_sensors(settings)
    return alert_sensors(settings, now=lambda: datetime.fromisoformat(f"{now}+00:00"))


def test_a_failed_run_is_one_message_whatever_failed_in_it(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    BAD[DAY] = "both"
    run = run_of(instance, DAY)

    evaluate(instance, run)

    [request] = webhook.requests
    assert request["type"] == "failure"
    assert request["title"] == "tutormax: daily_metrics failed for 2025-11-07"
    assert request["message"] == (
        "What failed:\n"
        "- step events. ValueError: no events\n"
        "- step sessions. The source is away.\n"
        "\n"
        "Where to look:\n"
        f"- {UI}/{run.run_id}\n"
        "\n"
        "What to do:\n"
        "- What a failed step would have written is as it was before, but for the tutors that it"
        " says it saved. Fix the cause that the run or the report of its check names, then"
        " materialize 2025-11-07 again in the UI or with: tutormax run --date 2025-11-07"
    )


def test_a_blocking_check_is_one_message_about_the_check(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    BAD[DAY] = "blocked"

    evaluate(instance, run_of(instance, DAY))

    [request] = webhook.requests
    assert request["title"] == "tutormax: daily_metrics failed for 2025-11-07"
    check, _, advice, _ = [
        line for line in request["message"].splitlines() if line.startswith("- ")
    ]
    assert check == "- check sessions: they_are_new (ERROR, blocking). They are 9.5 days old."
    assert advice == "- Ask the platform's people."


def test_checks_that_warn_are_one_message(
    instance: dg.DagsterInstance, webhook: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_UI_URL", "https://dagster.example.com/")
    BAD[DAY] = "warned"
    run = run_of(instance, DAY)
    assert run.status is dg.DagsterRunStatus.SUCCESS

    evaluate(instance, run)

    [request] = webhook.requests
    assert request["type"] == "warning"
    assert request["title"] == "tutormax: daily_metrics finished with warnings for 2025-11-07"
    assert set(request["message"].splitlines()) >= {
        "What the checks found:",
        "- check sessions: they_are_new (WARN). They are 9.5 days old.",
        "- check events: there_are_some (WARN)",
        f"- https://dagster.example.com/runs/{run.run_id}",
    }


def test_nothing_is_said_of_a_run_without_fault(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    evaluate(instance, run_of(instance, DAY))

    assert webhook.requests == []


def test_a_run_that_was_killed_is_told_of_once_it_is_not_run_again(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    job = SMALL.resolve_job_def(JOB_NAME)
    for retried in ("true", "false"):
        run = instance.create_run_for_job(
            job, tags={"dagster/partition": DAY, "dagster/will_retry": retried}
        )
        instance.report_run_failed(run, "The run worker is gone. It left no trace.")
        ended = instance.get_run_by_id(run.run_id)
        assert ended is not None
        evaluate(instance, ended)

    [request] = webhook.requests
    assert "- the run, outside of its steps. The run worker is gone.\n" in request["message"]
    assert run.run_id in request["message"]


def test_a_run_of_the_command_line_is_left_to_its_process(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    BAD[DAY] = "source"

    run = run_of(instance, DAY, **{ATTENDED_TAG: "true"})
    evaluate(instance, run)

    assert webhook.requests == []

    # Its re-execution in the UI has its tags, but no process that would tell.
    again = instance.create_run_for_job(
        SMALL.resolve_job_def(JOB_NAME),
        tags=run.tags,
        parent_run_id=run.run_id,
        root_run_id=run.run_id,
    )
    instance.report_run_failed(again)
    failed = instance.get_run_by_id(again.run_id)
    assert failed is not None
    evaluate(instance, failed)

    [request] = webhook.requests
    assert again.run_id in request["message"]


def test_checks_that_were_executed_alone_are_named(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    check = dg.AssetCheckKey(dg.AssetKey("sessions"), "they_are_new")
    run = instance.add_run(
        dg.DagsterRun(job_name="__ASSET_JOB", run_id=str(uuid4()), asset_check_selection={check})
    )
    instance.report_run_failed(run)
    failed = instance.get_run_by_id(run.run_id)
    assert failed is not None

    evaluate(instance, failed)

    [request] = webhook.requests
    assert request["title"] == "tutormax: checks of sessions failed"


def test_a_failed_range_says_that_its_dates_follow(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    run = instance.create_run_for_job(
        SMALL.resolve_job_def(JOB_NAME),
        tags={RANGE_START_TAG: "2025-11-01", RANGE_END_TAG: "2025-11-10"},
    )
    instance.report_run_failed(run)
    failed = instance.get_run_by_id(run.run_id)
    assert failed is not None

    evaluate(instance, failed)

    [request] = webhook.requests
    assert request["title"] == "tutormax: daily_metrics failed for 2025-11-01 to 2025-11-10"
    assert "each date is run by itself, and one message will say which" in request["message"]
    assert "tutormax backfill --from 2025-11-01 --to 2025-11-10" in request["message"]


def dates_of_range(instance: dg.DagsterInstance, *days: str) -> list[dg.DagsterRun]:
    tags = {RANGE_RUN_TAG: "the-range-run", RANGE_DATES_TAG: str(len(days))}
    return [run_of(instance, day, **tags) for day in days]


def test_the_dates_of_a_failed_range_are_one_message(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    BAD.update({"2025-11-04": "source", "2025-11-05": "warned"})
    runs = dates_of_range(instance, "2025-11-03", "2025-11-04", "2025-11-05", "2025-11-06")

    # The two sensors come by in no order.
    for run in reversed(runs):
        evaluate(instance, run)

    [request] = webhook.requests
    assert request["type"] == "failure"
    assert request["title"] == (
        "tutormax: 3 of 4 dates computed one by one after their range failed"
    )
    assert request["message"].startswith("Not computed: 2025-11-04\n")
    assert f"- {UI}/{runs[1].run_id}\n" in request["message"]
    assert "- step sessions. The source is away." in request["message"]
    _, warned = request["message"].split("\nWhat the checks found for dates that are saved:\n")
    assert warned.startswith(
        "- 2025-11-05, check events: there_are_some (WARN)\n"
        "- 2025-11-05, check sessions: they_are_new (WARN). They are 9.5 days old.\n"
    )
    assert f"- {UI}/{runs[2].run_id}\n" in warned
    assert "- Ask the platform's people.\n" in warned
    assert request["message"].endswith(f"The range run: {UI}/the-range-run")


def test_the_dates_are_told_of_once_all_have_ended(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    BAD["2025-11-04"] = "source"
    tags = {RANGE_RUN_TAG: "the-range-run", RANGE_DATES_TAG: "3"}
    first = run_of(instance, "2025-11-03", **tags)
    evaluate(instance, first)
    second = run_of(instance, "2025-11-04", **tags)
    evaluate(instance, second)
    # Dagster runs it again, as a crash would have it.
    instance.add_run_tags(second.run_id, {"dagster/will_retry": "true"})
    third = run_of(instance, "2025-11-05", **tags)
    evaluate(instance, third)
    assert webhook.requests == []

    BAD.clear()
    evaluate(instance, run_of(instance, "2025-11-04", **tags))

    [request] = webhook.requests
    assert request["type"] == "success"
    assert request["title"].startswith("tutormax: 3 of 3 dates computed one by one")
    assert request["message"] == f"The range run: {UI}/the-range-run"


def test_many_dates_and_failures_stay_readable(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    days = [f"2025-11-{day:02}" for day in range(1, 13)]
    BAD.update(dict.fromkeys(days, "both"))
    runs = dates_of_range(instance, *days)

    evaluate(instance, runs[-1])

    [request] = webhook.requests
    assert request["title"].startswith("tutormax: 0 of 12 dates computed one by one")
    assert request["message"].startswith("Not computed: 2025-11-01 to 2025-11-12\n")
    assert "- 2025-11-01, step events. ValueError: no events\n" in request["message"]
    assert "- and 14 more\n" in request["message"]
    assert "- and 2 more\n" in request["message"]


def test_the_command_line_tells_of_its_runs_itself(
    small_platform: Platform, webhook: WebhookServer
) -> None:
    # A file cannot take the place of this folder.
    obstacle = small_platform.storage / "tutor_events_set_aside" / f"{DAY}.json"
    obstacle.mkdir(parents=True)

    with captured_log() as log:
        replace(small_platform, settings=load_settings()).run("2025-11-06", DAY)

    of_failure = [request for request in webhook.requests if request["type"] == "failure"]
    assert webhook.requests == of_failure
    [request] = of_failure
    assert request["title"] == "tutormax: daily_metrics failed in 1 of 2 runs for 2025-11-07"
    assert "- step platform_snapshot. " in request["message"]
    assert "INFO Alert sent to receiver 1 (json): " + request["title"] in log
    assert TOKEN not in "\n".join(log)
    with dagster_instance(small_platform.settings) as instance:
        run_id = request["message"].partition(f"{UI}/")[2].split()[0]
        run = instance.get_run_by_id(run_id)
        assert run is not None
        assert run.tags["dagster/partition"] == DAY
        evaluate(instance, run)
    assert len(webhook.requests) == 1


def test_a_receiver_that_is_down_fails_neither_sensor_nor_run(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"json://reader:{TOKEN}@127.0.0.1:1/{TOKEN}?retry=1&wait=0"
    monkeypatch.setenv("TUTORMAX_ALERTS", url)
    BAD[DAY] = "source"
    run = run_of(instance, DAY)

    evaluate(instance, run)
    with captured_log() as log:
        tell_of_runs(instance, [run.run_id], load_settings(), logging.getLogger(LOGGER))

    [line] = log
    assert line.startswith("ERROR Alert not delivered to receiver 1 (json): A Connection error")
    assert "tutormax: daily_metrics failed for 2025-11-07" in line
    assert TOKEN not in line


def look_for_late_nights(instance: dg.DagsterInstance, now: str, cursor: str | None) -> str:
    """Evaluate the sensor at an instant; gives its cursor then."""
    [sensor] = [one for one in sensors(now) if one.name == "alert_on_late_nights"]
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    result = sensor(context)
    assert isinstance(result, dg.SkipReason)
    assert context.cursor is not None
    return context.cursor


def test_a_late_night_is_told_of_once(instance: dg.DagsterInstance, webhook: WebhookServer) -> None:
    cursor = look_for_late_nights(instance, "2025-11-06T12:00:00", None)
    # What was due before it was on is not known to be wanted.
    assert webhook.requests == []

    cursor = look_for_late_nights(instance, "2025-11-07T03:59:59", cursor)
    assert webhook.requests == []
    for now in ("2025-11-07T04:00:00", "2025-11-07T04:05:00", "2025-11-07T23:00:00"):
        cursor = look_for_late_nights(instance, now, cursor)

    [request] = webhook.requests
    assert request["type"] == "failure"
    assert request["title"] == "tutormax: no metrics for 2025-11-07"
    assert "due by 04:00 UTC" in request["message"]
    assert "http://127.0.0.1:3000/automation" in request["message"]
    assert request["message"].endswith("with: tutormax run --date 2025-11-07")


def test_a_date_that_was_materialized_is_not_late_and_one_of_an_outage_is(
    instance: dg.DagsterInstance, webhook: WebhookServer
) -> None:
    for day in ("2025-11-05", "2025-11-07"):
        instance.report_runless_asset_event(
            dg.AssetMaterialization("tutor_performance_metrics", partition=day)
        )

    assert look_for_late_nights(instance, "2025-11-05T05:00:00", "2025-11-04") == "2025-11-05"
    assert webhook.requests == []
    # Nobody looked on the 6th.
    assert look_for_late_nights(instance, "2025-11-07T05:00:00", "2025-11-05") == "2025-11-07"

    assert webhook.titles == ["tutormax: no metrics for 2025-11-06"]


def test_a_run_of_a_date_counts_as_its_materialization(small_platform: Platform) -> None:
    small_platform.run(DAY)

    with dagster_instance(small_platform.settings) as instance:
        found = late_dates(instance, after=date(2025, 11, 6), up_to=date(2025, 11, 7))
    assert found == []


def test_every_job_of_the_code_location_is_told_of() -> None:
    repository = build_definitions(load_settings()).get_repository_def()

    names = {sensor.name for sensor in repository.sensor_defs}

    assert {"alert_on_failed_runs", "alert_on_checks", "alert_on_late_nights"} <= names
    for sensor in sensors():
        assert sensor.description


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two.", "One."),
        ("db.example.com is 9.5 away! Really", "db.example.com is 9.5 away!"),
        ("no end\nsecond line", "no end"),
        ("  ", "it gave no reason"),
        ("x" * 500, "x" * 400 + "…"),
    ],
)
def test_reasons_are_first_sentences(text: str, expected: str) -> None:
    assert first_sentence(text) == expected
