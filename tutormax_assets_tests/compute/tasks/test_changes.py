"""What moved, task by task: dates that are not there, shards that failed, files that vanish."""

import logging
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
from upath import UPath

from tutormax_assets.compute.context import TaskContext
from tutormax_assets.compute.tasks.changes import (
    ChangesReport,
    ChangesTask,
    ComputedDate,
    compute_changes,
)
from tutormax_assets.compute.tasks.windows import compute_windows_and_edges
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.reasons import tier_reasons
from tutormax_assets.settings import Settings
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.partition import Partition, partition_of, store_parts
from tutormax_assets.storage.shards import ALL_IN_ONE, Shards
from tutormax_assets_tests.metrics.rows import D, Row, events, roster, sessions

POLICY = Policy(windows=(7,))


def stored(path: UPath, rows: pl.LazyFrame, *, failed: dict[int, str] | None = None) -> Partition:
    shards = Shards(("m",)) if failed else ALL_IN_ONE
    numbers = [number for number in range(len(shards)) if number not in (failed or {})]
    parts = [
        store_parts(path, rows.filter(shards.number() == number), first=number)
        for number in numbers
    ]
    return partition_of(path, shards, parts, failed=failed, schema=rows.collect_schema())


def computed(
    folder: Path,
    day: date,
    *rows: Row,
    tutors: tuple[str, ...] = ("t1",),
    failed: dict[int, str] | None = None,
    waiting: tuple[str, ...] = (),
) -> ComputedDate:
    """What is stored of a date, of which some tutors may be left out."""
    found = compute_windows_and_edges(
        roster(*tutors),
        sessions(*rows),
        events(),
        reference_dates=[day],
        windows=POLICY.windows,
        policy=POLICY,
        edges=(1, 7),
    )
    sums, edges = (frame.drop("reference_date").lazy() for frame in found)
    path = UPath(folder / str(day))
    return ComputedDate(
        stored(path / "reasons", tier_reasons(sums, policy=POLICY), failed=failed),
        [stored(path / "sums", sums).rows()],
        stored(path / "edges", edges).rows(),
        stored(path / "left_out", roster(*waiting)).rows(),
    )


def compare(folder: Path, now: ComputedDate, before: ComputedDate) -> ChangesReport:
    task = ChangesTask(D, now, {1: before}, UPath(folder / "changes"), POLICY)
    context = TaskContext(PlatformDatabase(Settings()), folder, logging.getLogger("test"))
    return compute_changes(task, context)


def moved(report: ChangesReport, folder: Path) -> list[tuple[str, str]]:
    [part] = report.stored.parts
    rows = pl.read_parquet(folder / "changes" / part.name)
    return rows.select("tutor_id", "move").unique().sort("tutor_id").rows()


DAY_BEFORE = D - timedelta(days=1)


def test_tutors_who_come_and_go_are_told(tmp_path: Path) -> None:
    before = computed(tmp_path, DAY_BEFORE, tutors=("a", "b"))
    now = computed(tmp_path, D, tutors=("b", "c"))

    report = compare(tmp_path, now, before)

    assert moved(report, tmp_path) == [("a", "gone"), ("c", "new")]
    assert report.compared == [1]
    assert report.moves.rows() == [(1, "7day", "new", 1), (1, "7day", "gone", 1)]


def test_who_is_not_computed_yet_has_neither_come_nor_gone(tmp_path: Path) -> None:
    # A run of some tutors has computed each of the dates.
    before = computed(tmp_path, DAY_BEFORE, tutors=("a", "b"), waiting=("c",))
    now = computed(tmp_path, D, tutors=("b", "c"), waiting=("a",))

    assert moved(compare(tmp_path, now, before), tmp_path) == []


@pytest.mark.parametrize("failed_then", [True, False])
def test_tutors_of_a_shard_that_failed_have_neither_come_nor_gone(
    tmp_path: Path, failed_then: bool
) -> None:
    failed = {1: "no memory"}
    before = computed(tmp_path, DAY_BEFORE, tutors=("a", "x"), failed=failed if failed_then else {})
    now = computed(tmp_path, D, tutors=("a", "x"), failed={} if failed_then else failed)

    assert moved(compare(tmp_path, now, before), tmp_path) == []


def test_a_date_whose_files_another_run_has_replaced_is_not_compared_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = computed(tmp_path, DAY_BEFORE, tutors=("a",))
    for file in (tmp_path / str(DAY_BEFORE) / "reasons").iterdir():
        file.unlink()

    report = compare(tmp_path, computed(tmp_path, D, tutors=("a",)), before)

    assert (report.compared, moved(report, tmp_path)) == ([], [])
    assert f"{D} is not compared with {DAY_BEFORE}: " in caplog.text
