"""What is too old, and its removal: metrics into the archive, Parquet and runs for good."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg
import sqlalchemy as sa

from tutormax_assets.database import archive, restore
from tutormax_assets.database.archive import ArchivedDate, StoredDate
from tutormax_assets.database.archived_table import ArchiveError
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.restore import RestoredDate
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.dates import midnight, today
from tutormax_assets.runs.partitions import PartitionFolder, delete_partition, partitions_before
from tutormax_assets.runs.run_retention import (
    compact_files,
    old_runless_events,
    old_runs,
    remove_runless_events,
    remove_runs,
)
from tutormax_assets.runs.tags import PARTITION_TAG, RANGE_END_TAG, RANGE_START_TAG
from tutormax_assets.settings import Settings, check_retention_days
from tutormax_assets.storage.files import make_private_folder

MAX_DATES_PER_RUN = 366
"""Dates that one run deals with: each is an observation of up to ten assets in the event log."""

# A run that was started longer ago and still is not over was abandoned.
_LONGEST_RUN = timedelta(days=1)

IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True)
class DueDates:
    """What of the table is too old.

    Attributes:
        stored: The dates whose rows go, oldest first.
        months_restored: The months that stay because they were restored, as ``YYYY-MM``, and the
            day until which each stays.
        rows_referred: Rows that stay because another table refers to them, by that table.
        rows_undated: Rows that stay because a timestamp of theirs cannot be read.
    """

    stored: Sequence[StoredDate]
    months_restored: Mapping[str, date] = field(default_factory=dict)
    rows_referred: Mapping[str, int] = field(default_factory=dict)
    rows_undated: int = 0

    def log(self, log: logging.Logger) -> None:
        """Say what stays, and why."""
        for month, until in self.months_restored.items():
            log.info("The metrics of %s were restored and stay until %s", month, until)
        for table, rows in self.rows_referred.items():
            log.warning("%s metrics stay in the table: %s refers to them", rows, table)
        if self.rows_undated:
            log.warning(
                "%s metrics stay in the table: a timestamp of theirs is infinite or outside of the"
                " years 1 to 9999. Correct or delete them",
                self.rows_undated,
            )


@dataclass(frozen=True)
class Retention:
    """What is kept, from which date on, and where.

    Attributes:
        today: The current day.
        metrics_from: First reference date whose metrics stay in the table.
        partitions_from: First reference date whose Parquet partitions stay.
        runs_from: Instant from which on runs that ended stay on Dagster's record; None for all.
        timezone: IANA timezone in which a reference date begins.
        archive_path: Base path of the archive.
        files_group: Unix group that can read it; none for the owner alone.
        storage_path: Base path of the Parquet partitions.
        parquet_assets: The assets whose partitions are Parquet.
        timeouts: How long a statement may take, and wait for another session's lock.
    """

    today: date
    metrics_from: date
    partitions_from: date
    runs_from: datetime | None
    timezone: str
    archive_path: str
    files_group: str | None
    storage_path: str
    parquet_assets: tuple[dg.AssetKey, ...]
    timeouts: Timeouts

    @classmethod
    def as_of_today(
        cls,
        settings: Settings,
        parquet_assets: Sequence[dg.AssetKey],
        *,
        retention_days: int | None = None,
    ) -> "Retention":
        """What the settings say for the current day.

        Args:
            settings: The settings.
            parquet_assets: The assets whose partitions are Parquet.
            retention_days: Age in days up to which metrics stay, in place of the settings'.

        Raises:
            OptionsError: It is below 1 or out of range.
        """
        now = today(timezone=settings.timezone)
        days = check_retention_days(
            settings.retention_days if retention_days is None else retention_days
        )
        return cls(
            today=now,
            metrics_from=now - timedelta(days=days),
            partitions_from=now - timedelta(days=settings.snapshot_retention_days),
            runs_from=_runs_from(settings, now),
            timezone=settings.timezone,
            archive_path=settings.archive_path,
            files_group=settings.files_group,
            storage_path=settings.storage_path,
            parquet_assets=tuple(parquet_assets),
            timeouts=Timeouts.of(settings),
        )

    def due_dates(
        self,
        engine: sa.Engine,
        instance: dg.DagsterInstance,
        *,
        released_months: Collection[str] = (),
    ) -> DueDates:
        """The dates whose metrics are too old, and what of them stays all the same.

        Args:
            engine: The platform's database.
            instance: Where runs in progress are on record.
            released_months: Restored months that do not stay.

        Raises:
            ArchiveError: The archive cannot be reached, or a released month is not restored.
            MetricsTableError: The table is missing or not as this version expects it, or the user
                may not see which of its rows another table refers to.
        """
        restored = self.months_restored() if released_months else None
        if restored is not None and (unknown := set(released_months) - set(restored)):
            raise ArchiveError(
                f"No month {', '.join(sorted(unknown))} is restored; restored are"
                f" {', '.join(restored) or 'none'}."
            )
        referred = archive.referred_rows(
            engine, self.metrics_from, timezone=self.timezone, timeouts=self.timeouts
        )
        undated = archive.undated_rows(
            engine, self.metrics_from, timezone=self.timezone, timeouts=self.timeouts
        )
        stored = list(self._stored_dates(engine))
        if not stored:
            return DueDates([], rows_referred=referred, rows_undated=undated)
        if restored is None:
            restored = self.months_restored()
        in_use = DatesInUse(instance)
        kept = {
            found.month: restored[found.month]
            for found in stored
            if found.month in restored and found.month not in released_months
        }
        due = [
            found
            for found in stored
            if found.month not in kept and found.day.isoformat() not in in_use
        ]
        return DueDates(due, kept, referred, undated)

    def is_due(self, engine: sa.Engine) -> bool:
        """Whether the metrics of any date are too old.

        Raises:
            MetricsTableError: The table is missing or not as this version expects it.
        """
        restored: Mapping[str, date] | None = None
        for found in self._stored_dates(engine):
            if restored is None:
                try:
                    restored = self.months_restored()
                except ArchiveError:
                    # The run meets it too, and its failure is seen.
                    restored = {}
            if found.month not in restored:
                return True
        return False

    def _stored_dates(self, engine: sa.Engine) -> Iterator[StoredDate]:
        return archive.dates_before(
            engine, self.metrics_from, timezone=self.timezone, timeouts=self.timeouts
        )

    def months_restored(self) -> dict[str, date]:
        """The restored months that stay in the table, and the day until which each stays.

        Raises:
            ArchiveError: The archive cannot be reached.
        """
        restored = restore.restored_months(self.archive_path)
        return {month: until for month, until in restored.items() if until > self.today}

    def due_partitions(self, instance: dg.DagsterInstance) -> list[PartitionFolder]:
        """The Parquet partitions that are too old, oldest first.

        Raises:
            StorageError: The storage cannot be reached.
        """
        stored = partitions_before(self.storage_path, self.parquet_assets, self.partitions_from)
        in_use = DatesInUse(instance) if stored else ()
        return [found for found in stored if found.partition_key not in in_use]

    def archive_dates(
        self, engine: sa.Engine, due: Sequence[StoredDate], *, log: logging.Logger
    ) -> Iterator[ArchivedDate]:
        """Move the metrics of these dates to the archive, one date after the other.

        Yields:
            What became of each date of which anything was archived, or would not come back.

        Raises:
            StorageError: The archive's folder cannot be made.
            ArchiveError: The archive cannot be written, or not read back.
            MetricsTableError: The table is missing or not as this version expects it.
        """
        if due:
            make_private_folder(self.archive_path, group=self.files_group)
        deleted = 0
        for found in due:
            archived = archive.archive_date(
                engine,
                self.archive_path,
                found.day,
                timezone=self.timezone,
                timeouts=self.timeouts,
            )
            _log_archived(archived, found.rows, log)
            if archived.rows_archived:
                deleted += archived.rows_deleted
                yield archived
        if deleted >= archive.VACUUM_FROM_ROWS:
            refusal = archive.vacuum(engine)
            if refusal is None:
                log.info("Vacuumed and analyzed %s", METRICS_TABLE)
            else:
                log.warning("%s was not vacuumed, autovacuum will: %s", METRICS_TABLE, refusal)

    def delete_partitions(
        self, engine: sa.Engine, due: Sequence[PartitionFolder], *, log: logging.Logger
    ) -> Iterator[PartitionFolder]:
        """Delete these Parquet partitions, one after the other.

        Those of a date that is being computed stay.

        Raises:
            StorageError: One cannot be deleted.
        """
        deleted = 0
        for partition in due:
            if delete_partition(engine, partition):
                deleted += 1
                yield partition
            else:
                log.warning("%s stays until the run of its date has ended", partition.path)
        if deleted:
            log.info("Deleted %s Parquet partitions before %s", deleted, self.partitions_from)

    def has_due_runs(self, instance: dg.DagsterInstance) -> bool:
        """Whether Dagster's record has runs that are too old."""
        return self.runs_from is not None and any(True for _ in old_runs(instance, self.runs_from))

    def due_runs(self, instance: dg.DagsterInstance) -> "RemovedRuns":
        """What ``delete_runs`` would remove."""
        removed = RemovedRuns()
        if self.runs_from is not None:
            for some in old_runs(instance, self.runs_from):
                removed.deleted += len(some.deleted)
                removed.trimmed += len(some.trimmed)
            removed.runless_events = old_runless_events(instance, self.runs_from)
        return removed

    def delete_runs(self, instance: dg.DagsterInstance, *, log: logging.Logger) -> "RemovedRuns":
        """Remove from Dagster's record the runs that are too old, and events without a run.

        The newest materialization, observation and check result of each partition stay.
        """
        removed = RemovedRuns()
        if self.runs_from is None:
            return removed
        for some in old_runs(instance, self.runs_from):
            remove_runs(instance, some)
            removed.deleted += len(some.deleted)
            removed.trimmed += len(some.trimmed)
        removed.runless_events = remove_runless_events(instance, self.runs_from)
        compact_files(instance, log=log)
        if removed != RemovedRuns():
            log.info(
                "Deleted %s runs that ended before %s, the details of %s runs that hold the newest"
                " result of a partition, and %s events without a run",
                removed.deleted,
                self.runs_from.date(),
                removed.trimmed,
                removed.runless_events,
            )
        return removed


def _runs_from(settings: Settings, now: date) -> datetime | None:
    if settings.run_retention_days is None:
        return None
    day = now - timedelta(days=settings.run_retention_days)
    return midnight(day, timezone=settings.timezone)


def _log_archived(archived: ArchivedDate, rows: int, log: logging.Logger) -> None:
    """Log how many of the rows of a date were archived and deleted, and why others stay."""
    if archived.is_in_use:
        log.warning(
            "%s metrics of %s stay until the run or the cleanup of that date has ended",
            rows,
            archived.day,
        )
    if archived.rows_archived == 0:
        return
    log.info(
        "Archived %s metrics of %s in %s and deleted %s",
        archived.rows_archived,
        archived.day,
        archived.path,
        archived.rows_deleted,
    )
    if archived.refusal is not None:
        log.error(
            "%s metrics of %s stay in the table, since they could not be restored: %s."
            " Change what keeps them out, such as a constraint that old rows do not meet",
            archived.rows_left,
            archived.day,
            archived.refusal.rstrip("."),
        )
    elif archived.rows_left:
        log.warning(
            "%s metrics of %s stay in the table: they changed while they were archived,"
            " another session holds them, another table refers to them by now, or the"
            " archive holds newer values",
            archived.rows_left,
            archived.day,
        )


@dataclass
class RemovedRuns:
    """What a cleanup removed from Dagster's record, or would.

    Attributes:
        deleted: Runs that went whole.
        trimmed: Runs that kept only their results, since they hold the newest of a partition.
        runless_events: Events that belonged to no run.
    """

    deleted: int = 0
    trimmed: int = 0
    runless_events: int = 0


@dataclass
class CleanupReport:
    """What a cleanup removed, or would.

    Attributes:
        retention: The rule that it followed.
        dry_run: Whether it only looked.
        due: What was too old.
        rows_by_date: Rows that left the table, by calculation date.
        rows_left: Archived rows that stay; the log says why.
        refusals: Why rows of a date stay, where they would not come back from the archive.
        partitions: Parquet partitions that were deleted.
        runs: What left Dagster's record.
    """

    retention: Retention
    due: DueDates
    dry_run: bool = False
    rows_by_date: dict[date, int] = field(default_factory=dict)
    rows_left: int = 0
    refusals: dict[date, str] = field(default_factory=dict)
    partitions: list[PartitionFolder] = field(default_factory=list)
    runs: RemovedRuns = field(default_factory=RemovedRuns)

    @property
    def rows(self) -> int:
        """Rows that left the table."""
        return sum(self.rows_by_date.values())

    @property
    def months(self) -> list[str]:
        """The months of these rows, as ``YYYY-MM``."""
        return sorted({f"{day:%Y-%m}" for day in self.rows_by_date})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        partitions: dict[str, list[str]] = {}
        for partition in self.partitions:
            name = partition.asset_key.to_user_string()
            partitions.setdefault(name, []).append(partition.partition_key)
        runs_from = self.retention.runs_from
        return {
            "dry_run": self.dry_run,
            "metrics": {
                "before": self.retention.metrics_from.isoformat(),
                "rows": self.rows,
                "rows_left": self.rows_left,
                "rows_referred": dict(self.due.rows_referred),
                "rows_undated": self.due.rows_undated,
                "months_restored": {
                    month: until.isoformat() for month, until in self.due.months_restored.items()
                },
                "refusals": {day.isoformat(): why for day, why in self.refusals.items()},
                "months": self.months,
                "dates": {day.isoformat(): rows for day, rows in self.rows_by_date.items()},
                "archive": self.retention.archive_path,
            },
            "parquet": {
                "before": self.retention.partitions_from.isoformat(),
                "partitions": len(self.partitions),
                "size_bytes": sum(partition.size_bytes for partition in self.partitions),
                "by_asset": partitions,
            },
            "runs": {
                "before": None if runs_from is None else runs_from.date().isoformat(),
                **asdict(self.runs),
            },
        }


def clean_up(
    retention: Retention,
    engine: sa.Engine,
    instance: dg.DagsterInstance,
    *,
    log: logging.Logger,
    released_months: Collection[str] = (),
    dry_run: bool = False,
) -> CleanupReport:
    """Remove all that is too old, outside of a run, and leave observations of it on record.

    Args:
        retention: What is too old.
        engine: The platform's database.
        instance: Where the partitions are on record.
        log: Where to say what is done.
        released_months: Restored months that go like any other from now on.
        dry_run: Only look.

    Raises:
        ArchiveError: The archive cannot be written, or not read back, or a released month is not
            restored.
        MetricsTableError: The table is missing or not as this version expects it.
        StorageError: The Parquet partitions cannot be reached.
    """
    due = retention.due_dates(engine, instance, released_months=released_months)
    partitions = retention.due_partitions(instance)
    report = CleanupReport(retention, due, dry_run=dry_run)
    if dry_run:
        report.rows_by_date = {found.day: found.rows for found in due.stored}
        report.partitions = partitions
        report.runs = retention.due_runs(instance)
        return report
    for month in released_months:
        restore.release_month(retention.archive_path, month)
    due.log(log)
    for archived in retention.archive_dates(engine, due.stored, log=log):
        report.rows_by_date[archived.day] = archived.rows_deleted
        report.rows_left += archived.rows_left
        if archived.refusal is not None:
            report.refusals[archived.day] = archived.refusal
        instance.report_runless_asset_event(observation_of_date(archived))
    for partition in retention.delete_partitions(engine, partitions, log=log):
        report.partitions.append(partition)
        instance.report_runless_asset_event(observation_of_partition(partition))
    # Last: a stored date needs the runs that its read state names.
    report.runs = retention.delete_runs(instance, log=log)
    return report


def observation_of_date(archived: ArchivedDate) -> dg.AssetObservation:
    """What the record of the metrics table says about a date whose rows went."""
    return dg.AssetObservation(
        METRICS_TABLE,
        partition=archived.day.isoformat(),
        description="Retention moved rows of this date from the table to the archive.",
        metadata={
            "rows_archived": archived.rows_archived,
            "rows_deleted": archived.rows_deleted,
            "archive": dg.MetadataValue.path(archived.path),
        },
    )


def observation_of_restored_date(restored: RestoredDate) -> dg.AssetObservation:
    """What the record of the metrics table says about a date whose rows came back."""
    return dg.AssetObservation(
        METRICS_TABLE,
        partition=restored.day.isoformat(),
        description="Archived rows of this date were restored to the table.",
        metadata={
            "rows_archived": restored.rows_archived,
            "rows_restored": restored.rows_restored,
            "archive": dg.MetadataValue.path(restored.path),
        },
    )


def observation_of_partition(partition: PartitionFolder) -> dg.AssetObservation:
    """What the record of an asset says about a partition whose file went."""
    return dg.AssetObservation(
        partition.asset_key,
        partition=partition.partition_key,
        description="Retention deleted the Parquet file of this partition.",
        metadata={
            "deleted_path": dg.MetadataValue.path(str(partition.path)),
            "size_bytes": partition.size_bytes,
        },
    )


class DatesInUse:
    """The reference dates that a run in progress is about: nothing is taken from under it."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        runs = instance.get_runs(
            filters=dg.RunsFilter(
                statuses=IN_PROGRESS, created_after=datetime.now(UTC) - _LONGEST_RUN
            )
        )
        self._ranges = [
            (run.tags[first], run.tags[last])
            for run in runs
            for first, last in ((PARTITION_TAG, PARTITION_TAG), (RANGE_START_TAG, RANGE_END_TAG))
            if first in run.tags and last in run.tags
        ]

    def __contains__(self, partition_key: str) -> bool:
        return any(first <= partition_key <= last for first, last in self._ranges)


def log_rest(log: logging.Logger, dates: int) -> None:
    """Log how many dates are left for later runs, if any."""
    if dates:
        log.warning("%s further dates are left for the next run", dates)
