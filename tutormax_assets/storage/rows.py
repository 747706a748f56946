"""Where the rows of a partition are: in files of its own, or in files that dates share."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import polars as pl
from pydantic import BaseModel
from upath import UPath

_SHARED = ".shared"


class Part(BaseModel, frozen=True):
    """The rows of a shard, which are those of a file or some of them.

    Attributes:
        name: The file's name in the partition's folder, or in that of its links.
        rows: How many rows there are.
        size_bytes: What they take of the file.
        offset: The first of these rows in a file that dates share; None where all rows of the file
            are meant.
    """

    name: str
    rows: int
    size_bytes: int
    offset: int | None = None


def file_of(path: UPath, part: Part) -> UPath:
    """The file that rows of a partition are in."""
    return (path if part.offset is None else folder_of_links(path)) / part.name


def folder_of_links(path: UPath) -> UPath:
    """The folder of a partition's links to files that dates share."""
    return path.with_suffix(_SHARED)


def is_folder_of_partition(path: UPath) -> bool:
    """Whether a path is named as one of the folders of a partition."""
    return path.suffix in (".parquet", _SHARED)


@dataclass(frozen=True)
class Rows:
    """Where rows with a ``tutor_id`` are.

    Attributes:
        path: The folder of the partition.
        parts: The files, and which of their rows are meant.
        tutor_ids: Only rows of these tutors are meant; all when empty.
    """

    path: UPath
    parts: tuple[Part, ...]
    tutor_ids: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[UPath, ...]:
        """The files."""
        return tuple(file_of(self.path, part) for part in self.parts)

    @property
    def file_names(self) -> tuple[str, ...]:
        """The names of the files, which only links to the same files share."""
        return tuple(part.name for part in self.parts)

    @property
    def count(self) -> int:
        """Number of rows in the parts, those of other tutors included."""
        return sum(part.rows for part in self.parts)

    def scan(self) -> pl.LazyFrame:
        """The rows."""
        whole = [part for part in self.parts if part.offset is None]
        frames = [self._scan(whole)] if whole or not self.parts else []
        frames += [
            self._scan([part]).slice(part.offset, part.rows)
            for part in self.parts
            if part.offset is not None
        ]
        rows = pl.concat(frames) if len(frames) > 1 else frames[0]
        if not self.tutor_ids:
            return rows
        return rows.filter(pl.col("tutor_id").is_in(self.tutor_ids))

    def _scan(self, parts: Sequence[Part]) -> pl.LazyFrame:
        files = [file_of(self.path, part) for part in parts]
        if all(isinstance(file, Path) for file in files):
            return pl.scan_parquet([str(file) for file in files], glob=False)
        contents: list[IO[bytes]] = [io.BytesIO(file.read_bytes()) for file in files]
        return pl.scan_parquet(contents)


def rows_of_all(dates: Sequence[Rows]) -> Rows:
    """The rows of neighbouring dates that are in the same files, each once."""
    parts = []
    for of_file in zip(*(rows.parts for rows in dates), strict=True):
        first = of_file[0]
        if first.offset is not None:
            offset = min(part.offset or 0 for part in of_file)
            end = max((part.offset or 0) + part.rows for part in of_file)
            first = first.model_copy(update={"offset": offset, "rows": end - offset})
        parts.append(first)
    return replace(dates[0], parts=tuple(parts))


def read_dates(dates: Mapping[str, Rows]) -> dict[str, pl.DataFrame]:
    """The rows of dates by key; files that dates share are read once."""
    by_files: dict[tuple[str, ...], list[str]] = {}
    for key, rows in dates.items():
        by_files.setdefault(rows.file_names, []).append(key)
    found = {}
    for keys in by_files.values():
        if len(keys) == 1:
            found[keys[0]] = dates[keys[0]].scan().collect()
            continue
        # Rows of some tutors only are chosen after a date's rows are.
        of_all = replace(rows_of_all([dates[key] for key in keys]), tutor_ids=())
        files = pl.collect_all(replace(of_all, parts=(part,)).scan() for part in of_all.parts)
        for key in keys:
            of_date = pl.concat(
                file.slice((part.offset or 0) - (whole.offset or 0), part.rows)
                for file, part, whole in zip(files, dates[key].parts, of_all.parts, strict=True)
            )
            only = dates[key].tutor_ids
            found[key] = of_date.filter(pl.col("tutor_id").is_in(only)) if only else of_date
    return {key: found[key] for key in dates}
