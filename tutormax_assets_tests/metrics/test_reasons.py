"""Reasons: intervals of textbooks, flags and their certainty, and the distance to other tiers."""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutormax_assets.compute.tasks.windows import window_metrics
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.reasons import (
    Distance,
    condition,
    distance_to_better,
    distance_to_worse,
    t_interval,
    tier_reasons,
    wilson_interval,
)
from tutormax_assets.metrics.schemas import TIERS, TierReasons, TutorTiers
from tutormax_assets.metrics.tiers import performance_tiers, tier_of
from tutormax_assets_tests.metrics.rows import D, Row, events, roster, sessions

POLICY = Policy()
DETERMINISTIC = settings(derandomize=True, deadline=None, max_examples=50)

Ends = tuple[float | None, float | None]


def wilson(part: int, whole: int) -> Ends:
    low, high = wilson_interval(pl.lit(part), pl.lit(whole))
    return pl.select(low=low, high=high).row(0)


def t_of(*values: int) -> Ends:
    low, high = t_interval(
        pl.lit(len(values), dtype=pl.UInt32),
        pl.lit(sum(values)),
        pl.lit(sum(value**2 for value in values)),
    )
    return pl.select(low=low, high=high).row(0)


def reasons_of(*rows: Row, policy: Policy = POLICY) -> dict[str, Any]:
    """The reasons of the tutor t1 over 30 days."""
    metrics = window_metrics(
        roster("t1"), sessions(*rows), events(), reference_date=D, windows=[30], policy=policy
    )
    found = (
        tier_reasons(metrics.lazy(), policy=policy)
        .pipe(TierReasons.validate, eager=False)
        .collect()
    )
    return found.row(0, named=True)


# R. G. Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine
# 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("part", "whole", "low", "high"),
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_the_interval_of_a_share_is_that_of_a_textbook(
    part: int, whole: int, low: float, high: float
) -> None:
    assert wilson(part, whole) == pytest.approx((low, high), abs=0.005)


# The quantiles 2.776 of 4 degrees of freedom, 12.706 of 1 and 2.262 of 9 stand in every table.
@pytest.mark.parametrize(
    ("values", "half"),
    [
        ((1, 2, 3, 4, 5), 2.776 * math.sqrt(2.5 / 5)),
        ((2, 4), 12.706 * math.sqrt(2 / 2)),
        ((4, 5) * 5, 2.262 * math.sqrt(2.5 / 9 / 10)),
        ((4, 4, 4), 0),
    ],
)
def test_the_interval_of_a_mean_is_that_of_a_textbook(values: tuple[int, ...], half: float) -> None:
    mean = sum(values) / len(values)
    assert t_of(*values) == pytest.approx((mean - half, mean + half), abs=0.001)


def test_nothing_has_no_interval() -> None:
    assert wilson(0, 0) == (None, None)
    assert t_of() == t_of(5) == (None, None)


@DETERMINISTIC
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_share_contains_it_and_stays_within_0_and_100(
    counts: tuple[int, int],
) -> None:
    part, whole = counts
    low, high = wilson(part, whole)
    assert low is not None
    assert high is not None
    assert 0 <= low <= 100 * part / whole <= high <= 100
    # Of ten times as many rows with the same share it is narrower.
    tenfold_low, tenfold_high = wilson(10 * part, 10 * whole)
    assert tenfold_low is not None
    assert tenfold_high is not None
    assert tenfold_high - tenfold_low < high - low


@DETERMINISTIC
@given(st.lists(st.integers(1, 5), min_size=2, max_size=60))
def test_the_interval_of_a_mean_contains_it(values: list[int]) -> None:
    low, high = t_of(*values)
    assert low is not None
    assert high is not None
    mean = sum(values) / len(values)
    assert low - 1e-9 <= mean <= high + 1e-9
    tenfold_low, tenfold_high = t_of(*values * 10)
    assert tenfold_low is not None
    assert tenfold_high is not None
    if len(set(values)) > 1:
        assert tenfold_high - tenfold_low < high - low


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # 1 of 3 is a third, whose interval reaches down to 6 %.
        ([{"tutor_initiated_reschedule": n == 0} for n in range(3)], ("red", "within_noise")),
        ([{"tutor_initiated_reschedule": n < 20} for n in range(40)], ("red", "certain")),
        ([{}] * 3, ("green", "within_noise")),
        ([{}] * 40, ("green", "certain")),
        ([{"tutor_initiated_reschedule": n < 12} for n in range(100)], (None, None)),
    ],
)
def test_a_flag_is_certain_where_the_whole_interval_is_on_its_side(
    rows: list[Row], expected: tuple[str | None, str | None]
) -> None:
    found = reasons_of(*rows)
    assert (found["reschedule_rate_flag"], found["reschedule_rate_certainty"]) == expected
    assert found["reschedule_rate_denominator"] == len(rows)


def test_a_single_rating_is_no_certainty() -> None:
    found = reasons_of({"overall_rating": 5})
    assert (found["avg_rating_flag"], found["avg_rating_certainty"]) == ("green", "within_noise")
    assert (found["avg_rating_low"], found["avg_rating_high"]) == (None, None)


def test_the_interval_of_ratings_ends_where_ratings_do() -> None:
    found = reasons_of({"overall_rating": 5}, {"overall_rating": 3})
    assert (found["avg_rating"], found["avg_rating_low"], found["avg_rating_high"]) == (4, 1, 5)


@pytest.mark.parametrize(("count", "evidence"), [(0, "thin"), (4, "thin"), (5, "sufficient")])
def test_few_sessions_are_thin_evidence(count: int, evidence: str) -> None:
    assert reasons_of(*[{}] * count)["evidence"] == evidence
    stricter = Policy(evidence_min_sessions=6)
    assert reasons_of(*[{}] * count, policy=stricter)["evidence"] == "thin"


def test_every_denominator_counts_the_rows_that_its_metric_rests_on() -> None:
    found = reasons_of(
        {"session_number": 1, "overall_rating": 5, "learning_objectives_met": True},
        {"session_number": 1, "learning_objectives_met": False},
        {"overall_rating": 3, "tutor_initiated_reschedule": None},
        {"scheduled_date": D - timedelta(days=31), "overall_rating": 1},
    )
    assert {
        name.removesuffix("_denominator"): value
        for name, value in found.items()
        if name.endswith("_denominator")
    } == {
        "avg_rating": 2,
        "first_session_success_rate": 1,
        "reschedule_rate": 2,
        "no_show_count": 3,
        "engagement_score": 3,
        "learning_objectives_met_pct": 2,
    }


def test_a_tutor_without_a_session_has_reasons_too() -> None:
    found = reasons_of()
    assert (found["performance_tier"], found["sessions"]) == ("Developing", 0)
    assert found["no_show_count_flag"] == "green"
    assert {value for name, value in found.items() if name.endswith("_certainty")} == {None}


@DETERMINISTIC
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "overall_rating": st.sampled_from([None, 1, 3, 4, 5]),
                "session_number": st.sampled_from([None, 1, 2]),
                "no_show": st.booleans(),
                "tutor_initiated_reschedule": st.sampled_from([True, False, None]),
                "learning_objectives_met": st.sampled_from([True, False, None]),
            }
        ),
        max_size=12,
    )
)
def test_reasons_agree_with_the_tiers(rows: list[Row]) -> None:
    metrics = window_metrics(
        roster("t1"), sessions(*rows), events(), reference_date=D, windows=[7, 30], policy=POLICY
    )
    reasons = tier_reasons(metrics.lazy(), policy=POLICY).collect()
    shared = [name for name in TutorTiers.column_names() if name in reasons.columns]
    tiers = performance_tiers(metrics.lazy(), policy=POLICY).collect()
    assert reasons.select(shared).equals(tiers.select(shared))
    for flag in ("green", "red"):
        flags = [name for name in reasons.columns if name.endswith("_flag")]
        count = pl.sum_horizontal((pl.col(flags) == flag).fill_null(False))
        assert reasons.select(count).to_series().to_list() == tiers[f"{flag}_flags"].to_list()


def row_with(tier: str, **flags: str | None) -> dict[str, Any]:
    """A row of reasons whose values are on the side of their flags."""
    values: dict[str, dict[str | None, float]] = {
        "avg_rating": {"green": 4.6, "red": 3.4, None: 4.0},
        "first_session_success_rate": {"green": 90.0, "red": 60.0, None: 80.0},
        "reschedule_rate": {"green": 5.0, "red": 20.0, None: 10.4},
        "no_show_count": {"green": 0, "red": 4, None: 1},
        "engagement_score": {"green": 85.0, "red": 50.0, None: 70.0},
        "learning_objectives_met_pct": {"green": 95.0, "red": 70.0, None: 85.0},
    }
    row: dict[str, Any] = {"performance_tier": tier}
    for name, of_flag in values.items():
        row |= {name: of_flag[flags.get(name)], f"{name}_flag": flags.get(name)}
    for flag in ("green", "red"):
        row[f"{flag}_flags"] = list(flags.values()).count(flag)
    return row


def test_the_distance_names_the_flags_nearest_to_their_bounds() -> None:
    row = row_with("Developing", avg_rating="green", no_show_count="green")

    better, worse = distance_to_better(row, policy=POLICY), distance_to_worse(row, policy=POLICY)

    assert better is not None
    assert better.tier == "Strong"
    [change] = better.changes
    assert (change.flag, change.count) == ("green", 1)
    nearest = change.candidates[0]
    assert (nearest.metric, nearest.value, nearest.bound, nearest.condition) == (
        "reschedule_rate",
        10.4,
        10,
        "10 or less",
    )
    assert "avg_rating" not in {candidate.metric for candidate in change.candidates}
    assert worse is not None
    assert worse.tier == "Needs Attention"
    assert [(one.flag, one.count) for one in worse.changes] == [("red", 1)]


def test_a_metric_without_a_value_is_no_candidate() -> None:
    row = row_with("Developing") | {"reschedule_rate": None}
    better = distance_to_better(row, policy=POLICY)
    assert better is not None
    assert "reschedule_rate" not in {one.metric for one in better.changes[0].candidates}


def test_the_best_tier_has_no_better_one_and_the_worst_no_worse() -> None:
    assert distance_to_better(row_with("Exemplary"), policy=POLICY) is None
    assert distance_to_worse(row_with("At Risk"), policy=POLICY) is None


@pytest.mark.parametrize("way", [distance_to_better, distance_to_worse])
@DETERMINISTIC
@given(greens=st.integers(0, 6), reds=st.integers(0, 6))
def test_who_goes_the_distance_is_in_the_tier_that_it_names(
    way: Callable[..., Distance | None], greens: int, reds: int
) -> None:
    reds = min(reds, 6 - greens)
    tier = tier_of(greens, reds, policy=POLICY)
    names = list(POLICY.thresholds.model_dump())
    flags = dict(zip(names, ["green"] * greens + ["red"] * reds, strict=False))
    distance = way(row_with(tier, **flags), policy=POLICY)
    if distance is None:
        return
    then = {"green": greens, "red": reds}
    for change in distance.changes:
        then[change.flag] += change.count
    assert tier_of(then["green"], then["red"], policy=POLICY) == distance.tier
    step = TIERS.index(distance.tier) - TIERS.index(tier)
    assert step < 0 if way is distance_to_better else step == 1


@pytest.mark.parametrize(
    ("metric", "flag", "words"),
    [
        ("avg_rating", "green", "4.5 or more"),
        ("avg_rating", "red", "less than 4.5"),
        ("reschedule_rate", "green", "4.5 or less"),
        ("reschedule_rate", "red", "more than 4.5"),
    ],
)
def test_the_condition_of_a_flag_in_words(metric: str, flag: str, words: str) -> None:
    assert condition(metric, flag, 4.5) == words
