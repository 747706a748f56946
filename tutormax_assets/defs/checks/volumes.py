"""How many rows the snapshots have by day and by tutor, counted once for all dates of a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Literal

import dataframely as dy
import polars as pl

from tutormax_assets.metrics.schemas import LOGIN, SessionsSnapshot, TutorEventsSnapshot
from tutormax_assets.metrics.window import within_window
from tutormax_assets.storage.rows import Rows, rows_of_all
from tutormax_assets.storage.store import PartitionStore

What = Literal["sessions", "logins"]


@dataclass(frozen=True)
class Volumes:
    """Rows by day of the snapshots of some reference dates, by partition key.

    Attributes:
        sessions: What ``sessions_by_day`` returns.
        events: What ``events_by_day`` returns.
    """

    sessions: Mapping[str, pl.DataFrame]
    events: Mapping[str, pl.DataFrame]

    def by_day(self, what: What, partition_key: str) -> pl.DataFrame:
        """Sessions or logins by day, ``date`` and ``rows``; empty where there is no snapshot."""
        if what == "sessions":
            return self.sessions[partition_key]
        events = self.events[partition_key].filter(pl.col("logins") > 0)
        return events.select("date", rows="logins")


def read_volumes(store: PartitionStore, partition_keys: Iterable[str], *, days: int) -> Volumes:
    """Count the rows of the snapshots of some reference dates.

    Args:
        store: Where the snapshots are.
        partition_keys: The reference dates.
        days: Days before a reference date that its snapshots hold.
    """
    keys = list(partition_keys)
    return Volumes(
        _by_day(
            store, "sessions_snapshot", keys, sessions_by_day, none=SessionsSnapshot, days=days
        ),
        _by_day(
            store, "tutor_events_snapshot", keys, events_by_day, none=TutorEventsSnapshot, days=days
        ),
    )


def sessions_by_day(sessions: pl.LazyFrame, /) -> pl.LazyFrame:
    """Sessions by day: ``date``, ``rows``, ``rated``, ``highest_score``, sorted by date.

    Args:
        sessions: ``SessionsSnapshot``.
    """
    return (
        sessions.group_by(pl.col("scheduled_date").alias("date"))
        .agg(
            pl.len().cast(pl.Int64).alias("rows"),
            pl.col("overall_rating").count().cast(pl.Int64).alias("rated"),
            pl.col("engagement_score").max().alias("highest_score"),
        )
        .sort("date")
    )


def events_by_day(events: pl.LazyFrame, /) -> pl.LazyFrame:
    """Events by day: ``date``, ``rows``, and how many of them are ``logins``, sorted by date.

    Args:
        events: ``TutorEventsSnapshot``.
    """
    return (
        events.group_by(pl.col("event_date").alias("date"))
        .agg(
            pl.len().cast(pl.Int64).alias("rows"),
            (pl.col("event_type") == LOGIN).sum().cast(pl.Int64).alias("logins"),
        )
        .sort("date")
    )


def unknown_tutors(
    store: PartitionStore, partition_keys: Iterable[str]
) -> dict[str, pl.DataFrame | None]:
    """The tutors of a date's sessions who were not in ``tutors`` when both were read.

    Returns:
        ``tutor_id`` and their number of ``rows``; None for a date of which the tutors are not
        known.
    """
    snapshots = {
        key: store.whole_partition("sessions_snapshot", key).rows() for key in partition_keys
    }
    found: dict[str, pl.DataFrame | None] = {}
    known: dict[tuple[str, ...], pl.Series] = {}
    for keys in _read_together(snapshots):
        of_all = rows_of_all([snapshots[key] for key in keys]).scan()
        ids = of_all.select(pl.col("tutor_id").unique()).collect().to_series()
        none = pl.DataFrame(schema={"tutor_id": pl.String, "rows": pl.UInt32})
        for key in keys:
            tutors = _tutors_when_read(store, key, known)
            if tutors is None:
                found[key] = None
            elif (unknown := ids.filter(~ids.is_in(tutors.implode()))).is_empty():
                found[key] = none
            else:
                is_unknown = pl.col("tutor_id").is_in(unknown.implode())
                rows = snapshots[key].scan().filter(is_unknown)
                found[key] = rows.group_by("tutor_id").len("rows").collect()
    return found


def _tutors_when_read(
    store: PartitionStore, key: str, known: dict[tuple[str, ...], pl.Series]
) -> pl.Series | None:
    """All tutors of the platform at the instant at which its sessions were read, if known."""
    try:
        parts = [
            store.whole_partition(asset, key).rows()
            for asset in ("tutor_roster", "tutors_left_out")
        ]
    except FileNotFoundError:
        return None
    files = tuple(name for rows in parts for name in rows.file_names)
    if files not in known:
        tutors = pl.concat(rows.scan().select("tutor_id") for rows in parts)
        known[files] = tutors.collect().to_series()
    return known[files]


def _by_day(
    store: PartitionStore,
    asset: str,
    keys: Iterable[str],
    count: Callable[[pl.LazyFrame], pl.LazyFrame],
    *,
    none: type[dy.Schema],
    days: int,
) -> dict[str, pl.DataFrame]:
    found, snapshots = {}, {}
    for key in keys:
        try:
            snapshots[key] = store.whole_partition(asset, key).rows()
        except FileNotFoundError:
            found[key] = count(none.create_empty().lazy()).collect()
    for together in _read_together(snapshots):
        of_all = rows_of_all([snapshots[key] for key in together]).scan()
        by_day = count(of_all).collect(engine="streaming")
        for key in together:
            window = within_window("date", reference_date=date.fromisoformat(key), days=days)
            of_date = by_day.filter(window)
            if of_date["rows"].sum() != snapshots[key].count:
                # The snapshot holds other days, as after a change of the windows.
                of_date = count(snapshots[key].scan()).collect(engine="streaming")
            found[key] = of_date
    return found


def _read_together(rows: Mapping[str, Rows]) -> Iterator[list[str]]:
    """The dates whose rows are in the same files."""
    by_files: dict[tuple[str, ...], list[str]] = {}
    for key, of_date in rows.items():
        by_files.setdefault(of_date.file_names, []).append(key)
    yield from by_files.values()
