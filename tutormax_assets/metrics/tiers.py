"""Flags and tier, read from the rounded metrics: what is shown is what was judged."""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import polars as pl

from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, LOWER_IS_BETTER, Policy
from tutormax_assets.metrics.schemas import TIERS, TutorTiers


def flags(policy: Policy) -> dict[str, tuple[pl.Expr, pl.Expr]]:
    """Whether each flagged metric is green and whether it is red; a null metric is neither."""
    result = {}
    for name in HIGHER_IS_BETTER:
        bound = getattr(policy.thresholds, name)
        result[name] = (pl.col(name) >= bound.green, pl.col(name) < bound.red)
    for name in LOWER_IS_BETTER:
        bound = getattr(policy.thresholds, name)
        result[name] = (pl.col(name) <= bound.green, pl.col(name) > bound.red)
    return {
        name: (green.fill_null(False), red.fill_null(False))
        for name, (green, red) in result.items()
    }


def performance_tiers(metrics: pl.LazyFrame, /, *, policy: Policy) -> pl.LazyFrame:
    """The tier of each tutor and window, with the number of flags that led to it.

    Args:
        metrics: ``WindowMetrics`` of any windows.
        policy: Thresholds, and how many flags make a tier.

    Returns:
        ``TutorTiers``, in the order of the rows that came in.
    """
    return with_tiers(metrics, policy=policy).select(TutorTiers.column_names())


def with_tiers(metrics: pl.LazyFrame, /, *, policy: Policy) -> pl.LazyFrame:
    """The rows of ``performance_tiers`` with all columns that came in."""
    greens, reds = zip(*flags(policy).values(), strict=True)
    green, red = pl.col("green_flags"), pl.col("red_flags")
    tier = pl.lit(TIER_OF_NO_RULE, dtype=pl.Enum(TIERS))
    for name, applies in reversed(tier_rules(policy)):
        tier = pl.when(applies(green, red)).then(pl.lit(name, dtype=pl.Enum(TIERS))).otherwise(tier)
    return metrics.with_columns(
        _count(greens).alias("green_flags"), _count(reds).alias("red_flags")
    ).with_columns(tier.alias("performance_tier"))


TIER_OF_NO_RULE = "Developing"


def tier_rules(policy: Policy) -> list[tuple[str, Callable[[Any, Any], Any]]]:
    """When a number of green and of red flags makes a tier; the first rule that applies counts.

    The numbers may be whole numbers or expressions.
    """
    need = policy.tier_flags
    return [
        ("Exemplary", lambda green, red: (green >= need.exemplary_green) & (red == 0)),
        ("At Risk", lambda _, red: red >= need.at_risk_red),
        ("Needs Attention", lambda _, red: red >= need.needs_attention_red),
        ("Strong", lambda green, _: green >= need.strong_green),
    ]


def tier_of(green: int, red: int, /, *, policy: Policy) -> str:
    """The tier of a number of green and of red flags."""
    tiers = (tier for tier, applies in tier_rules(policy) if applies(green, red))
    return next(tiers, TIER_OF_NO_RULE)


def _count(raised: tuple[pl.Expr, ...]) -> pl.Expr:
    return reduce(add, (flag.cast(pl.UInt8) for flag in raised))
