"""What is read of a run's shards, task by task."""

from datetime import UTC, datetime

from tutormax_assets.compute.tasks.snapshots import SnapshotPlan
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.source.lake import SharedLakeView
from tutormax_assets.storage.shards import Shards, TutorRange


def test_a_task_is_about_neighbouring_shards() -> None:
    instant = datetime(2025, 11, 7, tzinfo=UTC)
    plan = SnapshotPlan(
        view=SharedLakeView((), instant, "a listing", {}),
        shards=Shards(("b", "d", "x")),
        paths={},
        start=instant,
        end=instant,
        window_days=90,
        timezone="UTC",
        policy=Policy(),
        max_retries=0,
        retry_delay_seconds=0,
    )

    middle, last = plan.task([1, 2]), plan.task([3])

    assert (middle.tutor_range, middle.shards, middle.first_shard) == (
        TutorRange("b", "x"),
        Shards(("d",)),
        1,
    )
    assert (last.tutor_range, last.shards, last.first_shard) == (TutorRange("x"), Shards(()), 3)
    assert middle.plan is plan
