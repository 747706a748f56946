"""Parquet files on any filesystem: written whole or not at all, and read as they are now."""

import io
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from upath import UPath


class StorageError(Exception):
    """The Parquet partitions cannot be reached; the message says what to do."""


@dataclass(frozen=True)
class StoredFile:
    """A file that was written.

    Attributes:
        size_bytes: Its size.
        rows: How many rows it holds.
    """

    size_bytes: int
    rows: int


def write_parquet(path: UPath, rows: pl.LazyFrame) -> StoredFile:
    """Compute and store a file so that a reader sees the old one or the new one, never a part.

    Rows are written as they are computed. Who writes has the path to itself.
    """
    if not isinstance(path, Path):
        # An object store shows an object once it was put whole.
        with TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            rows.sink_parquet(local, compression="zstd", engine="streaming")
            path.fs.put_file(str(local), path.path)
            return _stored(local)
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in path.parent.glob(f".{path.name}.*"):
        left_behind.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            rows.sink_parquet(file, compression="zstd", engine="streaming")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # What relies on the file must not outlive it in a power failure, so its name is made to last.
    for folder in {path.parent, *(folder.parent for folder in new_folders)}:
        _sync(folder)
    return _stored(path)


def _stored(path: Path) -> StoredFile:
    rows = pl.scan_parquet(path).select(pl.len()).collect().item()
    return StoredFile(path.stat().st_size, rows)


def read_parquet(path: UPath) -> pl.DataFrame | None:
    """The rows of a file, or none if there is no such file."""
    _forget_listings(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return pl.read_parquet(io.BytesIO(content))


def entries(folder: UPath) -> list[UPath]:
    """What a folder holds; nothing if there is no such folder."""
    _forget_listings(folder)
    return list(folder.iterdir()) if folder.exists() else []


def _forget_listings(path: UPath) -> None:
    # fsspec keeps listings of remote folders, and another process may have written since.
    if not isinstance(path, Path):
        path.fs.invalidate_cache()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
