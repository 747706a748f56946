"""The Parquet partitions of the assets, and the IO manager that hands them from step to step.

A run has its reference dates to itself, from before its first step to its end. One that is filtered
to some tutors reads only those tutors and replaces only their rows. Rows do not pass through the IO
manager: the process that computes a shard stores it, and the manager lists what was stored.
"""

from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any

import dagster as dg
import polars as pl
from upath import UPath

from tutormax_assets.database.date_locks import DateLocks
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.runs.instance import pool_connections
from tutormax_assets.runs.partitions import partition_path
from tutormax_assets.runs.tags import partition_keys
from tutormax_assets.settings import Settings
from tutormax_assets.storage.files import StorageError, make_private_folder
from tutormax_assets.storage.partition import (
    Partition,
    list_partition,
    listing_state,
    merge_partition,
    open_partition,
)

PartitionsByDate = dict[str, Partition]
"""Partitions by their key, which is the reference date in ISO form."""


class PartitionedParquetIOManager(dg.IOManager):
    """Keeps each partition of an asset as the folder ``<base_path>/<asset>/<partition>.parquet``.

    Every step needs it: those that write Parquet, and the one that writes the metrics table for its
    input. So it renews the locks of the run's reference dates, and looks for another run's files
    when they were lost for a while.
    """

    def __init__(
        self, base_path: str, *, run_options: RunOptions, locks: DateLocks | None = None
    ) -> None:
        """Say where the partitions are.

        Args:
            base_path: Folder or URL.
            run_options: Name the tutors that the run is filtered to.
            locks: The locks that the run has on its reference dates.
        """
        self.base_path = base_path
        self.run_options = run_options
        self._locks = locks
        self._written: dict[UPath, tuple[int, float, int] | None] = {}

    def load_input(self, context: dg.InputContext) -> PartitionsByDate:
        """The partitions that the run reads, restricted to the tutors it is filtered to."""
        self._renew_locks()
        return self.partitions(context.asset_key, context.asset_partition_keys)

    def partitions(self, asset_key: dg.AssetKey, partition_keys: Iterable[str]) -> PartitionsByDate:
        """Partitions of an asset, restricted to the tutors that the run is filtered to.

        Raises:
            FileNotFoundError: A partition has not been materialized.
        """
        only = tuple(self.run_options.tutor_ids or ())
        return {
            key: open_partition(self.path(asset_key, key), tutor_ids=only) for key in partition_keys
        }

    def whole_partition(self, asset_key: dg.AssetKey, partition_key: str) -> Partition:
        """A partition of an asset with all of its tutors, whichever the run is filtered to.

        Raises:
            FileNotFoundError: The partition has not been materialized.
        """
        return open_partition(self.path(asset_key, partition_key))

    def rows_of_others(self, asset_key: dg.AssetKey, partition_key: str) -> pl.LazyFrame | None:
        """The stored rows of tutors that a filtered run leaves as they are, if there are any."""
        only = self.run_options.tutor_ids
        try:
            rows = self.whole_partition(asset_key, partition_key).rows().scan()
        except FileNotFoundError:
            return None
        return rows.filter(~pl.col("tutor_id").is_in(only)) if only else None

    def active_tutors_left_out(self, partition_key: str) -> int:
        """Number of active tutors that no run of a date has computed yet; 0 if not known."""
        try:
            left_out = self.whole_partition(dg.AssetKey("tutors_left_out"), partition_key)
        except FileNotFoundError:
            # An earlier version computed the date.
            return 0
        return left_out.rows().scan().filter(status="active").collect().height

    def active_tutors_of_others(self, partition_key: str) -> int:
        """Number of other tutors than the run's: in a date's roster, or not computed yet."""
        others = self.rows_of_others(dg.AssetKey("tutor_roster"), partition_key)
        in_roster = 0 if others is None else others.collect().height
        return in_roster + self.active_tutors_left_out(partition_key)

    def path(self, asset_key: dg.AssetKey, partition_key: str) -> UPath:
        """The folder of a partition."""
        return partition_path(self.base_path, asset_key, partition_key)

    def handle_output(self, context: dg.OutputContext, obj: PartitionsByDate) -> None:
        """List what was stored of each partition."""
        for key in context.asset_partition_keys:
            partition = obj[key]
            started = perf_counter()
            self._renew_locks()
            if self.run_options.tutor_ids:
                partition = merge_partition(partition, only=self.run_options.tutor_ids)
            list_partition(partition)
            self._written[partition.path] = listing_state(partition.path)
            seconds = partition.seconds + perf_counter() - started
            # Output metadata would be the same for every day of a range.
            context.step_context.add_asset_metadata(
                {
                    "path": dg.MetadataValue.path(str(partition.path)),
                    "shards": len(partition.parts),
                    **_failed(partition),
                    "size_bytes": sum(part.size_bytes for part in partition.parts),
                    "dagster/partition_row_count": sum(part.rows for part in partition.parts),
                    "write_seconds": round(seconds, 3),
                },
                asset_key=context.asset_key,
                partition_key=key,
            )

    def _renew_locks(self) -> None:
        if self._locks is None or not self._locks.renew():
            return
        for path, state in self._written.items():
            if listing_state(path) != state:
                raise StorageError(
                    f"{path} was written by another run while this one had lost its connection to"
                    " the platform. What the other run saved stays; run the date again if need be."
                )


def parquet_io_manager(settings: Settings) -> dg.IOManagerDefinition:
    """The IO manager of the Parquet partitions that the settings name."""

    @dg.io_manager(
        config_schema={},
        required_resource_keys={"run_options", "date_locks"},
        description="Parquet partitions.",
    )
    def io_manager(context: dg.InitResourceContext) -> PartitionedParquetIOManager:
        return PartitionedParquetIOManager(
            settings.storage_path,
            run_options=context.resources.run_options,
            locks=context.resources.date_locks,
        )

    return io_manager


def date_locks_resource(settings: Settings) -> dg.ResourceDefinition:
    """The locks that a run has on its reference dates, from before its first step to its end.

    Dagster makes it ready when the run has no place in a pool yet that the run which is waited for
    may need. Where an executor makes each step a process, the dates are locked for a step at a
    time.
    """

    @dg.resource(
        config_schema={},
        required_resource_keys={"run_options", "database"},
        description="Keeps other runs of the same reference dates waiting.",
    )
    def date_locks(context: dg.InitResourceContext) -> Iterator[DateLocks | None]:
        log: Any = context.log
        try:
            make_private_folder(settings.storage_path, group=settings.files_group)
            if context.instance is not None:
                # A worker that Dagster started comes by here before its first step.
                pool_connections(context.instance)
            locks = None
            if keys := _reference_dates(context):
                locks = DateLocks(
                    context.resources.database.engine,
                    keys,
                    retrying=context.resources.run_options.retrying(log),
                    log=log,
                )
                locks.take()
        except Exception as error:
            # The run's page shows what Dagster makes of a resource that fails.
            log.error(str(error))
            raise
        try:
            yield locks
        finally:
            if locks is not None:
                locks.release()

    return date_locks


def newest_dates(instance: dg.DagsterInstance, asset_keys: Iterable[dg.AssetKey]) -> list[str]:
    """The newest reference date of each asset that has been materialized, ascending."""
    of_assets = (instance.get_materialized_partitions(key) for key in asset_keys)
    return sorted({max(keys) for keys in of_assets if keys})


def _reference_dates(context: dg.InitResourceContext) -> list[str]:
    """The reference dates that a run works on."""
    if context.run is None or context.instance is None:
        return []
    checked = {check.asset_key for check in context.run.asset_check_selection or ()}
    return partition_keys(context.run) or newest_dates(context.instance, checked)


def _failed(partition: Partition) -> dict[str, dg.MetadataValue[Any]]:
    """Which shards have no rows, where there are such."""
    if not partition.failed:
        return {}
    why = {str(number): partition.failed[number] for number in sorted(partition.failed)}
    return {"failed_shards": dg.MetadataValue.json(why)}
