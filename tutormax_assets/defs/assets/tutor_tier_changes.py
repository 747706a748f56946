"""What moved against the day before and seven days before, and why."""

import logging
from collections.abc import Iterable, Mapping, Sequence
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
from tutormax_assets.database.date_locks import DateLocks
from tutormax_assets.database.rows_of_date import RowsOfDate
from tutormax_assets.database.tables import tutor_tier_changes as tutor_tier_changes_table
from tutormax_assets.dates import midnight
from tutormax_assets.defs.assets import (
    OWNERS,
    PLATFORM_POOL,
    frame_metadata,
    keep_partitions,
    reference_dates,
)
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import TierChanges
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.files import StorageError
from tutormax_assets.storage.partition import partition_of
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
        pool=PLATFORM_POOL,
        group_name="metrics",
        owners=OWNERS,
        kinds={"polars", "parquet", "postgres"},
        metadata=frame_metadata(TierChanges, _lineage()),
    )
    def tutor_tier_changes(
        context: dg.AssetExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        compute: dg.ResourceParam[Compute],
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> None:
        """What moved against the day before and seven days before, and why.

        One row per tutor, window and metric whose flag changed, and one without a metric where the
        tier moved and no flag did. The difference of each sum is split into rows that came in, aged
        out and were corrected. A date that is not there is not compared with. Stored later dates
        that are compared with a date of the run are compared anew, so that the order in which dates
        are computed does not matter. The table of the same name holds the same rows.
        """
        dates = reference_dates(context)
        later = _stored_later_dates(partition_store, dates.values())
        locks = DateLocks(
            database.engine,
            [str(one) for one in (*dates.values(), *later)],
            retrying=run_options.retrying(context.log),
            log=context.log,
            scope=TUTOR_TIER_CHANGES,
        )
        locks.take()
        try:
            tasks = _tasks(
                partition_store, [*dates.values(), *later], windows, metrics_policy.policy
            )
            for key, report in compute.map(compute_changes, tasks, log=context.log):
                partition = partition_of(tasks[key].path, ALL_IN_ONE, [report.stored])
                metadata = _metadata(partition_store, tasks[key].reference_date, report)
                # A file that is merged with others is gone once the partition is kept.
                rows = partition.rows().scan().collect()
                if key in dates:
                    context.add_asset_metadata(metadata, partition_key=key)
                    keep_partitions(context, partition_store, TUTOR_TIER_CHANGES, {key: partition})
                else:
                    partition_store.keep({key: partition})
                    context.log_event(
                        dg.AssetMaterialization(context.asset_key, partition=key, metadata=metadata)
                    )
                _save(key, rows, database, run_options, daily.timezone, context.log)
        finally:
            locks.release()

    return tutor_tier_changes


def _stored_later_dates(store: PartitionStore, reference_dates: Iterable[date]) -> list[date]:
    """The dates that are not among these, are compared with one of them, and are stored."""
    computed = set(reference_dates)
    later = {one + timedelta(days=days) for one in computed for days in COMPARED_DAYS} - computed
    return sorted(one for one in later if store.is_stored(TUTOR_TIER_CHANGES, str(one)))


def _tasks(
    store: PartitionStore,
    reference_dates: Iterable[date],
    windows: Sequence[int],
    policy: Policy,
) -> dict[str, ChangesTask]:
    return {
        str(reference_date): ChangesTask(
            reference_date,
            _open_date(str(reference_date), windows, store),
            _open_earlier_dates(store, reference_date, windows),
            store.path(TUTOR_TIER_CHANGES, str(reference_date)),
            policy,
        )
        for reference_date in reference_dates
    }


def _save(
    key: str,
    rows: pl.DataFrame,
    database: PlatformDatabase,
    run_options: RunOptions,
    timezone: str,
    log: logging.Logger,
) -> None:
    RowsOfDate(
        database.engine,
        midnight(date.fromisoformat(key), timezone=timezone),
        database.timeouts,
        run_options.retrying(log),
    ).write(
        tutor_tier_changes_table,
        rows,
        tutor_ids=run_options.tutor_ids,
    )


def _open_date(key: str, windows: Sequence[int], store: PartitionStore) -> ComputedDate:
    try:
        left_out = store.stored_partition(TUTORS_LEFT_OUT, key).rows()
    except FileNotFoundError:
        # An earlier version computed the date.
        left_out = None
    assets = (TUTOR_TIER_REASONS, WINDOW_EDGES, *map(metrics_asset_name, windows))
    reasons, edges, *sums = (store.stored_partition(asset, key) for asset in assets)
    return ComputedDate(reasons, [of_window.rows() for of_window in sums], edges.rows(), left_out)


def _open_earlier_dates(
    store: PartitionStore, reference_date: date, windows: Sequence[int]
) -> dict[int, ComputedDate]:
    found = {}
    for days in COMPARED_DAYS:
        with suppress(FileNotFoundError, StorageError):
            key = str(reference_date - timedelta(days=days))
            found[days] = _open_date(key, windows, store)
    return found


def _metadata(
    store: PartitionStore, reference_date: date, report: ChangesReport
) -> dict[str, dg.MetadataValue[Any]]:
    others = store.rows_of_others(TUTOR_TIER_CHANGES, str(reference_date))
    moves = sum_of_moves(
        [report.moves, *([] if others is None else [count_moves(others.collect())])]
    )
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
