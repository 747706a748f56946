"""Tiers under two policies side by side, and how often tiers change from date to date."""

from datetime import date

import polars as pl

from tutormax_assets.metrics.comparison import tier_flaps, tier_matrix, tier_movers


def tiers(**by_tutor: str) -> pl.LazyFrame:
    return pl.LazyFrame(
        {
            "tutor_id": list(by_tutor),
            "window": "7day",
            "performance_tier": list(by_tutor.values()),
        },
        schema={"tutor_id": pl.String, "window": pl.String, "performance_tier": pl.String},
    )


def test_the_matrix_counts_tutors_by_both_tiers() -> None:
    one = tiers(a="Strong", b="Strong", c="At Risk", only_here="Strong")
    other = tiers(a="Strong", b="Developing", c="At Risk", only_there="Strong")

    assert tier_matrix(one, other).collect().rows() == [
        ("7day", "Strong", "Strong", 1),
        ("7day", "Strong", "Developing", 1),
        ("7day", "At Risk", "At Risk", 1),
    ]


def test_who_moves_farthest_comes_first() -> None:
    one = tiers(a="Strong", b="Exemplary", c="At Risk", d="Strong")
    other = tiers(a="Developing", b="At Risk", c="Needs Attention", d="Strong")

    assert tier_movers(one, other).select("tutor_id", "steps").collect().rows() == [
        ("b", 4),
        ("a", 1),
        ("c", -1),
    ]


def test_a_flap_is_a_change_from_one_date_to_the_next_that_is_there() -> None:
    flaps = tier_flaps(
        {
            # In any order, and a day is missing.
            date(2025, 11, 7): tiers(a="Strong", b="Strong"),
            date(2025, 11, 3): tiers(a="Strong", b="Strong"),
            date(2025, 11, 4): tiers(a="At Risk", b="Strong"),
            date(2025, 11, 6): tiers(a="At Risk"),
        }
    )

    assert flaps.select("tutor_id", "flaps").collect().rows() == [("a", 2), ("b", 0)]
