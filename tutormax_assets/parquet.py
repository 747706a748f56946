"""Parquet files on any filesystem: written whole or not at all, and read as they are now."""

import io
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

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
            rows.sink_parquet(local, compression=_COMPRESSION, engine="streaming")
            path.fs.put_file(str(local), path.path)
            return _stored(local)
    with _replacing(path) as temporary:
        rows.sink_parquet(temporary, compression=_COMPRESSION, engine="streaming")
    return _stored(path)


def write_text(path: UPath, text: str) -> None:
    """Store a text so that a reader sees the old one or the new one, never a part."""
    if not isinstance(path, Path):
        path.write_text(text, encoding="utf-8")
        return
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_parquet_parts(
    folder: UPath, rows: pl.LazyFrame, number: pl.Expr, names: Sequence[str]
) -> list[StoredFile]:
    """Compute rows once and store each in one of several new files, as its number says.

    Args:
        folder: Where the files come to be.
        rows: All rows of the files.
        number: Which of the names a row's file has, as ``UInt16``.
        names: The files' names, none of which is there.

    Returns:
        The files in the order of their names; those without a row are written too.
    """
    if len(names) == 1:
        return [write_parquet(folder / names[0], rows)]
    # Files of the same filesystem can be moved into the folder.
    beside = None
    if isinstance(folder, Path):
        _make_folder(folder)
        beside = folder
    with TemporaryDirectory(dir=beside, prefix=".") as temporary:
        parts = Path(temporary)
        rows.with_columns(number.alias(_NUMBER)).sink_parquet(
            pl.PartitionBy(
                parts,
                key=_NUMBER,
                include_key=False,
                file_path_provider=lambda part: names[part.partition_keys.item()],
            ),
            compression=_COMPRESSION,
            engine="streaming",
        )
        stored = []
        for name in names:
            part = parts / name
            if not part.exists():
                rows.clear().sink_parquet(part, compression=_COMPRESSION)
            stored.append(_stored(part))
            if isinstance(folder, Path):
                _sync(part)
                part.replace(folder / name)
            else:
                folder.fs.put_file(str(part), (folder / name).path)
    if isinstance(folder, Path):
        _sync(folder)
    return stored


_COMPRESSION: Literal["zstd"] = "zstd"
_NUMBER = "number of the part"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file that takes the place of another one after the block, unless it fails."""
    new_folders = _make_folder(path.parent)
    for left_behind in path.parent.glob(f".{path.name}.*"):
        left_behind.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # What relies on the file must not outlive it in a power failure, so its name is made to last.
    for folder in {path.parent, *(folder.parent for folder in new_folders)}:
        _sync(folder)


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; gives those that are new."""
    new_folders = [new for new in (folder, *folder.parents) if not new.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return new_folders


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


def read_text(path: UPath) -> str | None:
    """The text of a file, or none if there is no such file."""
    _forget_listings(path)
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def entries(folder: UPath) -> list[UPath]:
    """What a folder holds; nothing if there is no such folder."""
    _forget_listings(folder)
    return list(folder.iterdir()) if folder.exists() else []


def _forget_listings(path: UPath) -> None:
    # fsspec keeps listings of remote folders, and another process may have written since.
    if not isinstance(path, Path):
        path.fs.invalidate_cache()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
