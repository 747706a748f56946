"""The Python API: what callers of the replaced service use, on a real PostgreSQL."""

import asyncio
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

import tutormax_assets
from tutormax_assets import AggregationSummary, DailyMetricsAggregator, run_daily_aggregation
from tutormax_assets.api.runs import aggregate, steps
from tutormax_assets.api.summary import MOST_ERRORS_SHOWN
from tutormax_assets.compute import DaskError
from tutormax_assets.database import tables
from tutormax_assets.database.metrics_reading import MetricsTableError, MetricsTableTimeoutError
from tutormax_assets.dates import ReferenceDateError, today
from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.runs.failures import is_of_every_date
from tutormax_assets.runs.instance import dagster_home, dagster_instance
from tutormax_assets.runs.tags import SOURCE_TAG
from tutormax_assets.settings import OptionsError, SettingsError, load_settings
from tutormax_assets.source.postgres import SnapshotGoneError
from tutormax_assets.source.streams import SourceError, SourceTimeoutError
from tutormax_assets.source.view import UnknownTutorsError
from tutormax_assets_tests.conftest import Platform, captured_log, open_platform
from tutormax_assets_tests.tls import refusing_server

DAY = date(2025, 11, 7)


def arguments(function: object) -> dict[str, Any]:
    assert callable(function)
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }


def add_metrics(platform: Platform, *days: date) -> None:
    platform.add(
        tables.tutor_performance_metrics,
        *(
            {
                "metric_id": f"of {day}",
                "tutor_id": "T000001",
                "calculation_date": datetime(day.year, day.month, day.day, tzinfo=UTC),
                "window": "7day",
            }
            for day in days
        ),
    )


def test_names_arguments_and_defaults_are_those_of_the_replaced_service() -> None:
    assert arguments(run_daily_aggregation) == {
        "reference_date": None,
        "tutor_ids": None,
        "include_inactive": False,
        "cleanup_old_metrics": False,
        "retention_days": 90,
    }
    assert arguments(DailyMetricsAggregator) == {
        "reference_date": None,
        "max_retries": 3,
        "retry_delay_seconds": 5,
        "batch_size": 1_000,
    }
    assert arguments(DailyMetricsAggregator.run) == {"tutor_ids": None, "include_inactive": False}
    assert arguments(DailyMetricsAggregator.cleanup_old_metrics) == {
        "session": None,
        "retention_days": 90,
    }
    for function in (
        run_daily_aggregation,
        DailyMetricsAggregator.run,
        DailyMetricsAggregator.cleanup_old_metrics,
    ):
        assert inspect.iscoroutinefunction(function)
    assert list(inspect.signature(AggregationSummary).parameters) == [
        "run_date",
        "total_tutors",
        "successful",
        "failed",
        "total_metrics_saved",
        "total_runtime_seconds",
        "errors",
        "results",
        "set_aside",
        "warnings",
    ]


def test_importing_the_package_alone_is_cheap(tmp_path: Path) -> None:
    code = (
        "import sys, tutormax_assets\n"
        "heavy = {'dagster', 'polars', 'sqlalchemy', 'pydantic', 'psycopg'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'run_daily_aggregation' in dir(tutormax_assets)\n"
        "from tutormax_assets import *\n"
        "assert callable(run_daily_aggregation) and 'dagster' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": os.defpath, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = tutormax_assets.nonsense


def test_a_run_of_today_with_cleanup(small_platform: Platform, tmp_path: Path) -> None:
    now = today(timezone="UTC")
    add_metrics(small_platform, *(now - timedelta(days=days) for days in (400, 91, 90)))
    with open_platform(small_platform.url, tmp_path / "own") as platform:
        summary = asyncio.run(
            run_daily_aggregation(
                tutor_ids=["T000001", "T000002"], include_inactive=True, cleanup_old_metrics=True
            )
        )
        with dagster_instance(platform.settings) as instance:
            # The UI lists runs of a job by this.
            label = {".dagster/repository": "__repository__@tutormax_assets.definitions"}
            [run] = instance.get_runs(dg.RunsFilter(tags=label))

    # The UI re-executes the run by this.
    assert run.remote_job_origin is not None
    assert run.remote_job_origin.job_name == run.job_name
    repository = build_definitions(platform.settings).get_repository_def().name
    assert run.remote_job_origin.repository_origin.repository_name == repository
    assert run.tags[SOURCE_TAG] == "Python API"

    assert summary.run_date.date() == now
    assert (summary.total_tutors, summary.successful, summary.failed) == (2, 2, 0)
    assert (summary.total_metrics_saved, summary.success_rate) == (6, 100.0)
    assert summary.total_runtime_seconds > 0

    rows = small_platform.metrics()
    dates = rows["calculation_date"].dt.date().unique().sort().to_list()
    assert dates == [now - timedelta(days=90), now]
    found = rows.filter(calculation_date=summary.run_date)
    for result in summary.results:
        of_tutor = found.filter(tutor_id=result.tutor_id)
        assert (result.success, result.error) == (True, None)
        assert sorted(result.metrics_saved) == of_tutor["metric_id"].sort().to_list()
        assert sorted(result.windows_processed) == ["30day", "7day", "90day"]
    assert [result.tutor_id for result in summary.results] == ["T000001", "T000002"]

    assert run.job_name == "daily_metrics"
    assert run.status is dg.DagsterRunStatus.SUCCESS
    assert run.tags["dagster/partition"] == now.isoformat()

    # No run of all tutors has computed the date.
    [warning] = summary.warnings
    assert "check every_tutor_has_a_tier: 2 of 29 tutors are computed" in warning
    assert json.loads(json.dumps(summary.to_dict())) == {
        "run_date": f"{now}T00:00:00+00:00",
        "total_tutors": 2,
        "successful": 2,
        "failed": 0,
        "total_metrics_saved": 6,
        "total_runtime_seconds": round(summary.total_runtime_seconds, 2),
        "success_rate": 100.0,
        "errors": [],
        "warnings": [warning],
        "set_aside": [],
    }


def test_the_first_errors_are_shown_and_the_others_counted() -> None:
    errors = [{"tutor_id": f"t{n}", "error": "refused"} for n in range(MOST_ERRORS_SHOWN + 2)]
    summary = AggregationSummary(datetime(2025, 11, 7, tzinfo=UTC), errors=errors)

    *shown, rest = summary.first_errors()

    assert shown == [(f"t{n}", "refused") for n in range(MOST_ERRORS_SHOWN)]
    assert rest[0] == "and 2 more"
    summary.errors = errors[:MOST_ERRORS_SHOWN]
    assert list(summary.first_errors()) == shown


def test_tutors_who_cannot_be_written_are_in_errors_and_results(small_platform: Platform) -> None:
    small_platform.execute(
        "ALTER TABLE tutor_performance_metrics ADD CONSTRAINT no_such_tutor"
        " CHECK (tutor_id <> 'T000002')"
    )
    aggregator = DailyMetricsAggregator(DAY, max_retries=0, retry_delay_seconds=0, batch_size=1)

    with dagster_instance(small_platform.settings) as instance:
        some = asyncio.run(aggregator.run(tutor_ids=["T000001", "T000002"], include_inactive=True))
        [run_of_some] = instance.get_runs(limit=1)
        summary = asyncio.run(aggregator.run(include_inactive=True))
        [run] = instance.get_runs(limit=1)
        checks = instance.get_records_for_run(
            run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
        ).records

    assert (some.successful, some.failed, some.success_rate) == (1, 1, 50.0)
    assert some.errors == summary.errors
    assert run_of_some.status is dg.DagsterRunStatus.FAILURE
    assert (summary.total_tutors, summary.successful, summary.failed) == (30, 29, 1)
    assert (summary.total_metrics_saved, summary.success_rate) == (87, 96.67)
    [error] = summary.errors
    assert error["tutor_id"] == "T000002"
    assert 'violates check constraint "no_such_tutor"' in error["error"]
    results = {result.tutor_id: result for result in summary.results}
    assert {key for key, result in results.items() if not result.success} == {"T000002"}
    assert results["T000002"].error == error["error"]
    assert results["T000002"].metrics_saved == []
    # What the table holds is not what was computed, so the run does not count as a success.
    assert run.status is dg.DagsterRunStatus.FAILURE
    evaluations: list[Any] = [
        check.event_log_entry.dagster_event.event_specific_data
        for check in checks
        if check.event_log_entry.dagster_event is not None
    ]
    failed = {
        one.check_name: one
        for one in evaluations
        if not one.passed and one.severity is dg.AssetCheckSeverity.ERROR
    }
    assert failed.keys() == {"rows_are_as_computed", "every_tutor_has_all_windows"}
    assert failed["rows_are_as_computed"].metadata["failed_tutors"].value == 1


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            "DROP TABLE tutor_performance_metrics CASCADE",
            'cannot be written: relation "tutor_performance_metrics" does not exist.* Run'
            " `tutormax db upgrade` to bring the table to the expected form",
        ),
        (
            "DROP TABLE sessions CASCADE",
            "cannot be read: table sessions: found no such table.* `tutormax db status`",
        ),
        (
            "ALTER TABLE sessions ALTER no_show TYPE text",
            "table sessions, column no_show: found type text, expected boolean",
        ),
    ],
)
def test_a_run_that_fails_as_a_whole_says_why(
    small_platform: Platform, statement: str, expected: str
) -> None:
    small_platform.execute(statement)

    summary = asyncio.run(run_daily_aggregation(DAY, cleanup_old_metrics=True))

    [error] = summary.errors
    assert error["tutor_id"] == "SYSTEM"
    assert re.search(expected, error["error"])
    assert (summary.successful, summary.success_rate, summary.results) == (0, 0, [])


def test_cleanup_says_how_many_rows_it_deleted(small_platform: Platform) -> None:
    now = today(timezone="UTC")
    add_metrics(small_platform, *(now - timedelta(days=days) for days in range(4)))
    aggregator = DailyMetricsAggregator()

    deleted = asyncio.run(aggregator.cleanup_old_metrics(retention_days=2))
    assert deleted == 1
    assert asyncio.run(aggregator.cleanup_old_metrics(object(), retention_days=1)) == 1
    assert asyncio.run(aggregator.cleanup_old_metrics()) == 0
    assert len(small_platform.metrics()) == 2


@pytest.mark.parametrize(
    ("value", "timezone", "expected"),
    [
        (date(2025, 11, 7), "UTC", date(2025, 11, 7)),
        (datetime(2025, 11, 7, 13, 30), "America/New_York", date(2025, 11, 7)),  # noqa: DTZ001
        (datetime(2025, 11, 7, 3, tzinfo=UTC), "America/New_York", date(2025, 11, 6)),
    ],
)
def test_a_reference_date_may_be_a_datetime(
    monkeypatch: pytest.MonkeyPatch, value: date, timezone: str, expected: date
) -> None:
    monkeypatch.setenv("TUTORMAX_TIMEZONE", timezone)
    assert DailyMetricsAggregator(value).reference_date == expected


def test_what_cannot_be_computed_is_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ReferenceDateError, match="is in the future"):
        DailyMetricsAggregator(today(timezone="UTC") + timedelta(days=2))
    with pytest.raises(ReferenceDateError, match="before the first reference date"):
        asyncio.run(run_daily_aggregation(date(2023, 12, 31)))
    monkeypatch.setenv("POSTGRES_HOST", "db.example")
    with pytest.raises(SettingsError, match="set all five"):
        DailyMetricsAggregator()
    assert list(tmp_path.iterdir()) == []


def test_a_summary_without_tutors_has_a_success_rate() -> None:
    summary = AggregationSummary(run_date=datetime(2025, 11, 7, tzinfo=UTC))
    assert (summary.success_rate, summary.all_saved) == (0.0, True)
    summary.total_tutors, summary.successful = 3, 2
    assert summary.success_rate == 66.67


def test_a_range_counts_its_steps_by_month() -> None:
    settings = load_settings()
    assert (steps(settings, 1), steps(settings, 31), steps(settings, 32)) == (14, 14, 28)


def test_no_dates_are_no_runs() -> None:
    assert aggregate(load_settings(), [], RunOptions()) == []


def test_the_dagster_home_gets_a_configuration_unless_it_has_one(tmp_path: Path) -> None:
    home = dagster_home(load_settings())
    assert home == tmp_path / ".tutormax" / "dagster"
    config = home / "dagster.yaml"
    assert "telemetry" in config.read_text()

    # The package was moved: the link leads nowhere.
    config.unlink()
    config.symlink_to(tmp_path / "gone")
    dagster_home(load_settings())
    assert "telemetry" in config.read_text()

    config.unlink()
    config.write_text("# mine")
    dagster_home(load_settings())
    assert config.read_text() == "# mine"


def test_a_refused_connection_is_told_everywhere_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with refusing_server("28P01", 'password authentication failed for user "reader"') as url:
        url = url.set(drivername="postgresql", username="reader", password="hunter2")
        monkeypatch.setenv("TUTORMAX_DATABASE_URL", url.render_as_string(hide_password=False))
        with captured_log() as log:
            summary = asyncio.run(DailyMetricsAggregator(DAY, max_retries=0).run())

    [error] = summary.errors
    assert f"The platform at 127.0.0.1:{url.port}/platform cannot be reached" in error["error"]
    assert 'password authentication failed for user "reader"' in error["error"]
    # On the run's page, in the alert, and in the log of the command.
    assert log.count(f"ERROR {error['error']}") == 1
    [alert] = [line for line in log if "No alert is sent" in line]
    assert "the run, outside of its steps. The platform at" in alert
    assert f"ERROR SYSTEM: {error['error']}" in log
    assert "hunter2" not in "".join(log)


def test_a_range_that_fails_whatever_the_date_is_not_tried_date_by_date(
    small_platform: Platform,
) -> None:
    small_platform.execute("ALTER TABLE sessions RENAME TO gone")

    with captured_log() as log:
        summaries = small_platform.run("2025-11-06", "2025-11-07")

    assert len(summaries) == 2
    assert all("table sessions: found no such table" in str(one.errors) for one in summaries)
    assert not any("running each date by itself" in line for line in log)


@pytest.mark.parametrize(
    ("error", "of_every"),
    [
        (SourceError, True),
        (SourceTimeoutError, False),
        (MetricsTableError, True),
        (MetricsTableTimeoutError, False),
        (SnapshotGoneError, False),
        (DaskError, True),
        (SettingsError, True),
        (ArithmeticError, False),
    ],
)
def test_a_range_that_takes_too_long_is_tried_date_by_date(
    error: type[Exception], of_every: bool
) -> None:
    recorded = SimpleNamespace(cls_name=error.__name__, message="x", cause=None)
    event = SimpleNamespace(
        event_type=dg.DagsterEventType.STEP_FAILURE,
        step_failure_data=SimpleNamespace(error=recorded),
    )

    assert is_of_every_date([event]) == of_every  # type: ignore[list-item]


def test_what_a_first_opening_that_was_killed_left_is_made_anew(tmp_path: Path) -> None:
    home = dagster_home(load_settings())
    (home / "history" / "runs").mkdir(parents=True)
    # The file is there and its tables are not, which Dagster takes for whole.
    (home / "history" / "runs" / "index.db").touch()
    (home / "opening.begun").touch()

    with dagster_instance(load_settings()) as instance:
        instance.report_runless_asset_event(dg.AssetObservation("tutor_roster"))
        assert instance.all_asset_keys()

    with dagster_instance(load_settings()) as instance:
        assert [key.to_user_string() for key in instance.all_asset_keys()] == ["tutor_roster"]


def newest_runs(platform: Platform, count: int) -> list[list[float]]:
    """The times at which the steps of the newest runs began and ended."""
    with dagster_instance(platform.settings) as instance:
        return [
            [
                record.event_log_entry.timestamp
                for of_type in (dg.DagsterEventType.STEP_START, dg.DagsterEventType.STEP_SUCCESS)
                for record in instance.get_records_for_run(run.run_id, of_type=of_type).records
            ]
            for run in instance.get_runs(limit=count)
        ]


def span_of_steps(times: list[float]) -> tuple[float, float]:
    return min(times), max(times)


def test_runs_of_one_process_take_turns(small_platform: Platform) -> None:
    async def both() -> list[AggregationSummary]:
        aggregators = [
            DailyMetricsAggregator(DAY - timedelta(days=n), max_retries=0) for n in (0, 1)
        ]
        return list(await asyncio.gather(*(aggregator.run() for aggregator in aggregators)))

    assert all(summary.all_saved for summary in asyncio.run(both()))
    (_, end), (start, _) = sorted(map(span_of_steps, newest_runs(small_platform, 2)))
    assert end <= start


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: run_daily_aggregation(DAY, tutor_ids=[]), "tutor_ids: found no id, expected"),
        (lambda: run_daily_aggregation(DAY, tutor_ids="T1"), "tutor_ids is a single text"),
        (
            lambda: run_daily_aggregation(DAY, tutor_ids=json.loads("[1]")),
            "tutor_ids.0: Input should be a valid",
        ),
        (lambda: run_daily_aggregation(DAY, tutor_ids=["a\0"]), r"found the id 'a\\x00'"),
        (lambda: run_daily_aggregation(DAY, retention_days=-400), "retention_days is -400; expect"),
        (
            lambda: DailyMetricsAggregator(DAY).cleanup_old_metrics(retention_days=0),
            "retention_days is 0; expected a whole number from 1 to 36500",
        ),
        (lambda: DailyMetricsAggregator(DAY, batch_size=0), "batch_size: Input should be greater"),
        (lambda: DailyMetricsAggregator(DAY, max_retries=-1), "max_retries: Input should be grea"),
        (
            lambda: DailyMetricsAggregator(DAY, retry_delay_seconds=float("nan")),
            "retry_delay_seconds: Input should be",
        ),
    ],
)
def test_unusable_arguments_are_refused_before_anything_starts(
    call: Callable[[], Any], expected: str, tmp_path: Path
) -> None:
    async def called() -> None:
        await call()

    with pytest.raises(OptionsError, match=expected):
        asyncio.run(called())

    assert list(tmp_path.iterdir()) == []


def test_only_unknown_tutors_are_refused_in_python_too(small_platform: Platform) -> None:
    with pytest.raises(UnknownTutorsError, match=r"None of the tutors is in .*: 'nobody'"):
        asyncio.run(run_daily_aggregation(DAY, tutor_ids=["nobody"]))


@pytest.mark.parametrize(
    "reference_date",
    ["2025-11-07", DAY, datetime(2025, 11, 7, 23, tzinfo=UTC)],
)
def test_a_reference_date_may_be_text_a_date_or_a_datetime(reference_date: date | str) -> None:
    assert DailyMetricsAggregator(reference_date).reference_date == DAY


@pytest.mark.parametrize("value", ["07.11.2025", "", 20251107, 0, DAY.toordinal() + 0.5])
def test_what_is_no_date_is_refused(value: Any) -> None:
    with pytest.raises(ReferenceDateError, match=r"not a date; expected .*YYYY-MM-DD"):
        DailyMetricsAggregator(value)


@pytest.mark.parametrize("tutor_ids", [[], ["nobody"]])
def test_a_run_of_the_launchpad_refuses_tutors_that_are_none(
    small_platform: Platform, tutor_ids: list[str]
) -> None:
    job = build_definitions(small_platform.settings).resolve_job_def(JOB_NAME)
    with dagster_instance(small_platform.settings) as instance:
        result = job.execute_in_process(
            instance=instance,
            run_config={"resources": {"run_options": {"config": {"tutor_ids": tutor_ids}}}},
            raise_on_error=False,
            partition_key=DAY.isoformat(),
        )

    assert not result.success
    assert small_platform.metrics().is_empty()


def test_a_run_goes_by_the_settings_that_it_is_given(
    small_platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment names another database, storage, policy and cluster."""
    for name, value in {
        "TUTORMAX_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nowhere",
        "TUTORMAX_STORAGE": str(tmp_path / "elsewhere"),
        "TUTORMAX_HOME": str(tmp_path / "another home"),
        "TUTORMAX_POLICY": str(tmp_path / "missing.toml"),
        "TUTORMAX_DASK_ADDRESS": "tcp://127.0.0.1:1",
        "TUTORMAX_TIMEZONE": "Asia/Tokyo",
    }.items():
        monkeypatch.setenv(name, value)

    [summary] = small_platform.run(str(DAY))

    assert summary.all_saved
    assert small_platform.metrics()["tutor_id"].n_unique() == summary.total_tutors
    assert not small_platform.partition("tutor_tiers", str(DAY)).is_empty()
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "another home").exists()


def test_a_cluster_is_that_of_the_settings(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutormax_assets.compute.dask.ANSWER_SECONDS", 1)
    settings = small_platform.settings.model_copy(
        update={"dask_address": "tcp://127.0.0.1:1", "home": small_platform.settings.home_path}
    )

    [summary] = aggregate(settings, [DAY], RunOptions(max_retries=0))

    [error] = summary.errors
    assert "No connection to the Dask scheduler at tcp://127.0.0.1:1" in error["error"]
