"""The metrics of each window: one asset a window, all of them computed in one step."""

from collections.abc import Iterator, Sequence

import dagster as dg

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.windows import (
    WINDOW_EDGES,
    collect_windows,
    compute_windows,
    metrics_asset_name,
    plan_windows,
)
from tutormax_assets.defs.assets import OWNERS, frame_metadata, keep_partitions
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.metrics.schemas import EdgeSums, WindowSums, origins
from tutormax_assets.storage.store import PartitionStore

_READ = ("tutor_roster", "sessions_snapshot", "tutor_events_snapshot")


def window_metrics_assets(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    windows: Sequence[int],
) -> dg.AssetsDefinition:
    """Build the assets of the windows, such as ``metrics_30day``, all of them in one step."""

    @dg.multi_asset(
        name="window_metrics",
        specs=[*(_spec(days) for days in windows), _spec_of_edges()],
        can_subset=True,
        partitions_def=daily,
        backfill_policy=backfill_policy,
    )
    def metrics_of_windows(
        context: dg.AssetExecutionContext,
        compute: dg.ResourceParam[Compute],
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.MaterializeResult[None]]:
        """Go through the snapshots of each reference date once for all windows."""
        keys = context.partition_keys
        assets = [*map(metrics_asset_name, windows), WINDOW_EDGES]
        selected = [one for one in assets if dg.AssetKey(one) in context.selected_asset_keys]
        plan = plan_windows(
            *(partition_store.partitions(asset, keys) for asset in _READ),
            paths={
                asset: {key: partition_store.path(asset, key) for key in keys} for asset in selected
            },
            policy=metrics_policy.policy,
        )
        reports, errors = compute.gather(compute_windows, plan.tasks, log=context.log)
        found = collect_windows(plan, reports, errors)
        for key, seconds in found.compute_seconds.items():
            # On one of the assets, so that the seconds of a run add up.
            context.add_asset_metadata(
                {"all_windows_compute_seconds": round(seconds, 3)},
                asset_key=selected[0],
                partition_key=key,
            )
        for asset in selected:
            keep_partitions(context, partition_store, asset, found.partitions[asset])
            yield dg.MaterializeResult(asset_key=asset)

    return metrics_of_windows


def _spec(days: int) -> dg.AssetSpec:
    return dg.AssetSpec(
        metrics_asset_name(days),
        deps=_READ,
        skippable=True,
        group_name="metrics",
        description=(
            f"The eight metrics of every tutor of the roster over the {days} days before a "
            "reference date, and the sums that they are computed from. One row per tutor per "
            "reference date."
        ),
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(WindowSums, origins(WindowSums)),
    )


def _spec_of_edges() -> dg.AssetSpec:
    return dg.AssetSpec(
        WINDOW_EDGES,
        deps=_READ,
        skippable=True,
        group_name="metrics",
        description=(
            "What the rows of the first and last days of each window add up to, so that a later "
            "date can tell which rows came in and which aged out. One row per tutor and edge per "
            "reference date."
        ),
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(EdgeSums, origins(EdgeSums)),
    )
