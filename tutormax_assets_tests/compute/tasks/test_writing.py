"""The tasks of writing a reference date, and the summaries of what was saved."""

from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest
from upath import UPath

from tutormax_assets.compute.tasks.writing import (
    WritingSummary,
    plan_writing,
    sum_of_summaries,
    summary_of_skipped,
)
from tutormax_assets.storage.partition import partition_of, store_parts
from tutormax_assets.storage.shards import Shards

DAY = "2025-11-07"


@pytest.mark.parametrize(
    ("timezone", "instant"),
    [
        ("UTC", datetime(2025, 11, 7, tzinfo=UTC)),
        ("Asia/Tokyo", datetime(2025, 11, 6, 15, tzinfo=UTC)),
    ],
)
def test_each_shard_with_tiers_is_a_task(tmp_path: Path, timezone: str, instant: datetime) -> None:
    shards, path = Shards(("b", "c")), UPath(tmp_path / "tiers")
    stored = store_parts(path, pl.LazyFrame({"tutor_id": ["a", "b", "c"]}), shards=shards)
    tiers = partition_of(path, shards, [stored], failed={1: "poisoned"})

    plan = plan_writing(
        DAY,
        tiers,
        timezone=timezone,
        batch_size=7,
        max_retries=2,
        retry_delay_seconds=0.5,
        holder=42,
    )

    assert list(plan.tasks) == [f"{DAY} shard 0", f"{DAY} shard 2"]
    assert plan.division.failed == {1: "poisoned"}
    for task in plan.tasks.values():
        assert (task.reference_date, task.calculation_date) == (date(2025, 11, 7), instant)
        assert (task.batch_size, task.max_retries, task.holder) == (7, 2, 42)
        assert task.tiers.count == 1


def test_summaries_of_shards_add_up() -> None:
    saved = WritingSummary(3, 6, inserted=4, updated=1, unchanged=1, errors={"t9": "refused"})
    skipped = summary_of_skipped(pl.LazyFrame({"tutor_id": ["t1", "t1", "t2"]}), "lost")

    total = sum_of_summaries([saved, skipped])

    assert total.to_dict() == {
        "total_tutors": 5,
        "successful": 2,
        "failed": 3,
        "total_metrics_saved": 6,
        "inserted": 4,
        "updated": 1,
        "unchanged": 1,
        "errors": [
            {"tutor_id": "t1", "error": "lost"},
            {"tutor_id": "t2", "error": "lost"},
            {"tutor_id": "t9", "error": "refused"},
        ],
    }
    assert sum_of_summaries([]).to_dict()["total_tutors"] == 0
