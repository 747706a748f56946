"""The tasks of a reference date's tiers, and what is collected of them."""

from datetime import date
from pathlib import Path

import polars as pl
import pytest
from upath import UPath

from tutormax_assets.compute import ShardsError
from tutormax_assets.compute.tasks import dates
from tutormax_assets.compute.tasks.tiers import (
    TUTOR_TIERS,
    TiersCounts,
    TiersReport,
    collect_tiers,
    plan_tiers,
    sum_of_counts,
)
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.storage.partition import Partition, partition_of, store_parts
from tutormax_assets.storage.shards import Shards

DAY = "2025-11-07"
SHARDS = Shards(("b", "c"))


def metrics(tmp_path: Path, window: str, *, failed: dict[int, str] | None = None) -> Partition:
    path = UPath(tmp_path / window)
    rows = pl.LazyFrame({"tutor_id": ["a", "b", "c"]})
    return partition_of(path, SHARDS, [store_parts(path, rows, shards=SHARDS)], failed=failed)


def report(path: UPath, shard: int) -> TiersReport:
    stored = store_parts(path, TutorTiers.create_empty().lazy(), first=shard)
    day = date.fromisoformat(DAY)
    return TiersReport({TUTOR_TIERS: {day: stored}}, {day: TiersCounts({}, {})})


def test_a_shard_that_an_earlier_step_could_not_compute_has_no_task(tmp_path: Path) -> None:
    failed = metrics(tmp_path, "7day", failed={1: "poisoned"})
    path = UPath(tmp_path / "tiers")

    plan = plan_tiers(
        [{DAY: failed}, {DAY: metrics(tmp_path, "30day")}],
        paths={TUTOR_TIERS: {DAY: path}},
        policy=Policy(),
    )

    assert {name: task.shard for name, task in plan.tasks.items()} == {
        f"{DAY} shard 0": 0,
        f"{DAY} shard 2": 2,
    }
    assert all(len(of_date) == 2 for task in plan.tasks.values() for of_date in task.metrics)
    reports = {name: report(path, task.shard) for name, task in plan.tasks.items()}
    found = collect_tiers(plan, reports, {})
    assert found.partitions[TUTOR_TIERS][DAY].failed == {1: "poisoned"}
    assert len(found.counts[DAY]) == 2


def test_dates_of_few_tutors_are_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = UPath(tmp_path / "7day")
    one = partition_of(
        path, Shards(()), [store_parts(path, pl.LazyFrame({"tutor_id": ["a", "b"]}))]
    )
    days = [f"2025-11-0{day}" for day in range(1, 6)]
    monkeypatch.setattr(dates, "_TUTORS_AT_ONCE", 4)

    plan = plan_tiers(
        [dict.fromkeys(days, one)],
        paths={TUTOR_TIERS: {day: UPath(tmp_path / day) for day in days}},
        policy=Policy(),
    )

    assert {
        name: [str(day) for day in task.reference_dates] for name, task in plan.tasks.items()
    } == {
        "2025-11-01 to 2025-11-02": days[:2],
        "2025-11-03 to 2025-11-04": days[2:4],
        "2025-11-05": days[4:],
    }


def test_partitions_that_are_divided_differently_are_one_task(tmp_path: Path) -> None:
    path = UPath(tmp_path / "90day")
    whole = partition_of(path, Shards(()), [store_parts(path, pl.LazyFrame({"tutor_id": ["a"]}))])

    plan = plan_tiers(
        [{DAY: metrics(tmp_path, "7day")}, {DAY: whole}],
        paths={TUTOR_TIERS: {DAY: UPath(tmp_path / "tiers")}},
        policy=Policy(),
    )

    [(name, task)] = plan.tasks.items()
    assert (name, task.shard) == (DAY, 0)


def test_shards_that_fail_are_named_unless_none_is_left(tmp_path: Path) -> None:
    path = UPath(tmp_path / "tiers")
    plan = plan_tiers(
        [{DAY: metrics(tmp_path, "7day")}], paths={TUTOR_TIERS: {DAY: path}}, policy=Policy()
    )
    first, *others = plan.tasks
    reports = {first: report(path, 0)}
    errors: dict[str, BaseException] = {name: ValueError(f"no {name}") for name in others}

    partition = collect_tiers(plan, reports, errors).partitions[TUTOR_TIERS][DAY]

    assert partition.failed == {1: f"no {DAY} shard 1", 2: f"no {DAY} shard 2"}
    assert len(partition.parts) == 3
    with pytest.raises(ShardsError, match=f"3 of 3 shards failed: {DAY} shard 0: lost"):
        collect_tiers(plan, {}, {first: ValueError("lost"), **errors})


def test_counts_of_shards_add_up() -> None:
    counts = [{"7day": {"Strong": 2}}, {"7day": {"Strong": 1, "At Risk": 4}}, {}]

    assert sum_of_counts(counts) == {
        "7day": {
            "Exemplary": 0,
            "Strong": 3,
            "Developing": 0,
            "Needs Attention": 0,
            "At Risk": 4,
        }
    }
