"""The synthetic platform as the Parquet datasets of a lake."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Unpack

import polars as pl
from upath import UPath

from tutormax_assets.sample.frames import SampleArguments, check_arguments
from tutormax_assets.sample.platform import PlatformNotEmptyError, slices
from tutormax_assets.source.contract import NEEDED_COLUMNS
from tutormax_assets.source.lake_files import DAY, INSTANTS, WITHOUT_DAY, Lake
from tutormax_assets.storage.files import entries


def generate_lake(
    path: str,
    *,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Unpack[SampleArguments],
) -> dict[str, int]:
    """Write the rows of `sample_frames` as the datasets of a lake, but for those of students.

    Args:
        path: Base path: a folder or any that fsspec knows.
        progress: Is called after each slice with the number of tutors written and ``tutors``.
        **arguments: Those of `sample_frames`.

    Returns:
        The number of rows written, for each dataset.

    Raises:
        PlatformNotEmptyError: There is something where a dataset would be.
        ValueError: An argument is out of its range.
    """
    check_arguments(**arguments)
    held = [table for table in NEEDED_COLUMNS if entries(UPath(path) / table)]
    if held:
        raise PlatformNotEmptyError(
            f"The lake at {Lake(path)} already holds {', '.join(held)}; use an empty path. Nothing"
            " was written."
        )
    rows = dict.fromkeys(NEEDED_COLUMNS, 0)
    for done, frames in slices(progress=progress, **arguments):
        datasets = {table: frames[table] for table in NEEDED_COLUMNS}
        write_lake(path, datasets, file_name=f"{done:09}.parquet")
        rows = {table: rows[table] + len(frame) for table, frame in datasets.items()}
    return rows


def write_lake(path: str, datasets: Mapping[str, pl.DataFrame], *, file_name: str) -> None:
    """Write rows as datasets of a lake, one file a partition.

    Args:
        path: Base path of the lake.
        datasets: Rows by dataset; feedback comes with its sessions, whose days it is kept by.
        file_name: Name of the files.
    """
    base = UPath(path)
    with TemporaryDirectory() as temporary:
        is_local = isinstance(base, Path)
        target = Path(base.path) if is_local else Path(temporary)
        for table, rows in datasets.items():
            if table in INSTANTS:
                rows = rows.with_columns(_utc_day(INSTANTS[table]))
            elif table == "student_feedback":
                days = datasets["sessions"].select("session_id", _utc_day(INSTANTS["sessions"]))
                days = days.unique("session_id")
                rows = rows.join(days, on="session_id", how="left", maintain_order="left")
            (target / table).mkdir(parents=True, exist_ok=True)
            if DAY not in rows.columns or rows.is_empty():
                rows.drop(DAY, strict=False).write_parquet(target / table / file_name)
                continue
            of_days = pl.PartitionBy(
                target / table,
                key=DAY,
                include_key=False,
                file_path_provider=lambda part: (
                    f"{DAY}={part.partition_keys.item() or WITHOUT_DAY}/{file_name}"
                ),
            )
            rows.lazy().sink_parquet(of_days, mkdir=True)
        if not is_local:
            base.fs.put(f"{target}/", base.path, recursive=True)


def _utc_day(column: str) -> pl.Expr:
    return pl.col(column).dt.convert_time_zone("UTC").dt.date().alias(DAY)
