"""The answers of the service that this project replaces, on its own platform."""

import json
from datetime import date
from pathlib import Path

import polars as pl
import pytest

from tutormax_assets.compute.tasks.windows import window_metrics
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.quality import good_events, good_sessions, good_tutors
from tutormax_assets.metrics.schemas import SourceEvents, SourceSessions, SourceTutors, TutorTiers
from tutormax_assets.metrics.tiers import performance_tiers

GOLDEN = Path(__file__).parents[1] / "golden"
DATES = [date(2025, 11, 7), date(2025, 11, 6), date(2025, 10, 1)]
KEY = ["tutor_id", "date", "window"]
RATES = [
    "avg_rating",
    "first_session_success_rate",
    "reschedule_rate",
    "engagement_score",
    "learning_objectives_met_pct",
    "response_time_avg_minutes",
]
EXACT = ["sessions_completed", "no_show_count", "performance_tier"]


def golden(name: str) -> pl.LazyFrame:
    return pl.scan_parquet(GOLDEN / f"{name}.parquet")


def platform() -> tuple[pl.LazyFrame, pl.LazyFrame, pl.LazyFrame]:
    """The golden rows as the platform's snapshot query would read them."""
    feedback = golden("student_feedback").select(
        "session_id", "feedback_id", "overall_rating", feedback_tutor_id="tutor_id"
    )
    sessions = golden("sessions").join(feedback, on="session_id", how="left")
    sessions = sessions.with_columns(pl.col("actual_start").is_not_null().alias("started"))
    events = golden("tutor_events").with_columns(
        pl.when(pl.col("event_type") == "message_response")
        .then(pl.col("metadata").map_elements(literal, return_dtype=pl.String))
        .alias("response_time_minutes")
    )
    return (
        golden("tutors").select(SourceTutors.column_names()),
        SourceSessions.cast(sessions),
        SourceEvents.cast(events),
    )


def literal(metadata: str) -> str | None:
    members = json.loads(metadata)
    has_it = isinstance(members, dict) and "response_time_minutes" in members
    return json.dumps(members["response_time_minutes"]) if has_it else None


@pytest.fixture(scope="module")
def both() -> pl.DataFrame:
    """Expected and found, side by side."""
    policy = Policy()
    tutors, source_sessions, source_events = platform()
    roster = good_tutors(tutors, include_inactive=True)
    sessions, _ = good_sessions(source_sessions, policy=policy, timezone="UTC")
    events, _ = good_events(source_events, timezone="UTC")
    found = pl.concat(
        performance_tiers(
            window_metrics(
                roster,
                sessions,
                events,
                reference_date=day,
                windows=policy.windows,
                policy=policy,
            ).lazy(),
            policy=policy,
        ).with_columns(pl.lit(day).alias("date"))
        for day in DATES
    ).collect()
    TutorTiers.validate(found.filter(date=DATES[0]).drop("date"))
    expected = (
        golden("expected_metrics")
        .with_columns(pl.col("calculation_date").dt.date().alias("date"))
        .drop("calculation_date")
        .collect()
    )
    return expected.join(
        found.with_columns(pl.col("performance_tier").cast(pl.String)),
        on=KEY,
        how="full",
        suffix="_found",
        validate="1:1",
    )


def test_every_row_has_its_answer_and_no_other(both: pl.DataFrame) -> None:
    assert len(both) == 1755
    assert both.select(KEY).null_count().row(0) == (0, 0, 0)
    assert both.select(f"{name}_found" for name in KEY).null_count().row(0) == (0, 0, 0)


@pytest.mark.parametrize("column", EXACT)
def test_counts_and_tiers_are_equal(both: pl.DataFrame, column: str) -> None:
    other = both.filter(pl.col(column).ne_missing(pl.col(f"{column}_found")))
    assert other.select(*KEY, column, f"{column}_found").rows() == []


@pytest.mark.parametrize("column", RATES)
def test_rates_are_null_in_the_same_places(both: pl.DataFrame, column: str) -> None:
    other = both.filter(pl.col(column).is_null() != pl.col(f"{column}_found").is_null())
    assert other.select(*KEY, column, f"{column}_found").rows() == []


@pytest.mark.parametrize("column", RATES)
def test_rates_are_within_a_hundredth_and_nearly_all_equal(both: pl.DataFrame, column: str) -> None:
    rates = both.drop_nulls(column).select(*KEY, column, f"{column}_found")
    off = (pl.col(column) - pl.col(f"{column}_found")).abs()

    assert len(rates) > 400
    assert rates.filter(off > 0.01 + 1e-9).rows() == []
    assert rates.select((off == 0).mean()).item() >= 0.98


def test_the_golden_platform_keeps_the_contract() -> None:
    _, source_sessions, source_events = platform()
    _, of_sessions = good_sessions(source_sessions, policy=Policy(), timezone="UTC")
    _, of_events = good_events(source_events, timezone="UTC")

    assert pl.concat([of_sessions, of_events]).collect().rows() == []


def test_all_tiers_and_windows_are_in_it(both: pl.DataFrame) -> None:
    assert both["performance_tier"].n_unique() == 5
    assert both.group_by("date", "window").len()["len"].to_list() == [195] * 9
