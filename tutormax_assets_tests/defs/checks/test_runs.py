"""The checks in runs: a status for each day, what a failure stops, and what it says."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import sqlalchemy as sa

from tutormax_assets.database.connection import create_engine
from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.defs.automation.alerts import late_dates
from tutormax_assets.defs.checks.refreshes import REFRESHES_ARE_RIGHT
from tutormax_assets.defs.checks.volumes import sessions_by_day
from tutormax_assets.runs.failures import step_failure
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.tags import RANGE_END_TAG, RANGE_START_TAG
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets_tests.cli.conftest import Invoke, invoke  # noqa: F401
from tutormax_assets_tests.conftest import (
    Platform,
    captured_log,
    new_database,
    open_platform,
)

# One process runs them all, so that the platforms are made once.
pytestmark = pytest.mark.xdist_group("checks")

DAYS = ["2025-11-03", "2025-11-04", "2025-11-05", "2025-11-06", "2025-11-07"]
LAST = DAYS[-1]

CHECKS = {
    "sessions_snapshot": [
        "few_rows_set_aside",
        "no_duplicate_sessions",
        "engagement_scores_fill_their_scale",
        "feedback_is_of_the_sessions_tutor",
        "tutors_are_known",
        "sessions_are_fresh",
        "feedback_is_fresh",
        "shortest_window_is_whole",
        "day_volume_is_usual",
    ],
    "tutor_events_snapshot": [
        "few_rows_set_aside",
        "events_are_fresh",
        "shortest_window_is_whole",
        "day_volume_is_usual",
    ],
    "metrics_7day": ["values_in_range", "one_row_per_tutor", "null_shares_are_steady"],
    "metrics_30day": ["values_in_range", "one_row_per_tutor", "null_shares_are_steady"],
    "metrics_90day": ["values_in_range", "one_row_per_tutor", "null_shares_are_steady"],
    "tutor_tiers": ["every_tutor_has_a_tier", "counts_never_shrink", "tiers_are_steady"],
    "tutor_tier_reasons": ["reasons_agree_with_tiers", "evidence_is_sufficient"],
    "tutor_tier_changes": ["splits_add_up"],
    "tutor_performance_metrics": ["rows_are_as_computed", "every_tutor_has_all_windows"],
}
ALL = {(asset, name) for asset, names in CHECKS.items() for name in names}

Statuses = Mapping[str, set[tuple[str, str, str]]]
"""By status: asset, check and day."""


@pytest.fixture(scope="module")
def good_database(
    server_url: sa.URL, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Name of a database with a platform in which every check passes."""
    with new_database(server_url, template=template_database) as url:
        engine = create_engine(url)
        sample_platform.generate(
            engine,
            tutors=100,
            sessions_per_tutor=40,
            days=110,
            end=date.fromisoformat(LAST),
            seed=3,
        )
        engine.dispose()
        yield str(url.database)


@pytest.fixture
def good(server_url: sa.URL, good_database: str, tmp_path: Path) -> Iterator[Platform]:
    """That platform, with a Dagster home of its own."""
    with (
        new_database(server_url, template=good_database) as url,
        open_platform(url, tmp_path / "home") as platform,
    ):
        yield platform


@pytest.fixture(scope="module")
def computed_good_template(
    server_url: sa.URL, good_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Name of a database, and a home: the platform of ``good`` after a run of the last date."""
    home = tmp_path_factory.mktemp("good") / "home"
    with new_database(server_url, template=good_database) as url:
        with open_platform(url, home) as platform:
            assert platform.run(LAST)[0].all_saved
        yield str(url.database), home


@pytest.fixture
def computed_good(
    server_url: sa.URL, computed_good_template: tuple[str, Path], tmp_path: Path
) -> Iterator[Platform]:
    """A copy of the platform of ``good`` after a run of the last date, for a test to change."""
    template, home = computed_good_template
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    with (
        new_database(server_url, template=template) as url,
        open_platform(url, tmp_path / "home") as platform,
    ):
        yield platform


def run_range(
    platform: Platform, *days: str, resources: Mapping[str, Any] | None = None, **options: Any
) -> dg.ExecuteInProcessResult:
    """The job for all days in one run, as a backfill in the UI launches it."""
    job = build_definitions(platform.settings).resolve_job_def(JOB_NAME)
    with dagster_instance(platform.settings) as instance:
        return job.execute_in_process(
            instance=instance,
            tags={RANGE_START_TAG: days[0], RANGE_END_TAG: days[-1]},
            run_config={
                "resources": {"run_options": {"config": options}, **(resources or {})},
                "loggers": {"line": {}},
            },
            raise_on_error=False,
        )


def run_checks(
    platform: Platform, day: str | None, *assets: str, only: str | None = None
) -> dg.ExecuteInProcessResult:
    """The checks of some assets alone, or one of them; the UI names no day."""
    job = dg.define_asset_job(
        "checks",
        dg.AssetSelection.checks(dg.AssetCheckKey(dg.AssetKey(assets[0]), only))
        if only
        else dg.AssetSelection.checks_for_assets(*assets)
        - dg.AssetSelection.checks(REFRESHES_ARE_RIGHT),
    )
    definitions = dg.Definitions.merge(
        build_definitions(platform.settings), dg.Definitions(jobs=[job])
    )
    with dagster_instance(platform.settings) as instance:
        return definitions.resolve_job_def("checks").execute_in_process(
            instance=instance,
            # partition_key= is refused for a job without assets.
            tags={"dagster/partition": day} if day else {},
            run_config={"loggers": {"line": {}}},
            raise_on_error=False,
        )


def statuses(platform: Platform) -> Statuses:
    """What the UI shows for each day of each check, from where the UI has it."""
    definitions = build_definitions(platform.settings)
    [daily] = {
        spec.partitions_def
        for checks in definitions.asset_checks or []
        for spec in specs(checks)
        if spec.partitions_def is not None
    }
    keys = [dg.AssetCheckKey(dg.AssetKey(asset), name) for asset, name in ALL]
    found: dict[str, set[tuple[str, str, str]]] = {}
    with dagster_instance(platform.settings) as instance:
        states = instance.event_log_storage.get_asset_check_state([(key, daily) for key in keys])
    for key, state in states.items():
        for status, subset in state.subsets.items():
            found.setdefault(status.value, set()).update(
                (key.asset_key.to_user_string(), key.name, day)
                for day in subset.subset_value.get_partition_keys()
            )
    return {status: checks for status, checks in found.items() if checks}


def errors_on_the_page(platform: Platform, run_id: str) -> list[str]:
    """What the page of a run shows at the level of errors: messages, and traces behind them."""
    with dagster_instance(platform.settings) as instance:
        entries = instance.all_logs(run_id)
    return [
        f"{entry.user_message} {getattr(entry.dagster_event, 'event_specific_data', '')}"
        for entry in entries
        if int(entry.level) >= logging.ERROR
    ]


def specs(checks: object) -> list[dg.AssetCheckSpec]:
    assert isinstance(checks, dg.AssetChecksDefinition)
    return list(checks.check_specs)


def evaluations(result: dg.ExecuteInProcessResult) -> dict[Any, dg.AssetCheckEvaluation]:
    return {
        (one.asset_key.to_user_string(), one.check_name, one.partition): one
        for one in result.get_asset_check_evaluations()
    }


def failed(result: dg.ExecuteInProcessResult) -> dict[tuple[str, str, str], str]:
    """Severity of each check that did not pass."""
    return {key: one.severity.value for key, one in evaluations(result).items() if not one.passed}


def saved_days(platform: Platform) -> list[str]:
    return [str(day) for day in platform.metrics()["calculation_date"].dt.date().unique().sort()]


def test_every_check_is_registered_with_its_days() -> None:
    from tutormax_assets.settings import load_settings

    definitions = build_definitions(load_settings())
    registered = [spec for checks in definitions.asset_checks or [] for spec in specs(checks)]
    # It is about several dates.
    [of_refreshes] = (spec for spec in registered if spec.key == REFRESHES_ARE_RIGHT)
    registered.remove(of_refreshes)

    assert sorted((spec.asset_key.to_user_string(), spec.name) for spec in registered) == sorted(
        ALL
    )
    assert all(isinstance(spec.partitions_def, dg.DailyPartitionsDefinition) for spec in registered)
    assert all(len(spec.description or "") > 20 for spec in registered)
    assert {
        (spec.asset_key.to_user_string(), spec.name) for spec in registered if not spec.blocking
    } == {
        ("sessions_snapshot", "no_duplicate_sessions"),
        ("sessions_snapshot", "engagement_scores_fill_their_scale"),
        ("sessions_snapshot", "feedback_is_of_the_sessions_tutor"),
        ("sessions_snapshot", "feedback_is_fresh"),
        ("sessions_snapshot", "day_volume_is_usual"),
        ("tutor_events_snapshot", "day_volume_is_usual"),
        *((f"metrics_{days}day", "null_shares_are_steady") for days in (7, 30, 90)),
        ("tutor_tiers", "tiers_are_steady"),
        ("tutor_tier_reasons", "evidence_is_sufficient"),
    }


def test_a_good_day_passes_in_a_run_of_its_own_and_in_a_range(good: Platform) -> None:
    with captured_log() as log:
        [summary] = good.run(DAYS[0])
    assert summary.all_saved
    assert statuses(good) == {"SUCCEEDED": {(*check, DAYS[0]) for check in ALL}}
    assert [line for line in log if line.startswith(("WARNING", "ERROR"))] == []

    result = run_range(good, *DAYS[:2])
    assert result.success
    assert set(evaluations(result)) == {(*check, day) for check in ALL for day in DAYS[:2]}
    assert statuses(good) == {"SUCCEEDED": {(*check, day) for check in ALL for day in DAYS[:2]}}
    with dagster_instance(good.settings) as instance:
        for (asset, _, day), one in evaluations(result).items():
            [newest] = instance.fetch_materializations(
                dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[day]), limit=1
            ).records
            assert one.target_materialization_data is not None
            assert one.target_materialization_data.storage_id == newest.storage_id
    compared = evaluations(result)["tutor_tiers", "tiers_are_steady", DAYS[1]]
    distributions = compared.metadata["distributions"]
    assert isinstance(distributions, dg.TableMetadataValue)
    assert len(distributions.records) == 3 * 5
    assert compared.description is None


def test_a_new_materialization_takes_the_old_status_away(computed_good: Platform) -> None:
    job = dg.define_asset_job("tiers", dg.AssetSelection.assets("tutor_tiers").without_checks())
    definitions = dg.Definitions.merge(
        build_definitions(computed_good.settings), dg.Definitions(jobs=[job])
    )
    with dagster_instance(computed_good.settings) as instance:
        definitions.resolve_job_def("tiers").execute_in_process(
            instance=instance, partition_key=LAST, run_config={"loggers": {"line": {}}}
        )
    assert {asset for asset, _, _ in statuses(computed_good)["SUCCEEDED"]} == CHECKS.keys() - {
        "tutor_tiers"
    }

    assert run_checks(computed_good, LAST, "tutor_tiers").success

    assert statuses(computed_good) == {"SUCCEEDED": {(*check, LAST) for check in ALL}}


def test_a_warning_is_of_its_day_only_and_stops_nothing(good: Platform) -> None:
    """Sessions of 4 November come four times: they are many for the date after it only."""
    good.execute(
        "INSERT INTO sessions (session_id, tutor_id, student_id, session_number, scheduled_start,"
        " actual_start, duration_minutes, subject, session_type, tutor_initiated_reschedule,"
        " no_show, late_start_minutes, engagement_score, learning_objectives_met,"
        " technical_issues) SELECT 'again-' || n || session_id, tutor_id, student_id,"
        " session_number, scheduled_start, actual_start, duration_minutes, subject, session_type,"
        " tutor_initiated_reschedule, no_show, late_start_minutes, engagement_score,"
        " learning_objectives_met, technical_issues FROM sessions, generate_series(1, 3) AS n"
        " WHERE scheduled_start >= '2025-11-04Z' AND scheduled_start < '2025-11-05Z'"
    )
    odd = ("sessions_snapshot", "day_volume_is_usual", "2025-11-05")

    with captured_log() as log:
        result = run_range(good, *DAYS[1:4])

    assert result.success
    assert failed(result) == {odd: "WARN"}
    assert statuses(good) == {
        "FAILED": {odd},
        "SUCCEEDED": {(*check, day) for check in ALL for day in DAYS[1:4]} - {odd},
    }
    [line] = [line for line in log if line.startswith("WARNING")]
    assert "sessions_snapshot of 2025-11-05, check day_volume_is_usual: 2025-11-04 has " in line
    assert saved_days(good) == DAYS[1:4]


def test_a_bad_day_is_blocked_and_the_others_are_saved(
    good: Platform,
    invoke: Invoke,  # noqa: F811
) -> None:
    """Ratings of 6 November are broken: they are in the windows of the last date only."""
    good.execute(
        "UPDATE student_feedback AS f SET overall_rating = 9 FROM sessions AS s"
        " WHERE s.session_id = f.session_id AND s.scheduled_start >= '2025-11-06Z'"
    )
    bad = ("sessions_snapshot", "few_rows_set_aside", LAST)

    with captured_log() as log:
        result = run_range(good, *DAYS[-2:])
    assert not result.success
    assert failed(result) == {bad: "ERROR"}
    advice = evaluations(result)[bad].metadata["advice"].value
    assert str(advice).startswith("`tutormax set-aside --date 2025-11-07` names them. Fix them")
    # The page of the run says why, before the trace of the step that Dagster fails.
    reason, trace, *_ = errors_on_the_page(good, result.run_id)
    assert reason.startswith("sessions_snapshot of 2025-11-07, check few_rows_set_aside: ")
    assert "blocking asset check failed" in trace
    assert log.count(f"ERROR {reason.strip()}") == 1
    # The days' statuses are there although the run stopped at the first stage.
    snapshots = {(*check, day) for check in ALL for day in DAYS[-2:] if "snapshot" in check[0]}
    assert statuses(good)["SUCCEEDED"] == snapshots - {bad}
    assert statuses(good)["FAILED"] == {bad}
    assert saved_days(good) == []

    summaries = good.run(*DAYS[-2:])

    assert [summary.all_saved for summary in summaries] == [True, False]
    assert saved_days(good) == DAYS[-2:-1]
    [error] = summaries[-1].errors
    assert error["tutor_id"] == "SYSTEM"
    assert error["error"].startswith("sessions_snapshot of 2025-11-07, check few_rows_set_aside: ")
    assert "student_feedback in the 7day window break the source contract" in error["error"]
    assert "`tutormax set-aside --date 2025-11-07` names them." in error["error"]
    computed = {(*check, day) for check in ALL for day in DAYS[-2:-1]}
    assert statuses(good)["SUCCEEDED"] == computed | (snapshots - {bad})

    shown = invoke("run", "--date", LAST, "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["errors"] == [error]

    # A limit in the policy file lets it through.
    policy = good.settings.home_path / "policy.toml"
    policy.write_text("[checks]\nset_aside_error_share = 0.5", encoding="utf-8")
    settings = good.settings.model_copy(update={"policy": policy})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTORMAX_POLICY", str(policy))
        [summary] = Platform(settings, good.engine).run(LAST)
    assert summary.all_saved
    assert statuses(good)["FAILED"] == {bad}
    assert saved_days(good) == DAYS[-2:]


def test_scores_on_another_scale_than_the_policys_are_named(good: Platform) -> None:
    policy = {"metrics_policy": {"config": {"overrides": {"session_score_scale": 100}}}}
    result = run_range(good, LAST, LAST, resources=policy)
    wrong = ("sessions_snapshot", "engagement_scores_fill_their_scale", LAST)
    assert failed(result)[wrong] == "WARN"

    good.execute("UPDATE sessions SET engagement_score = engagement_score * 100")
    result = run_range(good, LAST, LAST)

    too_large = ("sessions_snapshot", "few_rows_set_aside", LAST)
    assert failed(result) == {too_large: "ERROR"}
    said = str(evaluations(result)[too_large].description)
    assert "if the platform scores sessions from 0 to 100, set session_score_scale = 100 in" in said


def test_what_a_failed_check_shows_are_ids_only(good: Platform) -> None:
    good.execute("UPDATE sessions SET late_start_minutes = -4711 WHERE session_id LIKE '%7'")

    result = run_range(good, LAST, LAST)

    one = evaluations(result)["sessions_snapshot", "few_rows_set_aside", LAST]
    assert not one.passed
    first = one.metadata["first_rows"]
    assert isinstance(first, dg.TableMetadataValue)
    assert [column.name for column in first.schema.columns] == [
        "source_table",
        "row_key",
        "column",
        "reason",
    ]
    assert len(first.records) == 10
    assert first.records[0].data["row_key"].endswith("7")  # type: ignore[union-attr]
    assert one.metadata["see_the_rest"].value == f"tutormax set-aside --date {LAST}"
    assert "4711" not in repr(one)


def test_a_platform_that_lost_its_keys(good: Platform) -> None:
    good.execute("ALTER TABLE sessions DROP CONSTRAINT sessions_pkey CASCADE")
    good.execute("ALTER TABLE sessions DROP CONSTRAINT sessions_tutor_id_fkey")
    good.execute(
        "INSERT INTO sessions SELECT * FROM sessions WHERE session_id ="
        " (SELECT max(session_id) FROM sessions WHERE scheduled_start >= '2025-11-01Z')"
    )
    good.execute(
        "UPDATE student_feedback SET tutor_id = (SELECT min(tutor_id) FROM tutors)"
        " WHERE feedback_id LIKE '%7'"
    )
    good.execute("UPDATE sessions SET tutor_id = 'ghost' WHERE session_id LIKE '%1'")

    with captured_log() as log:
        result = run_range(good, LAST, LAST)

    assert failed(result) == {
        ("sessions_snapshot", "few_rows_set_aside", LAST): "ERROR",
        ("sessions_snapshot", "no_duplicate_sessions", LAST): "WARN",
        ("sessions_snapshot", "feedback_is_of_the_sessions_tutor", LAST): "WARN",
        ("sessions_snapshot", "tutors_are_known", LAST): "ERROR",
    }
    unknown = evaluations(result)["sessions_snapshot", "tutors_are_known", LAST]
    first = unknown.metadata["first_tutors"]
    assert isinstance(first, dg.TableMetadataValue)
    assert [record.data for record in first.records] == [{"tutor_id": "ghost"}]
    assert any(
        "check no_duplicate_sessions: 1 session ids come more than once" in line for line in log
    )
    assert saved_days(good) == []


def test_a_source_that_is_loaded_no_more(good: Platform) -> None:
    good.execute("DELETE FROM sessions WHERE scheduled_start >= '2025-10-31Z'")
    good.execute("DELETE FROM tutor_events WHERE event_timestamp >= '2025-11-02Z'")

    result = run_range(good, "2025-11-06", LAST)

    by_check = failed(result)
    fresh = {key: severity for key, severity in by_check.items() if "fresh" in key[1]}
    assert fresh == {
        ("sessions_snapshot", "sessions_are_fresh", "2025-11-06"): "WARN",
        ("sessions_snapshot", "sessions_are_fresh", LAST): "ERROR",
        ("tutor_events_snapshot", "events_are_fresh", "2025-11-06"): "WARN",
        ("tutor_events_snapshot", "events_are_fresh", LAST): "WARN",
    }
    assert not result.success


@pytest.mark.parametrize(("until", "severity"), [("2025-07-25Z", "ERROR"), ("2000-01-01Z", "WARN")])
def test_an_empty_horizon_is_stale_unless_nothing_was_before(
    good: Platform, until: str, severity: str
) -> None:
    good.execute(f"DELETE FROM sessions WHERE scheduled_start >= '{until}'")

    result = run_range(good, LAST, LAST)

    assert failed(result)["sessions_snapshot", "sessions_are_fresh", LAST] == severity


def metadata_of(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    """What the materialization or observation of an asset says in a run of one date."""
    events: list[dg.AssetMaterialization | dg.AssetObservation] = [
        event.step_materialization_data.materialization
        for event in result.get_asset_materialization_events()
    ]
    events += [
        event.asset_observation_data.asset_observation
        for event in result.get_asset_observation_events()
    ]
    [found] = [event for event in events if event.asset_key == dg.AssetKey(asset)]
    return {name: value.value for name, value in found.metadata.items()}


PICTURE = {
    "tutor_roster": ("dagster/partition_row_count",),
    "tutors_left_out": ("dagster/partition_row_count",),
    "sessions_snapshot": ("dagster/partition_row_count", "values_set_aside"),
    "tutor_tiers": ("dagster/partition_row_count",),
    "tutor_performance_metrics": (
        "total_tutors",
        "total_metrics_saved",
        "dagster/partition_row_count",
    ),
}
"""What materializations say of a whole date, by asset."""


def test_a_filtered_run_leaves_the_picture_of_its_day_whole(good: Platform) -> None:
    good.execute("UPDATE sessions SET late_start_minutes = -1 WHERE session_id LIKE '%77'")
    whole = run_range(good, LAST, LAST)
    before = {asset: metadata_of(whole, asset) for asset in PICTURE}
    # Broken and missing rows of others, which the run does not read.
    good.execute("UPDATE sessions SET late_start_minutes = -1 WHERE tutor_id > 'T000010'")
    good.execute("DELETE FROM sessions WHERE scheduled_start >= '2025-10-20Z'")
    two = good.metrics()["tutor_id"].unique().sort()[:2].to_list()

    result = run_range(good, LAST, LAST, tutor_ids=two)

    assert result.success
    assert failed(result) == failed(whole)
    done, of_whole = evaluations(result), evaluations(whole)
    assert set(done) == set(of_whole)
    for asset, name, metric in (
        ("sessions_snapshot", "few_rows_set_aside", "rows_set_aside"),
        ("metrics_7day", "one_row_per_tutor", "rows"),
        ("tutor_tiers", "every_tutor_has_a_tier", "tutors_of_the_roster"),
        ("tutor_performance_metrics", "rows_are_as_computed", "rows_computed"),
    ):
        key = (asset, name, LAST)
        assert done[key].metadata[metric] == of_whole[key].metadata[metric]
    tutors = before["tutor_performance_metrics"]["total_tutors"]
    now = {asset: metadata_of(result, asset) for asset in PICTURE}
    for asset, names in PICTURE.items():
        if asset == "sessions_snapshot":
            # Sessions of the two tutors are gone.
            assert 0 < now[asset][names[0]] < before[asset][names[0]]
            assert now[asset]["values_set_aside"] > len(now[asset]["set_aside_by_run"].records)
        else:
            assert {name: now[asset][name] for name in names} == {
                name: before[asset][name] for name in names
            }
    by_tier = now["tutor_tiers"]["tutors_by_tier"].records
    assert sum(record.data["7day"] for record in by_tier) == tutors
    assert now["tutor_performance_metrics"]["tutors_computed"] == f"2 of {tutors}"
    assert now["tutor_performance_metrics"]["summary"]["total_tutors"] == 2


def test_a_filtered_run_does_not_make_a_missing_night_look_done(
    good: Platform,
    invoke: Invoke,  # noqa: F811
) -> None:
    good.execute("UPDATE tutors SET status = 'active'")
    good.execute("UPDATE tutors SET status = 'churned' WHERE tutor_id = 'T000003'")

    def is_late() -> bool:
        day = date.fromisoformat(LAST)
        with dagster_instance(good.settings) as instance:
            return late_dates(instance, after=day - timedelta(days=1), up_to=day) == [day]

    inactive = invoke("run", "--date", LAST, "--tutors", "T000003", "--json")
    assert inactive.exit_code == 1
    [error] = json.loads(inactive.stdout)["errors"]
    assert error["error"] == (
        "None of the tutors is active: T000003. Set include_inactive (`--include-inactive`) to"
        " compute them."
    )
    assert is_late()

    result = run_range(good, LAST, LAST, tutor_ids=["T000001", "T000003"])

    assert result.success
    table = metadata_of(result, "tutor_performance_metrics")
    assert (table["tutors_computed"], table["total_tutors"]) == ("1 of 99", 1)
    assert failed(result) == {("tutor_tiers", "every_tutor_has_a_tier", LAST): "WARN"}
    said = evaluations(result)["tutor_tiers", "every_tutor_has_a_tier", LAST].description
    assert str(said).startswith("1 of 99 tutors are computed: only runs of some tutors have")
    # What is about the platform as a whole is not known.
    volume = evaluations(result)["sessions_snapshot", "shortest_window_is_whole", LAST]
    assert "only runs of some tutors" in str(volume.description)
    assert is_late()

    again = run_range(good, LAST, LAST, tutor_ids=["T000002", "T000003"], include_inactive=True)
    assert metadata_of(again, "tutor_performance_metrics")["tutors_computed"] == "2 of 100"
    assert good.partition("tutor_roster", LAST)["tutor_id"].to_list() == [
        "T000001",
        "T000002",
        "T000003",
    ]
    assert is_late()

    [summary] = good.run(LAST)
    assert summary.all_saved
    assert not is_late()
    assert good.partition("tutors_left_out", LAST)["tutor_id"].to_list() == ["T000003"]


def test_tutors_who_are_deleted_during_a_run_cost_nobody_else(
    good: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete_and_sum(rows: pl.LazyFrame) -> pl.LazyFrame:
        good.execute("DELETE FROM tutors WHERE tutor_id LIKE 'T00001%'")
        return sessions_by_day(rows)

    with monkeypatch.context() as patch:
        patch.setattr("tutormax_assets.defs.checks.volumes.sessions_by_day", delete_and_sum)
        [summary] = good.run(LAST)

    assert 0 < summary.failed < 11
    assert {error["tutor_id"][:6] for error in summary.errors} == {"T00001"}
    assert all("not in the database's tutors" in error["error"] for error in summary.errors)
    assert summary.successful == good.metrics()["tutor_id"].n_unique() > 70
    assert "FAILED" not in statuses(good)


def test_a_date_stays_green_after_its_tutors_were_deleted(computed_good: Platform) -> None:
    computed_good.execute("DELETE FROM tutors WHERE tutor_id LIKE 'T00001%'")

    for asset in ("sessions_snapshot", "tutor_performance_metrics"):
        result = run_checks(computed_good, LAST, asset)
        assert (result.success, failed(result)) == (True, {})
    table = evaluations(result)["tutor_performance_metrics", "rows_are_as_computed", LAST]
    assert table.metadata["tutors_deleted_since"].value in range(1, 11)


def test_days_whose_shortest_window_has_lost_most_of_its_events_are_blocked(
    good: Platform,
) -> None:
    good.execute("DELETE FROM tutor_events WHERE event_timestamp >= '2025-10-30Z'")

    result = run_range(good, *DAYS[1:])

    errors = {key for key, severity in failed(result).items() if severity == "ERROR"}
    lost, stale = "shortest_window_is_whole", "events_are_fresh"
    assert errors == {
        *(("tutor_events_snapshot", lost, day) for day in DAYS[1:]),
        *(("tutor_events_snapshot", stale, day) for day in DAYS[-2:]),
    }
    said = evaluations(result)["tutor_events_snapshot", lost, DAYS[1]].description
    assert str(said).startswith("The 7 days before 2025-11-04 have ")
    assert saved_days(good) == []


def test_shifts_are_judged_against_the_last_date_that_was_saved(good: Platform) -> None:
    good.run(DAYS[0])
    good.execute(
        "CREATE TABLE kept AS SELECT * FROM tutor_events WHERE event_timestamp >= '2025-10-28Z'"
    )
    good.execute("DELETE FROM tutor_events WHERE event_timestamp >= '2025-10-28Z'")
    [blocked] = good.run(DAYS[1])
    assert not blocked.all_saved
    good.execute("INSERT INTO tutor_events SELECT * FROM kept")
    good.execute("DELETE FROM student_feedback")

    [summary] = good.run(DAYS[2])

    assert summary.all_saved
    assert {name for _, name, day in statuses(good)["FAILED"] if day == DAYS[2]} == {
        "feedback_is_fresh",
        "null_shares_are_steady",
        "tiers_are_steady",
    }
    with dagster_instance(good.settings) as instance:
        [run, *_] = instance.get_runs(limit=1)
        said = [
            event.event_log_entry.dagster_event.asset_check_evaluation_data.description  # type: ignore[union-attr]
            for event in instance.get_records_for_run(
                run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
            ).records
        ]
    assert any(
        f"since {DAYS[0]}, the last date before it that is saved:" in str(text) for text in said
    )


def test_a_row_that_something_else_changed_fails_its_day(good: Platform) -> None:
    good.execute(
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN NEW.no_show_count := NEW.no_show_count + 1; RETURN NEW; END'"
    )
    good.execute(
        "CREATE TRIGGER meddle BEFORE INSERT OR UPDATE ON tutor_performance_metrics FOR EACH ROW"
        " WHEN (NEW.calculation_date = '2025-11-05Z' AND NEW.tutor_id = 'T000002')"
        " EXECUTE FUNCTION meddle()"
    )
    meddled = ("tutor_performance_metrics", "rows_are_as_computed", "2025-11-05")

    result = run_range(good, *DAYS[2:4])

    assert failed(result) == {meddled: "ERROR"}
    assert not result.success
    assert statuses(good) == {
        "FAILED": {meddled},
        "SUCCEEDED": {(*check, day) for check in ALL for day in DAYS[2:4]} - {meddled},
    }
    first = evaluations(result)[meddled].metadata["first_rows"]
    assert isinstance(first, dg.TableMetadataValue)
    assert [record.data for record in first.records] == [
        {"tutor_id": "T000002", "window": window, "problem": "other values"}
        for window in ("30day", "7day", "90day")
    ]

    summary, saved = good.run(*DAYS[2:4])
    assert saved.all_saved
    [error] = summary.errors
    assert "3 rows of 1 tutors are not as computed: 3 other values" in error["error"]


def test_the_table_is_checked_again_when_asked_for(good: Platform) -> None:
    table = "tutor_performance_metrics"
    [too_early] = run_checks(good, None, table).get_step_failure_events()
    assert step_failure(too_early).startswith(f"{table} has no date to check. Materialize")

    good.run(LAST)
    with dagster_instance(good.settings) as instance:
        # The newest date is not the one that was materialized last.
        instance.report_runless_asset_event(dg.AssetMaterialization(table, partition=DAYS[0]))
    newest = run_checks(good, None, *CHECKS)
    assert newest.success
    assert evaluations(newest).keys() == {(*check, LAST) for check in ALL}
    assert failed(newest) == {}
    # A row of the replaced service, at its own time of the day.
    good.execute(
        f'INSERT INTO {table} (metric_id, tutor_id, calculation_date, "window",'
        " sessions_completed, no_show_count)"
        f" VALUES ('old', 'T000002', '{LAST} 02:30Z', 'SEVEN_DAY', 0, 0)"
    )
    assert failed(run_checks(good, LAST, table)) == {(table, "rows_are_as_computed", LAST): "WARN"}
    good.execute(f"DELETE FROM {table} WHERE metric_id = 'old'")

    good.execute(f"UPDATE {table} SET avg_rating = 1.23 WHERE tutor_id = 'T000002'")
    good.execute(f"DELETE FROM {table} WHERE tutor_id = 'T000003' AND \"window\" = '7day'")
    result = run_checks(good, LAST, table)

    assert failed(result) == {
        (table, "rows_are_as_computed", LAST): "ERROR",
        (table, "every_tutor_has_all_windows", LAST): "ERROR",
    }
    assert (
        evaluations(result)[table, "rows_are_as_computed", LAST].metadata["failed_tutors"].value
        == 2
    )

    alone = run_checks(good, LAST, table, only="every_tutor_has_all_windows")
    assert list(evaluations(alone)) == [(table, "every_tutor_has_all_windows", LAST)]

    [summary] = good.run(LAST)
    assert summary.all_saved
    assert statuses(good) == {"SUCCEEDED": {(*check, LAST) for check in ALL}}


def test_a_stored_partition_that_was_changed_fails(computed_good: Platform) -> None:
    [path] = (computed_good.storage / "metrics_30day" / f"{LAST}.parquet").iterdir()
    rows = pl.read_parquet(path, memory_map=False)
    rows.with_columns(avg_rating=pl.lit(7.0)).slice(1).write_parquet(path)

    result = run_checks(computed_good, LAST, "metrics_30day")

    assert failed(result) == {
        ("metrics_30day", "values_in_range", LAST): "ERROR",
        ("metrics_30day", "one_row_per_tutor", LAST): "ERROR",
    }


def test_values_that_went_missing_since_the_day_before(good: Platform) -> None:
    good.run(DAYS[-2])
    good.execute("DELETE FROM student_feedback")
    good.execute("UPDATE sessions SET engagement_score = 0, no_show = true")

    [summary] = good.run(LAST)

    assert summary.all_saved
    assert statuses(good)["FAILED"] == {
        ("sessions_snapshot", "feedback_is_fresh", LAST),
        ("tutor_tiers", "tiers_are_steady", LAST),
        *((f"metrics_{window}day", "null_shares_are_steady", LAST) for window in (7, 30, 90)),
    }


def test_tutors_who_could_not_be_written_are_counted(good: Platform) -> None:
    good.execute(
        "ALTER TABLE tutor_performance_metrics ADD CONSTRAINT no_such_tutor"
        " CHECK (tutor_id <> 'T000002')"
    )

    [summary] = good.run(LAST, batch_size=1)

    [error] = summary.errors
    assert error["tutor_id"] == "T000002"
    assert summary.successful == summary.total_tutors - 1
    assert statuses(good)["FAILED"] == {
        ("tutor_performance_metrics", "rows_are_as_computed", LAST),
        ("tutor_performance_metrics", "every_tutor_has_all_windows", LAST),
    }
