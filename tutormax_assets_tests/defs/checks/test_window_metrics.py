"""What is asked of the metrics of one window."""

from typing import Any

import polars as pl
import pytest

from tutormax_assets.defs.checks import ERROR, WARN, Finding
from tutormax_assets.defs.checks.window_metrics import (
    null_shares_are_steady,
    one_row_per_tutor,
    values_in_range,
)
from tutormax_assets.metrics.schemas import TutorRoster, WindowMetrics, WindowSums
from tutormax_assets_tests.metrics.rows import roster, window_metrics_rows

SUMS = [name for name in WindowSums.column_names() if name not in WindowMetrics.column_names()]


def metrics(*rows: dict[str, Any]) -> pl.DataFrame:
    nothing = {name: pl.lit(0, dtype=pl.Schema(WindowSums)[name]) for name in SUMS}
    return window_metrics_rows(*rows).with_columns(**nothing).collect()


def table(finding: Finding, name: str) -> list[tuple[Any, ...]]:
    value = finding.metadata[name]
    assert isinstance(value, pl.DataFrame)
    return value.rows()


NONE = pl.DataFrame(schema=pl.Schema(WindowSums))


def test_values_of_the_contract_pass() -> None:
    assert values_in_range(metrics({"avg_rating": 1.0}, {"tutor_id": "t2"}), window="7day").passed
    assert values_in_range(NONE, window="7day").passed


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"avg_rating": 5.01}, "avg_rating|max"),
        ({"reschedule_rate": -0.01}, "reschedule_rate|min"),
        ({"engagement_score": 100.01}, "engagement_score|max"),
        ({"no_show_count": -1}, "no_show_count|min"),
        ({"sessions_completed": None}, "sessions_completed|nullability"),
        ({"window": "30day"}, "window"),
        ({"tutor_id": "t2"}, "primary_key"),
    ],
)
def test_a_value_out_of_range_is_named_by_its_rule(row: dict[str, Any], rule: str) -> None:
    finding = values_in_range(metrics({"tutor_id": "t2"}, row), window="7day")

    assert (finding.passed, finding.severity) == (False, ERROR)
    assert rule in [name for name, _ in table(finding, "rules")]
    assert rule in str(finding.description)
    assert ("t1",) in table(finding, "first_tutors") or rule == "primary_key"


def test_other_columns_and_types_fail() -> None:
    rows = metrics({}).drop("avg_rating").with_columns(pl.col("no_show_count").cast(pl.String))

    finding = values_in_range(rows, window="7day")

    assert not finding.passed
    assert table(finding, "columns") == [
        ("avg_rating", "None", "Float64"),
        ("no_show_count", "String", "Int32"),
    ]


def test_one_row_for_each_tutor_of_the_roster_passes() -> None:
    rows = metrics({}, {"tutor_id": "t2"})
    assert one_row_per_tutor(rows, roster("t2", "t1").collect()).passed
    assert one_row_per_tutor(NONE, pl.DataFrame(schema=pl.Schema(TutorRoster))).passed


def test_rows_that_are_not_the_rosters_are_named() -> None:
    rows = metrics({}, {}, {"tutor_id": "stranger"})

    finding = one_row_per_tutor(rows, roster("t1", "t2", "t3").collect())

    assert (finding.passed, finding.severity) == (False, ERROR)
    assert table(finding, "problems") == [
        ("missing", 2),
        ("more than one row", 1),
        ("not in the roster", 1),
    ]
    assert table(finding, "first_tutors") == [
        ("stranger", "not in the roster"),
        ("t1", "more than one row"),
        ("t2", "missing"),
        ("t3", "missing"),
    ]


def rated(*tutors: str, unrated: tuple[str, ...] = ()) -> pl.DataFrame:
    return metrics(
        *({"tutor_id": tutor, "avg_rating": 4.0} for tutor in tutors),
        *({"tutor_id": tutor} for tutor in unrated),
    )


def steady(
    rows: pl.DataFrame, before: pl.DataFrame | None, *, max_rise: float = 0.3, min_tutors: int = 2
) -> Finding:
    return null_shares_are_steady(rows, before, max_rise=max_rise, min_tutors=min_tutors)


def test_a_column_that_lost_its_values_warns() -> None:
    finding = steady(rated("a", unrated=("b", "c")), rated("a", "b", "c"))

    assert (finding.passed, finding.severity) == (False, WARN)
    assert "avg_rating from 0% to 67%" in str(finding.description)
    assert table(finding, "first_tutors") == [("b",), ("c",)]
    assert ("avg_rating", 0.0, 2 / 3) in table(finding, "null_shares")


def test_a_small_rise_and_any_fall_pass() -> None:
    assert steady(rated("a", "b", "c", unrated=("d",)), rated("a", "b", "c", "d")).passed
    assert steady(rated("a", "b"), rated(unrated=("a", "b"))).passed


def test_only_tutors_of_both_days_are_compared() -> None:
    assert steady(rated("a", "b", unrated=("new1", "new2")), rated("a", "b", "gone")).passed


@pytest.mark.parametrize("before", [None, NONE, rated("a")])
def test_without_enough_to_compare_it_passes_with_the_reason(before: pl.DataFrame | None) -> None:
    finding = steady(rated(unrated=("a", "b")), before)
    assert finding.passed
    assert str(finding.description).startswith("Not compared: ")


def test_nobody_is_steady() -> None:
    assert steady(NONE, NONE, min_tutors=1).passed
