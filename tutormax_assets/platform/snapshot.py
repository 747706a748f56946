"""Reading the platform: only the columns that are needed, as Arrow, in one consistent snapshot.

The transaction is REPEATABLE READ and READ ONLY, so that roster, sessions, feedback and events are
of the same instant. Its locks are those of any SELECT: no INSERT, UPDATE or DELETE waits for them.

A statement with bound parameters makes the driver leave the binary COPY protocol, which doubles
its time. So the bounds are bound to transaction-local settings first, and the query reads those.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from time import perf_counter
from typing import Literal

import dataframely as dy
import polars as pl
import sqlalchemy as sa
from adbc_driver_postgresql import dbapi

from tutormax_assets.metrics.schemas import SourceEvents, SourceSessions, SourceTutors
from tutormax_assets.platform.connection import Timeouts, conninfo, describe
from tutormax_assets.platform.contract import (
    FOUND_COLUMNS,
    NEEDED_COLUMNS,
    FoundColumn,
    breaches,
)
from tutormax_assets.platform.faults import of_stream, reason

_TUTORS = """
SELECT t.tutor_id::text, t.status::text
FROM tutors AS t
WHERE true
"""


def _whole_number(column: str) -> str:
    # Of a bigint, what does not fit stays on the same side of whatever the contract asks.
    return (
        f"CASE WHEN {column} < -1 THEN -1 WHEN {column} > 2147483647 THEN 2147483647"
        f" ELSE {column} END::integer"
    )


_SESSIONS = f"""
SELECT
    t.session_id,
    t.tutor_id,
    {_whole_number("t.session_number")} AS session_number,
    t.scheduled_start,
    t.actual_start IS NOT NULL AS started,
    t.tutor_initiated_reschedule,
    t.no_show,
    {_whole_number("t.late_start_minutes")} AS late_start_minutes,
    t.engagement_score::double precision,
    t.learning_objectives_met,
    f.feedback_id,
    f.tutor_id AS feedback_tutor_id,
    {_whole_number("f.overall_rating")} AS overall_rating
FROM sessions AS t
LEFT JOIN student_feedback AS f ON f.session_id = t.session_id
WHERE t.scheduled_start >= current_setting('tutormax.start')::timestamptz
    AND t.scheduled_start < current_setting('tutormax.end')::timestamptz
"""  # noqa: S608 - constants only

_EVENTS = """
SELECT
    t.event_id,
    t.tutor_id,
    t.event_type::text,
    t.event_timestamp,
    CASE
        WHEN t.event_type = 'message_response'
        THEN (t.metadata -> 'response_time_minutes')::text
    END AS response_time_minutes
FROM tutor_events AS t
WHERE t.event_timestamp >= current_setting('tutormax.start')::timestamptz
    AND t.event_timestamp < current_setting('tutormax.end')::timestamptz
    AND t.event_type IN ('login', 'message_response')
"""

_NEWEST = {
    "sessions": """
SELECT max(scheduled_start) AS newest
FROM sessions
WHERE scheduled_start < current_setting('tutormax.end')::timestamptz
""",
    "tutor_events": """
SELECT max(event_timestamp) AS newest
FROM tutor_events
WHERE event_timestamp < current_setting('tutormax.end')::timestamptz
    AND event_type IN ('login', 'message_response')
""",
}

_INSTANT = """
SELECT transaction_timestamp() AS read_at, pg_current_snapshot()::text AS snapshot
"""

_IS_EMPTY = {
    name: f"SELECT NOT EXISTS (SELECT FROM {name}) AS is_empty"  # noqa: S608 - constants only
    for name in NEEDED_COLUMNS
}

_ONLY_TUTORS = """
    AND t.tutor_id IN (
        SELECT jsonb_array_elements_text(current_setting('tutormax.tutor_ids')::jsonb)
    )
"""


Table = Literal["tutors", "sessions", "tutor_events"]


class SourceError(Exception):
    """The platform cannot be read, or a table is not as the contract has it."""


@dataclass(frozen=True)
class Source:
    """Where the platform is read, and how long a statement may take there."""

    url: sa.URL
    timeouts: Timeouts = field(default_factory=Timeouts)


@dataclass(frozen=True)
class PlatformRows:
    """What the platform held at one instant.

    Attributes:
        tutors: ``SourceTutors``.
        sessions: ``SourceSessions``.
        events: ``SourceEvents``.
        read_at: When the transaction began, in UTC.
        snapshot: The transactions that it saw, as PostgreSQL's type ``pg_snapshot`` writes them.
        seconds: How long each table took.
        empty_tables: Tables that were read and hold no row at all, whatever its date.
    """

    tutors: pl.DataFrame
    sessions: pl.DataFrame
    events: pl.DataFrame
    read_at: datetime
    snapshot: str
    seconds: dict[Table, float]
    empty_tables: tuple[str, ...]

    def count(self, table: Table) -> int:
        """Number of rows that were read of a table."""
        frames = {"tutors": self.tutors, "sessions": self.sessions, "tutor_events": self.events}
        return len(frames[table])


def read(
    source: Source,
    *,
    tables: Collection[Table] = ("tutors", "sessions", "tutor_events"),
    start: datetime,
    end: datetime,
    tutor_ids: Sequence[str] = (),
) -> PlatformRows:
    """Tutors, and sessions with their feedback and events in ``[start, end)``, of one snapshot.

    Args:
        source: Where to read.
        tables: What is wanted; the frames of the others are empty.
        start: First instant of sessions and events.
        end: First instant after them.
        tutor_ids: Only rows of these tutors; all when empty.

    Raises:
        SourceError: The platform cannot be read, ``tutors`` is empty, or a table is not as the
            contract has it. Its cause tells whether to try again.
    """
    seconds: dict[Table, float] = {}

    def fetch(table: Table, query: str, schema: type[dy.Schema]) -> pl.DataFrame:
        if table not in tables:
            return schema.create_empty()
        started = perf_counter()
        rows = _fetch(cursor, query + _ONLY_TUTORS if tutor_ids else query, schema)
        seconds[table] = perf_counter() - started
        return rows

    with _snapshot(source, start=start, end=end, tutor_ids=tutor_ids) as cursor:
        read_at, snapshot = _fetch(cursor, _INSTANT, _Instant).row(0)
        _check_contract(cursor, source)
        tutors = fetch("tutors", _TUTORS, SourceTutors)
        sessions = fetch("sessions", _SESSIONS, SourceSessions)
        events = fetch("tutor_events", _EVENTS, SourceEvents)
        suspects = {
            "tutors": tutors.is_empty(),
            "sessions": sessions.is_empty(),
            "student_feedback": sessions["feedback_id"].is_null().all(),
            "tutor_events": events.is_empty(),
        }
        empty_tables = tuple(
            name
            for name, is_suspect in suspects.items()
            if is_suspect
            and (name in tables or (name == "student_feedback" and "sessions" in tables))
            and _fetch(cursor, _IS_EMPTY[name], _IsEmpty).item()
        )
    if "tutors" in empty_tables:
        raise SourceError(
            f"The platform at {describe(source.url)} cannot be used: table tutors: found no row,"
            " expected at least one tutor. See that TUTORMAX_SOURCE_URL, or else"
            " TUTORMAX_DATABASE_URL, leads to the platform's database and that its user sees the"
            " rows."
        )
    return PlatformRows(tutors, sessions, events, read_at, snapshot, seconds, empty_tables)


def newest(
    source: Source, table: Literal["sessions", "tutor_events"], *, before: datetime
) -> datetime | None:
    """The instant of the newest session, login or message response before another instant.

    Returns:
        The instant in UTC, or none where there is no such row.

    Raises:
        SourceError: The platform cannot be read.
    """
    with _snapshot(source, end=before) as cursor:
        found: datetime | None = _fetch(cursor, _NEWEST[table], _Newest).item()
        return found


def unknown_tutors(source: Source, tutor_ids: Sequence[str]) -> list[str]:
    """Those of the ids that are not in the platform's tutors, sorted.

    Raises:
        SourceError: The platform cannot be read.
    """
    if not tutor_ids:
        return []
    with _snapshot(source, tutor_ids=tutor_ids) as cursor:
        known = _fetch(cursor, _TUTORS + _ONLY_TUTORS, SourceTutors)
    return sorted(set(tutor_ids) - set(known["tutor_id"]))


class _Newest(dy.Schema):
    newest = dy.Datetime(time_zone="UTC", nullable=True)


class _Instant(dy.Schema):
    read_at = dy.Datetime(time_zone="UTC")
    snapshot = dy.String()


class _IsEmpty(dy.Schema):
    is_empty = dy.Bool()


class _FoundColumns(dy.Schema):
    table_name = dy.String()
    column_name = dy.String(nullable=True)
    type = dy.String(nullable=True)
    is_enum = dy.Bool(nullable=True)
    readable = dy.Bool()


@contextmanager
def _snapshot(
    source: Source,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    tutor_ids: Sequence[str] = (),
) -> Iterator[dbapi.Cursor]:
    limits = source.timeouts
    settings = {
        "statement_timeout": f"{limits.statement_seconds}s",
        "lock_timeout": f"{limits.lock_seconds}s",
        "idle_in_transaction_session_timeout": f"{limits.statement_seconds}s",
        "tutormax.start": start.isoformat() if start else "",
        "tutormax.end": end.isoformat() if end else "",
        "tutormax.tutor_ids": json.dumps(list(tutor_ids)),
    }
    set_all = ", ".join(f"set_config('{name}', ${n}, true)" for n, name in enumerate(settings, 1))
    try:
        with dbapi.connect(conninfo(source.url)) as connection, connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            cursor.execute(f"SELECT {set_all}", tuple(settings.values()))
            yield cursor
    except dbapi.Error as error:
        raise SourceError(
            f"The platform at {describe(source.url)} cannot be read: {reason(error)}."
            " `tutormax db status` shows what is there."
        ) from error


def _check_contract(cursor: dbapi.Cursor, source: Source) -> None:
    found = _fetch(cursor, FOUND_COLUMNS, _FoundColumns)
    if found.is_empty():
        raise SourceError(
            f"The platform at {describe(source.url)} cannot be read: found none of the tables"
            f" {', '.join(NEEDED_COLUMNS)}, or no right to look into their schema; expected the"
            " tutoring platform's database. `tutormax db status` shows what is there."
        )
    clauses = [clause for _, clause in breaches([FoundColumn(*row) for row in found.iter_rows()])]
    if clauses:
        raise SourceError(
            f"The platform at {describe(source.url)} cannot be read: {'; '.join(clauses)}."
            " `tutormax db status` shows what is there, `tutormax db roles` prints the rights that"
            " are needed."
        )


def _is_lost(connection: dbapi.Connection) -> bool:
    try:
        connection.rollback()
    except dbapi.Error:
        return True
    return False


def _fetch(cursor: dbapi.Cursor, query: str, schema: type[dy.Schema]) -> pl.DataFrame:
    cursor.execute(query)
    try:
        rows = pl.DataFrame(cursor.fetch_arrow())
    except pl.exceptions.ComputeError as error:
        raise of_stream(error, is_lost=_is_lost(cursor.connection)) from error
    for name, expected in pl.Schema(schema).items():
        if rows.schema[name] != expected:
            raise SourceError(f"column {name} was read as {rows.schema[name]}; expected {expected}")
    return rows
