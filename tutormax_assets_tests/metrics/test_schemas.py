"""The columns of each stage."""

import dataframely as dy
import polars as pl
import pytest

from tutormax_assets.metrics.schemas import (
    TIERS,
    SessionsSnapshot,
    SetAside,
    SourceEvents,
    SourceSessions,
    SourceTutors,
    TutorEventsSnapshot,
    TutorRoster,
    TutorTiers,
    WindowMetrics,
)
from tutormax_assets_tests.metrics.rows import Row, frame, window_metrics_rows

STORED = [TutorRoster, SessionsSnapshot, TutorEventsSnapshot, SetAside, WindowMetrics, TutorTiers]
UTC_INSTANT = pl.Datetime("us", "UTC")
METRICS = {
    "tutor_id": pl.String(),
    "window": pl.String(),
    "sessions_completed": pl.Int32(),
    "avg_rating": pl.Float64(),
    "first_session_success_rate": pl.Float64(),
    "reschedule_rate": pl.Float64(),
    "no_show_count": pl.Int32(),
    "engagement_score": pl.Float64(),
    "learning_objectives_met_pct": pl.Float64(),
    "response_time_avg_minutes": pl.Float64(),
}


@pytest.mark.parametrize(
    ("schema", "columns"),
    [
        (SourceTutors, {"tutor_id": pl.String(), "status": pl.String()}),
        (
            SourceSessions,
            {
                "session_id": pl.String(),
                "tutor_id": pl.String(),
                "session_number": pl.Int32(),
                "scheduled_start": UTC_INSTANT,
                "started": pl.Boolean(),
                "tutor_initiated_reschedule": pl.Boolean(),
                "no_show": pl.Boolean(),
                "late_start_minutes": pl.Int32(),
                "engagement_score": pl.Float64(),
                "learning_objectives_met": pl.Boolean(),
                "feedback_id": pl.String(),
                "feedback_tutor_id": pl.String(),
                "overall_rating": pl.Int32(),
            },
        ),
        (
            SourceEvents,
            {
                "event_id": pl.String(),
                "tutor_id": pl.String(),
                "event_type": pl.String(),
                "event_timestamp": UTC_INSTANT,
                "response_time_minutes": pl.String(),
            },
        ),
        (TutorRoster, {"tutor_id": pl.String(), "status": pl.String()}),
        (
            SessionsSnapshot,
            {
                "tutor_id": pl.String(),
                "scheduled_date": pl.Date(),
                "session_number": pl.Int32(),
                "started": pl.Boolean(),
                "tutor_initiated_reschedule": pl.Boolean(),
                "no_show": pl.Boolean(),
                "late_start_minutes": pl.Int32(),
                "engagement_score": pl.Float64(),
                "learning_objectives_met": pl.Boolean(),
                "overall_rating": pl.Int32(),
            },
        ),
        (
            TutorEventsSnapshot,
            {
                "tutor_id": pl.String(),
                "event_date": pl.Date(),
                "event_type": pl.Enum(["login", "message_response"]),
                "response_time_minutes": pl.Float64(),
            },
        ),
        (
            SetAside,
            {
                "source_table": pl.String(),
                "row_key": pl.String(),
                "tutor_id": pl.String(),
                "date": pl.Date(),
                "column": pl.String(),
                "reason": pl.String(),
            },
        ),
        (WindowMetrics, METRICS),
        (
            TutorTiers,
            METRICS
            | {
                "green_flags": pl.UInt8(),
                "red_flags": pl.UInt8(),
                "performance_tier": pl.Enum(TIERS),
            },
        ),
    ],
)
def test_columns_and_their_order(schema: type[dy.Schema], columns: dict[str, pl.DataType]) -> None:
    assert list(pl.Schema(schema).items()) == list(columns.items())


def test_the_tiers_are_the_contracts() -> None:
    assert TIERS == ("Exemplary", "Strong", "Developing", "Needs Attention", "At Risk")


@pytest.mark.parametrize("schema", STORED)
def test_every_stored_column_is_described(schema: type[dy.Schema]) -> None:
    undescribed = [n for n, column in schema.columns().items() if not column.description]
    assert undescribed == []


@pytest.mark.parametrize("schema", STORED)
def test_no_stored_frame_holds_a_name_a_student_or_free_text(schema: type[dy.Schema]) -> None:
    private = ("name", "email", "student", "text")
    assert [n for n in schema.column_names() if any(word in n for word in private)] == []


@pytest.mark.parametrize("schema", STORED)
def test_an_empty_frame_is_valid(schema: type[dy.Schema]) -> None:
    assert schema.is_valid(frame(schema, []).collect())


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"sessions_completed": None}, "nullability"),
        ({"sessions_completed": -1}, "min"),
        ({"no_show_count": -1}, "min"),
        ({"avg_rating": 0.99}, "min"),
        ({"avg_rating": 5.01}, "max"),
        ({"reschedule_rate": 100.01}, "max"),
        ({"engagement_score": -0.01}, "min"),
        ({"engagement_score": 100.01}, "max"),
        ({"response_time_avg_minutes": float("inf")}, "inf"),
        ({"learning_objectives_met_pct": float("nan")}, "nan"),
    ],
)
def test_impossible_metrics_are_refused(row: Row, rule: str) -> None:
    with pytest.raises(dy.exc.ValidationError, match=f"'{rule}' failed for 1 rows"):
        WindowMetrics.validate(window_metrics_rows(row).collect())


def test_a_tutor_has_one_row_a_window() -> None:
    both = window_metrics_rows({}, {"window": "30day"}).collect()
    assert WindowMetrics.is_valid(both)

    with pytest.raises(dy.exc.ValidationError, match="primary_key"):
        WindowMetrics.validate(pl.concat([both, both]))
