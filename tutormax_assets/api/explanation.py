"""Why a tutor is in a tier: the reasons of a reference date, put together for a person."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from typing import Any

import dagster as dg
import polars as pl

from tutormax_assets.compute.tasks.changes import COMPARED_DAYS, TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS
from tutormax_assets.compute.tasks.windows import metrics_asset_name
from tutormax_assets.database.connection import Timeouts, engine_of
from tutormax_assets.database.metrics_reading import read_tiers
from tutormax_assets.dates import midnight
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.errors import TutormaxError, UsageError
from tutormax_assets.metrics import quality
from tutormax_assets.metrics.changes import TierRun, moving_rows, tier_run
from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, Policy, window_name
from tutormax_assets.metrics.reasons import (
    DENOMINATORS,
    Distance,
    FlagChange,
    condition,
    distance_to_better,
    distance_to_worse,
    tier_reasons,
)
from tutormax_assets.metrics.schemas import SessionsSnapshot
from tutormax_assets.metrics.window import engagement_parts
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.settings import Settings
from tutormax_assets.source.streams import SourceError
from tutormax_assets.source.view import open_view, source_of
from tutormax_assets.storage.spool import spool_folder
from tutormax_assets.storage.store import PartitionStore

_SESSIONS, _EVENTS = "sessions_snapshot", "tutor_events_snapshot"


class ExplanationError(UsageError):
    """What is to be explained is not there; the message says what is."""


@dataclass(frozen=True)
class MetricReason:
    """A metric that carries a flag.

    Attributes:
        metric: Its name.
        value: Its value; None where there is nothing to compute it from.
        denominator: Number of rows that it rests on.
        rests_on: What these rows are: a column of ``WindowSums``.
        green: When it is green, in words.
        red: When it is red, in words.
        green_bound: The bound at which it is green.
        red_bound: The bound beyond which it is red.
        higher_is_better: Whether green is at its bound or above it.
        flag: ``green``, ``red`` or None.
        low: Lower end of its 95 % interval, where it has one.
        high: Upper end of it.
        certainty: ``certain``, ``within_noise``, or None where it has no flag or no interval.
    """

    metric: str
    value: float | None
    denominator: int
    rests_on: str
    green: str
    red: str
    green_bound: float
    red_bound: float
    higher_is_better: bool
    flag: str | None
    low: float | None
    high: float | None
    certainty: str | None


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


@dataclass(frozen=True)
class WindowExplanation:
    """Why a tutor is in the tier of a window.

    Attributes:
        window: Its name.
        tier: The tier.
        run: Since when; None where the table does not have the date.
        sessions: Number of sessions.
        evidence: ``sufficient`` or ``thin``.
        metrics: The metrics that carry flags.
        engagement: The shares that ``engagement_score`` is made of, each 0 to 100, by name.
        better: What separates the tutor from a better tier.
        worse: What separates the tutor from the next worse tier.
        changes: What moved since the day before and seven days before, where these are known.
    """

    window: str
    tier: str
    run: TierRun | None
    sessions: int
    evidence: str
    metrics: Sequence[MetricReason]
    engagement: Mapping[str, float | None]
    better: Distance | None
    worse: Distance | None
    changes: Sequence[WindowChange]


@dataclass(frozen=True)
class Explanation:
    """Why a tutor is in the tiers of a reference date.

    Attributes:
        tutor_id: The tutor.
        reference_date: The date.
        read_at: When the platform was read for it; None if not known.
        windows: By window, the shortest first.
        notes: What is to be known about the explanation itself.
    """

    tutor_id: str
    reference_date: date
    read_at: datetime | None
    windows: Sequence[WindowExplanation]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON can hold it."""
        windows = [
            {
                **{name: value for name, value in asdict(one).items() if name != "run"},
                **(asdict(one.run) if one.run else dict.fromkeys(TierRun.__annotations__)),
                "better": distance_in_words(one.better),
                "worse": distance_in_words(one.worse),
            }
            for one in self.windows
        ]
        report: dict[str, Any] = _jsonable({**asdict(self), "windows": windows})
        return report


def distance_in_words(distance: Distance | None) -> str | None:
    """What separates a tutor from a tier, such as ``Strong: 1 more green flag; nearest: …``."""
    if distance is None:
        return None
    changes = [_change_in_words(change) for change in distance.changes]
    return f"{distance.tier}: {', and '.join(changes)}"


def _change_in_words(change: FlagChange) -> str:
    number = abs(change.count)
    more = "more" if change.count > 0 else "fewer"
    what = f"{number} {more} {change.flag} flag{'' if number == 1 else 's'}"
    nearest = "; ".join(
        f"{one.metric} {one.value:g}, {change.flag} at {one.condition}"
        for one in change.candidates[: max(number, _NEAREST)]
    )
    return f"{what} ({nearest})" if nearest else what


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _jsonable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    return value.isoformat() if isinstance(value, date) else value


_NEAREST = 2
"""How many metrics a distance names at least: those nearest to their bounds."""


def explain(
    settings: Settings, tutor_id: str, reference_date: date, *, window: str | None = None
) -> Explanation:
    """Say why a tutor is in the tiers of a reference date, from what its run has stored.

    Args:
        settings: Where everything is.
        tutor_id: The tutor.
        reference_date: The date.
        window: Only this window, such as ``30day``; all when None.

    Raises:
        ExplanationError: The date has not been computed, or not for the tutor, or has no such
            window.
        PolicyError: The policy is refused.
        MetricsTableError: The table cannot be read.
    """
    policy = load_policy(settings)
    store = PartitionStore(settings.storage_path, tutor_ids=[tutor_id])
    key = reference_date.isoformat()
    reasons = _reasons(store, key, tutor_id, window)
    notes: list[str] = []
    sums = _sums(store, key, policy)
    if not _are_of(policy, reasons, sums):
        notes.append(
            "The policy is another one than when the date was computed: the bounds and the distance"
            " to other tiers are those of today's policy. Run the date again to judge it by that."
        )
    runs = _runs(settings, tutor_id, reference_date)
    changes = _Changes(settings, store, policy, tutor_id, reference_date, notes)
    windows = [
        WindowExplanation(
            window=row["window"],
            tier=row["performance_tier"],
            run=runs.get(row["window"]),
            sessions=row["sessions"],
            evidence=row["evidence"],
            metrics=[_metric(row, name, policy) for name in DENOMINATORS],
            engagement=_engagement(sums, row["window"], policy),
            better=distance_to_better(row, policy=policy),
            worse=distance_to_worse(row, policy=policy),
            changes=changes.of(row["window"]),
        )
        for row in reasons.sort(_length, descending=False).iter_rows(named=True)
    ]
    notes += [
        f"Thin evidence: {one.sessions} sessions in the {one.window} window, and"
        f" {policy.evidence_min_sessions} are expected at least. The tier says little."
        for one in windows
        if one.evidence == "thin"
    ]
    return Explanation(tutor_id, reference_date, _read_at(settings, key), windows, notes)


_length = pl.col("window").str.extract(r"^(\d+)").cast(pl.Int64)


def _reasons(store: PartitionStore, key: str, tutor_id: str, window: str | None) -> pl.DataFrame:
    try:
        rows = store.partitions(TUTOR_TIER_REASONS, [key])[key].rows().scan().collect()
    except FileNotFoundError:
        raise ExplanationError(
            f"{key} has no reasons: it has not been computed, or by an earlier version. Run"
            f" `tutormax run --date {key}`."
        ) from None
    if rows.is_empty():
        raise ExplanationError(
            f"{key} has no tutor {tutor_id!r}: the id is unknown, or the tutor was not active when"
            " the date was computed. `tutormax run --include-inactive --tutor` computes one."
        )
    of_window = rows.filter(window=window) if window else rows
    if of_window.is_empty():
        known = ", ".join(rows.sort(_length)["window"])
        raise ExplanationError(f"{key} has no window {window!r}; expected one of {known}.")
    return of_window


def _sums(store: PartitionStore, key: str, policy: Policy) -> pl.DataFrame:
    """``WindowSums`` of the tutor, of the windows that are stored."""
    frames = []
    for days in policy.windows:
        with suppress(FileNotFoundError):
            asset = metrics_asset_name(days)
            frames.append(store.partitions(asset, [key])[key].rows().scan().collect())
    return pl.concat(frames)


def _are_of(policy: Policy, reasons: pl.DataFrame, sums: pl.DataFrame) -> bool:
    """Whether the reasons are those that a policy gives."""
    again = tier_reasons(sums.lazy(), policy=policy).collect()
    again = again.join(reasons, on=["tutor_id", "window"], how="semi")
    order = ["tutor_id", "window"]
    return again.sort(order).equals(reasons.select(again.columns).sort(order))


def _runs(settings: Settings, tutor_id: str, reference_date: date) -> dict[str, TierRun]:
    until = midnight(reference_date, timezone=settings.timezone)
    with engine_of(settings) as engine:
        rows = read_tiers(engine, tutor_id, until=until, timeouts=Timeouts.of(settings))
    tiers: dict[str, dict[date, str]] = {}
    for row in rows:
        if row.performance_tier is not None:
            day = row.calculation_date.astimezone(until.tzinfo).date()
            tiers.setdefault(row.window, {})[day] = row.performance_tier
    found = {
        window: tier_run(of_window, reference_date=reference_date)
        for window, of_window in tiers.items()
    }
    return {window: run for window, run in found.items() if run is not None}


def _metric(row: Mapping[str, Any], name: str, policy: Policy) -> MetricReason:
    bounds = getattr(policy.thresholds, name)
    return MetricReason(
        metric=name,
        value=row[name],
        denominator=row[f"{name}_denominator"],
        rests_on=DENOMINATORS[name],
        green=condition(name, "green", bounds.green),
        red=condition(name, "red", bounds.red),
        green_bound=bounds.green,
        red_bound=bounds.red,
        higher_is_better=name in HIGHER_IS_BETTER,
        flag=row[f"{name}_flag"],
        low=row.get(f"{name}_low"),
        high=row.get(f"{name}_high"),
        certainty=row.get(f"{name}_certainty"),
    )


def _engagement(sums: pl.DataFrame, window: str, policy: Policy) -> dict[str, float | None]:
    found = sums.filter(window=window).lazy().select(**engagement_parts(policy)).collect()
    return {name: value and round(value, 2) for name, value in found.row(0, named=True).items()}


def _read_at(settings: Settings, key: str) -> datetime | None:
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(_SESSIONS), asset_partitions=[key])
    with dagster_instance(settings) as instance:
        records = instance.fetch_materializations(wanted, limit=1).records
    for record in records:
        if record.asset_materialization is not None:
            read_at = record.asset_materialization.metadata.get("read_at")
            if isinstance(read_at, dg.TimestampMetadataValue):
                return datetime.fromtimestamp(read_at.value).astimezone()
    return None


_SHOWN: Mapping[str, tuple[str, ...]] = {
    "avg_rating": ("overall_rating",),
    "first_session_success_rate": ("session_number", "overall_rating"),
    "reschedule_rate": ("tutor_initiated_reschedule",),
    "no_show_count": ("no_show",),
    "engagement_score": ("engagement_score", "late_start_minutes"),
    "learning_objectives_met_pct": ("learning_objectives_met",),
}
"""The columns of a session that a metric is computed from."""


class _Changes:
    """What moved of a tutor, with the sessions and logins that moved it."""

    def __init__(
        self,
        settings: Settings,
        store: PartitionStore,
        policy: Policy,
        tutor_id: str,
        reference_date: date,
        notes: list[str],
    ) -> None:
        self._settings = settings
        self._store = store
        self._policy = policy
        self._tutor_id = tutor_id
        self._reference_date = reference_date
        self._notes = notes
        self._changes = self._rows(TUTOR_TIER_CHANGES, 0)
        self._ids: pl.DataFrame | None = None

    def of(self, window: str) -> list[WindowChange]:
        """What moved in a window since the dates that there is something of."""
        if self._changes is None:
            return []
        found = []
        for days in COMPARED_DAYS:
            rows = self._changes.filter(window=window, days=days).to_dicts()
            if rows:
                splits = [row for row in rows if row["metric"] is not None]
                found.append(
                    WindowChange(
                        days,
                        self._reference_date - timedelta(days=days),
                        rows[0]["move"],
                        rows[0]["tier_before"],
                        splits,
                        list(self._moving(window, days, splits)),
                    )
                )
        return found

    def _moving(
        self, window: str, days: int, splits: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        length = next(one for one in self._policy.windows if window_name(one) == window)
        metrics = dict.fromkeys(row["metric"] for row in splits)
        sessions = self._moving_of(_SESSIONS, "scheduled_date", days, length)
        if sessions is None:
            return
        sessions = self._with_ids(sessions)
        for metric in metrics:
            shown = _SHOWN[metric]
            of_metric = sessions.filter(pl.any_horizontal(pl.col(shown).is_not_null()))
            if metric == "first_session_success_rate":
                of_metric = of_metric.filter(
                    pl.col("session_number") == 1, pl.col("overall_rating").is_not_null()
                )
            for row in of_metric.iter_rows(named=True):
                yield {
                    "metric": metric,
                    "part": row["part"],
                    "date": row["scheduled_date"],
                    "session_id": row["session_id"],
                    **{name: row[name] for name in shown},
                }
        if "engagement_score" in metrics:
            logins = self._moving_of(_EVENTS, "event_date", days, length)
            if logins is not None:
                counted = logins.filter(event_type="login").group_by("part", "event_date").len()
                for row in counted.sort("event_date", "part").iter_rows(named=True):
                    yield {
                        "metric": "engagement_score",
                        "part": row["part"],
                        "date": row["event_date"],
                        "logins": row["len"],
                    }

    def _moving_of(self, asset: str, column: str, days: int, window: int) -> pl.DataFrame | None:
        after, before = self._rows(asset, 0), self._rows(asset, days)
        if after is None or before is None:
            return None
        return moving_rows(
            after.lazy(),
            before.lazy(),
            column=column,
            reference_date=self._reference_date,
            days=days,
            window=window,
        ).collect()

    def _rows(self, asset: str, days_ago: int) -> pl.DataFrame | None:
        key = str(self._reference_date - timedelta(days=days_ago))
        try:
            return self._store.partitions(asset, [key])[key].rows().scan().collect()
        except FileNotFoundError:
            return None

    def _with_ids(self, sessions: pl.DataFrame) -> pl.DataFrame:
        """The sessions with the ids that the platform has them under, if it still has them so."""
        names = SessionsSnapshot.column_names()
        if self._ids is None:
            self._ids = self._platform_sessions()
        number = pl.int_range(pl.len())
        wanted = sessions.with_columns(number=number.over(*names, "part"))
        known = self._ids.with_columns(number=number.over(names))
        return wanted.join(
            known, on=[*names, "number"], how="left", nulls_equal=True, maintain_order="left"
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
        except (SourceError, TutormaxError) as error:
            self._notes.append(f"The ids of sessions are left out: {error}")
            schema = {"session_id": pl.String(), **pl.Schema(SessionsSnapshot)}
            return pl.DataFrame(schema=schema)
