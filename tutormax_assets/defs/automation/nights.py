"""How the last nights went, as Dagster has it on record."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg

from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.defs.automation.alerts import late_dates
from tutormax_assets.defs.automation.messages import findings_of
from tutormax_assets.defs.automation.receivers import receiver_names
from tutormax_assets.defs.automation.schedule import SCHEDULE_SUFFIX, newest_due_date, next_tick
from tutormax_assets.runs.tags import partition_keys
from tutormax_assets.settings import Settings

# A daemon says that it is there every 30 seconds.
_DAEMON_SECONDS = 120

_RUNS = 500


@dataclass(frozen=True)
class Nights:
    """How the last nights went.

    Attributes:
        first: The first date that was examined.
        last: The newest date whose deadline has passed.
        last_good: The newest of these dates that is saved and did not fail.
        missing: Dates that were never saved.
        failed: Dates whose last run failed.
        warnings: What the checks of the last good date's run say that did not pass.
        receivers: Receivers of alerts.
        next_tick: When the schedule is due next.
        is_scheduled: Whether the schedule is on.
        has_daemon: Whether a daemon runs, without which no schedule does.
    """

    first: date
    last: date
    last_good: date | None
    missing: list[date]
    failed: list[date]
    warnings: list[str]
    receivers: list[str]
    next_tick: datetime
    is_scheduled: bool
    has_daemon: bool

    @property
    def is_well(self) -> bool:
        """Whether the last night's date is saved."""
        return self.last not in (*self.missing, *self.failed)

    def to_dict(self) -> dict[str, Any]:
        """The nights as JSON can hold them."""
        return {
            "first_date": str(self.first),
            "last_date": str(self.last),
            "last_good_date": None if self.last_good is None else str(self.last_good),
            "missing_dates": [str(day) for day in self.missing],
            "failed_dates": [str(day) for day in self.failed],
            "warnings": self.warnings,
            "receivers": self.receivers,
            "next_tick": self.next_tick.isoformat(),
            "is_scheduled": self.is_scheduled,
            "has_daemon": self.has_daemon,
        }


def last_nights(
    instance: dg.DagsterInstance, settings: Settings, *, days: int, now: datetime
) -> Nights:
    """Read how the last nights went.

    Args:
        instance: Where runs are on record.
        settings: Where everything is.
        days: Number of dates to examine, at least 1.
        now: The time.
    """
    last = newest_due_date(now, timezone=settings.timezone)
    first = max(min(settings.first_date, last), last - timedelta(days=days - 1))
    missing = late_dates(instance, after=first - timedelta(days=1), up_to=last)
    runs = dict(_newest_runs(instance, first))
    failed = [
        day
        for day, run in sorted(runs.items())
        if first <= day <= last and run.status is dg.DagsterRunStatus.FAILURE
    ]
    examined = (last - timedelta(days=n) for n in range((last - first).days + 1))
    last_good = next((day for day in examined if day not in (*missing, *failed)), None)
    return Nights(
        first=first,
        last=last,
        last_good=last_good,
        missing=missing,
        failed=failed,
        warnings=[] if last_good is None else _warnings(instance, last_good),
        receivers=receiver_names(settings),
        next_tick=next_tick(now, timezone=settings.timezone),
        is_scheduled=_is_scheduled(instance, default=settings.automation),
        has_daemon=any(
            now.timestamp() - heartbeat.timestamp < _DAEMON_SECONDS
            for heartbeat in instance.get_daemon_heartbeats().values()
        ),
    )


def _newest_runs(instance: dg.DagsterInstance, first: date) -> Iterator[tuple[date, dg.DagsterRun]]:
    """The newest finished run of each date, from the oldest to the newest run."""
    records = instance.get_run_records(
        dg.RunsFilter(
            statuses=[dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS],
            created_after=datetime(first.year, first.month, first.day, tzinfo=UTC)
            - timedelta(days=1),
        ),
        limit=_RUNS,
    )
    for record in reversed(records):
        for key in partition_keys(record.dagster_run):
            yield date.fromisoformat(key), record.dagster_run


def _warnings(instance: dg.DagsterInstance, day: date) -> list[str]:
    [record] = instance.fetch_materializations(
        dg.AssetRecordsFilter(
            asset_key=dg.AssetKey(METRICS_TABLE), asset_partitions=[day.isoformat()]
        ),
        limit=1,
    ).records
    run = instance.get_run_by_id(record.run_id)
    return [] if run is None else findings_of(instance, run).checks


def _is_scheduled(instance: dg.DagsterInstance, *, default: bool) -> bool:
    for state in instance.all_instigator_state():
        if state.instigator_name.endswith(SCHEDULE_SUFFIX):
            return state.status.value != "STOPPED"
    return default
