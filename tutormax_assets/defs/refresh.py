"""Plans how a stored reference date is brought up to date."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import dagster as dg
import polars as pl

from tutormax_assets.compute.tasks.roster import choose_others
from tutormax_assets.dates import horizon, midnight
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.defs.stored_date import NO_STATE, StoredDate, rows_read
from tutormax_assets.metrics.quality import good_tutors
from tutormax_assets.runs.read_state import computed_with, load_state
from tutormax_assets.settings import Settings
from tutormax_assets.source.changed_dates import DateRead, find_changed_dates
from tutormax_assets.source.horizon import UnknownChangesError
from tutormax_assets.source.view import open_view, source_of
from tutormax_assets.storage.store import PartitionStore


@dataclass(frozen=True)
class Refresh:
    """The plan for a reference date.

    Attributes:
        tutor_ids: The tutors to read: empty if nothing has changed, None for all tutors.
        why: The reason for reading all tutors, or the instant since which changes were searched;
            empty for a date that is not stored.
        read_state: The ``ReadState`` that becomes valid with the run, as JSON.
        is_known: Whether the changed tutors are known. All tutors are read if there are too many.
    """

    tutor_ids: tuple[str, ...] | None
    why: str = ""
    read_state: str | None = None
    is_known: bool = False


def plan_refresh(
    settings: Settings, instance: dg.DagsterInstance, day: date, *, include_inactive: bool
) -> Refresh:
    """Find the tutors of a reference date whose rows have to be read again.

    Args:
        settings: Where everything is.
        instance: Where runs are on record.
        day: The reference date.
        include_inactive: Whether tutors of any status are computed.

    Raises:
        SourceError: The platform cannot be read.
        StorageError: The storage cannot be read.
        PolicyError: The policy cannot be used.
    """
    policy = load_policy(settings)
    stored = StoredDate(settings, instance, day, policy)
    if not stored.is_there():
        return Refresh(None)
    try:
        state = stored.state(
            computed_with(policy, timezone=settings.timezone, include_inactive=include_inactive)
        )
        with open_view(source_of(settings)) as view:
            changes = stored.changes(view, state)
        stored.expect_rows(changes.tutors)
        roster = good_tutors(changes.tutors.lazy(), include_inactive=include_inactive).collect()
        others = choose_others(changes.tutors, roster["tutor_id"])
        changed = {*changes.tutor_ids, *stored.tutors_of_other_status(roster, others)}
        _expect_computed(changed, roster["tutor_id"])
    except UnknownChangesError as error:
        return Refresh(None, f"All tutors are read: {error}.")
    if len(changed) > settings.refresh_max_share * len(roster):
        why = f"All tutors are read: {len(changed)} of {len(roster)} tutors have changed."
        return Refresh(None, why, is_known=True)
    since = f"{state.read_at:%Y-%m-%d %H:%M:%S} UTC"
    now = state.model_copy(update={"horizon": changes.horizon, "read_at": changes.read_at})
    return Refresh(tuple(sorted(changed)), since, now.model_dump_json(), is_known=True)


def _expect_computed(changed: set[str], computed: pl.Series) -> None:
    """Check that a run of these tutors is possible."""
    if "" in changed:
        raise UnknownChangesError("rows without a tutor have changed")
    if changed and not computed.is_in(list(changed)).any():
        raise UnknownChangesError(f"none of the {len(changed)} changed tutors is in the roster")


def find_stale_dates(settings: Settings, days: Sequence[date]) -> dict[date, bool | str]:
    """Find the stored dates whose sessions, feedback or events have changed in the platform.

    Args:
        settings: Where everything is.
        days: Reference dates; those that are not stored are left out.

    Returns:
        Whether a date is stale, by date; or the reason why that is unknown.

    Raises:
        SourceError: The platform cannot be read.
        StorageError: The storage cannot be read.
    """
    policy = load_policy(settings)
    store = PartitionStore(settings.storage_path)
    found: dict[date, bool | str] = {}
    read: dict[date, DateRead] = {}
    for day in days:
        if not store.is_stored("sessions_snapshot", str(day)):
            continue
        state = load_state(settings.storage_path, str(day))
        if state is None or state.horizon is None:
            found[day] = NO_STATE if state is None else state.unknown
        else:
            rows = rows_read(store, day).sum()
            tables = ("sessions", "feedback", "events")
            read[day] = DateRead(state.horizon, {table: rows[table].item() for table in tables})
    if read:
        first, last = horizon(list(read), window_days=policy.horizon_days)
        found |= find_changed_dates(
            source_of(settings),
            read,
            start=midnight(first, timezone=settings.timezone),
            end=midnight(last, timezone=settings.timezone),
            timezone=settings.timezone,
            window_days=policy.horizon_days,
            most_transactions=settings.refresh_max_transactions,
        )
    return dict(sorted(found.items()))
