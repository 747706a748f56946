"""What is asked of the tiers."""

import math
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutormax_assets.defs.checks import ERROR, WARN, Finding
from tutormax_assets.defs.checks.tutor_tiers import (
    counts_never_shrink,
    every_tutor_has_all_windows,
    population_stability_index,
    tiers_are_steady,
)
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets_tests.metrics.rows import roster

WINDOWS = [7, 30]
NONE = pl.DataFrame(schema=pl.Schema(TutorTiers))


def tiers(*rows: dict[str, Any]) -> pl.DataFrame:
    default = {
        "window": "7day",
        "sessions_completed": 0,
        "no_show_count": 0,
        "green_flags": 0,
        "red_flags": 0,
        "performance_tier": "Strong",
    }
    return pl.DataFrame([default | row for row in rows], schema=pl.Schema(TutorTiers))


def table(finding: Finding, name: str) -> list[tuple[Any, ...]]:
    value = finding.metadata[name]
    assert isinstance(value, pl.DataFrame)
    return value.rows()


def whole(rows: pl.DataFrame, *tutors: str) -> Finding:
    return every_tutor_has_all_windows(
        rows, roster(*tutors).collect(), windows=WINDOWS, what_to_do="Do this."
    )


def test_a_tier_for_every_tutor_and_window_passes() -> None:
    rows = tiers({"tutor_id": "a"}, {"tutor_id": "a", "window": "30day"}, {"tutor_id": "other"})
    assert whole(rows, "a").passed
    assert whole(NONE).passed


def test_tutors_without_a_window_or_tier_or_with_too_many_are_named() -> None:
    rows = tiers(
        {"tutor_id": "a"},
        {"tutor_id": "a", "window": "30day"},
        {"tutor_id": "a", "window": "30day"},
        {"tutor_id": "b"},
        {"tutor_id": "c", "performance_tier": None},
        {"tutor_id": "c", "window": "30day"},
    )

    finding = whole(rows, "a", "b", "c", "d")

    assert (finding.passed, finding.severity) == (False, ERROR)
    assert str(finding.description).startswith("4 of 4 tutors of the roster do not have exactly")
    assert str(finding.description).endswith("Do this.")
    assert (finding.metadata["rows_missing"], finding.metadata["rows_repeated"]) == (4, 2)
    assert table(finding, "first_tutors") == [
        ("a", "30day"),
        ("b", "30day"),
        ("c", "7day"),
        ("d", "30day"),
        ("d", "7day"),
    ]


def test_counts_that_grow_or_stay_pass() -> None:
    rows = tiers(
        {"tutor_id": "a", "sessions_completed": 3, "window": "30day"},
        {"tutor_id": "a", "sessions_completed": 3},
        {"tutor_id": "b", "no_show_count": 9},
    )
    assert counts_never_shrink(rows, windows=WINDOWS).passed
    assert counts_never_shrink(NONE, windows=WINDOWS).passed
    assert counts_never_shrink(rows, windows=[7]).passed


@pytest.mark.parametrize("column", ["sessions_completed", "no_show_count"])
def test_a_count_that_shrinks_fails(column: str) -> None:
    rows = tiers(
        {"tutor_id": "a", column: 2, "window": "30day"},
        {"tutor_id": "a", column: 3},
        {"tutor_id": "b", column: 2, "window": "30day"},
        {"tutor_id": "b", column: 1},
    )

    finding = counts_never_shrink(rows, windows=WINDOWS)

    assert (finding.passed, finding.severity) == (False, ERROR)
    assert table(finding, "first_tutors") == [("a", "30day")]


def group(counts: dict[str, int], *, window: str = "7day") -> pl.DataFrame:
    """So many tutors of each tier; the first ones are the same in any group."""
    names = [tier for tier, count in counts.items() for _ in range(count)]
    return tiers(
        *(
            {"tutor_id": f"t{number}", "performance_tier": tier, "window": window}
            for number, tier in enumerate(names)
        )
    )


def steady(rows: pl.DataFrame, before: pl.DataFrame | None, *, min_tutors: int = 10) -> Finding:
    return tiers_are_steady(rows, before, windows=WINDOWS, max_shift=0.25, min_tutors=min_tutors)


def test_the_same_tiers_as_the_day_before_pass_and_show_both_distributions() -> None:
    rows = group({"Strong": 60, "At Risk": 40})

    finding = steady(rows, group({"At Risk": 41, "Strong": 59}))

    assert finding.passed
    assert ("7day", "Strong", 59, 60) in table(finding, "distributions")
    assert ("30day", "Strong", 0, 0) in table(finding, "distributions")
    assert finding.metadata["stability_index_7day"] == pytest.approx(0.0004, abs=1e-4)
    assert "stability_index_30day" not in finding.metadata


def test_a_shift_warns_and_names_who_moved() -> None:
    finding = steady(group({"At Risk": 60, "Strong": 40}), group({"At Risk": 20, "Strong": 80}))

    assert (finding.passed, finding.severity) == (False, WARN)
    assert "population stability index is 7day 0.72, with 0.25 expected" in str(finding.description)
    assert ("7day", "At Risk", 20, 60) in table(finding, "distributions")
    assert len(table(finding, "first_tutors_moved")) == 10


def test_tutors_of_one_day_only_do_not_count() -> None:
    assert steady(group({"Strong": 20, "At Risk": 80}), group({"Strong": 20})).passed


@pytest.mark.parametrize("before", [None, NONE, group({"At Risk": 9})])
def test_too_few_tutors_are_not_compared(before: pl.DataFrame | None) -> None:
    finding = steady(group({"Strong": 100}), before)
    assert finding.passed
    assert str(finding.description).startswith("Not compared: ")


def test_the_index_is_that_of_the_textbook() -> None:
    index = population_stability_index(pl.Series([20, 80]), pl.Series([60, 40]))
    assert index == pytest.approx(0.4 * math.log(3) - 0.4 * math.log(0.5))


COUNTS = st.lists(st.integers(0, 1_000), min_size=5, max_size=5).map(pl.Series)


@given(COUNTS, COUNTS)
def test_the_index_is_finite_symmetric_and_zero_between_equals(
    one: pl.Series, other: pl.Series
) -> None:
    index = population_stability_index(one, other)
    assert math.isfinite(index)
    assert index == pytest.approx(population_stability_index(other, one))
    assert population_stability_index(one, one) == 0
    if one.sum() == other.sum():
        assert index >= 0
