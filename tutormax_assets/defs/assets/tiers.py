"""The tier of each tutor and window."""

from collections.abc import Iterable, Mapping, Sequence

import dagster as dg

from tutormax_assets.compute import ShardsError
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.tiers import TiersReport, TiersTask, compute_tiers, tier_counts
from tutormax_assets.database.faults import reason
from tutormax_assets.defs.assets import OWNERS, frame_metadata
from tutormax_assets.defs.assets.distribution import distribution_image
from tutormax_assets.defs.assets.metrics import metrics_asset_name
from tutormax_assets.defs.io_manager import PartitionedParquetIOManager, PartitionsByDate
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, LOWER_IS_BETTER
from tutormax_assets.metrics.schemas import TIERS, TutorTiers, WindowMetrics
from tutormax_assets.storage.partition import division, partition_of
from tutormax_assets.storage.shards import shard_name


def tutor_tiers_asset(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    windows: Sequence[int],
) -> dg.AssetsDefinition:
    """Build the asset ``tutor_tiers``."""

    @dg.asset(
        ins={metrics_asset_name(days): dg.AssetIn() for days in windows},
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
        io_manager: dg.ResourceParam[PartitionedParquetIOManager],
        **metrics_by_window: PartitionsByDate,
    ) -> PartitionsByDate:
        """The metrics of all windows with their flags and the tier that follows.

        One row per tutor and window per reference date.
        """
        tiers: PartitionsByDate = {}
        for key in context.partition_keys:
            metrics = [metrics_by_window[metrics_asset_name(days)][key] for days in windows]
            path = io_manager.path(context.asset_key, key)
            divided = division(metrics)
            tasks = {
                shard_name(key, number): TiersTask(
                    [partition.rows(number) for partition in metrics],
                    number or 0,
                    path,
                    metrics_policy.policy,
                )
                for number in divided.numbers
            }
            reports: list[TiersReport] = []
            failed = dict(divided.failed)
            try:
                for _, report in compute.map(compute_tiers, tasks, log=context.log):
                    reports.append(report)
            except ShardsError as error:
                for name, failure in error.errors.items():
                    failed[tasks[name].shard] = reason(failure)
                if len(failed) == len(divided.shards):
                    raise
            others = io_manager.rows_of_others(context.asset_key, key)
            counts = _added_up(
                [
                    *(report.counts for report in reports),
                    *([] if others is None else [tier_counts(others.collect())]),
                ]
            )
            context.add_asset_metadata(
                {
                    "tier_distribution": dg.MetadataValue.md(distribution_image(counts)),
                    "tutors_by_tier": _table(counts),
                },
                partition_key=key,
            )
            tiers[key] = partition_of(
                path,
                divided.shards,
                [report.stored for report in reports],
                failed=failed,
                no_rows=TutorTiers.create_empty(),
            )
        return tiers

    return tutor_tiers


def _added_up(counts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for of_shard in counts:
        for window, tiers in of_shard.items():
            of_window = total.setdefault(window, dict.fromkeys(TIERS, 0))
            for tier, tutors in tiers.items():
                of_window[tier] += tutors
    return total


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
