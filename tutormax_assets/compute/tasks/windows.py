"""The metrics of all windows of a shard, in one pass over its snapshots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from time import perf_counter

import polars as pl
from upath import UPath

from tutormax_assets.compute.context import TaskContext
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import WindowMetrics
from tutormax_assets.metrics.window import window_metrics
from tutormax_assets.storage.partition import Rows, StoredParts, store_parts


@dataclass(frozen=True)
class WindowsOfShard:
    """A shard of a reference date.

    Attributes:
        reference_date: The day after the last one of each window.
        roster: ``TutorRoster``.
        sessions: ``SessionsSnapshot``.
        events: ``TutorEventsSnapshot``.
        shard: Its number.
        paths: The partitions to store, by the length of the window in days, the shortest first.
    """

    reference_date: date
    roster: Rows
    sessions: Rows
    events: Rows
    shard: int
    paths: Mapping[int, UPath]


@dataclass(frozen=True)
class WindowsTask:
    """Shards to compute at once."""

    shards: Sequence[WindowsOfShard]
    policy: Policy


@dataclass(frozen=True)
class WindowsReport:
    """What was stored.

    Attributes:
        stored: Of each shard, by the length of the window in days.
        compute_seconds: How long the computing of a shard took on average.
    """

    stored: list[dict[int, StoredParts]]
    compute_seconds: float


def compute_windows(task: WindowsTask, context: TaskContext) -> WindowsReport:
    """Go through the snapshots of each shard once for all windows.

    Raises:
        StorageError: The storage cannot be written.
    """
    started = perf_counter()
    frames = pl.collect_all(
        [
            window_metrics(
                shard.roster.scan(),
                shard.sessions.scan(),
                shard.events.scan(),
                reference_date=shard.reference_date,
                windows=list(shard.paths),
                policy=task.policy,
            ).pipe(WindowMetrics.validate, eager=False)
            for shard in task.shards
        ],
        engine="streaming",
    )
    seconds = (perf_counter() - started) / len(task.shards)
    stored = [
        {
            days: store_parts(path, rows.lazy().filter(window=window_name(days)), first=shard.shard)
            for days, path in shard.paths.items()
        }
        for shard, rows in zip(task.shards, frames, strict=True)
    ]
    return WindowsReport(stored, seconds)
