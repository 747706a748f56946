"""What moved against the day before and seven days before, and why."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
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
from tutormax_assets.database.date_locks import CHANGES, DateLocks
from tutormax_assets.database.metrics_reading import MetricsTableError, count_rows
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
        locks = DateLocks(
            database.engine,
            # Of later dates that are not stored, too: another run may be about to store one.
            [str(one) for one in {*dates.values(), *_later_dates(dates.values())}],
            retrying=run_options.retrying(context.log),
            log=context.log,
            scope=CHANGES,
        )
        locks.take()
        try:
            tasks = {
                key: _task(partition_store, reference_date, windows, metrics_policy.policy)
                for key, reference_date in dates.items()
            }
            later = _later_tasks(
                partition_store, dates.values(), windows, metrics_policy.policy, context.log
            )
            with ThreadPoolExecutor(1, thread_name_prefix=TUTOR_TIER_CHANGES) as pool:
                writer = _Writer(
                    context, database, run_options, partition_store, daily.timezone, pool
                )
                try:
                    for key, report in compute.map(compute_changes, tasks, log=context.log):
                        writer.keep(tasks[key], report)
                    reports, errors = compute.gather(compute_changes, later, log=context.log)
                    for key, report in reports.items():
                        writer.keep_later(later[key], report)
                finally:
                    writer.wait()
            for key, error in errors.items():
                context.log.warning(f"{key} is not compared anew: {error}")
        finally:
            locks.release()
        writer.check()

    return tutor_tier_changes


@dataclass
class _Writer:
    """Keeps what a run has found as Parquet, on record and in the table.

    The table's rows of a date are written while the next date is computed.
    """

    context: dg.AssetExecutionContext
    database: PlatformDatabase
    run_options: RunOptions
    store: PartitionStore
    timezone: str
    pool: ThreadPoolExecutor
    writing: Future[None] | None = None
    not_written: dict[str, str] = field(default_factory=dict)

    def keep(self, task: ChangesTask, report: ChangesReport) -> None:
        """Keep a date of the run."""
        key, partition = str(task.reference_date), _partition(task, report)
        # A file that is merged with others is gone once the partition is kept.
        rows = partition.rows().scan().collect()
        metadata = _metadata(self.store, task.reference_date, report)
        self.context.add_asset_metadata(metadata, partition_key=key)
        keep_partitions(self.context, self.store, TUTOR_TIER_CHANGES, {key: partition})
        self._write(key, rows)

    def keep_later(self, task: ChangesTask, report: ChangesReport) -> None:
        """Keep a later date, which is compared anew with a date of the run."""
        key, partition = str(task.reference_date), _partition(task, report)
        rows = partition.rows().scan().collect()
        metadata = _metadata(self.store, task.reference_date, report)
        self.store.keep({key: partition})
        self.context.log_event(
            dg.AssetMaterialization(self.context.asset_key, partition=key, metadata=metadata)
        )
        instant = midnight(task.reference_date, timezone=self.timezone)
        # The changes of a date whose metrics are in the archive are there, too.
        if count_rows(self.database.engine, instant).rows:
            self._write(key, rows)

    def wait(self) -> None:
        """Wait for the table; raises what went wrong with it."""
        if self.writing is not None:
            self.writing.result()

    def _write(self, key: str, rows: pl.DataFrame) -> None:
        # One date at a time waits to be written, so that memory does not grow with the range.
        self.wait()
        self.writing = self.pool.submit(self._write_now, key, rows)

    def _write_now(self, key: str, rows: pl.DataFrame) -> None:
        found = RowsOfDate(
            self.database.engine,
            midnight(date.fromisoformat(key), timezone=self.timezone),
            self.database.timeouts,
            self.run_options.retrying(self.context.log),
        ).write(tutor_tier_changes_table, rows, tutor_ids=self.run_options.tutor_ids)
        self.not_written |= {f"{tutor_id} on {key}": why for tutor_id, why in found.items()}

    def check(self) -> None:
        """Raise if rows of some tutors could not be written."""
        if self.not_written:
            subject, why = next(iter(self.not_written.items()))
            raise MetricsTableError(
                f"{tutor_tier_changes_table.name} keeps its rows of {len(self.not_written)}"
                f" tutors, such as {subject}: {why}. All others are written. Rerun the date."
            )


def _partition(task: ChangesTask, report: ChangesReport) -> Partition:
    return partition_of(task.path, ALL_IN_ONE, [report.stored])


def _later_dates(reference_dates: Iterable[date]) -> list[date]:
    """The dates that are not among these and are compared with one of them."""
    computed = set(reference_dates)
    return sorted({one + timedelta(days=n) for one in computed for n in COMPARED_DAYS} - computed)


def _later_tasks(
    store: PartitionStore,
    reference_dates: Iterable[date],
    windows: Sequence[int],
    policy: Policy,
    log: logging.Logger,
) -> dict[str, ChangesTask]:
    """The stored later dates. One that cannot be opened is left as it is."""
    tasks = {}
    for later in _later_dates(reference_dates):
        try:
            if store.is_stored(TUTOR_TIER_CHANGES, str(later)):
                tasks[str(later)] = _task(store, later, windows, policy)
        except (OSError, StorageError) as error:
            log.warning(f"{later} is not compared anew: {error}")
    return tasks


def _task(
    store: PartitionStore, reference_date: date, windows: Sequence[int], policy: Policy
) -> ChangesTask:
    key = str(reference_date)
    return ChangesTask(
        reference_date,
        _open_date(key, windows, store),
        _open_earlier_dates(store, reference_date, windows),
        store.path(TUTOR_TIER_CHANGES, key),
        policy,
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
        with suppress(OSError, StorageError):
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
