"""Compares stored dates with a full computation.

A stored date is a full run and the refreshes that came after it. Rows of tutors who have not
changed since must equal the rows that a full run would compute now.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import dagster as dg
import polars as pl

from tutormax_assets.compute.tasks.reading import GoodRows, read_good_rows, tiers_of
from tutormax_assets.compute.tasks.roster import choose_others
from tutormax_assets.compute.tasks.tiers import TUTOR_TIERS
from tutormax_assets.database.date_locks import date_lock
from tutormax_assets.dates import horizon, midnight
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.defs.stored_date import StoredDate
from tutormax_assets.metrics.quality import good_tutors
from tutormax_assets.runs.read_state import computed_with
from tutormax_assets.settings import Settings
from tutormax_assets.source.horizon import UnknownChangesError
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.view import View, open_view
from tutormax_assets.storage.spool import spool_folder

_KEY = ["tutor_id", "window"]


@dataclass(frozen=True)
class VerifiedDate:
    """The comparison of a stored date with a full computation.

    Attributes:
        day: The reference date.
        tutors: Number of tutors whose rows were compared.
        changed: Number of tutors left out because their rows may have changed since.
        wrong: ``tutor_id`` and ``window`` of rows that differ.
        unknown: Why the date was not compared; empty if it was.
    """

    day: date
    tutors: int
    changed: int
    wrong: pl.DataFrame
    unknown: str = ""


def verify_dates(
    settings: Settings,
    database: PlatformDatabase,
    instance: dg.DagsterInstance,
    days: Sequence[date],
) -> list[VerifiedDate]:
    """Compare stored dates with a full computation from one read of the platform; writes nothing.

    Args:
        settings: Where everything is.
        database: The platform, and where the metrics table is.
        instance: Where runs are on record.
        days: Reference dates; those that are not stored are left out.

    Raises:
        SourceError: The platform cannot be read.
        StorageError: The storage cannot be read.
        PolicyError: The policy cannot be used.
    """
    policy = load_policy(settings)
    stored = [StoredDate(settings, instance, day, policy) for day in days]
    stored = [one for one in stored if one.is_there()]
    if not stored:
        return []
    first, last = horizon([one.day for one in stored], window_days=policy.horizon_days)
    with (
        spool_folder(settings.home_path) as folder,
        open_view(database.source) as view,
    ):
        rows = read_good_rows(
            view,
            folder / "source",
            start=midnight(first, timezone=settings.timezone),
            end=midnight(last, timezone=settings.timezone),
            policy=policy,
            timezone=settings.timezone,
        )
        found = []
        for one in stored:
            with date_lock(database.engine, str(one.day)) as is_mine:
                found.append(
                    _verify(one, view, rows)
                    if is_mine
                    else _unknown(one, "a run of the date is under way")
                )
    return found


def _verify(stored: StoredDate, view: View, rows: GoodRows) -> VerifiedDate:
    policy = stored.policy
    conditions = computed_with(policy, timezone=stored.settings.timezone, include_inactive=False)
    try:
        state = stored.state(conditions)
        if state.read_at > view.read_at:
            raise UnknownChangesError("the date was computed meanwhile")
        changes = stored.changes(view, state)
        roster = good_tutors(changes.tutors.lazy(), include_inactive=False).collect()
        others = choose_others(changes.tutors, roster["tutor_id"])
        not_in_table = stored.rows_not_in_table(changes.tutors)
    except UnknownChangesError as error:
        return _unknown(stored, str(error))
    changed = {*changes.tutor_ids, *stored.tutors_of_other_status(roster, others)}
    is_unchanged = ~pl.col("tutor_id").is_in(list(changed))
    roster = roster.filter(is_unchanged)
    now = tiers_of(roster, rows, reference_date=stored.day, policy=policy)
    then = stored.scan(TUTOR_TIERS).filter(is_unchanged).collect().select(now.columns)
    wrong = [
        one.join(other, on=one.columns, how="anti", nulls_equal=True).select(_KEY)
        for one, other in ((now, then), (then, now))
    ]
    wrong.append(not_in_table.filter(is_unchanged).select(_KEY))
    return VerifiedDate(stored.day, len(roster), len(changed), pl.concat(wrong).unique().sort(_KEY))


def _unknown(stored: StoredDate, why: str) -> VerifiedDate:
    empty = pl.DataFrame(schema=dict.fromkeys(_KEY, pl.String))
    return VerifiedDate(stored.day, tutors=0, changed=0, wrong=empty, unknown=why)
