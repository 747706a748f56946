"""The tier of each tutor and window."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.tiers import (
    collect_tiers,
    compute_tiers,
    plan_tiers,
    sum_of_counts,
    tier_counts,
)
from tutormax_assets.defs.assets import OWNERS, frame_metadata, keep_partitions
from tutormax_assets.defs.assets.distribution import distribution_image
from tutormax_assets.defs.assets.window_metrics import metrics_asset_name
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, LOWER_IS_BETTER
from tutormax_assets.metrics.schemas import TIERS, TutorTiers, WindowMetrics
from tutormax_assets.storage.partition import Partition
from tutormax_assets.storage.store import PartitionStore

_ASSET = "tutor_tiers"


def tutor_tiers_asset(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    windows: Sequence[int],
) -> dg.AssetsDefinition:
    """Build the asset ``tutor_tiers``."""

    @dg.asset(
        deps=[metrics_asset_name(days) for days in windows],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="metrics",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(TutorTiers, _lineage(windows)),
    )
    def tutor_tiers(
        context: dg.AssetExecutionContext,
        compute: dg.ResourceParam[Compute],
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> None:
        """The metrics of all windows with their flags and the tier that follows.

        One row per tutor and window per reference date.
        """
        metrics = [
            partition_store.partitions(metrics_asset_name(days), context.partition_keys)
            for days in windows
        ]
        tiers: dict[str, Partition] = {}
        for key in context.partition_keys:
            plan = plan_tiers(
                key,
                [of_window[key] for of_window in metrics],
                path=partition_store.path(_ASSET, key),
                policy=metrics_policy.policy,
            )
            reports, errors = compute.gather(compute_tiers, plan.tasks, log=context.log)
            tiers[key] = collect_tiers(plan, reports, errors)
            counts = [report.counts for report in reports.values()]
            if (others := partition_store.rows_of_others(_ASSET, key)) is not None:
                counts.append(tier_counts(others.collect()))
            context.add_asset_metadata(_metadata(sum_of_counts(counts)), partition_key=key)
        keep_partitions(context, partition_store, _ASSET, tiers)

    return tutor_tiers


def _metadata(counts: dict[str, dict[str, int]]) -> dict[str, dg.MetadataValue[Any]]:
    return {
        "tier_distribution": dg.MetadataValue.md(distribution_image(counts)),
        "tutors_by_tier": _table(counts),
    }


def _table(counts: dict[str, dict[str, int]]) -> dg.TableMetadataValue:
    return dg.MetadataValue.table(
        [
            dg.TableRecord(
                {"tier": tier, **{window: tiers[tier] for window, tiers in counts.items()}}
            )
            for tier in TIERS
        ],
        dg.TableSchema(
            [dg.TableColumn("tier", "string"), *(dg.TableColumn(w, "int") for w in counts)]
        ),
    )


def _lineage(windows: Sequence[int]) -> dict[str, list[tuple[str, str]]]:
    def from_windows(*columns: str) -> list[tuple[str, str]]:
        return [(metrics_asset_name(days), column) for days in windows for column in columns]

    flagged = from_windows(*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
    return {
        **{column: from_windows(column) for column in WindowMetrics.column_names()},
        "green_flags": flagged,
        "red_flags": flagged,
        "performance_tier": flagged,
    }
