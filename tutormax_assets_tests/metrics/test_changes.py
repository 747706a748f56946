"""What moved: tiers and flags against those of an earlier date, and the split of the sums."""

from collections.abc import Callable, Sequence
from datetime import date, timedelta
from itertools import product
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutormax_assets.compute.tasks.windows import compute_windows_and_edges, window_metrics
from tutormax_assets.metrics.changes import moves, sum_splits, tier_changes
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.reasons import tier_reasons
from tutormax_assets.metrics.schemas import SUMS, EdgeSums, TierChanges, WindowSums
from tutormax_assets_tests.metrics.rows import D, Row, events, roster, sessions

POLICY = Policy()
DETERMINISTIC = settings(derandomize=True, deadline=None, max_examples=50)
WINDOW = 7
PARTS = ("before", "came_in", "aged_out", "corrected", "after")


def day(ago: int) -> date:
    return D - timedelta(days=ago)


def reasons(rows: Sequence[Row], *tutors: str, at: date = D) -> pl.LazyFrame:
    metrics = window_metrics(
        roster(*tutors or ("t1",)),
        sessions(*rows),
        events(),
        reference_date=at,
        windows=[WINDOW],
        policy=POLICY,
    )
    return tier_reasons(metrics.lazy(), policy=POLICY).collect().lazy()


def sums(
    rows: Sequence[Row],
    logins: Sequence[Row] = (),
    *,
    at: date = D,
    tutors: Sequence[str] = ("t1",),
) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """What the window of a date, and its edges, add up to."""
    found, edges = compute_windows_and_edges(
        roster(*tutors),
        sessions(*rows),
        events(*logins),
        reference_dates=[at],
        windows=[WINDOW],
        policy=POLICY,
        edges=(1, 7),
    )
    return (
        WindowSums.validate(found.drop("reference_date")).lazy(),
        EdgeSums.validate(edges.drop("reference_date")).lazy(),
    )


def split(
    now: Sequence[Row],
    before: Sequence[Row],
    *,
    days: int = 1,
    logins: tuple[Sequence[Row], Sequence[Row]] = ((), ()),
    tutors: Sequence[str] = ("t1",),
) -> pl.DataFrame:
    return sum_splits(
        pl.LazyFrame({"tutor_id": tutors}),
        sums(now, logins[0], tutors=tutors),
        sums(before, logins[1], at=day(days), tutors=tutors),
        days=days,
        window=WINDOW,
    ).collect()


def part(found: pl.DataFrame, name: str) -> tuple[int, ...]:
    """Before, came in, aged out, corrected and after of a sum."""
    return found.select(f"{name}_{part}" for part in PARTS).row(0)


def changes(now: Sequence[Row], before: Sequence[Row], *, days: int = 1) -> pl.DataFrame:
    """What moved of the tutor t1 from an earlier date on, whose snapshot held other rows."""
    moved = moves(reasons(now), reasons(before, at=day(days)))
    splits = sum_splits(
        moved.filter(pl.col("metrics").list.len() > 0),
        sums(now),
        sums(before, at=day(days)),
        days=days,
        window=WINDOW,
    )
    found = tier_changes(moved, splits, days=days)
    return found.pipe(TierChanges.validate, eager=False).collect()


def test_a_day_that_enters_the_window_came_in() -> None:
    rows = [{"scheduled_date": day(1), "overall_rating": 5}]
    assert part(split(rows, []), "rating_sum") == (0, 5, 0, 0, 5)


def test_a_day_that_leaves_the_window_aged_out() -> None:
    rows = [{"scheduled_date": day(8), "overall_rating": 5}]
    assert part(split(rows, rows), "rating_sum") == (5, 0, 5, 0, 0)


def test_late_feedback_is_a_correction() -> None:
    before = [{"scheduled_date": day(3)}]
    now = [{"scheduled_date": day(3), "overall_rating": 4}]
    found = split(now, before)
    assert part(found, "rating_sum") == (0, 0, 0, 4, 4)
    assert part(found, "ratings") == (0, 0, 0, 1, 1)
    assert part(found, "sessions") == (1, 0, 0, 0, 1)


def test_a_deleted_session_is_a_correction() -> None:
    before = [{"scheduled_date": day(3), "no_show": True}]
    assert part(split([], before), "no_shows") == (1, 0, 0, -1, 0)


def test_logins_are_split_as_sessions_are() -> None:
    then, now = [{"event_date": day(8)}], [{"event_date": day(8)}, {"event_date": day(1)}]
    assert part(split([], [], logins=(now, then)), "logins") == (1, 1, 1, 0, 1)


def test_windows_that_share_no_day_have_nothing_to_correct() -> None:
    rows = [{"scheduled_date": day(ago), "overall_rating": 4} for ago in range(1, 15)]
    assert part(split(rows, rows, days=7), "rating_sum") == (28, 28, 28, 0, 28)


ROWS = st.fixed_dictionaries(
    {
        "tutor_id": st.sampled_from(["t1", "t2"]),
        "scheduled_date": st.integers(-1, 16).map(day),
        "overall_rating": st.sampled_from([None, 1, 4, 5]),
        "session_number": st.sampled_from([None, 1, 2]),
        "no_show": st.booleans(),
        "engagement_score": st.none() | st.floats(0, 1),
        "late_start_minutes": st.sampled_from([None, 0, 30]),
        "tutor_initiated_reschedule": st.sampled_from([True, False, None]),
        "learning_objectives_met": st.sampled_from([True, False, None]),
    }
)


@DETERMINISTIC
@given(st.lists(ROWS, max_size=12), st.lists(ROWS, max_size=12), st.sampled_from([1, 7]))
def test_the_parts_add_up_exactly(now: list[Row], before: list[Row], days: int) -> None:
    tutors = ["t1", "t2"]
    found = split(now, before, days=days, tutors=tutors)
    earlier = day(days)
    common = {
        date_
        for date_ in (day(ago) for ago in range(40))
        if D - timedelta(days=WINDOW) <= date_ < D
        and earlier - timedelta(days=WINDOW) <= date_ < earlier
    }
    for tutor, name in product(tutors, SUMS):
        *parts, after = part(found.filter(tutor_id=tutor), name)
        was, came_in, aged_out, corrected = parts
        assert was + came_in - aged_out + corrected == after
        assert after == total(now, name, tutor, days_of(D))
        assert was == total(before, name, tutor, days_of(earlier))
        assert came_in == total(now, name, tutor, days_of(D) - common)
        assert aged_out == total(before, name, tutor, days_of(earlier) - common)
        assert corrected == total(now, name, tutor, common) - total(before, name, tutor, common)


def days_of(reference_date: date) -> set[date]:
    return {reference_date - timedelta(days=ago) for ago in range(1, WINDOW + 1)}


def total(rows: Sequence[Row], name: str, tutor: str, days: set[date]) -> int:
    """A sum over the rows of some days, added up one by one."""
    mine = [row for row in rows if row["tutor_id"] == tutor and row["scheduled_date"] in days]
    return sum(OF_A_ROW[name](row) for row in mine)


OF_A_ROW: dict[str, Callable[[Row], int]] = {
    "sessions": lambda row: 1,
    "no_shows": lambda row: row["no_show"],
    "reschedules_known": lambda row: row["tutor_initiated_reschedule"] is not None,
    "reschedules": lambda row: bool(row["tutor_initiated_reschedule"]),
    "ratings": lambda row: row["overall_rating"] is not None,
    "rating_sum": lambda row: row["overall_rating"] or 0,
    "first_rated": lambda row: row["session_number"] == 1 and row["overall_rating"] is not None,
    "first_successes": lambda row: row["session_number"] == 1 and (row["overall_rating"] or 0) >= 4,
    "lateness_known": lambda row: row["late_start_minutes"] is not None,
    "punctual": lambda row: row["late_start_minutes"] == 0,
    "scores": lambda row: row["engagement_score"] is not None,
    "score_sum": lambda row: round((row["engagement_score"] or 0) * 1e9),
    "objectives_known": lambda row: row["learning_objectives_met"] is not None,
    "objectives_met": lambda row: bool(row["learning_objectives_met"]),
    "logins": lambda row: 0,
}


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ((5, 5), (3, 3), "up"),
        ((1, 1), (5, 5), "down"),
    ],
)
def test_a_tier_moves_up_or_down(
    now: tuple[int, ...], before: tuple[int, ...], expected: str
) -> None:
    rows, earlier = (
        [
            {"scheduled_date": day(n), "overall_rating": rating, "learning_objectives_met": False}
            for n, rating in enumerate(ratings, 2)
        ]
        for ratings in (now, before)
    )
    found = changes(rows, earlier).row(0, named=True)
    assert (found["move"], found["metric"]) == (expected, "avg_rating")
    assert found["numerator_corrected"] == sum(now) - sum(before)
    assert (found["value"], found["value_before"]) == (now[0], before[0])


def test_who_is_there_only_now_is_new_and_only_then_is_gone() -> None:
    moved = moves(reasons([], "t1", "t2"), reasons([], "t2", "t3")).collect()
    assert moved.select("tutor_id", "move", "tier", "tier_before").rows() == [
        ("t1", "new", "Developing", None),
        ("t3", "gone", None, "Developing"),
    ]


def test_what_moved_neither_tier_nor_flag_is_left_out() -> None:
    rows = [{"scheduled_date": day(3), "overall_rating": 5}]
    assert changes(rows, [*rows, {"scheduled_date": day(4), "overall_rating": 5}]).is_empty()


def test_a_flag_that_changes_within_a_tier_is_told() -> None:
    late = {"late_start_minutes": 30, "learning_objectives_met": True}
    before = [{"scheduled_date": day(2), **late}]
    now = [{"scheduled_date": day(2), **late, "learning_objectives_met": None}]
    found: dict[str, Any] = changes(now, before).row(0, named=True)
    assert (found["metric"], found["flag_before"], found["flag"]) == (
        "learning_objectives_met_pct",
        "green",
        None,
    )
    assert (found["numerator_corrected"], found["denominator_corrected"]) == (-1, -1)


def test_a_composite_metric_has_a_row_for_each_of_its_parts() -> None:
    before = [{"scheduled_date": day(2), "engagement_score": 1.0}]
    now = [{"scheduled_date": day(2), "engagement_score": 0.0}]
    found = changes(now, before).filter(metric="engagement_score")
    assert found.select("numerator", "numerator_corrected").rows() == [
        ("punctual", 0),
        ("score_sum", -(10**9)),
        ("logins", 0),
    ]
