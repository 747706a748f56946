"""Parquet partitions between the stages: one file a reference date, written atomically.

A run filtered to some tutors reads only those tutors and replaces only their rows. Dagster's
``UPathIOManager`` refuses to write several partitions in one run, and reads one as a frame but
several as a dictionary; here both are always a dictionary by partition, so that an asset's body
is the same for one day and for a range.
"""

import io
import os
import uuid
from pathlib import Path

import dagster as dg
import polars as pl
from upath import UPath

from tutormax_assets.platform.connection import advisory_lock
from tutormax_assets.resources import PlatformDatabase, RunOptions

FramesByDate = dict[str, pl.LazyFrame]
"""Lazy frames by partition key, which is the reference date in ISO form."""


class PartitionedParquetIOManager(dg.ConfigurableIOManager):
    """Keeps each partition of an asset as ``<base_path>/<asset>/<partition>.parquet``.

    Every frame has a ``tutor_id`` column.
    """

    base_path: str
    run_options: dg.ResourceDependency[RunOptions]
    database: dg.ResourceDependency[PlatformDatabase]

    def load_input(self, context: dg.InputContext) -> FramesByDate:
        """Scan the partitions that the run reads, restricted to the tutors it is filtered to."""
        frames = {
            key: scan_partition(partition_path(self.base_path, context.asset_key, key))
            for key in context.asset_partition_keys
        }
        only = self.run_options.tutor_ids
        if not only:
            return frames
        return {key: rows.filter(pl.col("tutor_id").is_in(only)) for key, rows in frames.items()}

    def handle_output(self, context: dg.OutputContext, obj: FramesByDate) -> None:
        """Compute and store each partition, one after the other."""
        for key in context.asset_partition_keys:
            path = partition_path(self.base_path, context.asset_key, key)
            rows = obj[key].collect()
            # A filtered run reads what is there and writes it back; nobody may write in between.
            with advisory_lock(self.database.engine, str(path)):
                if only := self.run_options.tutor_ids:
                    rows = _merged(path, rows, only=only)
                size = write_partition(path, rows)
            # Output metadata would be the same for every day of a range.
            context.step_context.add_asset_metadata(
                {
                    "path": dg.MetadataValue.path(str(path)),
                    "size_bytes": size,
                    "dagster/partition_row_count": len(rows),
                },
                asset_key=context.asset_key,
                partition_key=key,
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


def write_partition(path: UPath, rows: pl.DataFrame) -> int:
    """Store a partition so that a reader sees the old file or the new one, never a part of it.

    Returns:
        Size of the file in bytes.
    """
    if not isinstance(path, Path):
        # An object store shows an object once it was put whole.
        buffer = io.BytesIO()
        rows.write_parquet(buffer, compression="zstd")
        return int(path.write_bytes(buffer.getvalue()))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            rows.write_parquet(file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _merged(path: UPath, rows: pl.DataFrame, *, only: list[str]) -> pl.DataFrame:
    if not path.exists():
        return rows
    others = scan_partition(path).filter(~pl.col("tutor_id").is_in(only)).collect()
    return pl.concat([others, rows]).sort("tutor_id", maintain_order=True)
