"""Changes of a tutor since earlier dates, with the sessions and logins that caused them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import polars as pl

from tutormax_assets.compute.tasks.changes import COMPARED_DAYS, TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.windows import metrics_asset_name
from tutormax_assets.dates import midnight
from tutormax_assets.errors import TutormaxError
from tutormax_assets.metrics import quality
from tutormax_assets.metrics.changes import moving_rows
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import SessionsSnapshot
from tutormax_assets.settings import Settings
from tutormax_assets.source.view import open_view, source_of
from tutormax_assets.storage.spool import spool_folder
from tutormax_assets.storage.store import PartitionStore

_SHOWN: Mapping[str, tuple[str, ...]] = {
    "avg_rating": ("overall_rating",),
    "first_session_success_rate": ("session_number", "overall_rating"),
    "reschedule_rate": ("tutor_initiated_reschedule",),
    "no_show_count": ("no_show",),
    "engagement_score": ("engagement_score", "late_start_minutes"),
    "learning_objectives_met_pct": ("learning_objectives_met",),
}
"""The columns of a session that a metric is computed from."""


@dataclass(frozen=True)
class WindowChange:
    """What moved in a window since an earlier date.

    Attributes:
        days: How many days before the reference date that is.
        compared_with: The date.
        move: ``up``, ``down``, ``new``, ``gone`` or ``same``.
        tier_before: The tier then.
        splits: Rows of ``TierChanges``, of the metrics whose flags changed.
        rows: The sessions and events that moved these metrics: ``metric``, ``part``, ``date``,
            ``session_id`` where the platform still has the session as it was read, and the values.
    """

    days: int
    compared_with: date
    move: str
    tier_before: str | None
    splits: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]


class Movement:
    """What moved of a tutor since earlier dates."""

    def __init__(
        self,
        settings: Settings,
        store: PartitionStore,
        policy: Policy,
        tutor_id: str,
        reference_date: date,
        notes: list[str],
        problems: list[str],
    ) -> None:
        """Take the tutor and the date.

        Args:
            settings: Where everything is.
            store: The partitions, restricted to the tutor.
            policy: Says which sessions of the platform are good.
            tutor_id: The tutor.
            reference_date: The date.
            notes: Takes what is to be known of the answers.
            problems: Takes what could not be looked up.
        """
        self._settings = settings
        self._store = store
        self._policy = policy
        self._tutor_id = tutor_id
        self._reference_date = reference_date
        self._notes = notes
        self._problems = problems
        self._changes = self._rows(TUTOR_TIER_CHANGES, 0)
        self._ids: pl.DataFrame | None = None

    def of(self, window: str) -> list[WindowChange]:
        """What moved in a window since the dates that there is something of."""
        if self._changes is None:
            return []
        found = []
        for days in COMPARED_DAYS:
            rows = self._changes.filter(window=window, days=days).to_dicts()
            if not rows:
                continue
            splits = [row for row in rows if row["metric"] is not None]
            compared_with = self._reference_date - timedelta(days=days)
            self._note_policy(compared_with, splits)
            moving: list[dict[str, Any]] = []
            if splits and self._is_as_it_was(window, days, splits):
                moving = list(self._moving(window, days, splits))
            elif splits:
                self._notes.append(
                    f"{compared_with} was computed again since {self._reference_date} was: the"
                    f" sessions are left out. Run {self._reference_date} again."
                )
            found.append(
                WindowChange(
                    days, compared_with, rows[0]["move"], rows[0]["tier_before"], splits, moving
                )
            )
        return found

    def _note_policy(self, compared_with: date, splits: Sequence[Mapping[str, Any]]) -> None:
        for metric in dict.fromkeys(row["metric"] for row in splits):
            if not any(
                row[f"{role}_{part}"]
                for row in splits
                if row["metric"] == metric
                for role in ("numerator", "denominator")
                for part in ("came_in", "aged_out", "corrected")
            ):
                self._notes.append(
                    f"No row moved {metric} since {compared_with}: the policy was another one then."
                )

    def _is_as_it_was(self, window: str, days: int, splits: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the earlier date holds what the reference date was compared with."""
        sums = self._rows(metrics_asset_name(_length(window)), days)
        if sums is None:
            return False
        held = sums.with_columns(no_shows="no_show_count").to_dicts()
        of_tutor = held[0] if held else {}
        return all(
            row[f"{role}_before"] == of_tutor.get(row[role], 0)
            for row in splits
            for role in ("numerator", "denominator")
        )

    def _moving(
        self, window: str, days: int, splits: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        metrics = dict.fromkeys(row["metric"] for row in splits)
        sessions = self._moving_of("sessions_snapshot", "scheduled_date", days, window)
        if sessions is None:
            return
        sessions = self._with_ids(sessions)
        for metric in metrics:
            shown = _SHOWN[metric]
            for row in _of_metric(sessions, metric, shown).iter_rows(named=True):
                yield {
                    "metric": metric,
                    "part": row["part"],
                    "date": row["scheduled_date"],
                    "session_id": row["session_id"],
                    **{name: row[name] for name in shown},
                }
        if "engagement_score" in metrics:
            yield from self._logins(days, window)

    def _logins(self, days: int, window: str) -> Iterator[dict[str, Any]]:
        events = self._moving_of("tutor_events_snapshot", "event_date", days, window)
        if events is None:
            return
        counted = events.filter(event_type="login").group_by("part", "event_date").len()
        for row in counted.sort("event_date", "part").iter_rows(named=True):
            yield {
                "metric": "engagement_score",
                "part": row["part"],
                "date": row["event_date"],
                "logins": row["len"],
            }

    def _moving_of(self, asset: str, column: str, days: int, window: str) -> pl.DataFrame | None:
        after, before = self._rows(asset, 0), self._rows(asset, days)
        if after is None or before is None:
            return None
        return moving_rows(
            after.lazy(),
            before.lazy(),
            column=column,
            reference_date=self._reference_date,
            days=days,
            window=_length(window),
        ).collect()

    def _rows(self, asset: str, days_ago: int) -> pl.DataFrame | None:
        key = str(self._reference_date - timedelta(days=days_ago))
        try:
            return self._store.partition(asset, key).rows().scan().collect()
        except FileNotFoundError:
            return None

    def _with_ids(self, sessions: pl.DataFrame) -> pl.DataFrame:
        """The sessions with the ids that the platform has them under.

        A session as it was before it was corrected has none, and neither has one of which the
        platform has another number that are alike: which of them it is would be a guess.
        """
        names = SessionsSnapshot.column_names()
        if self._ids is None:
            self._ids = self._platform_sessions()
        number, alike = pl.int_range(pl.len()), pl.len()
        key = [*names, "number", "alike"]
        wanted = sessions.with_columns(
            number=number.over(*names, "part"), alike=alike.over(*names, "part")
        )
        known = self._ids.with_columns(number=number.over(names), alike=alike.over(names))
        found = wanted.join(known, on=key, how="left", nulls_equal=True, maintain_order="left")
        return found.with_columns(
            session_id=pl.when(pl.col("part") != "corrected_from").then("session_id")
        )

    def _platform_sessions(self) -> pl.DataFrame:
        """The tutor's sessions as the platform has them now: ``SessionsSnapshot`` with ids."""
        settings, policy = self._settings, self._policy
        first = self._reference_date - timedelta(days=policy.horizon_days + max(COMPARED_DAYS))
        try:
            with (
                open_view(source_of(settings), tutor_ids=[self._tutor_id]) as view,
                spool_folder(settings.home_path) as folder,
            ):
                rows = view.rows(
                    folder / "source",
                    tables=["sessions"],
                    start=midnight(first, timezone=settings.timezone),
                    end=midnight(self._reference_date, timezone=settings.timezone),
                )
                good, _ = quality.good_sessions(
                    pl.concat(rows.sessions),
                    policy=policy,
                    timezone=settings.timezone,
                    with_ids=True,
                )
                return good.sort("session_id").collect()
        except TutormaxError as error:
            self._problems.append(f"The ids of sessions are left out: {error}")
            schema = {"session_id": pl.String(), **pl.Schema(SessionsSnapshot)}
            return pl.DataFrame(schema=schema)


def _of_metric(sessions: pl.DataFrame, metric: str, shown: Sequence[str]) -> pl.DataFrame:
    """The sessions that a metric is computed from, without corrections of something else."""
    rows = sessions.filter(pl.any_horizontal(pl.col(shown).is_not_null()))
    if metric == "first_session_success_rate":
        rows = rows.filter(pl.col("session_number") == 1, pl.col("overall_rating").is_not_null())
    alike = ["scheduled_date", *shown]
    numbered = rows.with_columns(nth=pl.int_range(pl.len()).over(*alike, "part"))
    sides = [numbered.filter(part=part) for part in ("corrected_from", "corrected_to")]
    key = [*alike, "nth"]
    corrected = [
        one.join(other, on=key, how="anti", nulls_equal=True)
        for one, other in (sides, reversed(sides))
    ]
    moved = numbered.filter(~pl.col("part").str.starts_with("corrected"))
    return pl.concat([moved, *corrected]).sort("scheduled_date", "part", maintain_order=True)


def _length(window: str) -> int:
    return int(window.removesuffix("day"))
