"""Flags and tiers, on every threshold and one step off it."""

from typing import Any

import polars as pl
import pytest

from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import TIERS, TutorTiers
from tutormax_assets.metrics.tiers import flags, performance_tiers
from tutormax_assets_tests.metrics.rows import Row, window_metrics_rows

GREEN: Row = {
    "avg_rating": 4.5,
    "first_session_success_rate": 85.0,
    "reschedule_rate": 10.0,
    "no_show_count": 0,
    "engagement_score": 80.0,
    "learning_objectives_met_pct": 90.0,
}
RED: Row = {
    "avg_rating": 3.49,
    "first_session_success_rate": 69.99,
    "reschedule_rate": 15.01,
    "no_show_count": 4,
    "engagement_score": 59.99,
    "learning_objectives_met_pct": 79.99,
}
METRICS = list(GREEN)


def tier_of(row: Row, policy: Policy | None = None) -> tuple[int, int, str]:
    """Green flags, red flags and tier of one row of metrics."""
    found = performance_tiers(window_metrics_rows(row), policy=policy or Policy()).collect()
    green, red, tier = (
        TutorTiers.validate(found).select("green_flags", "red_flags", "performance_tier").row(0)
    )
    return green, red, tier


def with_flags(green: int, red: int) -> dict[str, Any]:
    """Metrics with so many green and red flags and none from the rest."""
    return {name: GREEN[name] for name in METRICS[:green]} | {
        name: RED[name] for name in METRICS[len(METRICS) - red :]
    }


@pytest.mark.parametrize(
    ("metric", "value", "green", "red"),
    [
        ("avg_rating", 5.0, 1, 0),
        ("avg_rating", 4.51, 1, 0),
        ("avg_rating", 4.5, 1, 0),
        ("avg_rating", 4.49, 0, 0),
        ("avg_rating", 3.51, 0, 0),
        ("avg_rating", 3.5, 0, 0),
        ("avg_rating", 3.49, 0, 1),
        ("avg_rating", 1.0, 0, 1),
        ("first_session_success_rate", 100.0, 1, 0),
        ("first_session_success_rate", 85.01, 1, 0),
        ("first_session_success_rate", 85.0, 1, 0),
        ("first_session_success_rate", 84.99, 0, 0),
        ("first_session_success_rate", 70.01, 0, 0),
        ("first_session_success_rate", 70.0, 0, 0),
        ("first_session_success_rate", 69.99, 0, 1),
        ("first_session_success_rate", 0.0, 0, 1),
        ("reschedule_rate", 0.0, 1, 0),
        ("reschedule_rate", 9.99, 1, 0),
        ("reschedule_rate", 10.0, 1, 0),
        ("reschedule_rate", 10.01, 0, 0),
        ("reschedule_rate", 14.99, 0, 0),
        ("reschedule_rate", 15.0, 0, 0),
        ("reschedule_rate", 15.01, 0, 1),
        ("reschedule_rate", 100.0, 0, 1),
        ("no_show_count", 0, 1, 0),
        ("no_show_count", 1, 0, 0),
        ("no_show_count", 2, 0, 0),
        ("no_show_count", 3, 0, 0),
        ("no_show_count", 4, 0, 1),
        ("engagement_score", 100.0, 1, 0),
        ("engagement_score", 80.01, 1, 0),
        ("engagement_score", 80.0, 1, 0),
        ("engagement_score", 79.99, 0, 0),
        ("engagement_score", 60.01, 0, 0),
        ("engagement_score", 60.0, 0, 0),
        ("engagement_score", 59.99, 0, 1),
        ("engagement_score", 0.0, 0, 1),
        ("learning_objectives_met_pct", 100.0, 1, 0),
        ("learning_objectives_met_pct", 90.01, 1, 0),
        ("learning_objectives_met_pct", 90.0, 1, 0),
        ("learning_objectives_met_pct", 89.99, 0, 0),
        ("learning_objectives_met_pct", 80.01, 0, 0),
        ("learning_objectives_met_pct", 80.0, 0, 0),
        ("learning_objectives_met_pct", 79.99, 0, 1),
        ("learning_objectives_met_pct", 0.0, 0, 1),
    ],
)
def test_thresholds(metric: str, value: float, green: int, red: int) -> None:
    assert tier_of({metric: value})[:2] == (green, red)


def test_six_metrics_carry_flags() -> None:
    assert set(flags(Policy())) == set(METRICS)


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "no_show_count"])
def test_a_null_metric_gives_no_flag(metric: str) -> None:
    assert tier_of({**GREEN, metric: None})[:2] == (5, 0)
    assert tier_of({**RED, metric: None})[:2] == (0, 5)


@pytest.mark.parametrize("row", [{"sessions_completed": 0}, {"response_time_avg_minutes": 1e6}])
def test_other_metrics_carry_no_flag(row: Row) -> None:
    assert tier_of(row) == (0, 0, "Developing")


def test_a_tutor_without_sessions_is_developing() -> None:
    assert tier_of({"no_show_count": 0}) == (1, 0, "Developing")


@pytest.mark.parametrize(
    ("green", "red", "tier"),
    [
        (6, 0, "Exemplary"),
        (5, 0, "Exemplary"),
        (4, 0, "Strong"),
        (3, 0, "Strong"),
        (2, 0, "Developing"),
        (0, 0, "Developing"),
        # Red flags outweigh green ones.
        (5, 1, "Needs Attention"),
        (4, 1, "Needs Attention"),
        (4, 2, "Needs Attention"),
        (0, 1, "Needs Attention"),
        (0, 2, "Needs Attention"),
        (3, 3, "At Risk"),
        (0, 3, "At Risk"),
        (2, 4, "At Risk"),
        (0, 6, "At Risk"),
    ],
)
def test_the_first_match_wins(green: int, red: int, tier: str) -> None:
    assert tier_of(with_flags(green, red)) == (green, red, tier)


def test_every_tier_is_reached_by_some_flags() -> None:
    reached = {tier_of(with_flags(green, red))[2] for green in range(7) for red in range(7 - green)}
    assert reached == set(TIERS)


@pytest.mark.parametrize(
    ("overrides", "row", "expected"),
    [
        ({"thresholds": {"avg_rating": {"green": 4.8}}}, {"avg_rating": 4.79}, (0, 0)),
        ({"thresholds": {"avg_rating": {"green": 4.8}}}, {"avg_rating": 4.8}, (1, 0)),
        ({"thresholds": {"avg_rating": {"red": 4.2}}}, {"avg_rating": 4.19}, (0, 1)),
        ({"thresholds": {"no_show_count": {"green": 1}}}, {"no_show_count": 1}, (1, 0)),
        ({"thresholds": {"no_show_count": {"red": 5}}}, {"no_show_count": 5}, (0, 0)),
        ({"thresholds": {"no_show_count": {"red": 5}}}, {"no_show_count": 6}, (0, 1)),
        ({"thresholds": {"reschedule_rate": {"red": 10}}}, {"reschedule_rate": 10.0}, (1, 0)),
        ({"thresholds": {"reschedule_rate": {"red": 10}}}, {"reschedule_rate": 10.01}, (0, 1)),
    ],
)
def test_thresholds_of_another_policy(
    overrides: dict[str, Any], row: Row, expected: tuple[int, int]
) -> None:
    assert tier_of(row, Policy().with_overrides(overrides))[:2] == expected


@pytest.mark.parametrize(
    ("tier_flags", "green", "red", "tier"),
    [
        ({"exemplary_green": 4}, 4, 0, "Exemplary"),
        ({"exemplary_green": 6}, 5, 0, "Strong"),
        ({"strong_green": 1}, 1, 0, "Strong"),
        ({"strong_green": 4}, 3, 0, "Developing"),
        ({"at_risk_red": 2}, 0, 2, "At Risk"),
        ({"at_risk_red": 6}, 0, 5, "Needs Attention"),
        ({"needs_attention_red": 2}, 0, 1, "Developing"),
        # Exemplary asks for no red flag at all, however many the others let pass.
        ({"needs_attention_red": 2}, 5, 1, "Strong"),
    ],
)
def test_tier_flags_of_another_policy(
    tier_flags: dict[str, int], green: int, red: int, tier: str
) -> None:
    policy = Policy().with_overrides({"tier_flags": tier_flags})
    assert tier_of(with_flags(green, red), policy) == (green, red, tier)


def test_rows_keep_their_metrics_and_their_order() -> None:
    metrics = window_metrics_rows(
        {**RED, "tutor_id": "t2"}, {**GREEN, "tutor_id": "t1"}, {"tutor_id": "t2", "window": "x"}
    )
    found = performance_tiers(metrics, policy=Policy()).collect()

    assert found.drop("green_flags", "red_flags", "performance_tier").equals(metrics.collect())
    assert found["performance_tier"].to_list() == ["At Risk", "Exemplary", "Developing"]


def test_no_metrics_have_no_tiers() -> None:
    found = performance_tiers(window_metrics_rows(), policy=Policy()).collect()

    assert TutorTiers.validate(found).is_empty()
    assert found.schema == pl.Schema(TutorTiers)
