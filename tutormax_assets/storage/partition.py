"""A stored partition: a folder of Parquet files, one for each shard of tutors.

A listing beside the folder names its files. It is written last and atomically: a reader sees the
old partition or the new one, and a shard that was stored twice counts once.

A run of several dates stores their rows in one file, to which each date has a hard link; the
listing says which rows are the date's. The filesystem counts the links, so a partition is deleted
independently of others. Links are in a second folder, ``<partition>.shared``, so that reading every
file of the first one does not mix dates.
"""

import errno
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import NamedTuple
from uuid import uuid4

import polars as pl
from pydantic import BaseModel, ValidationError
from upath import UPath

from tutormax_assets.storage.files import (
    StorageError,
    entries,
    link_file,
    read_text,
    write_parquet,
    write_parquet_parts,
    write_text,
)
from tutormax_assets.storage.rows import Part, Rows, file_of, folder_of_links
from tutormax_assets.storage.shards import ALL_IN_ONE, Shards

STATE_SUFFIX = ".state"
"""Of a file beside a partition, which is deleted with it."""


class _Listing(BaseModel):
    bounds: tuple[str, ...]
    parts: tuple[Part, ...]
    failed: dict[int, str] = {}


@dataclass(frozen=True)
class Partition:
    """A partition.

    Attributes:
        path: The folder.
        shards: How its tutors are divided.
        parts: The file of each shard.
        tutor_ids: Only rows of these tutors are meant; all when empty.
        failed: Why a shard has no rows, by its number, of those that could not be computed.
        seconds: How long the storing took.
    """

    path: UPath
    shards: Shards
    parts: tuple[Part, ...]
    tutor_ids: tuple[str, ...] = ()
    failed: Mapping[int, str] = field(default_factory=dict, hash=False)
    seconds: float = field(default=0, compare=False)

    def rows(self, number: int | None = None) -> Rows:
        """The rows of a shard, or of all of them."""
        parts = self.parts if number is None else self.parts[number : number + 1]
        if self.tutor_ids:
            parts = tuple(parts[of] for of in sorted(self.shards.numbers_of(self.tutor_ids)))
        return Rows(self.path, parts, self.tutor_ids)

    def with_seconds(self, seconds: float) -> "Partition":
        """The partition with so many seconds added to the time that its storing took."""
        return replace(self, seconds=self.seconds + seconds)


class Division(NamedTuple):
    """How the tutors of some partitions are divided.

    Attributes:
        shards: In the same way in all of them.
        numbers: The shards to compute; one without a number stands for all rows.
        failed: Why others cannot be computed, by number.
    """

    shards: Shards
    numbers: list[int | None]
    failed: Mapping[int, str]


def division(partitions: Sequence[Partition]) -> Division:
    """How to compute something from partitions of the same date, shard by shard.

    Where there is only one shard, only some tutors are meant, or the partitions are divided in
    different ways, all is computed at once.

    Raises:
        StorageError: They are divided in different ways, and lack shards that failed.
    """
    first, *others = partitions
    failed = {number: why for one in partitions for number, why in one.failed.items()}
    is_shared = all(other.shards == first.shards for other in others)
    if failed and not is_shared:
        lacking = ", ".join(sorted(str(one.path) for one in partitions if one.failed))
        raise StorageError(
            f"Shards of {lacking} failed, and what is computed with it is divided in another way."
            " Run the date again, from the platform on."
        )
    if first.tutor_ids or not is_shared or len(first.shards) == 1:
        return Division(ALL_IN_ONE, [None], {})
    return Division(first.shards, [n for n in range(len(first.shards)) if n not in failed], failed)


@dataclass(frozen=True)
class StoredParts:
    """Files of neighbouring shards.

    Attributes:
        parts: The files.
        first: The number of the first of the shards.
        seconds: How long the storing took.
    """

    parts: tuple[Part, ...]
    first: int
    seconds: float


def partition_of(
    path: UPath,
    shards: Shards,
    stored: Iterable[StoredParts],
    *,
    failed: Mapping[int, str] | None = None,
    schema: pl.Schema | None = None,
) -> Partition:
    """A partition of the files of its shards.

    Args:
        path: Its folder.
        shards: How its tutors are divided.
        stored: The files.
        failed: Why other shards have none, by number.
        schema: The columns of the files that are stored of those, without rows.

    Raises:
        StorageError: The storage cannot be written.
    """
    failed = failed or {}
    stored = [
        *stored,
        *(store_parts(path, pl.LazyFrame(schema=schema), first=number) for number in failed),
    ]
    parts = tuple(part for one in sorted(stored, key=lambda one: one.first) for part in one.parts)
    seconds = sum(one.seconds for one in stored)
    return Partition(path, shards, parts, failed=failed, seconds=seconds)


def store_parts(
    path: UPath, rows: pl.LazyFrame, *, shards: Shards = ALL_IN_ONE, first: int = 0
) -> StoredParts:
    """Compute rows and store them as new files, which are read once the partition is listed.

    Args:
        path: Folder of the partition.
        rows: Rows with ``tutor_id``.
        shards: How their tutors are divided.
        first: The number that the first of these shards has in the partition.

    Raises:
        StorageError: The storage cannot be written.
    """
    started = perf_counter()
    names = [_new_name(first + number) for number in range(len(shards))]
    try:
        _make_way(path)
        files = write_parquet_parts(path, rows, shards.number(), names)
    # Polars passes on what the system says as an error of its own.
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _cannot_be_written(path, error) from error
    parts = tuple(
        Part(name=name, rows=file.rows, size_bytes=file.size_bytes)
        for name, file in zip(names, files, strict=True)
    )
    return StoredParts(parts, first, perf_counter() - started)


def store_slices(
    paths: Mapping[date, UPath],
    rows: pl.DataFrame,
    slices: Mapping[date, tuple[int, int]],
    *,
    shard: int = 0,
) -> dict[date, StoredParts]:
    """Store rows of a shard once for several dates, as new files that are to be listed.

    Where the storage has no hard links, each date has a file of its own.

    Args:
        paths: Folders of the partitions, by reference date.
        rows: The rows of all dates.
        slices: Of each date, at which of the rows its own begin, and how many they are.
        shard: The number that the shard has in the partitions.

    Raises:
        StorageError: The storage cannot be written.
    """
    started = perf_counter()
    stored: dict[date, Part] = {}
    most = max((count for _, count in slices.values()), default=0)
    links = _Links(rows, shard, most) if len(paths) > 1 else None
    for day, path in paths.items():
        offset, count = slices[day]
        try:
            _make_way(path)
            part = links and links.part(path, offset, count)
            stored[day] = part or _store_apart(path, rows.slice(offset, count), shard)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise _cannot_be_written(path, error) from error
    seconds = (perf_counter() - started) / max(len(paths), 1)
    return {day: StoredParts((part,), shard, seconds) for day, part in stored.items()}


@dataclass
class _Links:
    """A file of rows, which is written into the first folder and linked to by the others."""

    rows: pl.DataFrame
    shard: int
    rows_of_a_date: int
    file: UPath | None = None
    size_bytes: int = 0

    def part(self, path: UPath, offset: int, count: int) -> Part | None:
        """Some of the rows as a part of a partition, unless its storage has no hard links."""
        if not isinstance(path, Path):
            return None
        if self.file is None:
            self.file = folder_of_links(path) / _new_name(self.shard)
            # Small row groups keep a reader of one date from decoding the rows of others.
            size = max(min(self.rows_of_a_date, _MOST_OF_A_ROW_GROUP), 1)
            written = write_parquet(self.file, self.rows.lazy(), row_group_size=size)
            self.size_bytes = written.size_bytes
        elif not link_file(self.file, folder_of_links(path) / self.file.name):
            return None
        share = self.size_bytes * count // max(len(self.rows), 1)
        return Part(name=self.file.name, rows=count, size_bytes=share, offset=offset)


def slices_of(
    dates: pl.Series, spans: Mapping[date, tuple[date, date]]
) -> dict[date, tuple[int, int]]:
    """At which of some rows the span of a reference date begins, and how many rows it has.

    Args:
        dates: The date of each row, ascending.
        spans: By reference date, the first day of each span and the day after its last one.
    """
    places = {
        name: [dates.search_sorted(day, side="left") for day in span]
        for name, span in spans.items()
    }
    return {name: (first, end - first) for name, (first, end) in places.items()}


def _store_apart(path: UPath, rows: pl.DataFrame, shard: int) -> Part:
    name = _new_name(shard)
    size_bytes = write_parquet(path / name, rows.lazy()).size_bytes
    return Part(name=name, rows=len(rows), size_bytes=size_bytes)


_MOST_OF_A_ROW_GROUP = 250_000


def _new_name(shard: int) -> str:
    return f"{shard:04}-{uuid4().hex[:12]}.parquet"


def _make_way(path: UPath) -> None:
    """Delete a partition that is one file, as other tools and versions write it."""
    if isinstance(path, Path) and path.is_file():
        path.unlink()


def scan_partition(path: UPath) -> pl.LazyFrame:
    """The rows of a partition.

    Raises:
        FileNotFoundError: The partition has not been materialized.
        StorageError: Its listing is damaged.
    """
    return open_partition(path).rows().scan()


def open_partition(path: UPath, *, tutor_ids: tuple[str, ...] = ()) -> Partition:
    """A partition as it is listed.

    Raises:
        FileNotFoundError: The partition has not been materialized.
        StorageError: Its listing is damaged.
    """
    text = read_text(_listing_path(path))
    if text is None:
        raise FileNotFoundError(
            f"There is no partition at {path}."
            f" Materialize {path.parent.name} for {path.stem} first."
        )
    try:
        listing = _Listing.model_validate_json(text)
    except ValidationError as error:
        raise StorageError(
            f"{_listing_path(path)} does not list the files of a partition: found"
            f" {error.error_count()} errors. Materialize {path.parent.name} for {path.stem} again."
        ) from error
    # The rows of the tutors that a run is about are its own.
    failed = {} if tutor_ids else listing.failed
    return Partition(path, Shards(listing.bounds), listing.parts, tutor_ids, failed)


def merge_partition(partition: Partition, *, only: Sequence[str]) -> Partition:
    """The rows of some tutors in a partition, with those that are stored of the others.

    Raises:
        StorageError: The storage cannot be written, or an earlier version has written what is
            stored.
    """
    try:
        stored = open_partition(partition.path)
    except FileNotFoundError:
        return partition
    parts = list(stored.parts)
    for number in sorted(stored.shards.numbers_of(only)):
        others = stored.rows(number).scan().filter(~pl.col("tutor_id").is_in(only))
        rows = (
            partition.rows()
            .scan()
            .filter(pl.col("tutor_id").is_in(only), stored.shards.number() == number)
        )
        expect_columns(others, rows.collect_schema(), path=partition.path)
        stored_again = store_parts(partition.path, pl.concat([others, rows]), first=number)
        [parts[number]] = stored_again.parts
    return replace(stored, parts=tuple(parts), seconds=partition.seconds)


def expect_columns(rows: pl.LazyFrame, columns: Collection[str], *, path: UPath) -> None:
    """Check that the rows of a partition have some columns.

    Raises:
        StorageError: An earlier version has written it.
    """
    missing = [name for name in columns if name not in rows.collect_schema()]
    if missing:
        raise StorageError(
            f"{path} lacks {len(missing)} columns, such as {missing[0]}: an earlier version has"
            f" written it. Run {path.stem} again, for all tutors."
        )


def list_partition(partition: Partition) -> None:
    """Make the files of a partition those that are read, and delete the others.

    Raises:
        StorageError: The storage cannot be written, or not all files are there.
    """
    path = partition.path
    missing = set(partition.rows().files) - {*stored_files(path)}
    if missing:
        raise StorageError(
            f"{partition.path} lacks {len(missing)} of {len(partition.parts)} files that were"
            " stored, as where workers have a folder of their own: let TUTORMAX_STORAGE be one"
            " that all of them share, then run the date again."
        )
    listing = _Listing(
        bounds=partition.shards.bounds, parts=partition.parts, failed=dict(partition.failed)
    )
    try:
        write_text(_listing_path(partition.path), listing.model_dump_json())
        _delete_unlisted(partition.path, partition.parts)
    except OSError as error:
        raise _cannot_be_written(partition.path, error) from error


def delete_files(path: UPath) -> None:
    """Delete a partition; one that is gone already is fine."""
    path.with_suffix(STATE_SUFFIX).unlink(missing_ok=True)
    _listing_path(path).unlink(missing_ok=True)
    _delete_unlisted(path, ())
    _delete_folder(path)


def stored_files(path: UPath) -> list[UPath]:
    """What lies in the folders of a partition, whether it is listed or not."""
    folders = [path, folder_of_links(path)] if isinstance(path, Path) else [path]
    return [file for folder in folders for file in entries(folder)]


def is_listed(path: UPath) -> bool:
    """Whether there is a partition, and not a folder that something else made."""
    try:
        open_partition(path)
    except (FileNotFoundError, StorageError):
        return False
    return True


def _delete_unlisted(path: UPath, parts: Sequence[Part]) -> None:
    """Delete what the listing does not know: older files, and what somebody left behind."""
    listed = {file_of(path, part) for part in parts}
    for entry in stored_files(path):
        if entry in listed:
            continue
        if isinstance(entry, Path) and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if isinstance(path, Path):
        used = {file.parent for file in listed}
        for folder in (path, folder_of_links(path)):
            if folder not in used:
                _delete_folder(folder)


def _delete_folder(path: UPath) -> None:
    try:
        # An object store has no folders, unless it plays them.
        if path.exists():
            path.rmdir()
    except OSError as error:
        # Somebody else was faster, or has just stored a file: the next listing deletes that.
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def _cannot_be_written(path: UPath, error: Exception) -> StorageError:
    return StorageError(
        f"{path} cannot be written: {error}. TUTORMAX_STORAGE says where it is; check that it"
        " can be reached and has space."
    )


def _listing_path(path: UPath) -> UPath:
    return path.with_suffix(".json")
