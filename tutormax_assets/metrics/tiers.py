"""Flags and tier, read from the rounded metrics: what is shown is what was judged."""

from functools import reduce
from operator import add

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
    exemplary, strong, developing, needs_attention, at_risk = (
        pl.lit(tier, dtype=pl.Enum(TIERS)) for tier in TIERS
    )
    need = policy.tier_flags
    green, red = pl.col("green_flags"), pl.col("red_flags")
    greens, reds = zip(*flags(policy).values(), strict=True)
    return (
        metrics.with_columns(
            _count(greens).alias("green_flags"),
            _count(reds).alias("red_flags"),
        )
        .with_columns(
            pl.when((green >= need.exemplary_green) & (red == 0))
            .then(exemplary)
            .when(red >= need.at_risk_red)
            .then(at_risk)
            .when(red >= need.needs_attention_red)
            .then(needs_attention)
            .when(green >= need.strong_green)
            .then(strong)
            .otherwise(developing)
            .alias("performance_tier")
        )
        .select(TutorTiers.column_names())
    )


def _count(raised: tuple[pl.Expr, ...]) -> pl.Expr:
    return reduce(add, (flag.cast(pl.UInt8) for flag in raised))
