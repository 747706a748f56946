"""Why stored values differ from those of the source, on frames of a few rows."""

from datetime import date
from typing import Any

import polars as pl
import pytest

from tutormax_assets.metrics.drift import (
    differences,
    event_changes,
    session_changes,
    with_causes,
)
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import SessionsSnapshot, TutorEventsSnapshot, TutorTiers

DAY = date(2025, 11, 7)
HELD = date(2025, 11, 5)


def sessions(*rows: dict[str, Any]) -> pl.LazyFrame:
    usual = {"tutor_id": "t", "scheduled_date": HELD, "session_number": 1, "started": True}
    return pl.LazyFrame(
        [{"no_show": False, **usual, **row} for row in rows], schema=pl.Schema(SessionsSnapshot)
    )


def events(*rows: dict[str, Any]) -> pl.LazyFrame:
    usual = {"tutor_id": "t", "event_date": HELD, "event_type": "login"}
    return pl.LazyFrame([{**usual, **row} for row in rows], schema=pl.Schema(TutorEventsSnapshot))


def found(changes: pl.LazyFrame) -> list[tuple[str, str]]:
    assert set(changes.collect()["date"]) <= {HELD}
    return sorted(changes.select("column", "cause").collect().rows())


@pytest.mark.parametrize(
    ("stored", "now", "expected"),
    [
        ([{}], [{}], []),
        ([{}], [{"overall_rating": 4}], [("overall_rating", "late feedback")]),
        ([{"overall_rating": 4}], [{"overall_rating": 5}], [("overall_rating", "corrected")]),
        ([{"overall_rating": 4}], [{}], [("overall_rating", "deleted")]),
        ([{"no_show": None}], [{"no_show": True}], [("no_show", "corrected")]),
        (
            [{}],
            [{"no_show": True, "overall_rating": 1}],
            [("no_show", "corrected"), ("overall_rating", "late feedback")],
        ),
        ([{}], [], [("row", "deleted")]),
        ([], [{}], [("row", "new rows")]),
        ([{}], [{"session_number": 2}], [("row", "deleted"), ("row", "new rows")]),
        # Of rows that are alike, as many count as one side has more.
        ([{}, {}], [{}, {}, {}], [("row", "new rows")]),
        ([{}, {}], [{}, {"overall_rating": 3}], [("overall_rating", "late feedback")]),
    ],
)
def test_what_happened_to_sessions(
    stored: list[dict[str, Any]], now: list[dict[str, Any]], expected: list[tuple[str, str]]
) -> None:
    assert found(session_changes(sessions(*stored), sessions(*now))) == expected


def test_what_happened_to_events() -> None:
    answer = {"event_type": "message_response"}
    stored = events({}, {}, {**answer, "response_time_minutes": 3.0}, {**answer})
    now = events({}, {**answer, "response_time_minutes": 4.0}, {**answer}, {**answer})

    assert found(event_changes(stored, now)) == [
        ("event_type", "deleted"),
        ("response_time_minutes", "corrected"),
        ("response_time_minutes", "new rows"),
    ]


def tiers(*rows: dict[str, Any]) -> pl.LazyFrame:
    usual = {
        "window": "7day",
        "sessions_completed": 1,
        "no_show_count": 0,
        "performance_tier": "Strong",
    }
    return pl.LazyFrame([{**usual, **row} for row in rows], schema=pl.Schema(TutorTiers))


def test_values_differ_for_what_happened_to_the_rows_they_are_computed_from() -> None:
    stored = tiers(
        {"tutor_id": "left"},
        {"tutor_id": "late", "avg_rating": 4.0},
        {"tutor_id": "policy"},
        {"tutor_id": "same"},
        {"tutor_id": "set aside", "engagement_score": 50.0},
    )
    now = tiers(
        {"tutor_id": "joined"},
        {"tutor_id": "late", "avg_rating": 3.5, "performance_tier": "At Risk"},
        {"tutor_id": "policy", "performance_tier": "Developing"},
        {"tutor_id": "same"},
        {"tutor_id": "set aside", "engagement_score": 51.0},
    )
    values = differences(stored, now).collect()
    changes = pl.DataFrame(
        {
            "tutor_id": ["late", "late", "late"],
            "date": [HELD, HELD, date(2025, 10, 1)],
            "column": ["overall_rating", "no_show", "overall_rating"],
            # What lies before the window, or is of another metric, is no reason.
            "cause": ["late feedback", "corrected", "deleted"],
        }
    )
    of_policy = differences(
        tiers({"tutor_id": "policy"}),
        tiers({"tutor_id": "policy", "performance_tier": "Developing"}),
    ).collect()

    told = with_causes(values, changes, of_policy, reference_date=DAY, policy=Policy())

    assert told.select("tutor_id", "metric", "stored", "now", "causes").rows() == [
        ("joined", "performance_tier", None, "Strong", ["roster"]),
        ("late", "avg_rating", "4.0", "3.5", ["late feedback"]),
        ("late", "performance_tier", "Strong", "At Risk", ["late feedback"]),
        ("left", "performance_tier", "Strong", None, ["roster"]),
        ("policy", "performance_tier", "Strong", "Developing", ["policy"]),
        ("set aside", "engagement_score", "50.0", "51.0", ["corrected"]),
    ]
