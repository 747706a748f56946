"""Parquet partitions: written whole or not at all, and merged by tutor in a filtered run."""

import errno
import grp
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.storage.files import (
    StorageError,
    StoredFile,
    make_private_folder,
    read_parquet,
    write_parquet,
)
from tutormax_assets.storage.partition import (
    delete_files,
    division,
    list_partition,
    open_partition,
    partition_of,
    scan_partition,
    store_parts,
    store_slices,
    stored_files,
)
from tutormax_assets.storage.rows import read_dates, rows_of_all
from tutormax_assets.storage.shards import ALL_IN_ONE, Shards
from tutormax_assets.storage.store import PartitionStore, partition_path
from tutormax_assets_tests.conftest import store

KEY = "scores"


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
    path = partition_path(base_path, KEY, "2025-11-07")
    assert path.parts[-2:] == (KEY, "2025-11-07.parquet")
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


def test_a_shard_without_rows_says_why(base_path: str) -> None:
    day, shards, failed = "2025-11-07", Shards(("b", "c")), {1: "no memory"}

    read = compute(base_path, {day: {"a": 1, "b": 2, "c": 3}}, shards=shards, failed=failed)

    assert read == {day: frame({"a": 1, "c": 3}).to_dicts()}
    path = partition_path(base_path, KEY, day)
    partition = open_partition(path)
    assert partition.failed == failed
    assert partition.rows(1).scan().collect().is_empty()
    assert division([partition]) == (shards, [0, 2], failed)

    # Rows of some tutors are there, and the others of their shard are still not.
    compute(base_path, {day: {"b": 4}}, tutor_ids=["b"])
    assert stored(base_path, day) == frame({"a": 1, "b": 4, "c": 3}).to_dicts()
    assert open_partition(path).failed == failed
    assert division([open_partition(path, tutor_ids=("b",))]) == (ALL_IN_ONE, [None], {})

    other = replace(partition, shards=Shards(("x", "y")), failed={})
    with pytest.raises(StorageError, match=r"scores.*failed.* divided in another way"):
        division([other, partition])


def test_a_partition_takes_the_place_of_a_file(tmp_path: Path) -> None:
    path = partition_path(str(tmp_path), KEY, "2025-11-07")
    path.parent.mkdir()
    frame({"a": 1}).write_parquet(str(path))

    store(path, frame({"a": 2}))

    assert_frame_equal(scan_partition(path).collect(), frame({"a": 2}))


DAYS = [date(2025, 11, day) for day in (6, 7, 8)]
TOGETHER = frame({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5})


def keep_together(base_path: str, asset: str = KEY) -> PartitionStore:
    """Keep partitions of which each has three rows and the next one begins a row later."""
    kept = PartitionStore(base_path)
    paths = {day: kept.path(asset, str(day)) for day in DAYS}
    stored = store_slices(paths, TOGETHER, {day: (n, 3) for n, day in enumerate(DAYS)})
    kept.keep({str(day): partition_of(paths[day], ALL_IN_ONE, [stored[day]]) for day in DAYS})
    return kept


def test_dates_that_are_stored_together_share_a_file_and_each_has_its_rows(base_path: str) -> None:
    kept = keep_together(base_path)
    partitions = [kept.partition(KEY, str(day)) for day in DAYS]

    for number, partition in enumerate(partitions):
        assert_frame_equal(partition.rows().scan().collect(), TOGETHER.slice(number, 3))
        assert partition.rows().count == 3
        assert sum(part.size_bytes for part in partition.parts) > 0
    files = [file for partition in partitions for file in partition.rows().files]
    if base_path.startswith("memory"):
        assert [part.offset for partition in partitions for part in partition.parts] == [None] * 3
        return
    assert {file.stat().st_ino for file in files} == {files[0].stat().st_ino}
    # Who reads all files of a folder must not take the rows of all dates for those of one.
    assert not any(partition.path.exists() for partition in partitions)
    whole = rows_of_all([partition.rows() for partition in partitions])
    assert_frame_equal(whole.scan().collect(), TOGETHER)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_dates_that_are_read_together_have_the_rows_of_each(
    base_path: str, is_sharded: bool
) -> None:
    kept = keep_together(base_path)
    apart = partition_path(base_path, KEY, "2025-11-09")
    store(apart, TOGETHER, shards=Shards(("c",)) if is_sharded else ALL_IN_ONE)
    partitions = {str(day): kept.partition(KEY, str(day)) for day in DAYS}
    if is_sharded:
        # Each shard has a place of its own in its file.
        partitions = {
            day: replace(one, parts=(*one.parts, *one.parts), shards=Shards(("c",)))
            for day, one in partitions.items()
        }
    partitions["2025-11-09"] = open_partition(apart)

    found = read_dates({day: one.rows() for day, one in partitions.items()})

    assert list(found) == [*map(str, DAYS), "2025-11-09"]
    for day, one in partitions.items():
        assert_frame_equal(found[day], one.rows().scan().collect())

    of_some = {
        day: replace(one, tutor_ids=("b", "d")).rows()
        for day, one in partitions.items()
        if not is_sharded
    }
    for day, rows in read_dates(of_some).items():
        assert_frame_equal(rows, of_some[day].scan().collect())


def test_a_date_leaves_those_that_share_its_file_as_they_are(base_path: str) -> None:
    kept = keep_together(base_path)
    first, second, third = (str(day) for day in DAYS)
    before = stored(base_path, third)

    compute(base_path, {first: {"x": 7}})
    compute(base_path, {second: {"b": 8}}, tutor_ids=["b"])

    assert stored(base_path, first) == frame({"x": 7}).to_dicts()
    assert stored(base_path, second) == frame({"b": 8, "c": 3, "d": 4}).to_dicts()
    assert stored(base_path, third) == before
    delete_files(kept.path(KEY, first))
    assert stored(base_path, third) == before
    delete_files(kept.path(KEY, third))
    assert stored(base_path, second) == frame({"b": 8, "c": 3, "d": 4}).to_dicts()
    left = [path for path in UPath(base_path).joinpath(KEY).rglob("*") if path.is_file()]
    assert len(left) == 2


def test_links_that_are_not_listed_are_deleted(tmp_path: Path) -> None:
    kept = keep_together(str(tmp_path))
    path = kept.path(KEY, str(DAYS[1]))
    store_slices(
        {day: kept.path(KEY, str(day)) for day in DAYS}, TOGETHER, dict.fromkeys(DAYS, (0, 1))
    )
    assert len(stored_files(path)) == 2

    kept.keep({str(DAYS[1]): kept.partition(KEY, str(DAYS[1]))})

    assert len(stored_files(path)) == 1
    assert_frame_equal(scan_partition(path).collect(), TOGETHER.slice(1, 3))


def test_without_hard_links_all_dates_but_the_first_have_their_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)

    kept = keep_together(str(tmp_path))

    for number, day in enumerate(DAYS):
        partition = kept.partition(KEY, str(day))
        assert_frame_equal(partition.rows().scan().collect(), TOGETHER.slice(number, 3))
        assert (partition.parts[0].offset is None) == (number > 0)


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


def compute(
    base_path: str,
    scores: Mapping[str, Mapping[str, int]],
    *,
    tutor_ids: Sequence[str] = (),
    shards: Shards = ALL_IN_ONE,
    failed: Mapping[int, str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Keep the scores by day, as a run of some tutors does, and read what it reads of them."""
    store = PartitionStore(base_path, tutor_ids=tutor_ids)
    partitions = {}
    for day, of_day in scores.items():
        rows, path = frame(of_day), store.path(KEY, day)
        parts = [
            store_parts(path, rows.filter(shards.number() == number).lazy(), first=number)
            for number in range(len(shards))
            if number not in (failed or {})
        ]
        partitions[day] = partition_of(path, shards, parts, failed=failed, schema=rows.schema)
    store.keep(partitions)
    return {
        day: partition.rows().scan().sort("tutor_id").collect().to_dicts()
        for day, partition in store.partitions(KEY, scores).items()
    }


def stored(base_path: str, day: str) -> list[dict[str, Any]]:
    path = partition_path(base_path, KEY, day)
    return scan_partition(path).sort("tutor_id").collect().to_dicts()


def test_a_run_stores_and_reads_each_day(base_path: str) -> None:
    one, two = {"a": 1, "b": 2}, {"a": 3}

    assert compute(base_path, {"2025-11-06": one, "2025-11-07": two}) == {
        "2025-11-06": frame(one).to_dicts(),
        "2025-11-07": frame(two).to_dicts(),
    }


def test_a_partition_that_another_run_wrote_meanwhile_stays(base_path: str) -> None:
    lost = False
    store = PartitionStore(base_path, renew_locks=lambda: lost)
    path = store.path(KEY, "2025-11-07")

    def keep(score: int) -> None:
        parts = [store_parts(path, frame({"a": score}).lazy())]
        store.keep({"2025-11-07": partition_of(path, ALL_IN_ONE, parts)})

    keep(1)
    lost = True
    keep(2)
    compute(base_path, {"2025-11-07": {"a": 3}})

    for use in (lambda: keep(4), lambda: store.partitions(KEY, ["2025-11-07"])):
        with pytest.raises(StorageError, match="was written by another run"):
            use()
    assert stored(base_path, "2025-11-07") == frame({"a": 3}).to_dicts()


@pytest.mark.parametrize("shards", [ALL_IN_ONE, Shards(("c",)), Shards(("b", "c", "d", "e"))])
def test_a_filtered_run_replaces_only_the_rows_of_its_tutors(
    base_path: str, shards: Shards
) -> None:
    day = "2025-11-07"
    compute(base_path, {day: {"b": 1, "c": 1, "d": 1}}, shards=shards)
    path = partition_path(base_path, KEY, day)
    before = open_partition(path)

    read = compute(base_path, {day: {"a": 2, "c": 2}}, tutor_ids=["a", "c", "d"])

    assert stored(base_path, day) == frame({"a": 2, "b": 1, "c": 2}).to_dicts()
    assert read == {day: frame({"a": 2, "c": 2}).to_dicts()}
    after = open_partition(path)
    assert after.shards == shards
    untouched = set(range(len(shards))) - shards.numbers_of(["a", "c", "d"])
    assert {n for n in range(len(shards)) if before.parts[n] == after.parts[n]} == untouched
    assert {entry.name for entry in path.iterdir()} == {part.name for part in after.parts}


def test_a_filtered_run_may_be_the_first_of_a_day(base_path: str) -> None:
    compute(base_path, {"2025-11-07": {"a": 1}}, tutor_ids=["a"])

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


def test_rows_of_an_earlier_version_are_not_merged_with(base_path: str) -> None:
    day = "2025-11-07"
    store(partition_path(base_path, KEY, day), frame({"a": 1, "b": 2}).drop("score"))

    with pytest.raises(StorageError, match=r"lacks 1 columns, such as score: .*Run 2025-11-07"):
        compute(base_path, {day: {"a": 3}}, tutor_ids=["a"])


def test_an_earlier_date_names_its_failed_shards_whichever_the_tutors(base_path: str) -> None:
    day, failed = "2025-11-07", {1: "no memory"}
    compute(base_path, {day: {"a": 1, "c": 3}}, shards=Shards(("b", "c")), failed=failed)

    earlier = PartitionStore(base_path, tutor_ids=["c"]).stored_partition(KEY, day)

    assert earlier.failed == failed
    assert earlier.rows().scan().collect().to_dicts() == frame({"c": 3}).to_dicts()
