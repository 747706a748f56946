"""Parquet partitions between the stages: one file a reference date, written atomically.

A run has its reference dates to itself, from before its first step to its end. One that is filtered
to some tutors reads only those tutors and replaces only their rows. Dagster's
``UPathIOManager`` refuses to write several partitions in one run, and reads one as a frame but
several as a dictionary; here both are always a dictionary by partition, so that an asset's body
is the same for one day and for a range.
"""

import io
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import dagster as dg
import polars as pl
import sqlalchemy as sa
from pydantic import PrivateAttr
from upath import UPath

from tutormax_assets.automation.single_days import partition_keys
from tutormax_assets.parquet import StorageError, StoredFile, entries, write_parquet
from tutormax_assets.platform.date_locks import DateLocks, try_lock_date
from tutormax_assets.resources import PlatformDatabase, RunOptions

FramesByDate = dict[str, pl.LazyFrame]
"""Lazy frames by partition key, which is the reference date in ISO form."""


@dataclass(frozen=True)
class StoredPartition:
    """A partition of an asset, as it lies in the storage."""

    asset_key: dg.AssetKey
    partition_key: str
    path: UPath
    size_bytes: int


class PartitionedParquetIOManager(dg.ConfigurableIOManager):
    """Keeps each partition of an asset as ``<base_path>/<asset>/<partition>.parquet``.

    Every frame has a ``tutor_id`` column.

    It locks the reference dates of the run, since every step needs it: those that write Parquet,
    and the one that writes the metrics table for its input. Dagster makes it ready before the first
    step, when the run has no place in a pool yet that the run which is waited for may need. Where
    an executor makes each step a process, the dates are locked for a step at a time.
    """

    base_path: str
    run_options: dg.ResourceDependency[RunOptions]
    database: dg.ResourceDependency[PlatformDatabase]
    _locks: DateLocks | None = PrivateAttr(default=None)
    _written: dict[UPath, tuple[int, float, int]] = PrivateAttr(default_factory=dict)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Wait until no other run computes a reference date of this run, and keep others waiting.

        Raises:
            MetricsTableError: The database cannot be reached.
        """
        keys = partition_keys(context.run) if context.run else []
        if keys:
            log: Any = context.log
            self._locks = DateLocks(
                self.database.engine, keys, retrying=self.run_options.retrying(log), log=log
            )
            self._locks.take()

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Let the next run of these dates begin."""
        if self._locks is not None:
            self._locks.release()

    def load_input(self, context: dg.InputContext) -> FramesByDate:
        """Scan the partitions that the run reads, restricted to the tutors it is filtered to."""
        self._renew_locks()
        return self.scan(context.asset_key, context.asset_partition_keys)

    def scan(self, asset_key: dg.AssetKey, partition_keys: Iterable[str]) -> FramesByDate:
        """Scan partitions of an asset, restricted to the tutors that the run is filtered to.

        Raises:
            FileNotFoundError: A partition has not been materialized.
        """
        frames = {
            key: scan_partition(partition_path(self.base_path, asset_key, key))
            for key in partition_keys
        }
        only = self.run_options.tutor_ids
        if not only:
            return frames
        return {key: rows.filter(pl.col("tutor_id").is_in(only)) for key, rows in frames.items()}

    def handle_output(self, context: dg.OutputContext, obj: FramesByDate) -> None:
        """Compute and store each partition, one after the other."""
        for key in context.asset_partition_keys:
            path = partition_path(self.base_path, context.asset_key, key)
            started = perf_counter()
            rows = obj[key]
            self._renew_locks()
            if only := self.run_options.tutor_ids:
                rows = _merged(path, rows, only=only)
            stored = _write(path, rows)
            self._written[path] = _state(path)
            # Output metadata would be the same for every day of a range.
            context.step_context.add_asset_metadata(
                {
                    "path": dg.MetadataValue.path(str(path)),
                    "size_bytes": stored.size_bytes,
                    "dagster/partition_row_count": stored.rows,
                    "write_seconds": round(perf_counter() - started, 3),
                },
                asset_key=context.asset_key,
                partition_key=key,
            )

    def _renew_locks(self) -> None:
        if self._locks is None or not self._locks.renew():
            return
        for path, state in self._written.items():
            if not path.exists() or _state(path) != state:
                raise StorageError(
                    f"{path} was written by another run while this one had lost its connection to"
                    " the platform. What the other run saved stays; run the date again if need be."
                )


def partition_path(base_path: str, asset_key: dg.AssetKey, partition_key: str) -> UPath:
    """Where a partition of an asset is."""
    return UPath(base_path).joinpath(*asset_key.path, f"{partition_key}.parquet")


def scan_partition(path: UPath) -> pl.LazyFrame:
    """A partition as a lazy frame.

    Raises:
        FileNotFoundError: The partition has not been materialized.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"There is no partition at {path}."
            f" Materialize {path.parent.name} for {path.stem} first."
        )
    if isinstance(path, Path):
        return pl.scan_parquet(path)
    return pl.scan_parquet(io.BytesIO(path.read_bytes()))


def partitions_before(
    base_path: str, asset_keys: Iterable[dg.AssetKey], before: date
) -> list[StoredPartition]:
    """The stored partitions of these assets whose reference date lies before a day.

    Returns:
        The oldest first, and those of one date in the order of the assets.

    Raises:
        StorageError: The storage cannot be reached.
    """
    found = []
    try:
        for asset_key in asset_keys:
            for entry in entries(UPath(base_path).joinpath(*asset_key.path)):
                key = entry.stem
                if entry.suffix != ".parquet" or not _is_date(key) or key >= before.isoformat():
                    continue
                path = partition_path(base_path, asset_key, key)
                with suppress(FileNotFoundError):  # Another cleanup was faster.
                    found.append(StoredPartition(asset_key, key, path, path.stat().st_size))
    # What a filesystem raises depends on which one it is.
    except Exception as error:
        raise StorageError(
            f"The Parquet partitions at {base_path} cannot be listed: {error}."
            " TUTORMAX_STORAGE says where they are; check that it is reachable."
        ) from error
    return sorted(found, key=lambda partition: partition.partition_key)


def delete_partition(engine: sa.Engine, partition: StoredPartition) -> bool:
    """Delete a partition unless a run computes its date; one that is gone already is fine.

    It does not wait for the run, which may in turn need the place in the pool that who waits has.

    Returns:
        Whether it is gone.

    Raises:
        StorageError: It cannot be deleted.
    """
    with engine.begin() as connection:
        if not try_lock_date(connection, partition.partition_key):
            return False
        try:
            partition.path.unlink(missing_ok=True)
        except Exception as error:
            raise StorageError(
                f"{partition.path} cannot be deleted: {error}."
                " Check the rights of the user that runs this."
            ) from error
    return True


def _write(path: UPath, rows: pl.LazyFrame) -> StoredFile:
    try:
        return write_parquet(path, rows)
    # Polars passes on what the system says as an error of its own.
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StorageError(
            f"{path} cannot be written: {error}. TUTORMAX_STORAGE says where it is; check that it"
            " can be reached and has space."
        ) from error


def _state(path: UPath) -> tuple[int, float, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime, found.st_size


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _merged(path: UPath, rows: pl.LazyFrame, *, only: list[str]) -> pl.LazyFrame:
    if not path.exists():
        return rows
    others = scan_partition(path).filter(~pl.col("tutor_id").is_in(only))
    return pl.concat([others, rows])
