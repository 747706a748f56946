"""The quality of the data of reference dates, from the checks and metadata that are on record."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import dagster as dg

from tutormax_assets.compute.tasks.tiers import TUTOR_TIERS
from tutormax_assets.compute.tasks.windows import metrics_asset_name
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.report.record import CheckResult, DateRecord, read_record

_SNAPSHOTS: Mapping[str, str] = {
    "sessions_snapshot": "sessions",
    "tutor_events_snapshot": "logins and message responses",
}
"""What the newest run of a date has read, by the asset that it is recorded with."""


@dataclass(frozen=True)
class SetAside:
    """Values of one column that break the source contract for one reason.

    Attributes:
        source_table: The table.
        column: Its column.
        reason: Why they were not used.
        values: Their number.
        share: Their number divided by that of the rows read from sessions or events.
    """

    source_table: str
    column: str
    reason: str
    values: int
    share: float


@dataclass(frozen=True)
class Measure:
    """A number that a check compares with the usual.

    Attributes:
        name: What it measures.
        value: The number.
        limit: The limit of the current policy.
        is_anomaly: Whether the check did not pass for it.
        unit: ``of the usual``, ``share`` or ``index``.
    """

    name: str
    value: float
    limit: float
    is_anomaly: bool
    unit: str


@dataclass(frozen=True)
class DateQuality:
    """The quality of the data of one reference date.

    Attributes:
        day: The reference date.
        run_id: The run that has read the platform for it last.
        checks: All checks of that run.
        set_aside: Values that were not used, most of them first.
        measures: Volumes, null shares and tier shifts.
        rows: Rows read from sessions and events.
    """

    day: date
    run_id: str
    checks: Sequence[CheckResult]
    set_aside: Sequence[SetAside]
    measures: Sequence[Measure]
    rows: int

    @property
    def problems(self) -> list[CheckResult]:
        """The checks that did not pass, errors first."""
        found = [check for check in self.checks if not check.passed]
        return sorted(found, key=lambda check: check.severity)

    @property
    def set_aside_share(self) -> float:
        """All values set aside, divided by the rows."""
        return sum(one.values for one in self.set_aside) / max(self.rows, 1)

    def to_dict(self) -> dict[str, Any]:
        """The quality in JSON's types."""
        return {
            "date": str(self.day),
            "run_id": self.run_id,
            "rows": self.rows,
            "set_aside_share": self.set_aside_share,
            "checks": [
                {
                    "asset": check.asset,
                    "name": check.name,
                    "passed": check.passed,
                    "severity": None if check.passed else check.severity,
                    "says": check.says,
                }
                for check in self.checks
            ],
            "set_aside": [vars(one) for one in self.set_aside],
            "measures": [vars(one) for one in self.measures],
        }


@dataclass(frozen=True)
class Problem:
    """A check that did not pass.

    Attributes:
        severity: ``ERROR`` or ``WARN``.
        asset: The asset.
        name: The check.
        days: The reference dates, ascending.
        says: Its sentence on the last of them.
    """

    severity: str
    asset: str
    name: str
    days: Sequence[date]
    says: str


@dataclass(frozen=True)
class QualityReport:
    """The quality of the data of a range of reference dates.

    Attributes:
        first: The first date.
        last: The last date.
        dates: Those that are on record, ascending.
        missing: The others.
    """

    first: date
    last: date
    dates: Sequence[DateQuality] = field(default_factory=list)
    missing: Sequence[date] = field(default_factory=list)

    @property
    def problems(self) -> list["Problem"]:
        """Each check that did not pass, errors first."""
        found: dict[tuple[str, str, str], Problem] = {}
        for one in self.dates:
            for check in one.problems:
                key = check.severity, check.asset, check.name
                days = [*found[key].days, one.day] if key in found else [one.day]
                found[key] = Problem(*key, days, check.says)
        return [found[key] for key in sorted(found)]

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return {
            "from": str(self.first),
            "to": str(self.last),
            "dates": [one.to_dict() for one in self.dates],
            "missing_dates": [str(day) for day in self.missing],
        }


def collect_quality(
    instance: dg.DagsterInstance, days: Sequence[date], policy: Policy
) -> QualityReport:
    """What the newest run of each reference date has recorded about its data.

    Args:
        instance: Where runs are on record.
        days: Consecutive reference dates, ascending, at least one.
        policy: Says the limits that are shown; each check was judged by the policy of its run.
    """
    runs: dict[str, dict[str, DateRecord]] = {}
    dates: list[DateQuality] = []
    for day in days:
        run_id = _newest_run(instance, str(day))
        if run_id is None:
            continue
        if run_id not in runs:
            runs[run_id] = read_record(instance, run_id)
        record = runs[run_id].get(str(day), DateRecord())
        dates.append(
            DateQuality(
                day,
                run_id,
                sorted(record.checks, key=lambda check: (check.asset, check.name)),
                sorted(_set_aside(record), key=lambda one: -one.values),
                list(_measures(record, policy)),
                sum(int(_rows(record, asset)) for asset in _SNAPSHOTS),
            )
        )
    known = {one.day for one in dates}
    return QualityReport(days[0], days[-1], dates, [day for day in days if day not in known])


def _newest_run(instance: dg.DagsterInstance, key: str) -> str | None:
    """The run that has read the platform for a date last, whatever became of it."""
    wanted = dg.AssetRecordsFilter(
        asset_key=dg.AssetKey("sessions_snapshot"), asset_partitions=[key]
    )
    records = instance.fetch_materializations(wanted, limit=1).records
    return records[0].run_id if records else None


def _set_aside(record: DateRecord) -> Iterator[SetAside]:
    for asset in _SNAPSHOTS:
        metadata = record.metadata.get(asset, {})
        table = metadata.get("set_aside_by_reason")
        rows = _rows(record, asset)
        for row in table.records if isinstance(table, dg.TableMetadataValue) else ():
            values = int(row.data["values"])  # type: ignore[arg-type]
            yield SetAside(
                str(row.data["source_table"]),
                str(row.data["column"]),
                str(row.data["reason"]),
                values,
                values / rows if rows else 1.0,
            )


def _measures(record: DateRecord, policy: Policy) -> Iterator[Measure]:
    checks = {(check.asset, check.name): check for check in record.checks}
    limits = policy.checks
    for asset, what in _SNAPSHOTS.items():
        check = checks.get((asset, "day_volume_is_usual"))
        metadata = check.metadata if check else {}
        rows, median = _number(metadata, "rows"), _number(metadata, "median")
        if check and rows is not None and median:
            name = f"Newest day of {what}"
            yield Measure(
                name, rows / median, limits.volume_share, not check.passed, "of the usual"
            )
    for days in policy.windows:
        check = checks.get((metrics_asset_name(days), "null_shares_are_steady"))
        rise = _number(check.metadata, "largest_rise") if check else None
        if check and rise is not None:
            name = f"Null share, {window_name(days)}"
            yield Measure(name, rise, limits.null_share_rise, not check.passed, "share")
    check = checks.get((TUTOR_TIERS, "tiers_are_steady"))
    for days in policy.windows if check else ():
        window = window_name(days)
        shift = _number(check.metadata, f"stability_index_{window}") if check else None
        if check and shift is not None:
            is_anomaly = not check.passed and shift > limits.tier_shift
            yield Measure(f"Tier shift, {window}", shift, limits.tier_shift, is_anomaly, "index")


def _rows(record: DateRecord, asset: str) -> float:
    return _number(record.metadata.get(asset, {}), "dagster/partition_row_count") or 0


def _number(metadata: Mapping[str, dg.MetadataValue[Any]], name: str) -> float | None:
    value = metadata.get(name)
    return None if value is None or value.value is None else float(value.value)
