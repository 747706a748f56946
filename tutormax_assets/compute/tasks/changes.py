"""What moved since the day before and seven days before, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import polars as pl
from upath import UPath

from tutormax_assets.compute.context import TaskContext
from tutormax_assets.metrics.changes import moves, sum_splits, tier_changes
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import TierChanges
from tutormax_assets.storage.partition import Partition, Rows, StoredParts, store_parts

TUTOR_TIER_CHANGES = "tutor_tier_changes"

COMPARED_DAYS = (1, 7)
"""How many days before a reference date those are that it is compared with."""


@dataclass(frozen=True)
class ComputedDate:
    """What is stored of a reference date.

    Attributes:
        reasons: ``TierReasons``.
        sessions: ``SessionsSnapshot``.
        events: ``TutorEventsSnapshot``.
        left_out: ``TutorRoster`` of the tutors who are not computed; None if not known.
    """

    reasons: Partition
    sessions: Rows
    events: Rows
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
        policy: Its windows, and what the sums go by.
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
        moves: ``days``, ``window``, ``move`` and number of ``tutors``.
    """

    stored: StoredParts
    moves: pl.DataFrame


def compute_changes(task: ChangesTask, context: TaskContext) -> ChangesReport:
    """Find what moved, and split the sums of each metric whose flag changed.

    Raises:
        StorageError: The storage cannot be written.
    """
    after = task.computed.reasons.rows().scan()
    moved = {days: _moved(task.computed, earlier) for days, earlier in task.earlier.items()}
    tutors = pl.concat([pl.Series("tutor_id", [], pl.String), *map(_with_flags, moved.values())])
    rows_after = _rows_of(task.computed, tutors)
    frames = [TierChanges.create_empty()]
    for days, earlier in task.earlier.items():
        of_days = moved[days]
        splits = _splits(
            rows_after,
            _rows_of(earlier, _with_flags(of_days)),
            of_days,
            reference_date=task.reference_date,
            days=days,
            policy=task.policy,
        )
        before = earlier.reasons.rows().scan()
        frames.append(
            tier_changes(of_days.lazy(), after, before, splits, days=days)
            .pipe(TierChanges.validate, eager=False)
            .collect()
        )
    rows = pl.concat(frames).sort("tutor_id", maintain_order=True)
    return ChangesReport(store_parts(task.path, rows.lazy()), count_moves(rows))


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


def _moved(computed: ComputedDate, earlier: ComputedDate) -> pl.DataFrame:
    found = moves(computed.reasons.rows().scan(), earlier.reasons.rows().scan())
    move = pl.col("move")
    is_unknown = ((move == "new") & earlier.is_unknown()) | (
        (move == "gone") & computed.is_unknown()
    )
    return found.filter(~is_unknown).collect()


def _with_flags(moved: pl.DataFrame) -> pl.Series:
    """The tutors of whom a flag changed."""
    return moved.filter(pl.col("metrics").list.len() > 0)["tutor_id"].unique()


def _rows_of(computed: ComputedDate, tutors: pl.Series) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    is_wanted = pl.col("tutor_id").is_in(tutors.implode())
    scans = [rows.scan().filter(is_wanted) for rows in (computed.sessions, computed.events)]
    sessions, events = pl.collect_all(scans)
    return sessions.lazy(), events.lazy()


def _splits(
    after: tuple[pl.LazyFrame, pl.LazyFrame],
    before: tuple[pl.LazyFrame, pl.LazyFrame],
    moved: pl.DataFrame,
    *,
    reference_date: date,
    days: int,
    policy: Policy,
) -> pl.LazyFrame:
    """``SumSplit`` of all windows, with the ``window``, of the tutors that moved in it."""
    return pl.concat(
        sum_splits(
            after,
            before,
            reference_date=reference_date,
            days=days,
            window=window,
            policy=policy,
        )
        .filter(pl.col("tutor_id").is_in(_with_flags(of_window).implode()))
        .with_columns(window=pl.lit(window_name(window)))
        for window in policy.windows
        for of_window in [moved.filter(window=window_name(window))]
    )


def sum_of_moves(counts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The numbers of tutors in all of these together, sorted."""
    key = ["days", "window", "move"]
    return pl.concat(counts).group_by(key).agg(pl.col("tutors").sum()).sort(key)
