"""The daily job, end to end: a platform in PostgreSQL, the job, and what the table holds then."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal

from tutormax_assets.api.summary import AggregationSummary
from tutormax_assets.database import tables
from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.settings import load_settings
from tutormax_assets_tests.conftest import (
    GOLDEN,
    PARQUET_ASSETS,
    PASSWORD,
    STANDALONE_ASSETS,
    Platform,
    captured_log,
    new_database,
    open_platform,
)

# In no order, and the middle one last.
GOLDEN_DAYS = ("2025-11-07", "2025-10-01", "2025-11-06")
DAY = "2025-11-07"
WEEK_END = ("2025-11-05", "2025-11-06", "2025-11-07")

KEY = ["tutor_id", "calculation_date", "window"]
COUNTS = ["sessions_completed", "no_show_count"]
RATES = [
    "avg_rating",
    "first_session_success_rate",
    "reschedule_rate",
    "engagement_score",
    "learning_objectives_met_pct",
    "response_time_avg_minutes",
]
VALUES = [*KEY, *COUNTS, *RATES, "performance_tier"]


@dataclass(frozen=True)
class GoldenRun:
    """The golden platform after a run of each of the three dates, tutors of any status."""

    url: sa.URL
    home: Path
    summaries: Sequence[AggregationSummary]

    @contextmanager
    def open(self) -> Iterator[Platform]:
        with open_platform(self.url, self.home) as platform:
            yield platform


@pytest.fixture(scope="module")
def golden_run(
    server_url: sa.URL, golden_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GoldenRun]:
    home = tmp_path_factory.mktemp("golden") / "home"
    with new_database(server_url, template=golden_template) as url:
        with open_platform(url, home) as platform:
            summaries = [
                summary
                for day in GOLDEN_DAYS
                for summary in platform.run(day, include_inactive=True)
            ]
        yield GoldenRun(url, home, summaries)


@pytest.fixture
def golden(golden_run: GoldenRun) -> Iterator[Platform]:
    """For tests that leave what they found."""
    with golden_run.open() as platform:
        yield platform


def golden_answers() -> pl.DataFrame:
    return pl.read_parquet(GOLDEN / "expected_metrics.parquet", memory_map=False).sort(KEY)


def assert_as_golden(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Counts and tiers are equal, rates lie within 0.01 and 98 % of them are equal."""
    exact = [*KEY, *COUNTS, "performance_tier"]
    assert_frame_equal(found.select(exact), expected.select(exact))
    assert_frame_equal(found.select(RATES), expected.select(RATES), rel_tol=0, abs_tol=0.01 + 1e-9)
    for name in RATES:
        equal = found[name].eq_missing(expected[name])
        assert equal.mean() >= 0.98, name  # type: ignore[operator]


def test_the_table_holds_the_golden_answers(golden: Platform) -> None:
    assert_as_golden(golden.metrics(), golden_answers())


def test_the_summaries_count_what_is_in_the_table(golden_run: GoldenRun) -> None:
    assert [summary.run_date for summary in golden_run.summaries] == [
        datetime.fromisoformat(day).replace(tzinfo=UTC) for day in GOLDEN_DAYS
    ]
    for summary in golden_run.summaries:
        assert (summary.total_tutors, summary.successful, summary.failed) == (195, 195, 0)
        assert summary.total_metrics_saved == 3 * 195
        assert summary.errors == []
        assert summary.total_runtime_seconds > 0


def test_the_tiers_in_parquet_are_those_in_the_table(golden: Platform) -> None:
    rows = golden.metrics().filter(pl.col("calculation_date") == datetime(2025, 11, 7, tzinfo=UTC))
    names = [name for name in VALUES if name != "calculation_date"]
    tiers = golden.partition("tutor_tiers", DAY).sort("tutor_id", "window").select(names)
    assert_frame_equal(tiers, rows.select(names), check_dtypes=False)


def test_running_a_date_again_changes_nothing(golden: Platform) -> None:
    rows = golden.metrics()
    files = {asset: golden.partition(asset, DAY) for asset in STANDALONE_ASSETS}

    with captured_log() as log:
        [summary] = golden.run(DAY, include_inactive=True)

    assert summary.total_metrics_saved == 585
    assert (
        "INFO Batch 1/1 of 2025-11-07 committed (195 tutors: 0 inserted, 0 updated, 585 unchanged)"
        in log
    )
    assert_frame_equal(golden.metrics(), rows)
    for asset, frame in files.items():
        assert_frame_equal(golden.partition(asset, DAY), frame, check_row_order=False)


def test_tutors_who_are_not_active_are_left_out_by_default(golden_platform: Platform) -> None:
    golden_platform.execute("UPDATE tutors SET status = upper(status) WHERE tutor_id LIKE '%1'")
    with golden_platform.engine.connect() as connection:
        active = set(
            connection.scalars(
                sa.select(tables.tutors.c.tutor_id).where(tables.tutors.c.status.ilike("active"))
            )
        )

    [summary] = golden_platform.run(DAY)

    assert summary.total_tutors == len(active) == 180
    expected = golden_answers().filter(
        pl.col("calculation_date") == datetime(2025, 11, 7, tzinfo=UTC),
        pl.col("tutor_id").is_in(active),
    )
    assert_as_golden(golden_platform.metrics(), expected)


def test_a_range_gives_the_same_rows_as_single_runs_in_any_order(
    golden_run: GoldenRun, golden_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that it is two runs: one of two dates and one of the third.
    monkeypatch.setenv("TUTORMAX_MAX_DATES_PER_RUN", "2")
    golden_platform = replace(golden_platform, settings=load_settings())

    summaries = golden_platform.run(*WEEK_END, include_inactive=True)

    assert [str(summary.run_date.date()) for summary in summaries] == list(WEEK_END)
    assert [summary.total_metrics_saved for summary in summaries] == [585] * 3
    both = pl.col("calculation_date") >= datetime(2025, 11, 6, tzinfo=UTC)
    found = golden_platform.metrics()
    assert len(found) == 3 * 585
    with golden_run.open() as golden:
        names = ["metric_id", *VALUES]
        assert_frame_equal(
            found.filter(both).select(names), golden.metrics().filter(both).select(names)
        )
        for asset in STANDALONE_ASSETS:
            for day in WEEK_END[1:]:
                assert_frame_equal(
                    golden_platform.partition(asset, day),
                    golden.partition(asset, day),
                    check_row_order=False,
                )


def test_a_date_that_fails_does_not_lose_the_others_of_its_range(
    small_platform: Platform,
) -> None:
    # A file cannot take the place of this folder.
    obstacle = small_platform.storage / "tutor_tiers" / f"{WEEK_END[1]}.json"
    obstacle.mkdir(parents=True)

    with captured_log() as log:
        failed, saved = small_platform.run(*WEEK_END[1:])

    assert saved.all_saved
    [error] = failed.errors
    assert error["tutor_id"] == "SYSTEM"
    assert obstacle.name in error["error"]
    assert "WARNING The run of 2025-11-06 to 2025-11-07 failed; running each date by itself" in log
    dates = small_platform.metrics()["calculation_date"].dt.date().unique()
    assert dates.to_list() == [date(2025, 11, 7)]
    assert sorted(path.stem for path in obstacle.parent.glob("*.json")) == [*WEEK_END[1:]]


def test_a_filtered_run_touches_only_its_tutors(computed_platform: Platform) -> None:
    rows = computed_platform.metrics()
    files = {asset: computed_platform.partition(asset, DAY) for asset in PARQUET_ASSETS}
    computed_platform.execute(
        "UPDATE sessions SET engagement_score = 0.01, late_start_minutes = 60, session_number = 1,"
        " tutor_initiated_reschedule = true, no_show = true, learning_objectives_met = false"
    )
    computed_platform.execute("UPDATE student_feedback SET overall_rating = 1")
    computed_platform.execute("DELETE FROM tutor_events")
    two = rows["tutor_id"].unique().sort()[3:5].to_list()

    [summary] = computed_platform.run(DAY, tutor_ids=two)

    assert (summary.total_tutors, summary.total_metrics_saved) == (2, 6)
    others = ~pl.col("tutor_id").is_in(two)
    found = computed_platform.metrics()
    assert_frame_equal(found.filter(others), rows.filter(others))
    assert found.filter(~others)["avg_rating"].drop_nulls().unique().to_list() == [1]
    assert (found.filter(~others)["updated_at"] > rows["updated_at"].max()).all()
    for asset, frame in files.items():
        now = computed_platform.partition(asset, DAY)
        assert_frame_equal(now.filter(others), frame.filter(others), check_row_order=False)
        if asset.startswith("metrics_"):
            assert not now.filter(~others).equals(frame.filter(~others))


def test_unknown_and_inactive_tutors_are_named_and_the_others_are_computed(
    small_platform: Platform,
) -> None:
    small_platform.execute("UPDATE tutors SET status = 'Churned' WHERE tutor_id = 'T000001'")

    with captured_log() as log:
        [summary] = small_platform.run(DAY, tutor_ids=["T000001", "T000002", "no'body", "missing"])

    unknown = "The tutor is not in the platform's tutors. Check the id."
    assert {f"ERROR missing: {unknown}", f"ERROR no'body: {unknown}"} <= set(log)
    assert (
        "WARNING Inactive tutors are left out: T000001."
        " Set include_inactive (`--include-inactive`) to compute them."
    ) in log
    assert (summary.total_tutors, summary.successful, summary.failed) == (3, 1, 2)
    assert small_platform.metrics()["tutor_id"].unique().to_list() == ["T000002"]


def run_with_policy(platform: Platform, overrides: dict[str, Any]) -> dg.ExecuteInProcessResult:
    job = build_definitions(platform.settings).resolve_job_def(JOB_NAME)
    with dagster_instance(platform.settings) as instance:
        return job.execute_in_process(
            instance=instance,
            partition_key=DAY,
            run_config={
                "resources": {"metrics_policy": {"config": {"overrides": overrides}}},
                "loggers": {"line": {}},
            },
            raise_on_error=False,
        )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"weights": {"login": 0.9}}, "weights: login 0.9 + session 0.4 + punctual 0.2 is 1.5"),
        ({"windows": [7]}, "windows cannot be set for one run"),
    ],
)
def test_a_wrong_policy_of_a_run_is_refused_with_its_reason(
    small_platform: Platform, overrides: dict[str, Any], expected: str
) -> None:
    result = run_with_policy(small_platform, overrides)

    assert not result.success
    reasons = [
        event.step_failure_data.error.to_string()
        for event in result.get_step_failure_events()
        if event.step_failure_data.error is not None
    ]
    assert any(expected in reason for reason in reasons)
    assert small_platform.metrics().is_empty()


def test_a_policy_of_a_run_is_used(small_platform: Platform) -> None:
    assert run_with_policy(small_platform, {"tier_flags": {"at_risk_red": 6}}).success

    red = small_platform.partition("tutor_tiers", DAY).filter(pl.col("red_flags").is_between(3, 5))
    assert len(red) > 5
    assert red["performance_tier"].unique().to_list() == ["Needs Attention"]
    assert "At Risk" not in small_platform.metrics()["performance_tier"]


def test_a_platform_without_tutors_fails_with_a_sentence(platform: Platform) -> None:
    [summary] = platform.run(DAY)

    [error] = summary.errors
    assert "table tutors: found no row, expected at least one tutor" in error["error"]


def test_a_platform_without_active_tutors_is_no_failure(platform: Platform) -> None:
    platform.add(tables.tutors, {"tutor_id": "t", "status": "churned"})

    [summary] = platform.run(DAY)

    assert (summary.total_tutors, summary.success_rate, summary.all_saved) == (0, 0, True)
    assert platform.partition("tutor_tiers", DAY).is_empty()


def test_broken_values_are_set_aside_and_the_rest_of_the_row_counts(platform: Platform) -> None:
    at = datetime(2025, 11, 6, 12, tzinfo=UTC)
    good: dict[str, Any] = {
        "tutor_id": "t",
        "scheduled_start": at,
        "actual_start": at,
        "engagement_score": 0.5,
    }
    platform.add(
        tables.sessions,
        {**good, "session_id": "good"},
        {**good, "session_id": "engaged", "engagement_score": 1.5},
        {**good, "session_id": "early", "late_start_minutes": -1},
        {**good, "session_id": "zeroth", "session_number": 0},
        {**good, "session_id": "nan", "engagement_score": float("nan")},
        {**good, "session_id": "old", "scheduled_start": at - timedelta(days=80), "no_show": True},
    )
    platform.add(
        tables.student_feedback,
        {"feedback_id": "f1", "session_id": "good", "tutor_id": "t", "overall_rating": 4},
        {"feedback_id": "f2", "session_id": "early", "tutor_id": "t", "overall_rating": 6},
        {"feedback_id": "f3", "session_id": "zeroth", "tutor_id": "other", "overall_rating": 1},
    )
    response = {"tutor_id": "t", "event_timestamp": at, "event_type": "message_response"}
    platform.add(
        tables.tutor_events,
        *(
            {**response, "event_id": f"e{number}", "metadata": {"response_time_minutes": value}}
            for number, value in enumerate([10, "fast", -1, None])
        ),
        {**response, "event_id": "absent", "metadata": {}},
    )

    with captured_log() as log:
        [summary] = platform.run(DAY)

    assert summary.all_saved
    row = platform.metrics().filter(tutor_id="t", window="7day").to_dicts()[0]
    assert {name: row[name] for name in (*COUNTS, *RATES)} == {
        "sessions_completed": 5,
        "no_show_count": 0,
        "avg_rating": 4.0,
        "first_session_success_rate": None,
        "reschedule_rate": 0.0,
        # No login, a mean of 50 and all sessions punctual whose lateness is known.
        "engagement_score": 40.0,
        "learning_objectives_met_pct": None,
        "response_time_avg_minutes": 10.0,
    }
    aside = platform.partition("sessions_set_aside", DAY)
    assert aside["date"].unique().to_list() == [at.date()]
    assert aside["tutor_id"].unique().to_list() == ["t"]
    assert set(aside.select("source_table", "row_key", "column", "reason").rows()) == {
        ("sessions", "engaged", "engagement_score", "not within 0 and 1"),
        ("sessions", "nan", "engagement_score", "not within 0 and 1"),
        ("sessions", "early", "late_start_minutes", "negative"),
        ("sessions", "zeroth", "session_number", "below 1"),
        ("student_feedback", "f2", "overall_rating", "not within 1 and 5"),
        ("student_feedback", "f3", "tutor_id", "not the session's tutor"),
    }
    aside = platform.partition("tutor_events_set_aside", DAY)
    assert set(aside.select("row_key", "reason").rows()) == {
        ("e1", "not a finite number"),
        ("e2", "negative"),
    }
    assert "WARNING Set aside 2 of sessions: engagement_score is not within 0 and 1" in log
    assert "INFO Read 6 sessions, set 6 values aside" in log


BROKEN_SOURCES = """
ALTER TABLE sessions ALTER engagement_score TYPE numeric, ALTER session_number TYPE bigint,
    ALTER tutor_id DROP NOT NULL, DROP CONSTRAINT sessions_tutor_id_fkey;
CREATE TABLE chosen AS
SELECT session_id, row_number() OVER (ORDER BY session_id) AS n
FROM sessions WHERE scheduled_start BETWEEN '2025-10-20' AND '2025-11-06';
UPDATE sessions AS s SET
    engagement_score = CASE chosen.n WHEN 1 THEN 7e400 WHEN 2 THEN 'NaN' WHEN 3 THEN -7e400
        WHEN 4 THEN 'Infinity' WHEN 5 THEN 7e-400 ELSE engagement_score END,
    session_number = CASE chosen.n WHEN 6 THEN -9e18 ELSE session_number END,
    tutor_id = CASE chosen.n WHEN 7 THEN NULL WHEN 8 THEN '' WHEN 9 THEN 'gone' ELSE tutor_id END,
    scheduled_start = CASE chosen.n WHEN 10 THEN 'infinity' WHEN 11 THEN '-infinity'
        WHEN 12 THEN '20000-01-01' WHEN 13 THEN '0044-03-15 BC' ELSE scheduled_start END,
    actual_start = CASE chosen.n WHEN 14 THEN 'infinity' ELSE actual_start END
FROM chosen WHERE s.session_id = chosen.session_id;
UPDATE tutor_events SET event_timestamp = CASE right(event_id, 1)
    WHEN '1' THEN 'infinity'::timestamptz WHEN '2' THEN '-infinity'
    WHEN '3' THEN '20000-01-01' ELSE '0044-03-15 BC' END
WHERE event_timestamp < '2025-09-01';
DELETE FROM tutor_events WHERE event_type <> 'login';
CREATE TYPE event AS ENUM ('login');
ALTER TABLE tutor_events ALTER event_type TYPE event USING event_type::event;
ALTER TABLE tutors RENAME TO people;
CREATE VIEW tutors AS SELECT tutor_id, status FROM people
UNION ALL SELECT tutor_id, upper(status) FROM people WHERE tutor_id IN ('T000001', 'T000002')
UNION ALL VALUES (NULL, 'active'), (NULL, NULL), ('', 'active');
"""


def test_no_broken_value_ends_a_run_and_none_is_repeated(small_platform: Platform) -> None:
    with small_platform.engine.begin() as connection:
        for statement in BROKEN_SOURCES.split(";\n"):
            connection.exec_driver_sql(statement)
        broken = connection.scalars(
            sa.text("SELECT session_id FROM chosen WHERE n IN (1, 2, 3, 4, 6)")
        ).all()

    with captured_log() as log:
        [summary] = small_platform.run(DAY)

    assert (summary.failed, summary.total_tutors, summary.errors) == (0, summary.successful, [])
    tutors = small_platform.partition("tutor_roster", DAY)["tutor_id"]
    assert tutors.is_unique().all()
    assert {"T000001", "T000002"} <= set(tutors)
    assert not {"", None} & set(tutors)
    aside = small_platform.partition("sessions_set_aside", DAY)
    assert set(broken) <= set(aside["row_key"])
    assert "WARNING Table tutors: left out 3 rows without a tutor_id" in log
    repeated = "WARNING Table tutors: 2 ids are repeated, such as T000001; each tutor is computed"
    assert f"{repeated} once" in log
    # Neither as PostgreSQL writes it nor as Python does.
    values = re.compile(r"7e[-+]?400|70{99}|NaN", re.IGNORECASE)
    assert not [line for line in log if values.search(line)]


def test_tutors_with_two_statuses_are_a_sentence(small_platform: Platform) -> None:
    small_platform.execute("ALTER TABLE tutors RENAME TO people")
    small_platform.execute(
        "CREATE VIEW tutors AS SELECT tutor_id, status FROM people"
        " UNION ALL SELECT tutor_id, 'other' FROM people WHERE tutor_id = 'T000001'"
    )

    [summary] = small_platform.run(DAY)

    assert "found more than one status for 1 tutors, such as T000001" in summary.errors[0]["error"]


def test_nothing_personal_and_no_secret_is_kept_anywhere(
    small_platform: Platform, tmp_path: Path
) -> None:
    small_platform.execute(
        "UPDATE student_feedback SET free_text_feedback = 'Free text ' || feedback_id"
    )
    private = [
        "SELECT name FROM tutors",
        "SELECT email FROM tutors",
        "SELECT student_id FROM students",
        "SELECT name FROM students",
        "SELECT free_text_feedback FROM student_feedback",
    ]
    with small_platform.engine.connect() as connection:
        secrets = [
            PASSWORD,
            *(value for query in private for value in connection.scalars(sa.text(query))),
        ]
    assert len(secrets) > 500

    home = tmp_path / "own"
    with (
        open_platform(small_platform.url, home) as platform,
        captured_log() as log,
    ):
        platform.run(DAY)
        # One that fails says more than one that does not.
        platform.execute(
            "ALTER TABLE tutor_performance_metrics ADD CHECK (tutor_id <> 'T000001') NOT VALID"
        )
        platform.execute("UPDATE sessions SET no_show = true")
        [failed] = platform.run(DAY, batch_size=1)
        assert failed.failed == 1

    kept = "\n".join(log).encode()
    for path in home.rglob("*"):
        if path.suffix == ".parquet" and path.is_file():
            kept += pl.read_parquet(path, memory_map=False).write_csv().encode()
        elif path.is_file():
            kept += path.read_bytes()
    assert b"T000001" in kept
    assert b"daily_metrics" in kept
    assert [secret for secret in secrets if secret.encode() in kept] == []


def test_a_day_begins_at_local_midnight(
    database: sa.URL, tmp_path: Path, shared_dagster_home: Path
) -> None:
    """The clocks went back on 2 November, so the week of these reference dates has an hour more."""
    instants = {
        "before": datetime(2025, 10, 27, 3, 59, 59, 999999, tzinfo=UTC),
        "first": datetime(2025, 10, 27, 4, tzinfo=UTC),
        "last": datetime(2025, 11, 3, 4, 59, 59, 999999, tzinfo=UTC),
        "after": datetime(2025, 11, 3, 5, tzinfo=UTC),
    }
    with open_platform(
        database,
        tmp_path / "home",
        TUTORMAX_TIMEZONE="America/New_York",
        DAGSTER_HOME=str(shared_dagster_home),
    ) as platform:
        for name, at in instants.items():
            # The number of days in a window shows in the counts, and which they are in the times.
            platform.add(
                tables.sessions,
                {"session_id": name, "tutor_id": "t", "scheduled_start": at, "actual_start": at},
            )
            platform.add(
                tables.tutor_events,
                {
                    "event_id": name,
                    "tutor_id": "t",
                    "event_timestamp": at,
                    "event_type": "message_response",
                    "metadata": {"response_time_minutes": 10 ** list(instants).index(name)},
                },
            )

        summaries = platform.run("2025-11-02", "2025-11-03", "2025-11-04")

        assert [summary.run_date.isoformat() for summary in summaries] == [
            "2025-11-02T00:00:00-04:00",
            "2025-11-03T00:00:00-05:00",
            "2025-11-04T00:00:00-05:00",
        ]
        names = ["calculation_date", "sessions_completed", "response_time_avg_minutes"]
        week = platform.metrics().filter(window="7day").select(names)
        assert week.rows() == [
            (datetime(2025, 11, 2, 4, tzinfo=UTC), 2, 5.5),
            (datetime(2025, 11, 3, 5, tzinfo=UTC), 2, 55.0),
            (datetime(2025, 11, 4, 5, tzinfo=UTC), 2, 550.0),
        ]


def test_windows_of_the_policy_file_are_in_the_table(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = small_platform.settings.home_path / "policy.toml"
    policy.write_text("windows = [14, 60]", encoding="utf-8")
    monkeypatch.setenv("TUTORMAX_POLICY", str(policy))
    settings = small_platform.settings.model_copy(update={"policy": policy})

    [summary] = Platform(settings, small_platform.engine).run(DAY)

    assert summary.total_metrics_saved == 2 * summary.total_tutors
    assert set(small_platform.metrics()["window"]) == {"14day", "60day"}
