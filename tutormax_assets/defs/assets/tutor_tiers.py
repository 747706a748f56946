"""The tier of each tutor and window, and why."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.tiers import (
    SCHEMAS,
    TUTOR_TIER_REASONS,
    TUTOR_TIERS,
    TiersCounts,
    collect_tiers,
    compute_tiers,
    plan_tiers,
    sum_of_counts,
    thin_counts,
    tier_counts,
)
from tutormax_assets.compute.tasks.windows import metrics_asset_name
from tutormax_assets.defs.assets import OWNERS, frame_metadata, keep_partitions
from tutormax_assets.defs.assets.distribution import distribution_image
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, LOWER_IS_BETTER
from tutormax_assets.metrics.reasons import DENOMINATORS
from tutormax_assets.metrics.schemas import TIERS, WindowSums
from tutormax_assets.storage.store import PartitionStore


def tutor_tiers_assets(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    windows: Sequence[int],
) -> dg.AssetsDefinition:
    """Build the assets ``tutor_tiers`` and ``tutor_tier_reasons``, computed in one step."""

    @dg.multi_asset(
        name=TUTOR_TIERS,
        specs=[_spec(asset, windows) for asset in SCHEMAS],
        can_subset=True,
        partitions_def=daily,
        backfill_policy=backfill_policy,
    )
    def tutor_tiers(
        context: dg.AssetExecutionContext,
        compute: dg.ResourceParam[Compute],
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.MaterializeResult[None]]:
        """Raise the flags of all windows, find the tier that follows, and say why."""
        selected = [one for one in SCHEMAS if dg.AssetKey(one) in context.selected_asset_keys]
        metrics = [
            partition_store.partitions(metrics_asset_name(days), context.partition_keys)
            for days in windows
        ]
        keys = context.partition_keys
        plan = plan_tiers(
            metrics,
            paths={
                asset: {key: partition_store.path(asset, key) for key in keys} for asset in selected
            },
            policy=metrics_policy.policy,
        )
        reports, errors = compute.gather(compute_tiers, plan.tasks, log=context.log)
        found = collect_tiers(plan, reports, errors)
        for asset in selected:
            for key in keys:
                metadata = _METADATA[asset](
                    found.counts[key], partition_store.rows_of_others(asset, key)
                )
                metadata["policy_digest"] = dg.MetadataValue.text(metrics_policy.policy.digest)
                context.add_asset_metadata(metadata, asset_key=asset, partition_key=key)
            keep_partitions(context, partition_store, asset, found.partitions[asset])
            yield dg.MaterializeResult(asset_key=asset)

    return tutor_tiers


_Metadata = dict[str, dg.MetadataValue[Any]]


def _tiers_metadata(shards: Sequence[TiersCounts], others: pl.LazyFrame | None) -> _Metadata:
    counts = [of_shard.tiers for of_shard in shards]
    if others is not None:
        counts.append(tier_counts(others.collect()))
    total = sum_of_counts(counts)
    return {
        "tier_distribution": dg.MetadataValue.md(distribution_image(total)),
        "tutors_by_tier": _table(total),
    }


def _reasons_metadata(shards: Sequence[TiersCounts], others: pl.LazyFrame | None) -> _Metadata:
    thin = Counter[str]()
    for of_shard in shards:
        thin.update(of_shard.thin)
    if others is not None:
        thin.update(thin_counts(others.collect()))
    return {
        f"thin_evidence_{window}": dg.MetadataValue.int(tutors) for window, tutors in thin.items()
    }


_METADATA: Mapping[str, Callable[[Sequence[TiersCounts], pl.LazyFrame | None], _Metadata]] = {
    TUTOR_TIERS: _tiers_metadata,
    TUTOR_TIER_REASONS: _reasons_metadata,
}


def _spec(asset: str, windows: Sequence[int]) -> dg.AssetSpec:
    return dg.AssetSpec(
        asset,
        deps=[metrics_asset_name(days) for days in windows],
        skippable=True,
        description=_DESCRIPTIONS[asset],
        group_name="metrics",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(SCHEMAS[asset], _lineage(asset, windows)),
    )


_DESCRIPTIONS = {
    TUTOR_TIERS: (
        "The metrics of all windows with their flags and the tier that follows. One row per tutor"
        " and window per reference date."
    ),
    TUTOR_TIER_REASONS: (
        "Why a tutor is in a tier: of each metric that carries a flag its value, the number of"
        " rows that it rests on, its 95 % interval, its flag, and whether the flag is more than"
        " noise. One row per tutor and window per reference date."
    ),
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


def _lineage(asset: str, windows: Sequence[int]) -> dict[str, list[tuple[str, str]]]:
    def from_windows(*columns: str) -> list[tuple[str, str]]:
        return [(metrics_asset_name(days), column) for days in windows for column in columns]

    flagged = from_windows(*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
    found = {}
    for column in SCHEMAS[asset].column_names():
        metric, _, part = column.rpartition("_")
        if column in WindowSums.column_names():
            found[column] = from_windows(column)
        elif metric not in DENOMINATORS:
            # Flags and tier; the evidence is read from the sessions.
            found[column] = from_windows("sessions") if column == "evidence" else flagged
        elif part == "denominator":
            found[column] = from_windows(DENOMINATORS[metric])
        else:
            found[column] = from_windows(metric, DENOMINATORS[metric])
    return found
