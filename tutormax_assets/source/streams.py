"""Reading the result of a query as Arrow.

Sessions and their feedback are read apart and joined here, which costs server and client together
half of what the server's join costs. Both are split by the session's id, so that a part of the
joined rows is there at a time.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import dataframely as dy
import polars as pl
from adbc_driver_postgresql import dbapi

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
from tutormax_assets.source.packing import LONG_DELAY, PACKED, unpack_feedback, unpack_session
from tutormax_assets.source.queries import (
    MOST_FEEDBACK_PER_SESSION,
    OF_SESSIONS_READ,
    events_query,
    feedback_query,
    sessions_query,
)

Table = Literal["sessions", "tutor_events"]

ROWS_OF_A_PART = 500_000
"""Rows of a table that are looked at together; bounds the memory of what is made of them."""

_MOST_PARTS = 256

USE_COPY = "adbc.postgresql.use_copy"

Streamed = tuple[list[pl.LazyFrame], dict[str, int]]
"""The parts of a table, and the number of rows of each table that is in them."""


class HashesNotUniqueError(Exception):
    """Rows cannot be told apart by the hashes of their ids; the message says which."""


class SourceError(TutormaxError):
    """The platform cannot be read, or a table is not as the contract has it."""

    affects_every_date = True


class SourceTimeoutError(SourceError):
    """A statement took too long; one that reads less may not."""

    affects_every_date = False


_ID_COLUMNS = ("session_id", "tutor_id", "feedback_id", "feedback_tutor_id", "event_id")


def _schema(frame: type[dy.Schema], table: str, *, hashed: bool) -> pl.Schema:
    """The columns of a source frame that come from a table, as its query gives them."""
    schema = pl.Schema(frame)
    return pl.Schema(
        {
            name: pl.Int64() if hashed and name in _ID_COLUMNS else schema[name]
            for name in columns_read(frame, table)
        }
    )


def _sessions_schema(*, hashed: bool) -> pl.Schema:
    """Sessions as they are read: numbers and booleans in one."""
    schema = _schema(SourceSessions, "sessions", hashed=hashed)
    return pl.Schema(
        {
            **{
                name: dtype
                for name, dtype in schema.items()
                if not isinstance(dtype, pl.Boolean | pl.Int32)
            },
            PACKED: pl.Int64(),
            LONG_DELAY: pl.Int32(),
        }
    )


def _feedback_schema(*, hashed: bool) -> pl.Schema:
    if hashed:
        return pl.Schema({"session_id": pl.Int64(), PACKED: pl.Int64()})
    return _schema(SourceSessions, "student_feedback", hashed=False)


def _events_schema(*, hashed: bool) -> pl.Schema:
    schema = _schema(SourceEvents, "tutor_events", hashed=hashed)
    # A login has no id.
    return pl.Schema({name: dtype for name, dtype in schema.items() if name != "event_type"})


def is_lost(connection: dbapi.Connection) -> bool:
    """Whether the server does not answer on a connection any more."""
    try:
        connection.rollback()
    except dbapi.Error:
        return True
    return False


def read_sessions(cursor: dbapi.Cursor, *, bound: Callable[[str], str], hashed: bool) -> Streamed:
    """``SourceSessions`` in parts, and how many sessions and feedback that is.

    Args:
        cursor: Of a connection.
        bound: Puts its values into a query.
        hashed: Whether ids are read as hashes; that of a feedback is its session's then.

    Raises:
        HashesNotUniqueError: Two sessions have the same hash, or two feedbacks.
    """
    query, feedback_sql = sessions_query(hashed=hashed), feedback_query(hashed=hashed)
    sessions_expected = _estimate(cursor, bound(query))
    if _estimate(cursor, bound(feedback_sql)) > MOST_FEEDBACK_PER_SESSION * sessions_expected:
        feedback_sql += OF_SESSIONS_READ
    sessions = _read(cursor, bound(query), _sessions_schema(hashed=hashed))
    feedback = _read(cursor, bound(feedback_sql), _feedback_schema(hashed=hashed))
    if hashed:
        expect_unique("sessions", sessions["session_id"])
        expect_unique("student_feedback", feedback["session_id"].drop_nulls())
        feedback = feedback.with_columns(feedback_id="session_id")
    rows = {"sessions": len(sessions), "student_feedback": len(feedback)}
    return _joined(sessions, feedback), rows


def _joined(sessions: pl.DataFrame, feedback: pl.DataFrame) -> list[pl.LazyFrame]:
    """Sessions with their feedback, in parts."""
    count = number_of_parts(len(sessions))
    part = (pl.col("session_id").hash() % count).cast(pl.UInt8).alias("part")
    of_sessions, of_feedback = (rows.with_columns(part).lazy() for rows in (sessions, feedback))
    return [
        of_sessions.filter(part=number)
        .with_columns(*unpack_session())
        .drop(PACKED, LONG_DELAY)
        .join(of_feedback.filter(part=number).drop("part"), on="session_id", how="left")
        .with_columns(*(unpack_feedback() if PACKED in feedback.columns else ()))
        .select(SourceSessions.column_names())
        for number in range(count)
    ]


def expect_unique(table: str, hashes: pl.Series) -> None:
    """Check that no two rows of a table have the same hash.

    Raises:
        HashesNotUniqueError: Two have.
    """
    if hashes.n_unique() != len(hashes):
        raise HashesNotUniqueError(f"two rows of {table} have the same hash")


def read_events(cursor: dbapi.Cursor, *, bound: Callable[[str], str], hashed: bool) -> Streamed:
    """``SourceEvents`` in parts, and how many events that is; arguments as of ``read_sessions``."""
    event_type = pl.when(pl.col("event_id").is_null()).then(pl.lit(LOGIN))
    parts, rows = [], 0
    for part in _in_parts(
        cursor, bound(events_query(hashed=hashed)), _events_schema(hashed=hashed)
    ):
        rows += len(part)
        parts.append(
            part.lazy()
            .with_columns(event_type.otherwise(pl.lit(MESSAGE_RESPONSE)).alias("event_type"))
            .select(SourceEvents.column_names())
        )
    return parts, {"tutor_events": rows}


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


def _read(cursor: dbapi.Cursor, query: str, schema: pl.Schema) -> pl.DataFrame:
    """The rows of a query."""
    return pl.concat(_in_parts(cursor, query, schema))


def _in_parts(cursor: dbapi.Cursor, query: str, schema: pl.Schema) -> Iterator[pl.DataFrame]:
    """The rows of a query in parts, at least one."""
    cursor.execute(query)
    part = pl.DataFrame(schema=schema)
    try:
        for batch in batches(cursor.fetch_arrow()):
            expect_columns(batch, schema)
            if len(part) >= ROWS_OF_A_PART:
                yield part
                part = batch
            else:
                part = part.vstack(batch)
    except ArrowStreamError as error:
        raise of_stream(error, is_lost=is_lost(cursor.connection)) from error
    yield part


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
