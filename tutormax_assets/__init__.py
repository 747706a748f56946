"""Nightly tutor performance metrics: Dagster assets computed with Polars, kept in PostgreSQL.

The names below are loaded when they are first used, so that importing the package is cheap.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutormax_assets.api.aggregator import DailyMetricsAggregator, run_daily_aggregation
    from tutormax_assets.api.summary import AggregationResult, AggregationSummary

__all__ = [
    "AggregationResult",
    "AggregationSummary",
    "DailyMetricsAggregator",
    "run_daily_aggregation",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tutormax_assets.api import aggregator

        return getattr(aggregator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
