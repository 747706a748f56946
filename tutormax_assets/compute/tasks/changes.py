"""What moved since the day before and seven days before, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import polars as pl
from upath import UPath

from tutormax_assets.compute.context import TaskContext
from tutormax_assets.compute.tasks.windows import EDGE_DAYS
from tutormax_assets.metrics.changes import moves, sum_splits, tier_changes
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import TierChanges
from tutormax_assets.storage.partition import Partition, StoredParts, store_parts
from tutormax_assets.storage.rows import Rows

TUTOR_TIER_CHANGES = "tutor_tier_changes"

COMPARED_DAYS = EDGE_DAYS
"""How many days before a reference date those are that it is compared with."""


@dataclass(frozen=True)
class ComputedDate:
    """What is stored of a reference date.

    Attributes:
        reasons: ``TierReasons``.
        sums: ``WindowSums`` of each window, the shortest first.
        edges: ``EdgeSums``.
        left_out: ``TutorRoster`` of the tutors who are not computed; None if not known.
    """

    reasons: Partition
    sums: Sequence[Rows]
    edges: Rows
    left_out: Rows | None

    def is_unknown(self) -> pl.Expr:
        """Whether it is not known of a tutor without a row if there should be one."""
        unknown = self.reasons.shards.number().is_in(list(self.reasons.failed))
        if self.left_out is None:
            return unknown
        waiting = self.left_out.scan().filter(status="active").select("tutor_id").collect()
        return unknown | pl.col("tutor_id").is_in(waiting["tutor_id"].implode())


@dataclass(frozen=True)
class ChangesTask:
    """A reference date to compare with earlier ones.

    Attributes:
        reference_date: The date.
        computed: What is stored of it.
        earlier: The same of earlier dates, by how many days before they are.
        path: The partition to store.
        policy: Its windows.
    """

    reference_date: date
    computed: ComputedDate
    earlier: Mapping[int, ComputedDate]
    path: UPath
    policy: Policy


@dataclass(frozen=True)
class ChangesReport:
    """What was stored.

    Attributes:
        stored: The file.
        compared: How many days before the dates are that it was compared with.
        moves: ``days``, ``window``, ``move`` and number of ``tutors``.
    """

    stored: StoredParts
    compared: Sequence[int]
    moves: pl.DataFrame


def compute_changes(task: ChangesTask, context: TaskContext) -> ChangesReport:
    """Find what moved, and split the sums of each metric whose flag changed.

    Raises:
        StorageError: The storage cannot be written.
    """
    try:
        found = _changes(task, task.earlier)
    except _GONE:
        # The run has no lock on an earlier date, whose files another run may delete meanwhile.
        found = {}
        for days, earlier in task.earlier.items():
            try:
                found |= _changes(task, {days: earlier})
            except _GONE as error:
                day = task.reference_date - timedelta(days=days)
                context.log.warning(f"{task.reference_date} is not compared with {day}: {error}")
    rows = pl.concat([TierChanges.create_empty(), *found.values()])
    return ChangesReport(store_parts(task.path, rows.lazy()), list(found), count_moves(rows))


_GONE = (OSError, pl.exceptions.PolarsError)


def _changes(task: ChangesTask, earlier: Mapping[int, ComputedDate]) -> dict[int, pl.DataFrame]:
    """``TierChanges`` against each of these dates, by how many days before they are."""
    windows = task.policy.windows
    moved = pl.collect_all(_moves(task.computed, one) for one in earlier.values())
    # By themselves: in one plan with what is made of them they take longer.
    splits = pl.collect_all(
        _splits(task.computed, one, rows, days=days, windows=windows)
        for rows, (days, one) in zip(moved, earlier.items(), strict=True)
    )
    found = pl.collect_all(
        tier_changes(rows.lazy(), of_rows.lazy(), days=days).pipe(TierChanges.validate, eager=False)
        for rows, of_rows, days in zip(moved, splits, earlier, strict=True)
    )
    return dict(zip(earlier, found, strict=True))


def count_moves(changes: pl.DataFrame) -> pl.DataFrame:
    """Number of tutors by ``days``, ``window`` and ``move``, sorted.

    Args:
        changes: ``TierChanges``.
    """
    return (
        changes.unique(["tutor_id", "days", "window"])
        .group_by("days", "window", "move")
        .agg(pl.len().alias("tutors"))
        .sort("days", "window", "move")
    )


def _moves(computed: ComputedDate, earlier: ComputedDate) -> pl.LazyFrame:
    found = moves(computed.reasons.rows().scan(), earlier.reasons.rows().scan())
    move = pl.col("move")
    is_unknown = ((move == "new") & earlier.is_unknown()) | (
        (move == "gone") & computed.is_unknown()
    )
    return found.filter(~is_unknown)


def _splits(
    computed: ComputedDate,
    earlier: ComputedDate,
    moved: pl.DataFrame,
    *,
    days: int,
    windows: Sequence[int],
) -> pl.LazyFrame:
    """The splits of all windows, for tutors with a changed flag."""
    with_flags = moved.lazy().filter(pl.col("metrics").list.len() > 0)
    return pl.concat(
        sum_splits(
            with_flags.filter(window=window_name(window)),
            *((one.sums[place].scan(), one.edges.scan()) for one in (computed, earlier)),
            days=days,
            window=window,
        )
        for place, window in enumerate(windows)
    )


def sum_of_moves(counts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The numbers of tutors in all of these together, sorted."""
    key = ["days", "window", "move"]
    return pl.concat(counts).group_by(key).agg(pl.col("tutors").sum()).sort(key)
