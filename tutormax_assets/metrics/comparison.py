"""Tiers under one policy beside those under another: who moves, and how often tiers flap."""

from collections.abc import Mapping
from datetime import date

import polars as pl

from tutormax_assets.metrics.schemas import TIERS

_KEY = ["tutor_id", "window"]


def tier_matrix(tiers: pl.LazyFrame, others: pl.LazyFrame, /) -> pl.LazyFrame:
    """Number of tutors by window, tier and tier under the other policy.

    Args:
        tiers: ``tutor_id``, ``window`` and ``performance_tier`` under one policy.
        others: The same under the other one.

    Returns:
        ``window``, ``tier``, ``other_tier`` and ``tutors``, sorted; pairs without a tutor are left
        out, and so are windows that only one of the policies has.
    """
    key = ["window", "tier", "other_tier"]
    return _side_by_side(tiers, others).group_by(key).agg(pl.len().alias("tutors")).sort(key)


def tier_movers(tiers: pl.LazyFrame, others: pl.LazyFrame, /) -> pl.LazyFrame:
    """The tutors whose tier is another one under the other policy.

    Args:
        tiers: ``tutor_id``, ``window`` and ``performance_tier`` under one policy.
        others: The same under the other one.

    Returns:
        ``tutor_id``, ``window``, ``tier``, ``other_tier`` and how many ``steps`` down that is,
        negative where it is up; those who move farthest first.
    """
    steps = pl.col("other_tier").to_physical().cast(pl.Int8) - pl.col("tier").to_physical().cast(
        pl.Int8
    )
    moved = _side_by_side(tiers, others).with_columns(steps=steps).filter(pl.col("steps") != 0)
    return moved.sort(-pl.col("steps").abs(), "window", "tutor_id")


def tier_flaps(tiers: Mapping[date, pl.LazyFrame], /) -> pl.LazyFrame:
    """How often each tutor's tier changes from one reference date to the next that is there.

    Args:
        tiers: ``tutor_id``, ``window`` and ``performance_tier`` by reference date.

    Returns:
        ``tutor_id``, ``window`` and the number of ``flaps``.
    """
    dated = pl.concat(
        rows.select(*_KEY, pl.col("performance_tier").cast(pl.Enum(TIERS)), pl.lit(day).alias("d"))
        for day, rows in tiers.items()
    )
    tier = pl.col("performance_tier")
    is_flap = (tier != tier.shift()).fill_null(False)
    return (
        dated.sort("d")
        .group_by(_KEY, maintain_order=True)
        .agg(is_flap.sum().alias("flaps"))
        .sort(_KEY)
    )


def _side_by_side(tiers: pl.LazyFrame, others: pl.LazyFrame) -> pl.LazyFrame:
    def named(rows: pl.LazyFrame, name: str) -> pl.LazyFrame:
        return rows.select(*_KEY, pl.col("performance_tier").cast(pl.Enum(TIERS)).alias(name))

    return named(tiers, "tier").join(named(others, "other_tier"), on=_KEY)
