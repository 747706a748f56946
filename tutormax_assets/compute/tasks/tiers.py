"""Flags and tiers of a shard."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
from upath import UPath

from tutormax_assets.compute.context import TaskContext
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import TIERS, TutorTiers
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets.storage.partition import Rows, StoredParts, store_parts


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
class TiersReport:
    """What was stored.

    Attributes:
        stored: The file.
        counts: Number of tutors by window and tier.
    """

    stored: StoredParts
    counts: dict[str, dict[str, int]]


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


def tier_counts(tiers: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Number of tutors in each tier by window, tiers without a tutor included.

    Args:
        tiers: ``TutorTiers``.
    """
    counted = tiers.group_by("window", "performance_tier").len()
    found = {(window, tier): count for window, tier, count in counted.iter_rows()}
    windows = tiers["window"].unique(maintain_order=True)
    return {window: {tier: found.get((window, tier), 0) for tier in TIERS} for window in windows}
