"""Removal of old runs from Dagster's record; the newest result of each partition stays.

Dagster has no retention of runs. Its ``delete_run`` removes the materializations that make a
partition green, leaves check results and SQLite files behind, and deletes the record of the run
first, so that nothing finds the events of a deletion that was killed. This module, and no other,
therefore deletes from Dagster's tables with SQL, through the connections of Dagster's storage. The
tables and columns are those of Dagster 1.13; a test on SQLite and PostgreSQL covers each of them.
"""

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

from tutormax_assets.runs.event_log import PooledSqliteEventLogStorage
from tutormax_assets.runs.private_dagster import SqliteEventLogStorage

RUNS_AT_ONCE = 100
"""Runs that one transaction deals with: 18,000 events of nights, half a second at most."""

_EVENTS_AT_ONCE = 1_000
_BUSY_TIMEOUT_SECONDS = 30

# New events soon fill a smaller share of a file.
_FREE_SHARE = 0.1

_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]

_OF_PARTITIONS = [
    dg.DagsterEventType.ASSET_MATERIALIZATION.value,
    dg.DagsterEventType.ASSET_OBSERVATION.value,
]

_RESULTS = [
    *_OF_PARTITIONS,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION.value,
    dg.DagsterEventType.RUN_SUCCESS.value,
    dg.DagsterEventType.RUN_FAILURE.value,
    dg.DagsterEventType.RUN_CANCELED.value,
]
"""Events that a trimmed run keeps."""

_RUNLESS = ""
"""What Dagster records as the run of an event that belongs to none."""


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *map(sa.column, columns))


_EVENTS = _table(
    "event_logs", "id", "run_id", "dagster_event_type", "timestamp", "asset_key", "partition"
)
_EVENT_TAGS = _table("asset_event_tags", "event_id")
_CHECKS = _table(
    "asset_check_executions",
    *("id", "run_id", "asset_key", "check_name", "partition", "execution_status"),
)


@dataclass(frozen=True)
class OldRuns:
    """Ids of old runs that are removed together.

    Attributes:
        deleted: Runs that go whole.
        trimmed: Runs that hold the newest materialization, observation or check result of a
            partition. They keep their record, these events and their end; their other events go.
    """

    deleted: Sequence[str]
    trimmed: Sequence[str]


def old_runs(instance: dg.DagsterInstance, before: datetime) -> Iterator[OldRuns]:
    """The runs that ended before an instant and have anything to remove, the oldest first.

    Args:
        instance: Where runs are on record.
        before: The instant.

    Yields:
        At most ``RUNS_AT_ONCE`` runs at a time. Removing them does not change what follows.
    """
    storage: Any = instance.event_log_storage
    wanted = dg.RunsFilter(statuses=_ENDED, updated_before=before.astimezone(UTC))
    run_ids = instance.get_run_ids(wanted)[::-1]
    # Runs that are recorded meanwhile can only make it smaller.
    with storage.index_connection() as connection:
        held = set(connection.scalars(_with_newest()))
    for first in range(0, len(run_ids), RUNS_AT_ONCE):
        some = run_ids[first : first + RUNS_AT_ONCE]
        with storage.index_connection() as connection:
            detailed = set(connection.scalars(_with_details(some)))
        deleted = [run_id for run_id in some if run_id not in held]
        trimmed = [run_id for run_id in some if run_id in held & detailed]
        if deleted or trimmed:
            yield OldRuns(deleted, trimmed)


def remove_runs(instance: dg.DagsterInstance, runs: OldRuns) -> None:
    """Remove old runs, with their events, check results and compute logs.

    The record of a run goes last, and its file in SQLite before its rows in the file that all runs
    share. ``old_runs`` therefore finds what a removal that was killed has left.

    Args:
        instance: Where the runs are on record.
        runs: Some of what ``old_runs`` has found.
    """
    storage: Any = instance.event_log_storage
    for run_id in (*runs.deleted, *runs.trimmed):
        # Another cleanup may be deleting the same folder.
        with suppress(FileNotFoundError):
            instance.compute_log_manager.delete_logs(prefix=[run_id])
    if isinstance(storage, SqliteEventLogStorage):
        _delete_files(storage, runs.deleted)
    # Dagster's own class would not find what stays of a run without its file.
    if isinstance(storage, PooledSqliteEventLogStorage):
        _delete_files(storage, runs.trimmed)
    with storage.index_transaction() as connection:
        _delete_events(connection, _EVENTS.c.run_id.in_(runs.deleted))
        connection.execute(_CHECKS.delete().where(_CHECKS.c.run_id.in_(runs.deleted)))
        _delete_events(connection, _EVENTS.c.run_id.in_(runs.trimmed), _is_detail())
    for run_id in runs.deleted:
        if storage.supports_global_concurrency_limits:
            storage.free_concurrency_slots_for_run(run_id)
        instance.run_storage.delete_run(run_id)


def old_runless_events(instance: dg.DagsterInstance, before: datetime) -> int:
    """Number of events without a run that ``remove_runless_events`` would remove."""
    storage: Any = instance.event_log_storage
    with storage.index_connection() as connection:
        count = sa.select(sa.func.count()).select_from(_old_runless(before).subquery())
        return int(connection.scalar(count))


def remove_runless_events(instance: dg.DagsterInstance, before: datetime) -> int:
    """Remove old materializations and observations that belong to no run.

    The newest one of each partition stays.

    Args:
        instance: Where they are on record.
        before: The instant before which they were recorded.

    Returns:
        Their number.
    """
    storage: Any = instance.event_log_storage
    if isinstance(storage, SqliteEventLogStorage) and Path(storage.path_for_shard("")).exists():
        while _remove_some_runless(storage.run_connection(_RUNLESS), before):
            pass
    removed = 0
    while some := _remove_some_runless(storage.index_transaction(), before):
        removed += some
    return removed


def compact_files(instance: dg.DagsterInstance, *, log: logging.Logger) -> None:
    """Return the free space of SQLite's files to the filesystem, if it is a large share of them.

    Other processes can read a file meanwhile, and wait to write. PostgreSQL's autovacuum makes the
    space of deleted rows available to new ones.

    Args:
        instance: Left as it is if it is not in SQLite.
        log: Where a file that could not be compacted is reported.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, SqliteEventLogStorage):
        return
    for path in (
        Path(storage.path_for_shard("index")),
        Path(instance.root_directory, "history", "runs.db"),
    ):
        if path.exists():
            _compact(path, log)


def _with_newest() -> sa.CompoundSelect[Any]:
    """Selects the runs whose events a reader of the newest events needs."""
    event, check = _EVENTS.c, _CHECKS.c
    of_partitions = (
        sa.select(sa.func.max(event.id))
        .where(event.dagster_event_type.in_(_OF_PARTITIONS))
        .group_by(event.asset_key, event.dagster_event_type, event.partition)
    )
    of_checks = sa.select(sa.func.max(check.id)).group_by(
        check.asset_key, check.check_name, check.partition
    )
    # The newest execution of a check may never have come to a result.
    with_result = of_checks.where(check.execution_status.in_(["SUCCEEDED", "FAILED"]))
    return sa.union(
        sa.select(event.run_id).where(
            # SQLite gives the id of a deleted last row again, which cursors of sensors are past.
            event.id.in_(of_partitions) | (event.id == _last_event())
        ),
        sa.select(check.run_id).where(check.id.in_(of_checks) | check.id.in_(with_result)),
    )


def _with_details(run_ids: Sequence[str]) -> sa.Select[Any]:
    """Selects those of some runs that have events which a trimmed run has not."""
    return sa.select(_EVENTS.c.run_id).where(_EVENTS.c.run_id.in_(run_ids), _is_detail()).distinct()


def _is_detail() -> sa.ColumnElement[bool]:
    of_type = _EVENTS.c.dagster_event_type
    return (of_type.is_(None) | of_type.not_in(_RESULTS)) & (_EVENTS.c.id < _last_event())


def _last_event() -> sa.ScalarSelect[Any]:
    return sa.select(sa.func.max(_EVENTS.alias().c.id)).scalar_subquery()


def _old_runless(before: datetime) -> sa.Select[Any]:
    """Selects the ids of old materializations and observations that belong to no run."""
    event = _EVENTS.c
    is_runless = (event.run_id == _RUNLESS) & event.dagster_event_type.in_(_OF_PARTITIONS)
    newest = (
        sa.select(sa.func.max(event.id))
        .where(is_runless)
        .group_by(event.asset_key, event.dagster_event_type, event.partition)
    )
    recorded_before = event.timestamp < sa.bindparam(
        "before", before.astimezone(UTC).replace(tzinfo=None), sa.DateTime()
    )
    return sa.select(event.id).where(is_runless, recorded_before, event.id.not_in(newest))


def _remove_some_runless(transaction: Any, before: datetime) -> int:
    with transaction as connection:
        ids = connection.scalars(_old_runless(before).limit(_EVENTS_AT_ONCE)).all()
        _delete_events(connection, _EVENTS.c.id.in_(ids))
        return len(ids)


def _delete_events(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> None:
    """Delete events with their tags."""
    ids = sa.select(_EVENTS.c.id).where(*conditions)
    connection.execute(_EVENT_TAGS.delete().where(_EVENT_TAGS.c.event_id.in_(ids)))
    connection.execute(_EVENTS.delete().where(*conditions))


def _delete_files(storage: SqliteEventLogStorage, run_ids: Iterable[str]) -> None:
    for run_id in run_ids:
        for suffix in ("-wal", "-shm", ""):
            Path(storage.path_for_shard(run_id) + suffix).unlink(missing_ok=True)


def _compact(path: Path, log: logging.Logger) -> None:
    with closing(
        sqlite3.connect(path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None)
    ) as connection:
        try:
            [pages], [free] = (
                connection.execute(f"PRAGMA {name}").fetchone()
                for name in ("page_count", "freelist_count")
            )
            if free > _FREE_SHARE * pages:
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        # Another process has locked the file, or the disk is full.
        except sqlite3.OperationalError as error:
            log.warning("%s keeps its size: %s", path, error)
