"""Dagster's event log in SQLite, with connections that stay open; ``dagster.yaml`` names it.

Dagster's own class opens and closes the file anew for every statement of every event: each time it
makes an SQLAlchemy engine, compiles the statement, and has SQLite copy its journal back and sync it
to the disk. A range run records a thousand events, so that would take longer than what they tell
of.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import dagster as dg
import sqlalchemy as sa

from tutormax_assets.runs.private_dagster import (
    ConfigurableClassData,
    SqliteEventLogStorage,
    forget_file_of_run,
)

_INDEX = "index"
_BATCH_SIZE = "DAGSTER_EVENT_BATCH_SIZE"
_EVENTS_OF_A_BATCH = "1000"
_BUSY_TIMEOUT_SECONDS = 30
_OF_ASSETS = (
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_OBSERVATION,
)

_ENDS = sa.text(
    "SELECT 1 FROM event_logs WHERE run_id = :run_id AND dagster_event_type IN"
    " ('PIPELINE_SUCCESS', 'PIPELINE_FAILURE', 'PIPELINE_CANCELED') LIMIT 1"
)

# SQLite takes 32,766 values in a statement unless it is built otherwise; an event has seven.
_MOST_IN_A_STATEMENT = 1_000


class PooledSqliteEventLogStorage(SqliteEventLogStorage):
    """The event log with one connection to each file that is in use.

    The files are in ``base_dir``, or else where Dagster has them in a home that names no storage.
    What is recorded and where is as with Dagster's own class, and processes with either class read
    and write the same files. Events that Dagster has at once, such as those of all partitions of a
    run, are recorded in one transaction of each file. A run whose file retention has deleted is
    read from the file that all runs share. After a power failure the last events may be missing,
    as may those that Dagster was gathering when its process was killed; a run without its end is
    then put on record as failed.
    """

    def __init__(
        self, inst_data: ConfigurableClassData | None = None, *, base_dir: str | None = None
    ) -> None:
        """Leave the files alone until the instance says where its home is."""
        self._of_yaml = inst_data
        self._folder = base_dir
        self._engines: dict[str, sa.Engine] = {}
        # The transactions of a batch that is being recorded, by the file that they are in.
        self._of_batch: dict[str, sa.Connection] = {}
        self._tables: set[str] = set()
        self._in_use = threading.RLock()

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        """The configuration: ``base_dir``, which may be left out."""
        return {"base_dir": dg.Field(dg.StringSource, is_required=False)}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """The storage of an instance that is being opened."""
        return cls(inst_data, **config_value)

    def register_instance(self, instance: dg.DagsterInstance) -> None:
        """Open the files in the home of the instance."""
        folder = self._folder or str(Path(instance.root_directory, "history", "runs"))
        super().__init__(folder, self._of_yaml)
        super().register_instance(instance)
        # Dagster hands over batches only where this variable says how large they may be.
        os.environ.setdefault(_BATCH_SIZE, _EVENTS_OF_A_BATCH)

    @contextmanager
    def run_connection(self, run_id: str | None = None) -> Iterator[sa.Connection]:
        """A transaction in the file of a run, which is made if it is not there."""
        if run_id is None:
            raise ValueError("found no id of a run, expected one: each run has a file of its own")
        with self._in_use:
            if run_id in self._of_batch:
                yield self._of_batch[run_id]
                return
            path = Path(self.path_for_shard(run_id))
            if run_id in self._engines and not path.exists():
                # Another process has deleted the run.
                self._engines.pop(run_id).dispose()
                forget_file_of_run(self, run_id)
            if run_id not in self._engines:
                if not path.exists() and self._is_trimmed(run_id):
                    with self.index_connection() as connection:
                        yield connection
                    return
                self._make(run_id)
            with self._engine(run_id).begin() as connection:
                yield connection

    def _is_trimmed(self, run_id: str) -> bool:
        """Whether retention has left of a run what is in the file that all runs share."""
        with self.index_connection() as connection:
            return connection.scalar(_ENDS, {"run_id": run_id}) is not None

    def _make(self, run_id: str) -> None:
        try:
            # The file has its journal before Dagster makes the tables, a transaction each.
            with self._engine(run_id).connect(), super().run_connection(run_id):
                pass
        except BaseException:
            self._engines.pop(run_id).dispose()
            raise

    @contextmanager
    def index_connection(self) -> Iterator[sa.Connection]:
        """A transaction in the file that all runs share."""
        with self._in_use:
            if _INDEX in self._of_batch:
                yield self._of_batch[_INDEX]
                return
            with self._engine(_INDEX).begin() as connection:
                yield connection

    def store_event_batch(self, events: Sequence[dg.EventLogEntry]) -> None:
        """Record events of one run, in one transaction of each of the two files."""
        with (
            self._in_use,
            self.run_connection(events[0].run_id) as of_run,
            self.index_connection() as of_all,
        ):
            self._of_batch = {events[0].run_id: of_run, _INDEX: of_all}
            try:
                if all(event.dagster_event_type in _OF_ASSETS for event in events):
                    for first in range(0, len(events), _MOST_IN_A_STATEMENT):
                        some = events[first : first + _MOST_IN_A_STATEMENT]
                        self._store_together(some, of_run, of_all)
                else:
                    for event in events:
                        super().store_event(event)
            finally:
                self._of_batch = {}
        self._tell(events[0].run_id)

    def _store_together(
        self, events: Sequence[dg.EventLogEntry], of_run: sa.Connection, of_all: sa.Connection
    ) -> None:
        """Record events of assets with one statement for each table."""
        insert = self.prepare_insert_event_batch(events)
        of_run.execute(insert)
        # Nobody else inserts before the transaction ends, so the ids of the rows are in a row.
        last = of_all.execute(insert).lastrowid
        ids = range(last - len(events) + 1, last + 1)
        self.store_asset_event_tags(events, ids)
        # An asset has one row, which each of its events would replace.
        newest = {
            (event.dagster_event_type, event.get_dagster_event().asset_key): (event, number)
            for event, number in zip(events, ids, strict=True)
        }
        for event, number in sorted(newest.values(), key=lambda one: one[1]):
            self.store_asset_event(event, number)

    def store_event(self, event: dg.EventLogEntry) -> None:
        """Record an event."""
        super().store_event(event)
        self._tell(event.run_id)

    def _tell(self, run_id: str) -> None:
        """Notify those who watch a run of its new events."""
        # They wait for the file to change; what has changed is the journal beside it.
        with suppress(FileNotFoundError):
            os.utime(self.path_for_shard(run_id))

    def has_table(self, table_name: str) -> bool:
        """Whether the file that all runs share has a table."""
        if table_name not in self._tables:
            with self.index_connection() as connection:
                if not sa.inspect(connection).has_table(table_name):
                    return False
            self._tables.add(table_name)
        return True

    def wipe(self) -> None:
        """Delete all events."""
        self._close()
        super().wipe()

    def dispose(self) -> None:
        """Close the files."""
        super().dispose()
        self._close()

    def _engine(self, shard: str) -> sa.Engine:
        """The engine of a file; of the files of runs only the one used last stays open."""
        if shard not in self._engines:
            for other in self._engines.keys() - {_INDEX, shard} if shard != _INDEX else ():
                self._engines.pop(other).dispose()
            self._engines[shard] = _engine(self.conn_string_for_shard(shard))
        return self._engines[shard]

    def _close(self) -> None:
        with self._in_use:
            while self._engines:
                self._engines.popitem()[1].dispose()


def _engine(url: str) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, _: object) -> None:
        # With its journal, the file is whole whatever happens; the journal need not be on the disk.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    return engine
