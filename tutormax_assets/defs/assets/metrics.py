"""The metrics of each window: one asset a window, all of them computed in one step."""

from collections.abc import Iterator, Sequence

import dagster as dg

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.windows import collect_windows, compute_windows, plan_windows
from tutormax_assets.defs.assets import OWNERS, frame_metadata
from tutormax_assets.defs.io_manager import PartitionedParquetIOManager, PartitionsByDate
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.metrics.schemas import WindowMetrics

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


def window_metrics_assets(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    windows: Sequence[int],
) -> dg.AssetsDefinition:
    """Build the assets of the windows, such as ``metrics_30day``, all of them in one step."""

    @dg.multi_asset(
        name="window_metrics",
        outs={metrics_asset_name(days): _out(days) for days in windows},
        can_subset=True,
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="metrics",
    )
    def metrics_of_windows(
        context: dg.AssetExecutionContext,
        compute: dg.ResourceParam[Compute],
        metrics_policy: MetricsPolicy,
        io_manager: dg.ResourceParam[PartitionedParquetIOManager],
        tutor_roster: PartitionsByDate,
        sessions_snapshot: PartitionsByDate,
        tutor_events_snapshot: PartitionsByDate,
    ) -> Iterator[dg.Output[PartitionsByDate]]:
        """Go through the snapshots of each reference date once for all windows."""
        selected = {
            days: asset
            for days in windows
            if (asset := dg.AssetKey(metrics_asset_name(days))) in context.selected_asset_keys
        }
        plan = plan_windows(
            tutor_roster,
            sessions_snapshot,
            tutor_events_snapshot,
            paths={
                days: {key: io_manager.path(asset, key) for key in tutor_roster}
                for days, asset in selected.items()
            },
            policy=metrics_policy.policy,
        )
        reports, errors = compute.gather(compute_windows, plan.tasks, log=context.log)
        found = collect_windows(plan, reports, errors)
        for key, seconds in found.compute_seconds.items():
            # On one of the assets, so that the seconds of a run add up.
            context.add_asset_metadata(
                {"all_windows_compute_seconds": round(seconds, 3)},
                asset_key=next(iter(selected.values())),
                partition_key=key,
            )
        for days, asset in selected.items():
            yield dg.Output(dict(found.partitions[days]), asset.to_python_identifier())

    return metrics_of_windows


def _out(days: int) -> dg.AssetOut:
    return dg.AssetOut(
        is_required=False,
        description=(
            f"The eight metrics of every tutor of the roster over the {days} days before a "
            "reference date. One row per tutor per reference date."
        ),
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(WindowMetrics, _LINEAGE),
    )
