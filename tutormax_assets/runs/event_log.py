"""Dagster's event log in SQLite, kept open while this process executes runs.

Dagster opens and closes the file anew for every statement of every event: each time it makes an
SQLAlchemy engine, compiles the statement, and has SQLite copy its journal back and sync it to the
disk. A range run records a thousand events, so that would take longer than what they tell of.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

_INDEX = "index"
_BUSY_TIMEOUT_SECONDS = 30


@contextmanager
def event_log_kept_open(instance: dg.DagsterInstance) -> Iterator[None]:
    """Let one connection to each file of the event log serve all events until the block ends.

    What is recorded, where, and in which transactions does not change, and other processes read and
    write the files as before. After a power failure, and only then, the last events may be missing;
    a run without its end is then put on record as failed, like one whose process was killed.

    Args:
        instance: Left as it is if its event log is in PostgreSQL, whose connections have a pool.
    """
    log: Any = instance.event_log_storage
    if not log.is_run_sharded:
        yield
        return
    engines: dict[str, sa.Engine] = {}
    opened = {"run_connection": log.run_connection, "index_connection": log.index_connection}

    def engine(shard: str) -> sa.Engine:
        if shard not in engines:
            for other in engines.keys() - {_INDEX}:
                engines.pop(other).dispose()
            engines[shard] = _engine(log.conn_string_for_shard(shard))
        return engines[shard]

    @contextmanager
    def run_connection(run_id: str) -> Iterator[sa.Connection]:
        if run_id not in engines:
            # The file has its journal before Dagster makes the tables, one transaction each.
            with engine(run_id).connect(), opened["run_connection"](run_id):
                pass
        with engine(run_id).begin() as connection:
            yield connection
        # The UI shows what is new when the file changes; the journal beside it is what changed.
        Path(log.path_for_shard(run_id)).touch()

    @contextmanager
    def index_connection() -> Iterator[sa.Connection]:
        with engine(_INDEX).begin() as connection:
            yield connection

    log.run_connection = run_connection
    log.index_connection = index_connection
    log.has_table = cache(log.has_table)
    try:
        yield
    finally:
        del log.run_connection, log.index_connection, log.has_table
        for one in engines.values():
            one.dispose()


def _engine(url: str) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, _: object) -> None:
        # With its journal, the file is whole whatever happens; the journal need not be on the disk.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    return engine
