"""Streaming the result of a query into Arrow files, and reading small results.

Rows stream from the server into files, so that memory does not grow with them. Sessions and their
feedback are read apart and joined here, which costs server and client together half of what the
server's join costs. Both are split by the session's id, and a part of each fits into memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import dataframely as dy
import polars as pl
from adbc_driver_postgresql import dbapi
from polars.io.plugins import register_io_source

from tutormax_assets.database.faults import of_stream
from tutormax_assets.errors import TutormaxError
from tutormax_assets.metrics.schemas import (
    LOGIN,
    MESSAGE_RESPONSE,
    SourceEvents,
    SourceSessions,
)
from tutormax_assets.source.arrow_stream import ArrowStreamError, batches
from tutormax_assets.source.contract import columns_read
from tutormax_assets.source.queries import (
    EVENTS,
    FEEDBACK,
    MOST_FEEDBACK_PER_SESSION,
    NULLABLE_FLAGS,
    OF_SESSIONS_READ,
    SESSIONS,
    UNKNOWN_FLAG,
)

Table = Literal["sessions", "tutor_events"]

ROWS_OF_A_PART = 500_000
"""Rows of a table that are looked at together; bounds the memory of what reads the parts."""

_MOST_PARTS = 256

USE_COPY = "adbc.postgresql.use_copy"

Streamed = tuple[list[pl.LazyFrame], dict[str, int]]
"""The parts of a table, and the number of rows of each table that is in them."""


class SourceError(TutormaxError):
    """The platform cannot be read, or a table is not as the contract has it."""

    affects_every_date = True


class SourceTimeoutError(SourceError):
    """A statement took too long; one that reads less may not."""

    affects_every_date = False


def _stream_schema(frame: type[dy.Schema], table: str) -> pl.Schema:
    """The columns of a source frame that come from a table."""
    schema = pl.Schema(frame)
    return pl.Schema({name: schema[name] for name in columns_read(frame, table)})


def _sessions_schema() -> pl.Schema:
    """Sessions as the query streams them: flags in one number."""
    schema = _stream_schema(SourceSessions, "sessions")
    return pl.Schema(
        {
            **{name: dtype for name, dtype in schema.items() if not isinstance(dtype, pl.Boolean)},
            "flags": pl.Int16(),
        }
    )


_SESSIONS = _sessions_schema()
_FEEDBACK = _stream_schema(SourceSessions, "student_feedback")
# A login has no id.
_EVENTS = pl.Schema(
    {name: dtype for name, dtype in pl.Schema(SourceEvents).items() if name != "event_type"}
)


def is_lost(connection: dbapi.Connection) -> bool:
    """Whether the server does not answer on a connection any more."""
    try:
        connection.rollback()
    except dbapi.Error:
        return True
    return False


def read_sessions(cursor: dbapi.Cursor, *, folder: Path, bound: Callable[[str], str]) -> Streamed:
    """``SourceSessions`` in parts, and how many sessions and feedback that is."""
    sessions_expected = _estimate(cursor, bound(SESSIONS))
    feedback = FEEDBACK
    if _estimate(cursor, FEEDBACK) > MOST_FEEDBACK_PER_SESSION * sessions_expected:
        feedback += OF_SESSIONS_READ
    part = pl.col("session_id").hash() % number_of_parts(sessions_expected)
    for name, query, schema in (
        ("sessions", bound(SESSIONS), _SESSIONS),
        ("student_feedback", bound(feedback), _FEEDBACK),
    ):
        files = pl.PartitionBy(folder / name, key=part.alias("part"), include_key=False)
        _stream(cursor, query, schema, files)
    parts = [
        _scan(of_sessions, _SESSIONS)
        .join(
            _scan(folder / "student_feedback" / of_sessions.name, _FEEDBACK),
            on="session_id",
            how="left",
        )
        .with_columns((pl.col("flags") % 2 == 1).alias("started"), *_nullable_flags())
        .select(SourceSessions.column_names())
        for of_sessions in sorted((folder / "sessions").glob("*"))
    ]
    rows = {name: _count(folder / name) for name in ("sessions", "student_feedback")}
    return parts or [SourceSessions.create_empty().lazy()], rows


def read_events(cursor: dbapi.Cursor, *, folder: Path, bound: Callable[[str], str]) -> Streamed:
    """``SourceEvents`` in parts, and how many events that is."""
    path = folder / "tutor_events"
    _stream(
        cursor,
        bound(EVENTS),
        _EVENTS,
        pl.PartitionBy(path, max_rows_per_file=ROWS_OF_A_PART),
    )
    event_type = pl.when(pl.col("event_id").is_null()).then(pl.lit(LOGIN))
    parts = [
        pl.scan_ipc(file)
        .with_columns(event_type.otherwise(pl.lit(MESSAGE_RESPONSE)).alias("event_type"))
        .select(SourceEvents.column_names())
        for file in sorted(path.glob("*"))
    ]
    return parts or [SourceEvents.create_empty().lazy()], {"tutor_events": _count(path)}


READERS: Mapping[Table, Callable[..., Streamed]] = {
    "sessions": read_sessions,
    "tutor_events": read_events,
}


def number_of_parts(rows: int) -> int:
    """Parts to split so many rows of a table into."""
    return min(max(-(-rows // ROWS_OF_A_PART), 1), _MOST_PARTS)


def _estimate(cursor: dbapi.Cursor, query: str) -> int:
    """How many rows the planner expects."""
    statement = cursor.adbc_statement
    # What is no query cannot be copied.
    statement.set_options(**{USE_COPY: "false"})
    try:
        cursor.execute(f"EXPLAIN (FORMAT JSON) {query}")
        [plan] = json.loads(pl.DataFrame(cursor.fetch_arrow()).to_series().ext.storage().item())
    finally:
        statement.set_options(**{USE_COPY: "true"})
    return int(plan["Plan"]["Plan Rows"])


def _nullable_flags() -> Iterator[pl.Expr]:
    for place, name in enumerate(NULLABLE_FLAGS):
        flag = pl.col("flags") // (2 * 4**place) % 4
        yield pl.when(flag != UNKNOWN_FLAG).then(flag == 1).alias(name)


def _scan(folder: Path, schema: pl.Schema) -> pl.LazyFrame:
    files = sorted(folder.glob("*"))
    return pl.scan_ipc(files) if files else pl.LazyFrame(schema=schema)


def _count(folder: Path) -> int:
    files = sorted(folder.glob("**/*.ipc"))
    return pl.scan_ipc(files).select(pl.len()).collect().item() if files else 0


def _stream(cursor: dbapi.Cursor, query: str, schema: pl.Schema, files: pl.PartitionBy) -> None:
    """Write the rows of a query to files, batch by batch."""
    cursor.execute(query)

    def generate(
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,
    ) -> Iterator[pl.DataFrame]:
        # Where every column is written, no selection is needed.
        for batch in batches(cursor.fetch_arrow()):
            expect_columns(batch, schema)
            yield batch

    try:
        rows = register_io_source(generate, schema=schema)
        rows.sink_ipc(files, mkdir=True, engine="streaming")
    except ArrowStreamError as error:
        raise of_stream(error, is_lost=is_lost(cursor.connection)) from error


def fetch_frame(cursor: dbapi.Cursor, query: str, schema: type[dy.Schema]) -> pl.DataFrame:
    """The result of a small query.

    Raises:
        SourceError: Its columns are not those of the schema.
    """
    cursor.execute(query)
    try:
        rows = pl.DataFrame(cursor.fetch_arrow())
    except pl.exceptions.ComputeError as error:
        raise of_stream(error, is_lost=is_lost(cursor.connection)) from error
    expect_columns(rows, pl.Schema(schema))
    return rows


def expect_columns(rows: pl.DataFrame, schema: pl.Schema) -> None:
    """Check the columns that were read.

    Raises:
        SourceError: They are not those of the schema.
    """
    for name, expected in schema.items():
        found = rows.schema[name]
        if found != expected:
            raise SourceError(f"column {name} was read as {found}; expected {expected}")
