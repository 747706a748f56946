"""Flags and tiers of a shard."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
from upath import UPath

from tutormax_assets.compute import ShardsError
from tutormax_assets.compute.context import TaskContext
from tutormax_assets.database.faults import reason
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import TIERS, TutorTiers
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets.storage.partition import (
    Division,
    Partition,
    Rows,
    StoredParts,
    division,
    partition_of,
    store_parts,
)
from tutormax_assets.storage.shards import shard_name


@dataclass(frozen=True)
class TiersTask:
    """A shard of a reference date.

    Attributes:
        metrics: ``WindowMetrics`` of each window, the shortest one first.
        shard: Its number.
        path: The partition to store.
        policy: Thresholds, and how many flags make a tier.
    """

    metrics: Sequence[Rows]
    shard: int
    path: UPath
    policy: Policy


@dataclass(frozen=True)
class TiersPlan:
    """What is to be done for a reference date.

    Attributes:
        path: The partition to store.
        division: The shards that have metrics, and those that an earlier step could not compute.
        tasks: By the name of the shard.
    """

    path: UPath
    division: Division
    tasks: Mapping[str, TiersTask]


@dataclass(frozen=True)
class TiersReport:
    """What was stored.

    Attributes:
        stored: The file.
        counts: Number of tutors by window and tier.
    """

    stored: StoredParts
    counts: dict[str, dict[str, int]]


def plan_tiers(
    partition_key: str, metrics: Sequence[Partition], *, path: UPath, policy: Policy
) -> TiersPlan:
    """Divide a reference date into tasks.

    Args:
        partition_key: The reference date in ISO form.
        metrics: ``WindowMetrics`` of each window, the shortest one first.
        path: The partition to store.
        policy: Thresholds, and how many flags make a tier.
    """
    divided = division(metrics)
    tasks = {
        shard_name(partition_key, number): TiersTask(
            [partition.rows(number) for partition in metrics], number or 0, path, policy
        )
        for number in divided.numbers
    }
    return TiersPlan(path, divided, tasks)


def collect_tiers(
    plan: TiersPlan, reports: Mapping[str, TiersReport], errors: Mapping[str, BaseException]
) -> Partition:
    """The partition of a reference date, with the shards that failed named in it.

    Args:
        plan: What was to be done.
        reports: Of the shards that were computed, by name.
        errors: Why others were not, by name.

    Raises:
        ShardsError: No shard was computed.
    """
    failed = dict(plan.division.failed)
    failed |= {plan.tasks[name].shard: reason(error) for name, error in errors.items()}
    if errors and len(failed) == len(plan.division.shards):
        raise ShardsError(errors, of=len(plan.tasks)) from next(iter(errors.values()))
    return partition_of(
        plan.path,
        plan.division.shards,
        [report.stored for report in reports.values()],
        failed=failed,
        no_rows=TutorTiers.create_empty(),
    )


def compute_tiers(task: TiersTask, context: TaskContext) -> TiersReport:
    """Raise the flags of each tutor and window, and find the tier.

    Raises:
        StorageError: The storage cannot be written.
    """
    rows = (
        performance_tiers(pl.concat(rows.scan() for rows in task.metrics), policy=task.policy)
        .sort("tutor_id", maintain_order=True)
        .pipe(TutorTiers.validate, eager=False)
        .collect()
    )
    stored = store_parts(task.path, rows.lazy(), first=task.shard)
    return TiersReport(stored, tier_counts(rows))


def sum_of_counts(
    counts: Iterable[Mapping[str, Mapping[str, int]]],
) -> dict[str, dict[str, int]]:
    """The numbers of tutors by window and tier in all of these together."""
    total: dict[str, dict[str, int]] = {}
    for one in counts:
        for window, tiers in one.items():
            of_window = total.setdefault(window, dict.fromkeys(TIERS, 0))
            for tier, tutors in tiers.items():
                of_window[tier] += tutors
    return total


def tier_counts(tiers: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Number of tutors in each tier by window, tiers without a tutor included.

    Args:
        tiers: ``TutorTiers``.
    """
    counted = tiers.group_by("window", "performance_tier").len()
    found = {(window, tier): count for window, tier, count in counted.iter_rows()}
    windows = tiers["window"].unique(maintain_order=True)
    return {window: {tier: found.get((window, tier), 0) for tier in TIERS} for window in windows}
