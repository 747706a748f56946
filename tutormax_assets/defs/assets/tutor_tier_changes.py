"""What moved against the day before and seven days before, and why."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date, timedelta
from typing import Any

import dagster as dg
import polars as pl

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.changes import (
    COMPARED_DAYS,
    TUTOR_TIER_CHANGES,
    ChangesReport,
    ChangesTask,
    ComputedDate,
    compute_changes,
    count_moves,
    sum_of_moves,
)
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS
from tutormax_assets.compute.tasks.windows import WINDOW_EDGES, metrics_asset_name
from tutormax_assets.defs.assets import OWNERS, frame_metadata, keep_partitions, reference_dates
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.metrics.schemas import TierChanges
from tutormax_assets.storage.files import StorageError
from tutormax_assets.storage.partition import Partition, partition_of
from tutormax_assets.storage.shards import ALL_IN_ONE
from tutormax_assets.storage.store import TUTORS_LEFT_OUT, PartitionStore


def tutor_tier_changes_asset(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    windows: Sequence[int],
) -> dg.AssetsDefinition:
    """Build the asset ``tutor_tier_changes``."""

    @dg.asset(
        deps=[TUTOR_TIER_REASONS, WINDOW_EDGES, *map(metrics_asset_name, windows)],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="metrics",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(TierChanges, _lineage()),
    )
    def tutor_tier_changes(
        context: dg.AssetExecutionContext,
        compute: dg.ResourceParam[Compute],
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> None:
        """What moved against the day before and seven days before, and why.

        One row per tutor, window and metric whose flag changed, and one without a metric where the
        tier moved and no flag did. The difference of each sum is split into rows that came in, aged
        out and were corrected. A date that is not there is not compared with.
        """
        dates = reference_dates(context)
        tasks = {
            key: ChangesTask(
                reference_date,
                _open_date(key, windows, partition_store.partition),
                _open_earlier_dates(partition_store, reference_date, windows),
                partition_store.path(TUTOR_TIER_CHANGES, key),
                metrics_policy.policy,
            )
            for key, reference_date in dates.items()
        }
        reports = dict(compute.map(compute_changes, tasks, log=context.log))
        for key, report in reports.items():
            others = partition_store.rows_of_others(TUTOR_TIER_CHANGES, key)
            counts = [report.moves, *([] if others is None else [count_moves(others.collect())])]
            metadata = _metadata(dates[key], report, sum_of_moves(counts))
            context.add_asset_metadata(metadata, partition_key=key)
        partitions = {
            key: partition_of(tasks[key].path, ALL_IN_ONE, [report.stored])
            for key, report in reports.items()
        }
        keep_partitions(context, partition_store, TUTOR_TIER_CHANGES, partitions)

    return tutor_tier_changes


def _open_date(
    key: str, windows: Sequence[int], opened: Callable[[str, str], Partition]
) -> ComputedDate:
    try:
        left_out = opened(TUTORS_LEFT_OUT, key).rows()
    except FileNotFoundError:
        # An earlier version computed the date.
        left_out = None
    assets = (TUTOR_TIER_REASONS, WINDOW_EDGES, *map(metrics_asset_name, windows))
    reasons, edges, *sums = (opened(asset, key) for asset in assets)
    return ComputedDate(reasons, [of_window.rows() for of_window in sums], edges.rows(), left_out)


def _open_earlier_dates(
    store: PartitionStore, reference_date: date, windows: Sequence[int]
) -> dict[int, ComputedDate]:
    found = {}
    for days in COMPARED_DAYS:
        with suppress(FileNotFoundError, StorageError):
            key = str(reference_date - timedelta(days=days))
            found[days] = _open_date(key, windows, store.earlier_partition)
    return found


def _metadata(
    reference_date: date, report: ChangesReport, moves: pl.DataFrame
) -> dict[str, dg.MetadataValue[Any]]:
    compared = [str(reference_date - timedelta(days=days)) for days in report.compared]
    columns = [dg.TableColumn(name, str(dtype)) for name, dtype in moves.schema.items()]
    rows = moves.with_columns(pl.col("move").cast(pl.String)).to_dicts()
    return {
        "compared_with": dg.MetadataValue.text(", ".join(compared) or "no earlier date"),
        "movers": dg.MetadataValue.table(
            [dg.TableRecord(row) for row in rows], dg.TableSchema(columns)
        ),
    }


def _lineage() -> Mapping[str, list[tuple[str, str]]]:
    tier = [(TUTOR_TIER_REASONS, "performance_tier")]
    return {
        "tutor_id": [(TUTOR_TIER_REASONS, "tutor_id")],
        "window": [(TUTOR_TIER_REASONS, "window")],
        "move": tier,
        "tier": tier,
        "tier_before": tier,
    }
