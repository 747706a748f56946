"""Summaries of all tutors: tiers, distributions of metrics, and what is charted over time."""

import polars as pl

from tutormax_assets.metrics.schemas import TIERS

CHARTED = {
    "tutors": "Tutors",
    "sessions_completed": "Sessions completed",
    "mean_rating": "Mean of avg_rating",
    "no_shows": "No-shows",
    "at_risk_share": "At Risk, % of tutors",
    "exemplary_share": "Exemplary, % of tutors",
    "without_session_share": "Without a session, % of tutors",
}
"""What is charted, with its title."""

DISTRIBUTED = (
    "sessions_completed",
    "avg_rating",
    "first_session_success_rate",
    "reschedule_rate",
    "no_show_count",
    "engagement_score",
    "learning_objectives_met_pct",
    "response_time_avg_minutes",
)
_QUANTILES = {"p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9}


def tier_shares(tiers: pl.LazyFrame, /) -> pl.LazyFrame:
    """Number of tutors by reference date, window and tier.

    Args:
        tiers: ``reference_date``, ``window`` and ``performance_tier``.

    Returns:
        ``reference_date``, ``window``, ``performance_tier`` and ``tutors``.
    """
    key = ["reference_date", "window", "performance_tier"]
    return tiers.group_by(key).agg(pl.len().alias("tutors")).sort(key)


def charted_values(tiers: pl.LazyFrame, /) -> pl.LazyFrame:
    """A value of each chart by reference date.

    Args:
        tiers: ``TutorTiers`` of one window, with their ``reference_date``.

    Returns:
        ``reference_date`` and a column for each of ``CHARTED``, sorted by date.
    """
    tier = pl.col("performance_tier").cast(pl.Enum(TIERS))
    return (
        tiers.group_by("reference_date")
        .agg(
            tutors=pl.len().cast(pl.Float64),
            sessions_completed=pl.col("sessions_completed").sum().cast(pl.Float64),
            mean_rating=pl.col("avg_rating").mean(),
            no_shows=pl.col("no_show_count").sum().cast(pl.Float64),
            at_risk_share=100 * (tier == "At Risk").mean(),
            exemplary_share=100 * (tier == "Exemplary").mean(),
            without_session_share=100 * (pl.col("sessions_completed") == 0).mean(),
        )
        .sort("reference_date")
    )


def metric_distributions(tiers: pl.LazyFrame, /) -> pl.LazyFrame:
    """How the metrics of all tutors are distributed, by window.

    Args:
        tiers: ``TutorTiers``.

    Returns:
        ``window``, ``metric``, ``tutors`` with a value, ``p10``, ``p25``, ``median``, ``p75`` and
        ``p90``; null where no tutor has a value.
    """
    return pl.concat(
        tiers.group_by("window").agg(
            metric=pl.lit(name),
            tutors=pl.col(name).count(),
            **{
                title: pl.col(name).cast(pl.Float64).quantile(share, interpolation="linear")
                for title, share in _QUANTILES.items()
            },
        )
        for name in DISTRIBUTED
    )
