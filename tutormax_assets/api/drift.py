"""Compares stored dates with the platform, and writes nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date

import polars as pl

from tutormax_assets.compute.tasks.dates import batches_of_dates
from tutormax_assets.compute.tasks.reading import GoodRows, read_good_rows
from tutormax_assets.compute.tasks.tiers import TUTOR_TIERS
from tutormax_assets.compute.tasks.windows import compute_windows_and_edges, window_metrics
from tutormax_assets.dates import horizon, midnight
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.errors import UsageError
from tutormax_assets.metrics.drift import differences, event_changes, session_changes, with_causes
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.quality import good_tutors
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets.metrics.window import within_window
from tutormax_assets.settings import Settings
from tutormax_assets.source.view import open_view, source_of
from tutormax_assets.storage.spool import spool_folder
from tutormax_assets.storage.store import PartitionStore


class NothingStoredError(UsageError):
    """None of the dates is stored."""


@dataclass(frozen=True)
class Drift:
    """What differs between what is stored and the platform.

    Attributes:
        dates: Those that were compared, ascending.
        not_stored: The others of the range.
        values: ``reference_date``, ``tutor_id``, ``window``, ``metric``, ``stored`` and ``now`` as
            texts, and the list of ``causes``; a row for each value that differs.
        windows: Those that only the stored dates have, or only the policy; they are not compared.
    """

    dates: Sequence[date]
    not_stored: Sequence[date]
    values: pl.DataFrame
    windows: Sequence[str]

    def counts(self) -> pl.DataFrame:
        """Number of ``tutors`` by ``reference_date``, ``metric`` and ``cause``, sorted."""
        key = ["reference_date", "metric", "cause"]
        return (
            self.values.explode("causes")
            .rename({"causes": "cause"})
            .group_by(key)
            .agg(pl.col("tutor_id").n_unique().alias("tutors"))
            .sort(key)
        )


def find_drift(settings: Settings, days: Sequence[date]) -> Drift:
    """Compare stored dates with what they would be if they were computed now.

    The platform is read once for all of them.

    Args:
        settings: Where everything is.
        days: Consecutive reference dates, ascending.

    Raises:
        NothingStoredError: None of them is stored.
        SourceError: The platform cannot be read.
        StorageError: The storage cannot be read.
        PolicyError: The policy of the settings is refused.
    """
    policy = load_policy(settings)
    store = PartitionStore(settings.storage_path)
    stored = [day for day in days if store.is_stored(TUTOR_TIERS, str(day))]
    if not stored:
        raise NothingStoredError(
            f"Nothing is stored of {days[0]} to {days[-1]}. `tutormax backfill --from {days[0]}"
            f" --to {days[-1]}` computes these dates."
        )
    first, last = horizon(stored, window_days=policy.horizon_days)
    with spool_folder(settings.home_path) as folder, open_view(source_of(settings)) as view:
        rows = read_good_rows(
            view,
            folder / "source",
            start=midnight(first, timezone=settings.timezone),
            end=midnight(last, timezone=settings.timezone),
            policy=policy,
            timezone=settings.timezone,
        )
        tutors = view.tutors()
    found = [
        _compare(store, rows, day, tiers, policy)
        for day, tiers in _tiers_now(store, tutors, rows, stored, policy)
    ]
    windows = {window for _, only_one in found for window in only_one}
    missing = [day for day in days if day not in set(stored)]
    return Drift(stored, missing, pl.concat(values for values, _ in found), sorted(windows))


def _tiers_now(
    store: PartitionStore,
    tutors: pl.DataFrame,
    rows: GoodRows,
    days: Sequence[date],
    policy: Policy,
) -> Iterator[tuple[date, pl.DataFrame]]:
    """``TutorTiers`` of each date, as the platform says now."""
    for include_inactive in (False, True):
        roster = good_tutors(tutors.lazy(), include_inactive=include_inactive).collect()
        of_these = [one for one in days if _has_inactive(store, one) == include_inactive]
        for batch in batches_of_dates({str(one): len(roster) for one in of_these}):
            dates = [date.fromisoformat(key) for key in batch]
            windows, _ = compute_windows_and_edges(
                roster.lazy(),
                rows.sessions.lazy(),
                rows.events.lazy(),
                reference_dates=dates,
                windows=policy.windows,
                policy=policy,
            )
            for one in dates:
                of_date = windows.lazy().filter(reference_date=one)
                yield one, performance_tiers(of_date, policy=policy).collect()


def _has_inactive(store: PartitionStore, day: date) -> bool:
    """Whether tutors of any status were computed."""
    roster = _scan(store, "tutor_roster", day)
    return bool(roster.select((pl.col("status") != "active").any()).collect().item())


def _compare(
    store: PartitionStore, now_rows: GoodRows, day: date, now: pl.DataFrame, policy: Policy
) -> tuple[pl.DataFrame, set[str]]:
    """The values of a date that differ, and the windows that only one side has."""
    stored = _scan(store, TUTOR_TIERS, day).collect()
    windows = set(stored["window"]), set(now["window"])
    both = pl.col("window").is_in(list(windows[0] & windows[1]))
    found = differences(stored.lazy().filter(both), now.lazy().filter(both)).collect()
    is_theirs = pl.col("tutor_id").is_in(found["tutor_id"].unique().implode())
    roster, sessions, events = (
        _scan(store, asset, day).filter(is_theirs)
        for asset in ("tutor_roster", "sessions_snapshot", "tutor_events_snapshot")
    )

    def of_date(rows: pl.DataFrame, column: str) -> pl.LazyFrame:
        in_window = within_window(column, reference_date=day, days=policy.horizon_days)
        return rows.lazy().filter(is_theirs, in_window)

    changes = pl.concat(
        pl.collect_all(
            [
                session_changes(sessions, of_date(now_rows.sessions, "scheduled_date")),
                event_changes(events, of_date(now_rows.events, "event_date")),
            ]
        )
    )
    again = performance_tiers(
        window_metrics(
            roster, sessions, events, reference_date=day, windows=policy.windows, policy=policy
        ).lazy(),
        policy=policy,
    )
    of_policy = differences(stored.lazy().filter(both, is_theirs), again.filter(both)).collect()
    values = with_causes(found, changes, of_policy, reference_date=day, policy=policy)
    return values.insert_column(0, pl.lit(day).alias("reference_date")), windows[0] ^ windows[1]


def _scan(store: PartitionStore, asset: str, day: date) -> pl.LazyFrame:
    return store.whole_partition(asset, str(day)).rows().scan()
