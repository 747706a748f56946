"""Parquet files on any filesystem: written whole or not at all, and read as they are now."""

import io
import os
import uuid
from pathlib import Path

import polars as pl
from upath import UPath


class StorageError(Exception):
    """The Parquet partitions cannot be reached; the message says what to do."""


def write_parquet(path: UPath, rows: pl.DataFrame) -> int:
    """Store a file so that a reader sees the old one or the new one, never a part of it.

    Who writes has the path to itself.

    Returns:
        Size of the file in bytes.
    """
    if not isinstance(path, Path):
        # An object store shows an object once it was put whole.
        buffer = io.BytesIO()
        rows.write_parquet(buffer, compression="zstd")
        return int(path.write_bytes(buffer.getvalue()))
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in path.parent.glob(f".{path.name}.*"):
        left_behind.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            rows.write_parquet(file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # What relies on the file must not outlive it in a power failure, so its name is made to last.
    for folder in {path.parent, *(folder.parent for folder in new_folders)}:
        _sync(folder)
    return path.stat().st_size


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
