"""Parquet partitions: written whole or not at all, and merged by tutor in a filtered run."""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.parquet import StoredFile, write_parquet
from tutormax_assets.resources import PlatformDatabase, RunOptions
from tutormax_assets.storage import (
    FramesByDate,
    PartitionedParquetIOManager,
    partition_path,
    scan_partition,
)
from tutormax_assets_tests.conftest import Platform

KEY = dg.AssetKey("scores")
DAYS = dg.DailyPartitionsDefinition("2025-11-01")


def frame(scores: Mapping[str, int]) -> pl.DataFrame:
    return pl.DataFrame({"tutor_id": list(scores), "score": list(scores.values())})


@pytest.fixture(params=["local", "memory"])
def base_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, and a store that is none."""
    if request.param == "local":
        yield str(tmp_path / "storage")
        return
    path = UPath(f"memory://{uuid4().hex}")
    yield str(path)
    if path.exists():
        path.fs.rm(path.path, recursive=True)


def test_a_partition_comes_back_as_it_was_stored(base_path: str) -> None:
    path = partition_path(base_path, dg.AssetKey(["folder", "scores"]), "2025-11-07")
    assert path.parts[-3:] == ("folder", "scores", "2025-11-07.parquet")
    for rows in (frame({"a": 1, "b": 2}), frame({"c": 3}), frame({"a": 1}).clear()):
        stored = write_parquet(path, rows.lazy())

        assert_frame_equal(scan_partition(path).collect(), rows)
        assert stored == StoredFile(size_bytes=path.stat().st_size, rows=len(rows))


def test_a_missing_partition_says_what_to_do(base_path: str) -> None:
    path = partition_path(base_path, KEY, "2025-11-07")

    with pytest.raises(FileNotFoundError) as error:
        scan_partition(path)

    assert str(error.value) == (
        f"There is no partition at {path}. Materialize scores for 2025-11-07 first."
    )


def test_a_write_that_fails_leaves_the_old_partition_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = partition_path(str(tmp_path), KEY, "2025-11-07")
    write_parquet(path, frame({"a": 1}).lazy())

    def disk_is_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        write_parquet(path, frame({"a": 2}).lazy())

    assert_frame_equal(scan_partition(path).collect(), frame({"a": 1}))
    assert list(path.parent.iterdir()) == [path]


def materialize(
    base_path: str,
    scores: Mapping[str, Mapping[str, int]],
    *,
    tutor_ids: list[str] | None = None,
) -> tuple[dg.ExecuteInProcessResult, dict[str, list[dict[str, Any]]]]:
    """Store the scores by day as an asset, and say what one that depends on it reads."""
    read: dict[str, list[dict[str, Any]]] = {}

    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
    def scores_asset() -> FramesByDate:
        return {day: frame(of_day).lazy() for day, of_day in scores.items()}

    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
    def reader(scores_asset: FramesByDate) -> dg.MaterializeResult:  # type: ignore[type-arg]
        read.update({day: rows.collect().to_dicts() for day, rows in scores_asset.items()})
        return dg.MaterializeResult()

    days = sorted(scores)
    options = RunOptions(tutor_ids=tutor_ids or [])
    result = dg.materialize(
        [scores_asset, reader],
        resources={
            "io_manager": PartitionedParquetIOManager(
                base_path=base_path, run_options=options, database=PlatformDatabase()
            )
        },
        tags={
            "dagster/asset_partition_range_start": days[0],
            "dagster/asset_partition_range_end": days[-1],
        },
    )
    return result, read


def stored(base_path: str, day: str) -> list[dict[str, Any]]:
    path = partition_path(base_path, dg.AssetKey("scores_asset"), day)
    return scan_partition(path).sort("tutor_id").collect().to_dicts()


def test_a_run_stores_and_reads_each_day(base_path: str, platform: Platform) -> None:
    one, two = {"a": 1, "b": 2}, {"a": 3}

    result, read = materialize(base_path, {"2025-11-06": one, "2025-11-07": two})

    assert read == {
        "2025-11-06": frame(one).to_dicts(),
        "2025-11-07": frame(two).to_dicts(),
    }
    materializations = {
        str(event.partition): event.step_materialization_data.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey("scores_asset")
    }
    for day, rows in {"2025-11-06": one, "2025-11-07": two}.items():
        path = partition_path(base_path, dg.AssetKey("scores_asset"), day)
        metadata = {name: value.value for name, value in materializations[day].items()}
        assert "write_seconds" in metadata
        timeless = {name: metadata[name] for name in metadata if not name.endswith("_seconds")}
        assert timeless == {
            "path": str(path),
            "size_bytes": path.stat().st_size,
            "dagster/partition_row_count": len(rows),
        }


def test_a_filtered_run_replaces_only_the_rows_of_its_tutors(
    base_path: str, platform: Platform
) -> None:
    day = "2025-11-07"
    materialize(base_path, {day: {"b": 1, "c": 1, "d": 1}})

    _, read = materialize(base_path, {day: {"a": 2, "c": 2}}, tutor_ids=["a", "c", "d"])

    assert stored(base_path, day) == frame({"a": 2, "b": 1, "c": 2}).to_dicts()
    assert read == {day: frame({"a": 2, "c": 2}).to_dicts()}


def test_a_filtered_run_may_be_the_first_of_a_day(base_path: str, platform: Platform) -> None:
    materialize(base_path, {"2025-11-07": {"a": 1}}, tutor_ids=["a"])

    assert stored(base_path, "2025-11-07") == frame({"a": 1}).to_dicts()
