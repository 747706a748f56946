"""Explains the tiers of a tutor on a reference date."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, tzinfo
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import dagster as dg
import polars as pl
import sqlalchemy as sa

from tutormax_assets.api.movement import Movement, WindowChange
from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS
from tutormax_assets.compute.tasks.windows import metrics_asset_name, window_metrics
from tutormax_assets.database.connection import Timeouts, engine_of
from tutormax_assets.database.faults import reason
from tutormax_assets.database.metrics_reading import TierSince, read_tiers_since
from tutormax_assets.dates import midnight
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.errors import TutormaxError, UsageError
from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, Policy
from tutormax_assets.metrics.reasons import (
    DENOMINATORS,
    Distance,
    FlagChange,
    condition,
    distance_to_better,
    distance_to_worse,
    tier_reasons,
)
from tutormax_assets.metrics.window import engagement_parts
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.settings import Settings
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
class TierRun:
    """The unbroken run of a tier that ends at the reference date.

    Attributes:
        tier_since: Its first reference date.
        held_days: Days from the first to the last date of it, both included.
        dates_missing: Of these, those that were not computed for the tutor.
        previous_tier: The tier before it; None if there is none.
    """

    tier_since: date
    held_days: int
    dates_missing: int
    previous_tier: str | None


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
        compared_with: The earlier dates that it was compared with.
        windows: By window, the shortest first.
        notes: What is to be known about the explanation itself.
        problems: What could not be looked up, for whoever runs the product.
    """

    tutor_id: str
    reference_date: date
    read_at: datetime | None
    compared_with: Sequence[str]
    windows: Sequence[WindowExplanation]
    notes: Sequence[str]
    problems: Sequence[str]

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
    if not tutor_id or re.search("[\0\ud800-\udfff]", tutor_id):
        raise ExplanationError(f"found the id {tutor_id!a}, expected text that is not empty")
    policy = load_policy(settings)
    store = PartitionStore(settings.storage_path, tutor_ids=[tutor_id])
    key = reference_date.isoformat()
    reasons = _reasons(store, key, tutor_id, window)
    notes: list[str] = []
    problems: list[str] = []
    sums = _sums(store, key, reasons).filter(pl.col("sessions") > 0)
    is_judged_by = _is_of(policy, store, reference_date, reasons)
    if not is_judged_by:
        notes.append(
            "The policy is another one than when the date was computed: bounds, weights and the"
            " distance to other tiers are those of today's policy. Run the date again to judge it"
            " by that."
        )
    runs = _read_runs(settings, tutor_id, reference_date, problems)
    notes += _notes_of_unsaved(reasons, runs)
    record = _record(settings, key, tutor_id, problems)
    movement = Movement(settings, store, policy, tutor_id, reference_date, notes, problems)
    windows = [
        _window(
            row,
            sums if is_judged_by else sums.clear(),
            _run_of(runs, row, ZoneInfo(settings.timezone)),
            movement,
            policy,
        )
        for row in reasons.sort(_length).iter_rows(named=True)
    ]
    notes += [
        f"Thin evidence: {one.sessions} sessions in the {one.window} window, and"
        f" {policy.evidence_min_sessions} are expected at least. The tier says little."
        for one in windows
        if one.evidence == "thin"
    ]
    return Explanation(
        tutor_id,
        reference_date,
        record.read_at,
        record.compared_with,
        windows,
        list(dict.fromkeys(notes)),
        problems,
    )


def _window(
    row: Mapping[str, Any],
    sums: pl.DataFrame,
    run: TierRun | None,
    movement: Movement,
    policy: Policy,
) -> WindowExplanation:
    return WindowExplanation(
        window=row["window"],
        tier=row["performance_tier"],
        run=run,
        sessions=row["sessions"],
        evidence=row["evidence"],
        metrics=[_metric(row, name, policy) for name in DENOMINATORS],
        engagement=_engagement(sums, row["window"], policy),
        better=distance_to_better(row, policy=policy),
        worse=distance_to_worse(row, policy=policy),
        changes=movement.of(row["window"]),
    )


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
    of_window = rows if window is None else rows.filter(window=window)
    if of_window.is_empty():
        known = ", ".join(rows.sort(_length)["window"])
        raise ExplanationError(f"{key} has no window {window!r}; expected one of {known}.")
    return of_window


def _sums(store: PartitionStore, key: str, reasons: pl.DataFrame) -> pl.DataFrame:
    """``WindowSums`` of the tutor, of the windows that are explained."""
    lengths = reasons.sort(_length).select(_length).to_series()
    assets = [metrics_asset_name(days) for days in lengths]
    return pl.concat(store.partition(asset, key).rows().scan() for asset in assets).collect()


def _is_of(
    policy: Policy, store: PartitionStore, reference_date: date, reasons: pl.DataFrame
) -> bool:
    """Whether the reasons of a date are those that a policy gives."""
    key = str(reference_date)
    roster, sessions, events = (
        store.partition(asset, key).rows().scan() for asset in ("tutor_roster", _SESSIONS, _EVENTS)
    )
    lengths = reasons.sort(_length).select(_length).to_series().to_list()
    if not set(lengths) <= set(policy.windows):
        return False
    again = tier_reasons(
        window_metrics(
            roster, sessions, events, reference_date=reference_date, windows=lengths, policy=policy
        ).lazy(),
        policy=policy,
    ).collect()
    return again.sort("window").equals(reasons.select(again.columns).sort("window"))


def _read_runs(
    settings: Settings, tutor_id: str, reference_date: date, problems: list[str]
) -> dict[str, TierSince]:
    """Since when the tutor has the tier of each window, in the table."""
    instant = midnight(reference_date, timezone=settings.timezone)
    try:
        with engine_of(settings) as engine:
            found = read_tiers_since(
                engine, [tutor_id], calculation_date=instant, timeouts=Timeouts.of(settings)
            )
    except (TutormaxError, sa.exc.SQLAlchemyError) as error:
        problems.append(f"Since when is left out: {error}")
        return {}
    return {window: run for (_, window), run in found.items()}


def _notes_of_unsaved(reasons: pl.DataFrame, runs: Mapping[str, TierSince]) -> Iterator[str]:
    for window, tier in reasons.select("window", "performance_tier").iter_rows():
        if window in runs and runs[window].tier != tier:
            yield (
                f"The table has {runs[window].tier} for the {window} window: the date was computed"
                " and not saved. Run it again."
            )


def _run_of(
    runs: Mapping[str, TierSince], row: Mapping[str, Any], timezone: tzinfo
) -> TierRun | None:
    """The run of a tier, if the table has the tier that the reasons are of."""
    found = runs.get(row["window"])
    if found is None or found.tier != row["performance_tier"]:
        return None
    since = found.tier_since.astimezone(timezone).date()
    return TierRun(since, found.held_days, found.dates_missing, found.previous_tier)


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
    """The parts of the score; none without a session, or where another policy computed it."""
    found = sums.filter(window=window).lazy().select(**engagement_parts(policy)).collect()
    return {
        name: value and round(value, 2)
        for row in found.iter_rows(named=True)
        for name, value in row.items()
    }


class _Record(NamedTuple):
    """What is on record of the run that computed a tutor.

    Attributes:
        read_at: When the platform was read; None if not known.
        compared_with: The earlier dates that the date was compared with.
    """

    read_at: datetime | None = None
    compared_with: Sequence[str] = ()


def _record(settings: Settings, key: str, tutor_id: str, problems: list[str]) -> _Record:
    if not (settings.dagster_home_path / "dagster.yaml").exists():
        return _Record()
    try:
        with dagster_instance(settings) as instance:
            read_at = _newest_metadata(instance, _SESSIONS, key, tutor_id).get("read_at")
            compared = _newest_metadata(instance, TUTOR_TIER_CHANGES, key, tutor_id)
    # Whatever Dagster's storage raises.
    except Exception as error:
        problems.append(f"When the platform was read is left out: {reason(error)}")
        return _Record()
    dates = compared.get("compared_with")
    return _Record(
        datetime.fromtimestamp(read_at.value).astimezone()
        if isinstance(read_at, dg.TimestampMetadataValue)
        else None,
        re.findall(r"\d{4}-\d\d-\d\d", str(dates.value)) if dates is not None else (),
    )


def _newest_metadata(
    instance: dg.DagsterInstance, asset: str, key: str, tutor_id: str
) -> Mapping[str, dg.MetadataValue[Any]]:
    """The metadata of the newest materialization by a run that the tutor was part of."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key])
    for record in instance.fetch_materializations(wanted, limit=_RUNS).records:
        run = instance.get_run_by_id(record.run_id)
        only = _tutor_ids(run.run_config) if run is not None else None
        if (not only or tutor_id in only) and record.asset_materialization is not None:
            return record.asset_materialization.metadata
    return {}


def _tutor_ids(run_config: Mapping[str, Any]) -> list[str] | None:
    """The tutors that a run is filtered to."""
    found: Any = run_config
    for name in ("resources", "run_options", "config", "tutor_ids"):
        found = (found or {}).get(name)
    return found  # type: ignore[no-any-return]


_RUNS = 20
"""How many runs of a date are looked through for the newest one of a tutor."""
