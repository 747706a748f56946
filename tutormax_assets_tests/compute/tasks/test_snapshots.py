"""What is read of a run's shards, task by task."""

import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from tutormax_assets.compute import ShardsError
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.snapshots import (
    SnapshotPlan,
    SnapshotReport,
    SnapshotRequest,
    read_groups,
)
from tutormax_assets.errors import TutormaxError
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.source.lake import SharedLakeView
from tutormax_assets.storage.shards import Shards, TutorRange


def four_shards() -> SnapshotPlan:
    instant = datetime(2025, 11, 7, tzinfo=UTC)
    request = SnapshotRequest(
        paths={},
        start=instant,
        end=instant,
        window_days=90,
        timezone="UTC",
        policy=Policy(),
        max_retries=0,
        retry_delay_seconds=0,
    )
    view = SharedLakeView((), instant, "a listing", {})
    return SnapshotPlan(request, view, Shards(("b", "d", "x")))


def test_a_task_is_about_neighbouring_shards() -> None:
    plan = four_shards()

    middle, last = plan.task([1, 2]), plan.task([3])

    assert (middle.tutor_range, middle.shards, middle.first_shard) == (
        TutorRange("b", "x"),
        Shards(("d",)),
        1,
    )
    assert (last.tutor_range, last.shards, last.first_shard) == (TutorRange("x"), Shards(()), 3)
    assert middle.plan is plan


class ComputeStub(Compute):
    """Reads shards, of which some fail: alone, and with them each group that they are in."""

    def __init__(self, errors: dict[int, Exception]) -> None:
        self.errors = errors
        self.tasks: list[list[str]] = []

    def map(self, _: Any, tasks: Mapping[str, Any], *, log: logging.Logger) -> Iterator[Any]:  # type: ignore[override]
        self.tasks.append(list(tasks))
        failed = {}
        for name, task in tasks.items():
            numbers = range(task.first_shard, task.first_shard + len(task.shards))
            if of_task := [self.errors[number] for number in numbers if number in self.errors]:
                failed[name] = of_task[0]
            else:
                yield name, SnapshotReport(count={"sessions": len(numbers)})
        if failed:
            raise ShardsError(failed, of=len(tasks))


def read(errors: dict[int, Exception]) -> tuple[ComputeStub, SnapshotReport]:
    compute = ComputeStub(errors)
    report = read_groups(compute, [[0, 1], [2, 3]], four_shards(), log=logging.getLogger())
    return compute, report


def test_groups_are_read_at_once() -> None:
    compute, report = read({})

    assert compute.tasks == [["shards 0 to 1", "shards 2 to 3"]]
    assert (report.count, report.failed) == ({"sessions": 4}, {})


def test_the_shards_of_a_group_that_fails_are_read_one_by_one() -> None:
    compute, report = read({2: ValueError("no memory")})

    assert compute.tasks[1:] == [["shards 2 to 2", "shards 3 to 3"]]
    assert (report.count, report.failed) == ({"sessions": 3}, {2: "no memory"})


def test_nothing_is_kept_where_no_group_can_be_read() -> None:
    with pytest.raises(ShardsError):
        read({0: ValueError("no memory"), 3: ValueError("no memory")})


def test_what_may_pass_is_left_to_a_new_reading_of_all() -> None:
    class PassingError(TutormaxError):
        may_pass = True

    with pytest.raises(PassingError):
        read({2: PassingError("the server restarts")})
