"""Flags and tiers of a shard, and why they are so."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import dataframely as dy
import polars as pl
from upath import UPath

from tutormax_assets.compute import ShardsError
from tutormax_assets.compute.context import TaskContext
from tutormax_assets.database.faults import reason
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.reasons import tier_reasons
from tutormax_assets.metrics.schemas import (
    TIERS,
    TierReasons,
    TutorTiers,
    WindowMetrics,
    WindowSums,
)
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets.storage.partition import (
    Division,
    Partition,
    Rows,
    StoredParts,
    division,
    expect_columns,
    partition_of,
    store_parts,
)
from tutormax_assets.storage.shards import shard_name

TUTOR_TIERS, TUTOR_TIER_REASONS = "tutor_tiers", "tutor_tier_reasons"

SCHEMAS: Mapping[str, type[dy.Schema]] = {TUTOR_TIERS: TutorTiers, TUTOR_TIER_REASONS: TierReasons}
"""What is stored, by asset."""


@dataclass(frozen=True)
class TiersTask:
    """A shard of a reference date.

    Attributes:
        metrics: ``WindowSums`` of each window, the shortest one first.
        shard: Its number.
        paths: The partitions to store, by asset.
        policy: Thresholds, and how many flags make a tier.
    """

    metrics: Sequence[Rows]
    shard: int
    paths: Mapping[str, UPath]
    policy: Policy


@dataclass(frozen=True)
class TiersPlan:
    """What is to be done for a reference date.

    Attributes:
        paths: The partitions to store, by asset.
        division: The shards that have metrics, and those that an earlier step could not compute.
        tasks: By the name of the shard.
    """

    paths: Mapping[str, UPath]
    division: Division
    tasks: Mapping[str, TiersTask]


@dataclass(frozen=True)
class TiersReport:
    """What was stored.

    Attributes:
        stored: The file of each asset.
        counts: Number of tutors by window and tier.
        thin: Number of tutors with thin evidence by window.
    """

    stored: Mapping[str, StoredParts]
    counts: dict[str, dict[str, int]]
    thin: dict[str, int]


def plan_tiers(
    partition_key: str,
    metrics: Sequence[Partition],
    *,
    paths: Mapping[str, UPath],
    policy: Policy,
) -> TiersPlan:
    """Divide a reference date into tasks.

    Args:
        partition_key: The reference date in ISO form.
        metrics: ``WindowSums`` of each window, the shortest one first.
        paths: The partitions to store, by asset.
        policy: Thresholds, and how many flags make a tier.
    """
    divided = division(metrics)
    tasks = {
        shard_name(partition_key, number): TiersTask(
            [partition.rows(number) for partition in metrics], number or 0, paths, policy
        )
        for number in divided.numbers
    }
    return TiersPlan(paths, divided, tasks)


def collect_tiers(
    plan: TiersPlan, reports: Mapping[str, TiersReport], errors: Mapping[str, BaseException]
) -> dict[str, Partition]:
    """The partitions of a reference date by asset, with the shards that failed named in them.

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
    return {
        asset: partition_of(
            path,
            plan.division.shards,
            [report.stored[asset] for report in reports.values()],
            failed=failed,
            no_rows=SCHEMAS[asset].create_empty(),
        )
        for asset, path in plan.paths.items()
    }


def compute_tiers(task: TiersTask, context: TaskContext) -> TiersReport:
    """Raise the flags of each tutor and window, find the tier, and say why.

    Raises:
        StorageError: The storage cannot be written, or an earlier version has computed the metrics.
    """
    scans = [rows.scan() for rows in task.metrics]
    needed = WindowSums if TUTOR_TIER_REASONS in task.paths else WindowMetrics
    for rows, scan in zip(task.metrics, scans, strict=True):
        expect_columns(scan, needed.column_names(), path=rows.path)
    metrics = pl.concat(scans)
    functions: Mapping[str, Callable[[pl.LazyFrame], pl.LazyFrame]] = {
        TUTOR_TIERS: partial(performance_tiers, policy=task.policy),
        TUTOR_TIER_REASONS: partial(tier_reasons, policy=task.policy),
    }
    frames = pl.collect_all(
        [
            functions[asset](metrics)
            .sort("tutor_id", maintain_order=True)
            .pipe(SCHEMAS[asset].validate, eager=False)
            for asset in task.paths
        ]
    )
    found = dict(zip(task.paths, frames, strict=True))
    stored = {
        asset: store_parts(task.paths[asset], rows.lazy(), first=task.shard)
        for asset, rows in found.items()
    }
    of_any = next(iter(found.values()))
    return TiersReport(stored, tier_counts(of_any), thin_counts(found.get(TUTOR_TIER_REASONS)))


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
        tiers: ``TutorTiers``, or ``TierReasons``.
    """
    counted = tiers.group_by("window", "performance_tier").len()
    found = {(window, tier): count for window, tier, count in counted.iter_rows()}
    windows = tiers["window"].unique(maintain_order=True)
    return {window: {tier: found.get((window, tier), 0) for tier in TIERS} for window in windows}


def thin_counts(reasons: pl.DataFrame | None) -> dict[str, int]:
    """Number of tutors with thin evidence by window.

    Args:
        reasons: ``TierReasons``.
    """
    if reasons is None:
        return {}
    windows = reasons["window"].unique(maintain_order=True)
    found = dict(reasons.filter(evidence="thin").group_by("window").len().iter_rows())
    return {window: found.get(window, 0) for window in windows}
