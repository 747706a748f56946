"""Reading the platform: what is good and what is set aside, sliced by reference date."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from functools import partial
from time import perf_counter

import polars as pl
import tenacity
from upath import UPath

from tutormax_assets.compute import KilledShardError, ShardsError
from tutormax_assets.compute.context import TaskContext
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.database.faults import may_pass, reason, retrying
from tutormax_assets.metrics import quality
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.window import within_window
from tutormax_assets.source.postgres import SnapshotGoneError
from tutormax_assets.source.streams import Table
from tutormax_assets.source.view import SharedView, View, open_shared_view
from tutormax_assets.storage.partition import (
    Partition,
    StoredParts,
    partition_of,
    slices_of,
    store_parts,
    store_slices,
)
from tutormax_assets.storage.shards import Shards, TutorRange
from tutormax_assets.storage.spool import spool_folder


@dataclass(frozen=True, kw_only=True)
class SnapshotRequest:
    """What is to be read and stored for the reference dates of a run.

    Attributes:
        paths: The partitions to store, by asset and reference date.
        start: First instant.
        end: First instant after the last one.
        window_days: Days before a reference date that are in its partitions.
        timezone: In which a date begins.
        policy: Says which values are good.
        max_retries: How often a view that was received is read again.
        retry_delay_seconds: Seconds before the first retry.
    """

    paths: Mapping[str, Mapping[date, UPath]]
    start: datetime
    end: datetime
    window_days: int
    timezone: str
    policy: Policy
    max_retries: int
    retry_delay_seconds: float


@dataclass(frozen=True)
class SnapshotPlan:
    """A request that is to be read shard by shard.

    Attributes:
        request: What is to be read and stored.
        view: The platform at the instant of the run, shared where another process computes.
        shards: How tutors are divided.
    """

    request: SnapshotRequest
    view: View | SharedView
    shards: Shards

    def task(self, numbers: Sequence[int]) -> "SnapshotTask":
        """The task of neighbouring shards.

        Args:
            numbers: Those of the shards, ascending.
        """
        return SnapshotTask(
            self, self.shards.of_numbers(numbers), numbers[0], self.shards.range_of(numbers)
        )


@dataclass(frozen=True)
class SnapshotTask:
    """Neighbouring shards to read.

    Attributes:
        plan: What is to be read and stored.
        shards: How the tutors of these shards are divided.
        first_shard: The number that the first of them has in the partitions.
        tutor_range: Their tutors.
    """

    plan: SnapshotPlan
    shards: Shards
    first_shard: int
    tutor_range: TutorRange


@dataclass
class SnapshotReport:
    """What was read and stored of some shards.

    Attributes:
        stored: By asset and reference date.
        count: Number of rows that were read, by source table.
        reasons: Number of values that were set aside, as ``source_table``, ``column``, ``reason``
            and ``values``, by table; of each reference date, and of all under ``None``.
        read_seconds: How long the reading took.
        clean_seconds: How long the cleaning took, by table.
        failed: Why other shards could not be read, by number.
    """

    stored: dict[str, dict[date, list[StoredParts]]] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, dict[date | None, pl.DataFrame]] = field(default_factory=dict)
    read_seconds: float = 0
    clean_seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def snapshot_asset(table: Table) -> str:
    """The asset that holds the good rows of a table."""
    return f"{table}_snapshot"


def set_aside_asset(table: Table) -> str:
    """The asset that says what of a table was not used."""
    return f"{table}_set_aside"


def read_snapshots(task: SnapshotTask, context: TaskContext) -> SnapshotReport:
    """Read shards of the platform and store what is good of them and what was set aside.

    Raises:
        SourceError: The platform cannot be read.
        StorageError: The storage cannot be written.
    """
    plan, request = task.plan, task.plan.request
    tables: list[Table] = [
        table
        for table in DATE_COLUMNS
        if {snapshot_asset(table), set_aside_asset(table)} & request.paths.keys()
    ]
    view = (
        open_shared_view(plan.view, context.database.source)
        if isinstance(plan.view, SharedView)
        else plan.view
    )
    with spool_folder(context.home_path) as folder:
        attempt = retrying(
            max_retries=request.max_retries if view.is_received else 0,
            retry_delay_seconds=request.retry_delay_seconds,
            log=context.log,
        ).copy(retry=tenacity.retry_if_exception(_may_pass_here))
        rows = attempt(
            view.rows,
            folder / "source",
            tables=tables,
            start=request.start,
            end=request.end,
            tutor_range=task.tutor_range,
            hashed=True,
        )
        if rows.note:
            context.log.info(rows.note)
        report = SnapshotReport(count=dict(rows.count), read_seconds=rows.seconds)
        good_sessions = partial(
            quality.good_sessions,
            policy=request.policy,
            timezone=request.timezone,
            ids_are_unique=view.ids_are_unique,
        )
        good_events = partial(quality.good_events, timezone=request.timezone)
        cleaning: Mapping[Table, tuple[list[pl.LazyFrame], Clean]] = {
            "sessions": (rows.sessions, good_sessions),
            "tutor_events": (rows.events, good_events),
        }
        for table in tables:
            started = perf_counter()
            good, set_aside = clean_parts(*cleaning[table])
            if rows.hashes is not None:
                good, set_aside = attempt(rows.hashes.resolve, table, good, set_aside)
            report.clean_seconds[table] = perf_counter() - started
            _store_table(task, table, good, set_aside, report)
    return report


def _store_table(
    task: SnapshotTask,
    table: Table,
    good: pl.DataFrame,
    set_aside: pl.DataFrame,
    report: SnapshotReport,
) -> None:
    """Store what is good of a table and what was set aside, sliced by reference date."""
    request = task.plan.request
    for asset, rows, column in (
        (snapshot_asset(table), good, DATE_COLUMNS[table]),
        (set_aside_asset(table), set_aside, "date"),
    ):
        report.stored[asset] = _store_dates(task, rows, column, request.paths.get(asset, {}))
    report.reasons[table] = {None: count_reasons(set_aside)}
    for reference_date in request.paths.get(snapshot_asset(table), {}):
        of_date = set_aside.filter(
            within_window("date", reference_date=reference_date, days=request.window_days)
        )
        report.reasons[table][reference_date] = count_reasons(of_date)


def read_groups(
    compute: Compute,
    groups: list[Sequence[int]],
    plan: SnapshotPlan,
    *,
    log: logging.Logger,
) -> SnapshotReport:
    """Read groups of shards; those of one that fails are read one by one, to keep the others.

    Args:
        compute: Where they are read.
        groups: The numbers of neighbouring shards.
        plan: What is to be read of them.
        log: Where failures are told.

    Raises:
        ShardsError: No group could be read.
        Exception: What may pass when all is read again, as ``may_pass`` says.
        KilledShardError: The only shard could not be read.
    """
    reports: list[SnapshotReport] = []
    failed: dict[int, str] = {}
    while groups:
        named = {f"shards {numbers[0]} to {numbers[-1]}": numbers for numbers in groups}
        tasks = {name: plan.task(numbers) for name, numbers in named.items()}
        try:
            for _, report in compute.map(read_snapshots, tasks, log=log):
                reports.append(report)
        except KilledShardError as error:
            [(only, numbers)] = named.items()
            if len(numbers) == 1:
                raise
            errors: Mapping[str, BaseException] = {only: error}
        except ShardsError as error:
            errors = error.errors
            if not reports and not any(map(may_pass, errors.values())):
                raise
        else:
            break
        for failure in filter(may_pass, errors.values()):
            raise failure
        groups = []
        for name, failure in errors.items():
            if len(named[name]) > 1:
                groups += [[number] for number in named[name]]
            else:
                failed[named[name][0]] = reason(failure)
    return replace(sum_of_reports(reports), failed=failed)


def collect_snapshots(
    request: SnapshotRequest,
    asset: str,
    report: SnapshotReport,
    shards: Shards,
    *,
    schema: pl.Schema,
) -> dict[str, Partition]:
    """The partitions of an asset by reference date in ISO form.

    Args:
        request: What was to be stored.
        asset: The asset.
        report: What was stored of it, and which shards could not be read.
        shards: How tutors are divided.
        schema: The columns of the files that are stored of those that could not be read.

    Raises:
        StorageError: The storage cannot be written.
    """
    return {
        reference_date.isoformat(): partition_of(
            path,
            shards,
            report.stored[asset][reference_date],
            failed=report.failed,
            schema=schema,
        )
        for reference_date, path in request.paths[asset].items()
    }


def _may_pass_here(error: BaseException) -> bool:
    # Where the run's snapshot is gone, it is the run that has to begin anew.
    return may_pass(error) and not isinstance(error, SnapshotGoneError)


Clean = Callable[[pl.LazyFrame], tuple[pl.LazyFrame, pl.LazyFrame]]
"""Tells the good rows and what is set aside."""

DATE_COLUMNS: Mapping[Table, str] = {"sessions": "scheduled_date", "tutor_events": "event_date"}
"""The local date of a row that was read, by table."""


def _store_dates(
    task: SnapshotTask, rows: pl.DataFrame, column: str, paths: Mapping[date, UPath]
) -> dict[date, list[StoredParts]]:
    """Store the window of each date: of one date as the rows come, of several sorted and once."""
    days = task.plan.request.window_days
    if len(paths) == 1:
        [(reference_date, path)] = paths.items()
        of_date = rows.lazy().filter(
            within_window(column, reference_date=reference_date, days=days)
        )
        parts = store_parts(path, of_date, shards=task.shards, first=task.first_shard)
        return {reference_date: [parts]}
    spans = {one: (one - timedelta(days=days), one) for one in paths}
    stored: dict[date, list[StoredParts]] = {one: [] for one in paths}
    for number in range(len(task.shards)):
        of_shard = rows.filter(task.shards.number() == number) if task.shards.bounds else rows
        by_date = of_shard.sort(column)
        slices = slices_of(by_date[column], spans)
        of_dates = store_slices(paths, by_date, slices, shard=task.first_shard + number)
        for reference_date, parts in of_dates.items():
            stored[reference_date].append(parts)
    return stored


def clean_parts(parts: list[pl.LazyFrame], clean: Clean) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The good rows and what was set aside of all parts; none of them is left in memory.

    Args:
        parts: Rows as they were read; the list is emptied.
        clean: Tells good rows and values that are set aside, lazily.
    """
    good, set_aside = [], []
    while parts:
        # What is good and what is set aside would each join the part anew.
        of_part = pl.collect_all(clean(parts.pop().collect().lazy()))
        good.append(of_part[0])
        set_aside.append(of_part[1])
    return pl.concat(good), pl.concat(set_aside)


def count_reasons(set_aside: pl.DataFrame) -> pl.DataFrame:
    """Number of values by ``source_table``, ``column`` and ``reason``."""
    return set_aside.group_by("source_table", "column", "reason").agg(pl.len().alias("values"))


def sum_of_reasons(counts: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """The numbers of values in all of these together, sorted."""
    return (
        pl.concat(counts)
        .group_by("source_table", "column", "reason")
        .agg(pl.col("values").sum())
        .sort(pl.all())
    )


def sum_of_reports(reports: Iterable[SnapshotReport]) -> SnapshotReport:
    """What was read and stored of all shards."""
    total = SnapshotReport()
    for report in reports:
        for asset, by_day in report.stored.items():
            of_asset = total.stored.setdefault(asset, {})
            for reference_date, stored in by_day.items():
                of_asset.setdefault(reference_date, []).extend(stored)
        for name, number in report.count.items():
            total.count[name] = total.count.get(name, 0) + number
        for table, by_day_or_all in report.reasons.items():
            of_table = total.reasons.setdefault(table, {})
            for day_or_all, reasons in by_day_or_all.items():
                of_table[day_or_all] = sum_of_reasons(
                    [of_table.get(day_or_all, reasons.clear()), reasons]
                )
        for table, seconds in report.clean_seconds.items():
            total.clean_seconds[table] = total.clean_seconds.get(table, 0) + seconds
        total.read_seconds += report.read_seconds
    return total
