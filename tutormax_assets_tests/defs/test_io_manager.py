"""Parquet partitions: written whole or not at all, and merged by tutor in a filtered run."""

import errno
import grp
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.defs.io_manager import PartitionedParquetIOManager, PartitionsByDate
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.runs.partitions import partition_path
from tutormax_assets.storage.files import (
    StorageError,
    StoredFile,
    make_private_folder,
    read_parquet,
    write_parquet,
)
from tutormax_assets.storage.partition import (
    division,
    list_partition,
    open_partition,
    partition_of,
    scan_partition,
    store_parts,
)
from tutormax_assets.storage.shards import ALL_IN_ONE, Shards
from tutormax_assets_tests.conftest import Platform, store

KEY = dg.AssetKey("scores")
DAYS = dg.DailyPartitionsDefinition("2025-11-01")


def frame(scores: Mapping[str, int]) -> pl.DataFrame:
    return pl.DataFrame({"tutor_id": list(scores), "score": list(scores.values())})


@pytest.fixture(params=["local", "memory"])
def base_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, whose name would be a pattern, and a store that is none."""
    if request.param == "local":
        yield str(tmp_path / "a [b]*?{c}")
        return
    path = UPath(f"memory://{uuid4().hex}")
    yield str(path)
    if path.exists():
        path.fs.rm(path.path, recursive=True)


@pytest.mark.parametrize("shards", [ALL_IN_ONE, Shards(("b", "x"))])
def test_a_partition_comes_back_as_it_was_stored(base_path: str, shards: Shards) -> None:
    path = partition_path(base_path, dg.AssetKey(["folder", "scores"]), "2025-11-07")
    assert path.parts[-3:] == ("folder", "scores", "2025-11-07.parquet")
    for rows in (frame({"a": 1, "b": 2, "é": 3}), frame({"c": 3}), frame({"a": 1}).clear()):
        store(path, rows, shards=shards)

        assert_frame_equal(scan_partition(path).collect(), rows)
        partition = open_partition(path)
        assert partition.shards == shards
        assert len(list(path.iterdir())) == len(partition.parts) == len(shards)
        for number, part in enumerate(partition.parts):
            of_shard = partition.rows(number)
            assert (of_shard.count, part.size_bytes) == (
                part.rows,
                (path / part.name).stat().st_size,
            )
            expected = rows.filter(shards.number() == number)
            assert_frame_equal(of_shard.scan().collect(), expected)
            assert of_shard.count == len(expected)


def test_what_is_not_listed_is_not_read(base_path: str) -> None:
    path = partition_path(base_path, KEY, "2025-11-07")
    store(path, frame({"a": 1}))
    twice = [store_parts(path, frame({"a": 2}).lazy()) for _ in range(2)]

    assert_frame_equal(scan_partition(path).collect(), frame({"a": 1}))
    list_partition(partition_of(path, ALL_IN_ONE, twice[1:]))

    assert_frame_equal(scan_partition(path).collect(), frame({"a": 2}))
    assert [entry.name for entry in path.iterdir()] == [twice[1].parts[0].name]


def test_a_shard_without_rows_says_why(base_path: str, platform: Platform) -> None:
    day, shards, failed = "2025-11-07", Shards(("b", "c")), {1: "no memory"}

    result, read = materialize(
        base_path, {day: {"a": 1, "b": 2, "c": 3}}, shards=shards, failed=failed
    )

    assert read == {day: frame({"a": 1, "c": 3}).to_dicts()}
    path = partition_path(base_path, dg.AssetKey("scores_asset"), day)
    partition = open_partition(path)
    assert partition.failed == failed
    assert partition.rows(1).scan().collect().is_empty()
    assert division([partition]) == (shards, [0, 2], failed)
    [event, *_] = result.get_asset_materialization_events()
    metadata = event.step_materialization_data.materialization.metadata
    assert metadata["failed_shards"].value == {"1": "no memory"}

    # Rows of some tutors are there, and the others of their shard are still not.
    materialize(base_path, {day: {"b": 4}}, tutor_ids=["b"])
    assert stored(base_path, day) == frame({"a": 1, "b": 4, "c": 3}).to_dicts()
    assert open_partition(path).failed == failed
    assert division([open_partition(path, tutor_ids=("b",))]) == (ALL_IN_ONE, [None], {})

    other = replace(partition, shards=Shards(("x", "y")), failed={})
    with pytest.raises(StorageError, match=r"scores_asset.*failed.* divided in another way"):
        division([other, partition])


def test_a_partition_takes_the_place_of_a_file(tmp_path: Path) -> None:
    path = partition_path(str(tmp_path), KEY, "2025-11-07")
    path.parent.mkdir()
    frame({"a": 1}).write_parquet(str(path))

    store(path, frame({"a": 2}))

    assert_frame_equal(scan_partition(path).collect(), frame({"a": 2}))


def test_a_damaged_listing_says_what_to_do(tmp_path: Path) -> None:
    path = partition_path(str(tmp_path), KEY, "2025-11-07")
    store(path, frame({"a": 1}))
    path.with_suffix(".json").write_text('{"parts": [{"name": 1}]}')

    with pytest.raises(StorageError, match=r"Materialize scores for 2025-11-07 again"):
        scan_partition(path)


def test_a_file_comes_back_as_it_was_stored(base_path: str) -> None:
    path = UPath(base_path) / "rows.parquet"
    for rows in (frame({"a": 1, "b": 2}), frame({"a": 1}).clear()):
        stored = write_parquet(path, rows.lazy())

        assert stored == StoredFile(size_bytes=path.stat().st_size, rows=len(rows))
        read = read_parquet(path)
        assert read is not None
        assert_frame_equal(read, rows)


def test_a_missing_partition_says_what_to_do(base_path: str) -> None:
    path = partition_path(base_path, KEY, "2025-11-07")

    with pytest.raises(FileNotFoundError) as error:
        scan_partition(path)

    assert str(error.value) == (
        f"There is no partition at {path}. Materialize scores for 2025-11-07 first."
    )


@pytest.mark.parametrize("shards", [ALL_IN_ONE, Shards(("b", "x"))])
def test_a_write_that_fails_leaves_the_old_partition_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Shards
) -> None:
    path = partition_path(str(tmp_path), KEY, "2025-11-07")
    store(path, frame({"a": 1}))
    before = sorted(path.parent.rglob("*"))

    def disk_is_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(StorageError, match=r"cannot be written: .*No space left"):
        store(path, frame({"a": 2}), shards=shards)

    assert_frame_equal(scan_partition(path).collect(), frame({"a": 1}))
    assert sorted(path.parent.rglob("*")) == before


def materialize(
    base_path: str,
    scores: Mapping[str, Mapping[str, int]],
    *,
    tutor_ids: list[str] | None = None,
    shards: Shards = ALL_IN_ONE,
    failed: Mapping[int, str] | None = None,
) -> tuple[dg.ExecuteInProcessResult, dict[str, list[dict[str, Any]]]]:
    """Store the scores by day as an asset, and say what one that depends on it reads."""
    read: dict[str, list[dict[str, Any]]] = {}

    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
    def scores_asset() -> PartitionsByDate:
        paths = {day: partition_path(base_path, dg.AssetKey("scores_asset"), day) for day in scores}
        return {
            day: partition_of(path, shards, parts, failed=failed, no_rows=rows.clear())
            for day, path in paths.items()
            for rows in [frame(scores[day])]
            for parts in [
                [
                    store_parts(path, rows.filter(shards.number() == number).lazy(), first=number)
                    for number in range(len(shards))
                    if number not in (failed or {})
                ]
            ]
        }

    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
    def reader(scores_asset: PartitionsByDate) -> dg.MaterializeResult:  # type: ignore[type-arg]
        read.update(
            {
                day: partition.rows().scan().sort("tutor_id").collect().to_dicts()
                for day, partition in scores_asset.items()
            }
        )
        return dg.MaterializeResult()

    days = sorted(scores)
    options = RunOptions(tutor_ids=tutor_ids or None)
    result = dg.materialize(
        [scores_asset, reader],
        resources={"io_manager": PartitionedParquetIOManager(base_path, run_options=options)},
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
            "shards": 1,
            "size_bytes": sum(part.stat().st_size for part in path.iterdir()),
            "dagster/partition_row_count": len(rows),
        }


@pytest.mark.parametrize("shards", [ALL_IN_ONE, Shards(("c",)), Shards(("b", "c", "d", "e"))])
def test_a_filtered_run_replaces_only_the_rows_of_its_tutors(
    base_path: str, platform: Platform, shards: Shards
) -> None:
    day = "2025-11-07"
    materialize(base_path, {day: {"b": 1, "c": 1, "d": 1}}, shards=shards)
    path = partition_path(base_path, dg.AssetKey("scores_asset"), day)
    before = open_partition(path)

    _, read = materialize(base_path, {day: {"a": 2, "c": 2}}, tutor_ids=["a", "c", "d"])

    assert stored(base_path, day) == frame({"a": 2, "b": 1, "c": 2}).to_dicts()
    assert read == {day: frame({"a": 2, "c": 2}).to_dicts()}
    after = open_partition(path)
    assert after.shards == shards
    untouched = set(range(len(shards))) - shards.numbers_of(["a", "c", "d"])
    assert {n for n in range(len(shards)) if before.parts[n] == after.parts[n]} == untouched
    assert {entry.name for entry in path.iterdir()} == {part.name for part in after.parts}


def test_a_filtered_run_may_be_the_first_of_a_day(base_path: str, platform: Platform) -> None:
    materialize(base_path, {"2025-11-07": {"a": 1}}, tutor_ids=["a"])

    assert stored(base_path, "2025-11-07") == frame({"a": 1}).to_dicts()


def modes(folder: Path) -> set[tuple[str, str]]:
    """Kind and mode of a folder and of all that it holds."""
    return {
        ("folder" if path.is_dir() else "file", f"{path.stat().st_mode & 0o7777:o}")
        for path in (folder, *folder.rglob("*"))
    }


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("shards", [ALL_IN_ONE, Shards(("b",))])
def test_rows_of_people_are_for_their_owner(tmp_path: Path, shards: Shards) -> None:
    base = tmp_path / "storage"
    make_private_folder(str(base), group=None)
    store(partition_path(str(base), KEY, "2025-11-07"), frame({"a": 1, "b": 2}), shards=shards)
    assert modes(base) == {("folder", "700"), ("file", "600")}


@pytest.mark.usefixtures("open_umask")
def test_a_group_can_read_what_is_shared_with_it(tmp_path: Path) -> None:
    # A group of this process that new files would not get by themselves, where there is one.
    number = next((gid for gid in os.getgroups() if gid != os.getegid()), os.getegid())
    if os.geteuid() == 0:
        number = grp.getgrnam("daemon").gr_gid
    group = grp.getgrgid(number).gr_name
    base = tmp_path / "storage"
    base.mkdir()
    make_private_folder(str(base), group=group)
    for shards in (ALL_IN_ONE, Shards(("b",))):
        store(partition_path(str(base), KEY, "2025-11-07"), frame({"a": 1, "b": 2}), shards=shards)
    assert modes(base) == {("folder", "2750"), ("file", "640")}
    assert {path.stat().st_gid for path in (base, *base.rglob("*"))} == {number}
