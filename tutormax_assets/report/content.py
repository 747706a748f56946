"""What the daily report says of a reference date, from what its run has stored and recorded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Generic, TypeVar

import dagster as dg
import polars as pl
import sqlalchemy as sa
from upath import UPath

from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS, TUTOR_TIERS
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.metrics_reading import TierSince, read_tiers_since
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.errors import TutormaxError
from tutormax_assets.metrics.control_chart import Limits, xmr_limits
from tutormax_assets.metrics.overview import (
    CHARTED,
    charted_values,
    metric_distributions,
    tier_shares,
)
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import MOVES, TIERS, TutorTiers
from tutormax_assets.report.record import CheckResult, DateRecord, recorded_numbers
from tutormax_assets.storage.files import StorageError
from tutormax_assets.storage.store import PartitionStore

T = TypeVar("T")

DAILY_REPORT = "daily_report"

MOST_ROWS = 30
"""Tutors that a list of the page names at most."""

DATES_SHOWN = 30
"""Dates of which the page shows the tiers."""

WEEKS_CHARTED = 13
"""Values of a control chart, the newest one included."""

_AT_RISK = "At Risk"
_SET_ASIDE = ("sessions_set_aside", "tutor_events_set_aside")
_SUMMARY_METADATA = "summary"


@dataclass(frozen=True)
class Mover:
    """A tutor whose tier of a window is another one than the day before.

    Attributes:
        tutor_id: The tutor.
        window: The window.
        move: ``up``, ``down``, ``new`` or ``gone``.
        tier: The tier now; None of one who is gone.
        tier_before: The tier then; None of one who is new.
        flags: The metrics whose flags changed: metric, flag then and flag now.
    """

    tutor_id: str
    window: str
    move: str
    tier: str | None
    tier_before: str | None
    flags: Sequence[tuple[str, str | None, str | None]]


@dataclass(frozen=True)
class TutorAtRisk:
    """A tutor who is At Risk in a window.

    Attributes:
        tutor_id: The tutor.
        since: Since when; None if the table does not say.
        sessions: Sessions of the window.
        evidence: ``sufficient`` or ``thin``.
        red: The metrics with a red flag, and whether it is within noise.
    """

    tutor_id: str
    since: TierSince | None
    sessions: int
    evidence: str
    red: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Listing(Generic[T]):
    """The first of many.

    Attributes:
        rows: Those that are shown.
        total: How many there are.
    """

    rows: Sequence[T]
    total: int

    @property
    def left_out(self) -> int:
        """How many are not shown."""
        return self.total - len(self.rows)


@dataclass(frozen=True)
class Distribution:
    """How the values of a metric are distributed.

    Attributes:
        window: The window.
        metric: The metric.
        tutors: Tutors with a value.
        quantiles: The 10 %, 25 %, 50 %, 75 % and 90 % quantiles; None without a value.
    """

    window: str
    metric: str
    tutors: int
    quantiles: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A control chart.

    Attributes:
        name: One of ``CHARTED``.
        title: What is charted.
        dates: The reference dates, the newest one last.
        values: Their values.
        is_current: Whether the newest value is that of the report's date.
        limits: Those of the dates before it; None where these are too few, or it has no value.
    """

    name: str
    title: str
    dates: Sequence[date]
    values: Sequence[float]
    is_current: bool
    limits: Limits | None

    @property
    def is_signal(self) -> bool:
        """Whether the newest value is unusual."""
        return self.limits is not None and self.limits.is_signal(self.values[-1])


@dataclass(frozen=True)
class DailyReport:
    """What the page says.

    Attributes:
        reference_date: The date.
        calculation_date: The instant that it stands for.
        read_at: When the platform was read; None if not known.
        windows: Names of the windows, the shortest first.
        tutors: Number of tutors that were computed.
        moves: Number of tutors by window and move, since the day before; None if it is not there.
        movers: Those who moved.
        at_risk: Those At Risk by window.
        thin: Number of tutors with thin evidence by window.
        tiers: Number of tutors by window, date and tier.
        distributions: Of all metrics.
        chart_window: The window that is charted.
        charts: The control charts.
        checks: What the checks found, those that did not pass first.
        set_aside: Number of values by source table, column and reason.
        newest: The newest row of sessions and of events.
        errors: What could not be saved: tutor and reason.
        names: Names by id, where they are shown.
        problems: What is missing from the page, and why.
    """

    reference_date: date
    calculation_date: datetime
    read_at: datetime | None
    windows: Sequence[str]
    tutors: int
    moves: Mapping[str, Mapping[str, int]] | None
    movers: Listing[Mover]
    at_risk: Mapping[str, Listing[TutorAtRisk]]
    thin: Mapping[str, int]
    tiers: Mapping[str, Mapping[date, Mapping[str, int]]]
    distributions: Sequence[Distribution]
    chart_window: str
    charts: Sequence[Chart]
    checks: Sequence[CheckResult]
    set_aside: Sequence[tuple[str, str, str, int]]
    newest: Mapping[str, date | None]
    errors: Listing[tuple[str, str]]
    names: Mapping[str, str]
    problems: Sequence[str]


@dataclass
class _OfDates:
    """Rows that are computed once of each date, however many reports of a run show it.

    Attributes:
        function: Computes them from ``TutorTiers`` with ``reference_date``.
    """

    function: Callable[[pl.LazyFrame], pl.LazyFrame]
    known: dict[date, pl.DataFrame] = field(default_factory=dict)

    def rows(
        self, dates: Sequence[date], tiers: Callable[[Iterable[date]], pl.LazyFrame]
    ) -> pl.DataFrame:
        """The rows of some dates; ``tiers`` gives what they are computed from."""
        new = [day for day in dates if day not in self.known]
        found = self.function(tiers(new)).collect()
        of_day = found.partition_by("reference_date", as_dict=True)
        # A date that has no rows may not have been reached, and is tried again.
        self.known |= {day: of_day[day,] for day in new if (day,) in of_day}
        return pl.concat([found.clear(), *(self.known[day] for day in dates if day in self.known)])


@dataclass(frozen=True)
class ReportSource:
    """Where a report comes from.

    Attributes:
        store: The partitions.
        engine: The database that holds the metrics table.
        timeouts: How long a statement may take, and wait for another session's lock.
        policy: Its windows.
        instance: Where earlier reports are on record; None without one.
    """

    store: PartitionStore
    engine: sa.Engine
    timeouts: Timeouts
    policy: Policy
    instance: dg.DagsterInstance | None
    _shares: _OfDates = field(default_factory=lambda: _OfDates(tier_shares), init=False)
    _charted: _OfDates = field(default_factory=lambda: _OfDates(charted_values), init=False)

    def collect(
        self,
        reference_date: date,
        record: DateRecord,
        *,
        calculation_date: datetime,
    ) -> DailyReport:
        """Collect the report of a reference date.

        Args:
            reference_date: The date.
            record: What its run has put on record.
            calculation_date: The instant that the date stands for in the table.

        Raises:
            FileNotFoundError: The date has not been computed.
        """
        key = str(reference_date)
        problems: list[str] = []
        tiers = self.store.whole_partition(TUTOR_TIERS, key).rows().scan().collect()
        windows = [window_name(days) for days in self.policy.windows]
        reasons = self._rows(TUTOR_TIER_REASONS, key)
        changes = self._changes(key)
        ago = range(DATES_SHOWN - 1, -1, -1)
        shown = [reference_date - timedelta(days=number) for number in ago]
        shares = self._shares.rows(shown, self._tiers_of)
        metadata = record.metadata.get(METRICS_TABLE, {})
        summary = metadata.get(_SUMMARY_METADATA)
        return DailyReport(
            reference_date,
            calculation_date,
            _read_at(record),
            windows,
            tiers["tutor_id"].n_unique(),
            None if changes is None else _count_moves(changes, windows),
            _movers(changes),
            self._at_risk(reasons, windows, calculation_date, problems),
            {} if reasons is None else _thin(reasons, windows),
            _tier_counts(shares, windows),
            _distributions(tiers, windows),
            windows[0],
            _charts(self._charted_values(reference_date), reference_date),
            sorted(record.checks, key=lambda one: (one.passed, one.severity != "ERROR")),
            self._set_aside(key),
            self._newest(key),
            _errors(summary),
            {},
            problems,
        )

    def _rows(self, asset: str, key: str) -> pl.DataFrame | None:
        try:
            return self.store.whole_partition(asset, key).rows().scan().collect()
        except FileNotFoundError:
            return None

    def _changes(self, key: str) -> pl.DataFrame | None:
        """What changed since the day before; None where that is not stored."""
        rows = self._rows(TUTOR_TIER_CHANGES, key)
        before = str(date.fromisoformat(key) - timedelta(days=1))
        if rows is None or not self.store.is_stored(TUTOR_TIER_REASONS, before):
            return None
        return rows.filter(days=1)

    def _tiers_of(self, days: Iterable[date]) -> pl.LazyFrame:
        """``TutorTiers`` of those dates that are stored, with their ``reference_date``."""
        frames = []
        for day in days:
            with suppress(OSError, StorageError):
                partition = self.store.whole_partition(TUTOR_TIERS, str(day))
                frames.append(partition.rows().scan().with_columns(reference_date=pl.lit(day)))
        none = TutorTiers.create_empty(lazy=True).with_columns(reference_date=pl.lit(date.min))
        return pl.concat(frames) if frames else none

    def _charted_values(self, reference_date: date) -> pl.DataFrame:
        """Values of the shortest window, whose dates are so far apart that it does not overlap.

        The record keeps those of dates whose Parquet is gone.
        """
        step = self.policy.windows[0]
        ago = range(WEEKS_CHARTED - 1, -1, -1)
        dates = [reference_date - timedelta(days=step * n) for n in ago]
        window = window_name(step)
        stored = self._charted.rows(dates, lambda days: self._tiers_of(days).filter(window=window))
        if reference_date not in stored["reference_date"]:
            # A date without tutors has no row of any.
            nobody = {"reference_date": reference_date, "tutors": 0.0, "sessions_completed": 0.0}
            stored = pl.concat([stored, pl.DataFrame([nobody], schema=stored.schema)])
        missing = [str(day) for day in dates if day not in stored["reference_date"]]
        if self.instance is None or not missing:
            return stored
        names = {chart_metadata(name, step): name for name in CHARTED}
        found = recorded_numbers(self.instance, DAILY_REPORT, missing, names)
        recorded = pl.DataFrame(
            [
                {"reference_date": date.fromisoformat(key)}
                | {names[name]: value for name, value in values.items()}
                for key, values in found.items()
            ],
            schema=stored.schema,
        )
        return pl.concat([recorded, stored]).sort("reference_date")

    def _at_risk(
        self,
        reasons: pl.DataFrame | None,
        windows: Sequence[str],
        calculation_date: datetime,
        problems: list[str],
    ) -> dict[str, Listing[TutorAtRisk]]:
        if reasons is None:
            problems.append("The reasons for tiers are missing: an earlier version computed them.")
            return {}
        order = pl.col("evidence") == "thin", -pl.col("red_flags").cast(pl.Int8), "tutor_id"
        found = {
            window: reasons.filter(window=window, performance_tier=_AT_RISK).sort(*order)
            for window in windows
        }
        shown = {window: rows.head(MOST_ROWS) for window, rows in found.items()}
        tutor_ids = pl.concat(rows["tutor_id"] for rows in shown.values()).unique().to_list()
        since: dict[tuple[str, str], TierSince] = {}
        try:
            since = read_tiers_since(
                self.engine, tutor_ids, calculation_date=calculation_date, timeouts=self.timeouts
            )
        except (TutormaxError, sa.exc.SQLAlchemyError) as error:
            problems.append(f"Since when tutors are At Risk is left out: {error}")
        return {
            window: Listing(
                [_tutor_at_risk(row, since) for row in rows.iter_rows(named=True)],
                len(found[window]),
            )
            for window, rows in shown.items()
        }

    def _set_aside(self, key: str) -> list[tuple[str, str, str, int]]:
        frames = [rows for asset in _SET_ASIDE if (rows := self._rows(asset, key)) is not None]
        if not frames:
            return []
        counted = pl.concat(frames).group_by("source_table", "column", "reason").len()
        return counted.sort("len", descending=True).rows()

    def _newest(self, key: str) -> dict[str, date | None]:
        found = {}
        for name, asset, column in (
            ("session", "sessions_snapshot", "scheduled_date"),
            ("event", "tutor_events_snapshot", "event_date"),
        ):
            with suppress(FileNotFoundError):
                rows = self.store.whole_partition(asset, key).rows().scan()
                found[name] = rows.select(pl.col(column).max()).collect().item()
        return found


def chart_metadata(name: str, days: int) -> str:
    """The metadata of a report that holds a charted value of a window of so many days."""
    return f"{name}_{window_name(days)}"


def report_path(base_path: str, reference_date: date) -> UPath:
    """Where the page of a reference date is stored."""
    return UPath(base_path) / DAILY_REPORT / f"{reference_date}.html"


def _read_at(record: DateRecord) -> datetime | None:
    said: Any = record.metadata.get("sessions_snapshot", {}).get("read_at")
    if not isinstance(said, dg.TimestampMetadataValue):
        return None
    return datetime.fromtimestamp(said.value, tz=UTC)


def _count_moves(changes: pl.DataFrame, windows: Sequence[str]) -> dict[str, dict[str, int]]:
    counted = changes.unique(["tutor_id", "window"]).group_by("window", "move").len()
    found = {(window, move): number for window, move, number in counted.iter_rows()}
    return {
        window: {move: found.get((window, move), 0) for move in MOVES if move != "same"}
        for window in windows
    }


def _movers(changes: pl.DataFrame | None) -> Listing[Mover]:
    if changes is None:
        return Listing([], 0)
    key = ["tutor_id", "window"]
    flags = pl.concat_list(pl.col("metric", "flag_before", "flag").cast(pl.String))
    moved = (
        changes.lazy()
        .filter(pl.col("move") != "same")
        .group_by(key)
        .agg(
            pl.col("move", "tier", "tier_before").first(),
            flags=flags.filter(pl.col("metric").is_not_null()).unique(maintain_order=True),
        )
        # Who fell farthest comes first, then who is new, gone and up.
        .with_columns(
            order=pl.col("move")
            .cast(pl.String)
            .replace_strict({"down": 0, "new": 1, "gone": 2, "up": 3}, return_dtype=pl.Int8),
            fall=_rank("tier") - _rank("tier_before"),
            rank=_rank("tier"),
        )
        .sort(
            "order",
            "fall",
            "rank",
            *key,
            descending=[False, True, True, False, False],
            nulls_last=True,
        )
        .collect()
    )
    shown = moved.head(MOST_ROWS).drop("order", "fall", "rank")
    return Listing([Mover(**row) for row in shown.iter_rows(named=True)], len(moved))


def _rank(tier: str) -> pl.Expr:
    # The best tier comes first.
    return pl.col(tier).cast(pl.Enum(TIERS)).to_physical().cast(pl.Int8)


def _tutor_at_risk(
    row: Mapping[str, Any], since: Mapping[tuple[str, str], TierSince]
) -> TutorAtRisk:
    flagged = {
        name.removesuffix("_flag"): flag for name, flag in row.items() if name.endswith("_flag")
    }
    red = [
        (metric, row.get(f"{metric}_certainty") == "within_noise")
        for metric, flag in flagged.items()
        if flag == "red"
    ]
    found = since.get((row["tutor_id"], row["window"]))
    if found is not None and found.tier != _AT_RISK:
        # The date was computed and not saved.
        found = None
    return TutorAtRisk(row["tutor_id"], found, row["sessions"], row["evidence"], red)


def _thin(reasons: pl.DataFrame, windows: Sequence[str]) -> dict[str, int]:
    found = dict(reasons.filter(evidence="thin").group_by("window").len().iter_rows())
    return {window: found.get(window, 0) for window in windows}


def _tier_counts(
    shares: pl.DataFrame, windows: Sequence[str]
) -> dict[str, dict[date, dict[str, int]]]:
    counts: dict[str, dict[date, dict[str, int]]] = {window: {} for window in windows}
    for day, window, tier, tutors in shares.iter_rows():
        if window in counts:
            counts[window].setdefault(day, dict.fromkeys(TIERS, 0))[tier] = tutors
    return counts


def _distributions(tiers: pl.DataFrame, windows: Sequence[str]) -> list[Distribution]:
    rows = {
        (row[0], row[1]): Distribution(row[0], row[1], row[2], row[3:])
        for row in metric_distributions(tiers.lazy()).collect().iter_rows()
    }
    metrics = dict.fromkeys(metric for _, metric in rows)
    return [
        rows[window, metric] for window in windows for metric in metrics if (window, metric) in rows
    ]


def _charts(charted: pl.DataFrame, reference_date: date) -> list[Chart]:
    found = []
    for name, title in CHARTED.items():
        rows = charted.select("reference_date", name).drop_nulls()
        dates, values = rows["reference_date"].to_list(), rows[name].to_list()
        if values:
            is_current = dates[-1] == reference_date
            limits = xmr_limits(values[:-1]) if is_current else None
            found.append(Chart(name, title, dates, values, is_current, limits))
    return found


def _errors(summary: dg.MetadataValue[Any] | None) -> Listing[tuple[str, str]]:
    if not isinstance(summary, dg.JsonMetadataValue):
        return Listing([], 0)
    said: Any = summary.value
    errors = [(one["tutor_id"], one["error"]) for one in said.get("errors", ())]
    return Listing(errors[:MOST_ROWS], len(errors))
