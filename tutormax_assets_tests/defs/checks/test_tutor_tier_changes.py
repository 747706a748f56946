"""What is asked of reasons and changes: they say the same as the tiers and the windows."""

from datetime import timedelta
from typing import Any

import polars as pl
import pytest

from tutormax_assets.compute.tasks.windows import compute_windows_and_edges
from tutormax_assets.defs.checks import ERROR, WARN
from tutormax_assets.defs.checks.tutor_tier_changes import splits_add_up
from tutormax_assets.defs.checks.tutor_tiers import (
    evidence_is_sufficient,
    reasons_agree_with_tiers,
)
from tutormax_assets.metrics.changes import moves, sum_splits, tier_changes
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.reasons import tier_reasons
from tutormax_assets.metrics.schemas import SUMS
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets_tests.metrics.rows import D, events, roster, sessions

POLICY = Policy()
RATED = [{"scheduled_date": D - timedelta(days=ago), "overall_rating": 5} for ago in (2, 3)]


def windows(rows: list[dict[str, Any]], *, days_ago: int = 0) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """What the windows of a date, and their edges, add up to."""
    found, edges = compute_windows_and_edges(
        roster("t1", "t2"),
        sessions(*rows),
        events(),
        reference_dates=[D - timedelta(days=days_ago)],
        windows=[7],
        policy=POLICY,
        edges=(1,),
    )
    return found.drop("reference_date").lazy(), edges.drop("reference_date").lazy()


def reasons(rows: list[dict[str, Any]], *, days_ago: int = 0) -> pl.DataFrame:
    return tier_reasons(windows(rows, days_ago=days_ago)[0], policy=POLICY).collect()


def tiers(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return performance_tiers(windows(rows)[0], policy=POLICY).collect()


@pytest.fixture
def changes() -> pl.DataFrame:
    """What moved as two ratings arrived late."""
    before = [{**row, "overall_rating": None} for row in RATED]
    moved = moves(reasons(RATED).lazy(), reasons(before, days_ago=1).lazy())
    splits = sum_splits(moved, windows(RATED), windows(before, days_ago=1), days=1, window=7)
    return tier_changes(moved, splits, days=1).collect()


@pytest.fixture
def sums() -> pl.DataFrame:
    found = windows(RATED)[0].with_columns(no_shows="no_show_count")
    return found.select("tutor_id", "window", pl.col(SUMS).cast(pl.Int64)).collect()


def test_splits_that_add_up_to_the_windows_pass(changes: pl.DataFrame, sums: pl.DataFrame) -> None:
    finding = splits_add_up(changes, sums)
    assert finding.passed
    assert finding.metadata == {"splits": 1, "wrong_splits": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"numerator_came_in": pl.col("numerator_came_in") + 1},
        {"denominator_corrected": pl.lit(None, dtype=pl.Int64)},
        # The parts add up, but not to what the window holds.
        {
            "numerator_corrected": pl.col("numerator_corrected") + 1,
            "numerator_after": pl.col("numerator_after") + 1,
        },
    ],
)
def test_a_split_that_is_not_the_difference_fails(
    changes: pl.DataFrame, sums: pl.DataFrame, wrong: dict[str, pl.Expr]
) -> None:
    finding = splits_add_up(changes.with_columns(**wrong), sums)

    assert (finding.passed, finding.severity) == (False, ERROR)
    first = finding.metadata["first_splits"]
    assert isinstance(first, pl.DataFrame)
    assert first.rows() == [("t1", "7day", "avg_rating")]


def test_dates_without_a_change_have_nothing_to_add_up(
    changes: pl.DataFrame, sums: pl.DataFrame
) -> None:
    assert splits_add_up(changes.clear(), sums.clear()).passed


def test_reasons_of_the_same_run_agree_with_the_tiers() -> None:
    assert reasons_agree_with_tiers(reasons(RATED), tiers(RATED)).passed


@pytest.mark.parametrize(
    "wrong",
    [
        {"avg_rating": pl.lit(4.9)},
        {"avg_rating_flag": pl.lit(None, dtype=pl.Enum(["green", "red"]))},
        {"performance_tier": pl.col("performance_tier").reverse()},
        {"tutor_id": pl.col("tutor_id") + "x"},
    ],
)
def test_reasons_that_say_something_else_fail(wrong: dict[str, pl.Expr]) -> None:
    finding = reasons_agree_with_tiers(reasons(RATED).with_columns(**wrong), tiers(RATED))

    assert (finding.passed, finding.severity) == (False, ERROR)


def test_rows_that_one_of_them_lacks_fail() -> None:
    assert not reasons_agree_with_tiers(reasons(RATED).head(1), tiers(RATED)).passed
    assert not reasons_agree_with_tiers(reasons(RATED), tiers(RATED).head(1)).passed


@pytest.mark.parametrize(("share", "passed"), [(0.5, False), (1.0, True)])
def test_many_tutors_with_thin_evidence_are_a_warning(share: float, passed: bool) -> None:
    finding = evidence_is_sufficient(reasons(RATED), window="7day", max_share=share)
    assert (finding.passed, finding.metadata["tutors_with_thin_evidence"]) == (passed, 2)
    assert passed or finding.severity is WARN


def test_without_tutors_no_evidence_is_thin() -> None:
    assert evidence_is_sufficient(reasons([]).clear(), window="7day", max_share=0).passed
