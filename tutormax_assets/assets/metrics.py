"""The metrics of each window: one asset a window, all from one factory."""

import dagster as dg

from tutormax_assets.assets import OWNERS, frame_metadata, reference_dates
from tutormax_assets.metrics.schemas import WindowMetrics
from tutormax_assets.metrics.window import window_metrics
from tutormax_assets.resources import MetricsPolicy
from tutormax_assets.storage import FramesByDate

_SESSIONS, _EVENTS = "sessions_snapshot", "tutor_events_snapshot"
_LINEAGE = {
    "tutor_id": [("tutor_roster", "tutor_id")],
    "sessions_completed": [(_SESSIONS, "started"), (_SESSIONS, "no_show")],
    "avg_rating": [(_SESSIONS, "overall_rating")],
    "first_session_success_rate": [(_SESSIONS, "session_number"), (_SESSIONS, "overall_rating")],
    "reschedule_rate": [(_SESSIONS, "tutor_initiated_reschedule")],
    "no_show_count": [(_SESSIONS, "no_show")],
    "engagement_score": [
        (_EVENTS, "event_type"),
        (_SESSIONS, "engagement_score"),
        (_SESSIONS, "late_start_minutes"),
    ],
    "learning_objectives_met_pct": [(_SESSIONS, "learning_objectives_met")],
    "response_time_avg_minutes": [(_EVENTS, "response_time_minutes")],
}


def metrics_asset_name(days: int) -> str:
    """The name of the asset that holds the metrics of a window of so many days."""
    return f"metrics_{days}day"


def window_metrics_asset(
    daily: dg.DailyPartitionsDefinition, backfill_policy: dg.BackfillPolicy, *, days: int
) -> dg.AssetsDefinition:
    """Build the asset of one window, such as ``metrics_30day``."""

    @dg.asset(
        name=metrics_asset_name(days),
        description=(
            f"The eight metrics of every tutor of the roster over the {days} days before a "
            "reference date. One row per tutor per reference date."
        ),
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="metrics",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(WindowMetrics, _LINEAGE),
    )
    def metrics_of_window(
        context: dg.AssetExecutionContext,
        metrics_policy: MetricsPolicy,
        tutor_roster: FramesByDate,
        sessions_snapshot: FramesByDate,
        tutor_events_snapshot: FramesByDate,
    ) -> FramesByDate:
        """Compute the metrics of one window."""
        policy = metrics_policy.policy
        return {
            key: window_metrics(
                tutor_roster[key],
                sessions_snapshot[key],
                tutor_events_snapshot[key],
                reference_date=day,
                days=days,
                policy=policy,
            ).pipe(WindowMetrics.validate, eager=False)
            for key, day in reference_dates(context).items()
        }

    return metrics_of_window
