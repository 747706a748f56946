"""The platform's rows in memory, cleaned, and the tiers that follow from them.

The stages of the daily job store what each of them computes. This is for what needs no more than
the tiers: a comparison, the metrics as of an instant, and live numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from pathlib import Path

import polars as pl

from tutormax_assets.compute.tasks.snapshots import Clean, clean_parts
from tutormax_assets.compute.tasks.windows import window_metrics
from tutormax_assets.metrics import quality
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets.source.streams import Table
from tutormax_assets.source.view import View
from tutormax_assets.storage.shards import ALL_TUTORS, TutorRange


@dataclass(frozen=True)
class GoodRows:
    """Rows of the platform without broken values.

    Attributes:
        sessions: ``SessionsSnapshot``.
        events: ``TutorEventsSnapshot``.
        count: Number of rows of each table that was read.
        values_set_aside: Number of broken values.
    """

    sessions: pl.DataFrame
    events: pl.DataFrame
    count: Mapping[str, int]
    values_set_aside: int


def read_good_rows(
    view: View,
    folder: Path,
    *,
    start: datetime,
    end: datetime,
    policy: Policy,
    timezone: str,
    tutor_range: TutorRange = ALL_TUTORS,
    shift: timedelta = timedelta(0),
) -> GoodRows:
    """Read sessions and events in ``[start, end)`` and leave out broken values.

    Args:
        view: The platform at one instant.
        folder: Where the source may keep rows while they are read.
        start: First instant.
        end: First instant after them.
        policy: Says which values are good.
        timezone: IANA name; a row belongs to the date that its instant has there.
        tutor_range: Only rows of these tutors.
        shift: Is taken from each instant, so that a date begins so much later.

    Raises:
        SourceError: The platform cannot be read.
    """
    rows = view.rows(folder, start=start, end=end, tutor_range=tutor_range, hashed=True)
    good_sessions = partial(
        quality.good_sessions,
        policy=policy,
        timezone=timezone,
        ids_are_unique=view.ids_are_unique,
    )
    good_events = partial(quality.good_events, timezone=timezone)
    cleaning: Mapping[Table, tuple[list[pl.LazyFrame], str, Clean]] = {
        "sessions": (rows.sessions, "scheduled_start", good_sessions),
        "tutor_events": (rows.events, "event_timestamp", good_events),
    }
    found = {}
    values_set_aside = 0
    for table, (parts, instant, clean) in cleaning.items():
        if shift:
            parts = [part.with_columns(pl.col(instant) - shift) for part in parts]
        good, set_aside = clean_parts(parts, clean)
        if rows.hashes is not None:
            good, set_aside = rows.hashes.resolve(table, good, set_aside)
        found[table] = good
        values_set_aside += len(set_aside)
    return GoodRows(found["sessions"], found["tutor_events"], rows.count, values_set_aside)


def tiers_of(
    roster: pl.DataFrame, rows: GoodRows, *, reference_date: date, policy: Policy
) -> pl.DataFrame:
    """``TutorTiers`` of the tutors of a roster for the windows that end with a reference date."""
    metrics = window_metrics(
        roster.lazy(),
        rows.sessions.lazy(),
        rows.events.lazy(),
        reference_date=reference_date,
        windows=policy.windows,
        policy=policy,
    )
    return performance_tiers(metrics.lazy(), policy=policy).collect()


def tiers_until(
    view: View, folder: Path, roster: pl.DataFrame, *, instant: datetime, policy: Policy
) -> pl.DataFrame:
    """``TutorTiers`` for windows that end at an instant, each of N times 24 hours.

    Args:
        view: The platform at one instant.
        folder: Where the source may keep rows while they are read.
        roster: ``TutorRoster``.
        instant: First instant after the windows.
        policy: Windows, thresholds and weights.

    Raises:
        SourceError: The platform cannot be read.
    """
    end = instant.astimezone(UTC)
    midnight = datetime.combine(end.date(), time.min, UTC)
    rows = read_good_rows(
        view,
        folder,
        start=end - timedelta(days=policy.horizon_days),
        end=end,
        policy=policy,
        timezone="UTC",
        # Days begin at the time of day of the instant, so that the windows end there.
        shift=end - midnight,
    )
    return tiers_of(roster, rows, reference_date=midnight.date(), policy=policy)
