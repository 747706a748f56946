"""Reading the platform: only the columns that are needed, as Arrow, in one consistent snapshot.

The transaction is REPEATABLE READ and READ ONLY, so that roster, sessions, feedback and events are
of the same instant. Its locks are those of any SELECT: no INSERT, UPDATE or DELETE waits for them.

A statement with bound parameters makes the driver leave the binary COPY protocol, which doubles
its time. So ids are bound to a transaction-local setting first, which the query reads; instants are
bound by the client, since the server would read a setting anew for each row.

Rows stream from the server into files, so that memory does not grow with them. Sessions and their
feedback are read apart and joined here, which costs server and client together half of what the
server's join costs. Both are split by the session's id, and a part of each fits into memory. Events
are read meanwhile, by another connection that is given the snapshot of the first.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal, LiteralString

import dataframely as dy
import polars as pl
import sqlalchemy as sa
from adbc_driver_postgresql import dbapi
from polars.io.plugins import register_io_source
from psycopg import sql

from tutormax_assets.database.connection import (
    Timeouts,
    conninfo,
    describe,
    transaction_limits,
)
from tutormax_assets.database.faults import is_timeout, of_stream, reason, sqlstate
from tutormax_assets.errors import TutormaxError
from tutormax_assets.metrics.quality import contradictory_tutors
from tutormax_assets.metrics.schemas import (
    LOGIN,
    MESSAGE_RESPONSE,
    SourceEvents,
    SourceSessions,
    SourceTutors,
)
from tutormax_assets.source.arrow_stream import ArrowStreamError, batches
from tutormax_assets.source.contract import FOUND_COLUMNS, NEEDED_COLUMNS, FoundColumn, breaches
from tutormax_assets.storage.shards import ALL_TUTORS, TutorRange

_TUTORS = """
SELECT t.tutor_id::text, t.status::text
FROM tutors AS t
"""


def _whole_number(column: str) -> str:
    # Of a bigint, what does not fit stays on the same side of whatever the contract asks.
    return (
        f"CASE WHEN {column} < -1 THEN -1 WHEN {column} > 2147483647 THEN 2147483647"
        f" ELSE {column} END::integer"
    )


# PostgreSQL refuses a numeric value that is too large or too small for a double, and repeats it in
# its message. Here it stays on its side of the contract; NaN counts as larger than any number.
_NUMERIC_SCORE = """
    CASE
        WHEN t.engagement_score > 1e300 THEN 'Infinity'
        WHEN t.engagement_score < -1e300 THEN '-Infinity'
        WHEN abs(t.engagement_score) < 1e-300 THEN sign(t.engagement_score) * 1e-300
        ELSE t.engagement_score
    END::double precision
"""
_SCORE = "t.engagement_score::double precision"

_NULLABLE_FLAGS = ("tutor_initiated_reschedule", "no_show", "learning_objectives_met")
_UNKNOWN_FLAG = 2

# The driver spends more on a field than the server, so four booleans travel as one number: a bit
# for the first one and two bits, the higher one for null, for each of the others.
_FLAGS = " + ".join(
    (
        "(t.actual_start IS NOT NULL)::integer",
        *(
            f"{2 * 4**place} * coalesce(t.{column}::integer, {_UNKNOWN_FLAG})"
            for place, column in enumerate(_NULLABLE_FLAGS)
        ),
    )
)

_OF_WINDOW = "t.scheduled_start >= {start} AND t.scheduled_start < {end}"

_SESSIONS = f"""
SELECT
    coalesce(t.session_id::text, '') AS session_id,
    coalesce(t.tutor_id::text, '') AS tutor_id,
    {_whole_number("t.session_number")} AS session_number,
    t.scheduled_start,
    ({_FLAGS})::smallint AS flags,
    {_whole_number("t.late_start_minutes")} AS late_start_minutes,
    {{score}} AS engagement_score
FROM sessions AS t
WHERE {_OF_WINDOW} {{only_tutors}}
"""  # noqa: S608 - constants only

_FEEDBACK = f"""
SELECT
    f.session_id::text,
    coalesce(f.feedback_id::text, '') AS feedback_id,
    f.tutor_id::text AS feedback_tutor_id,
    {_whole_number("f.overall_rating")} AS overall_rating
FROM student_feedback AS f
"""  # noqa: S608 - constants only

# Feedback has no column that tells when its session is. Where most of it is of other sessions the
# server finds what is wanted; elsewhere that join costs more than it saves.
_OF_SESSIONS_READ = f"""
WHERE f.session_id IN (SELECT t.session_id FROM sessions AS t WHERE {_OF_WINDOW} {{only_tutors}})
"""  # noqa: S608 - constants only
_MOST_FEEDBACK_PER_SESSION = 2

# Only the tutor of a login can be broken, so its id is of no use otherwise; that it has none says
# the type. An enum without one of the labels is compared as text.
_EVENTS = """
SELECT
    CASE
        WHEN t.event_type::text = 'message_response' OR t.tutor_id IS NULL
        THEN coalesce(t.event_id::text, '')
    END AS event_id,
    coalesce(t.tutor_id::text, '') AS tutor_id,
    t.event_timestamp,
    CASE
        WHEN t.event_type::text = 'message_response'
        THEN (t.metadata -> 'response_time_minutes')::text
    END AS response_time_minutes
FROM tutor_events AS t
WHERE t.event_timestamp >= {start}
    AND t.event_timestamp < {end}
    AND t.event_type::text IN ('login', 'message_response')
    {only_tutors}
"""

# What lies before the first year, as minus infinity does, has no date here.
_NEWEST = {
    "sessions": """
SELECT max(scheduled_start) AS newest
FROM sessions
WHERE scheduled_start < {end} AND scheduled_start >= '0001-01-02'
""",
    "tutor_events": """
SELECT max(event_timestamp) AS newest
FROM tutor_events
WHERE event_timestamp < {end} AND event_timestamp >= '0001-01-02'
    AND event_type::text IN ('login', 'message_response')
""",
}

_INSTANT = """
SELECT transaction_timestamp() AS read_at, pg_current_snapshot()::text AS snapshot
"""

_ENCODING = "SELECT current_setting('server_encoding') AS encoding"

# Who shares a snapshot waits for the others, however long they read.
_SHARED = """
SELECT pg_export_snapshot() AS name
FROM (SELECT set_config('idle_in_transaction_session_timeout', '0', true)) AS patient
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


# Whether an index keeps an id unique, among all rows that a query of the table sees.
_IS_UNIQUE = """
SELECT bool_and(EXISTS (
    SELECT FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indrelid
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
    WHERE c.oid = to_regclass(id.table_name) AND a.attname = id.column_name
        AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indpred IS NULL
        AND NOT (c.relkind = 'r' AND c.relhassubclass)
)) AS is_unique
FROM (VALUES
    ('sessions', 'session_id'),
    ('student_feedback', 'session_id'),
    ('student_feedback', 'feedback_id')
) AS id (table_name, column_name)
"""

ROWS_OF_A_PART = 500_000
"""Rows of a table that are looked at together; bounds the memory of what reads the parts."""

_MOST_PARTS = 256
# Which one it is depends on the version, and on whether the transaction ended just now.
_SNAPSHOT_IS_GONE = ("22023", "42704", "55000")
_SECONDS_TO_CONNECT = 2
_UTF8 = "UTF8"
_USE_COPY = "adbc.postgresql.use_copy"

Table = Literal["sessions", "tutor_events"]


_Streamed = tuple[list[pl.LazyFrame], dict[str, int]]
"""The parts of a table, and the number of rows of each table that is in them."""


class SourceError(TutormaxError):
    """The platform cannot be read, or a table is not as the contract has it."""

    affects_every_date = True


class SourceTimeoutError(SourceError):
    """A statement took too long; one that reads less may not."""

    affects_every_date = False


class SnapshotGoneError(SourceError):
    """What the run saw cannot be seen any more by others; it can look again."""

    may_pass = True
    affects_every_date = False


@dataclass(frozen=True)
class Source:
    """Where the platform is read, and how long a statement may take there."""

    url: sa.URL
    timeouts: Timeouts = field(default_factory=Timeouts)


@dataclass(frozen=True)
class PlatformRows:
    """Rows of the platform, which are read from the files they wait in when they are collected.

    Attributes:
        sessions: ``SourceSessions`` in parts, at least one; all rows of a session are in one part.
        events: ``SourceEvents`` in parts, at least one.
        count: Number of rows of each table that was read.
        seconds: How long the reading took.
    """

    sessions: Sequence[pl.LazyFrame]
    events: Sequence[pl.LazyFrame]
    count: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class View:
    """The platform at one instant, for as long as the block of ``open_view`` lasts.

    Other processes see the same instant through ``share``, by a connection of their own.

    Attributes:
        source: Where it is read.
        tutor_ids: Only sessions and events of these tutors; all when empty.
        read_at: When its transaction began, in UTC.
        snapshot: The transactions that it sees, as PostgreSQL's type ``pg_snapshot`` writes them.
        ids_are_unique: Whether the database sees to it that a session, and a feedback, is there
            once.
        is_utf8: Whether the database's text is UTF-8, so that its bytes have our order.
        score_is_numeric: Whether an engagement score may be out of a double's range.
    """

    source: Source
    tutor_ids: tuple[str, ...]
    read_at: datetime
    snapshot: str
    ids_are_unique: bool
    is_utf8: bool
    score_is_numeric: bool
    _cursor: dbapi.Cursor | None = None
    _name: str | None = None

    def tutors(self) -> pl.DataFrame:
        """``SourceTutors``: all of them, whichever tutors the view is about.

        A view of the platform may have an id twice, or none.

        Raises:
            SourceError: The platform cannot be read, has no tutors, or has one with two statuses.
        """
        with self._reading() as cursor:
            tutors = _fetch(cursor, _bound(_TUTORS), SourceTutors)
            if tutors.is_empty():
                raise SourceError(
                    f"The platform at {describe(self.source.url)} cannot be used: table tutors:"
                    " found no row, expected at least one tutor. See that TUTORMAX_SOURCE_URL, or"
                    " else TUTORMAX_DATABASE_URL, leads to the platform's database and that its"
                    " user sees the rows."
                )
        if again := contradictory_tutors(tutors):
            raise SourceError(
                f"The platform at {describe(self.source.url)} cannot be used: table tutors: found"
                f" more than one status for {len(again)} tutors, such as {again[0]}; expected one"
                " row per tutor. Correct the table or view."
            )
        return tutors

    def rows(
        self,
        folder: Path,
        *,
        tables: Collection[Table] = ("sessions", "tutor_events"),
        start: datetime,
        end: datetime,
        tutor_range: TutorRange = ALL_TUTORS,
    ) -> PlatformRows:
        """Sessions with their feedback, and events, in ``[start, end)``.

        Args:
            folder: Where the parts are kept. What it holds is removed first.
            tables: What is wanted; the frames of the others are empty.
            start: First instant.
            end: First instant after them.
            tutor_range: Only rows of these tutors.

        Raises:
            SourceError: The platform cannot be read. Its cause tells whether to try again.
        """
        began = perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        bound = partial(
            _bound,
            tutor_ids=self.tutor_ids,
            tutor_range=tutor_range,
            is_utf8=self.is_utf8,
            score=_NUMERIC_SCORE if self.score_is_numeric else _SCORE,
            start=start,
            end=end,
        )
        parts: dict[Table, Sequence[pl.LazyFrame]] = {
            "sessions": [SourceSessions.create_empty().lazy()],
            "tutor_events": [SourceEvents.create_empty().lazy()],
        }
        count: dict[str, int] = {}
        readers = {
            table: partial(read_table, folder=folder, bound=bound)
            for table, read_table in _READERS.items()
            if table in tables
        }
        with self._reading() as cursor:
            streamed = _at_once(self.source, cursor, readers, self.tutor_ids)
        for table, (of_table, rows) in streamed.items():
            parts[table] = of_table
            count |= rows
        return PlatformRows(parts["sessions"], parts["tutor_events"], count, perf_counter() - began)

    def empty_tables(self, names: Iterable[str]) -> list[str]:
        """Those of the source tables that hold no row at all, whatever its date.

        Raises:
            SourceError: The platform cannot be read.
        """
        with self._reading() as cursor:
            return [name for name in names if _fetch(cursor, _IS_EMPTY[name], _IsEmpty).item()]

    @contextmanager
    def _reading(self) -> Iterator[dbapi.Cursor]:
        if self._cursor is None:
            with _snapshot(self.source, tutor_ids=self.tutor_ids, shared=self._name) as cursor:
                yield cursor
            return
        with _told(self.source):
            yield self._cursor

    @property
    def is_received(self) -> bool:
        """Whether it came from another process; a reading that failed may be tried again then."""
        return self._cursor is None

    def share(self) -> "SharedView":
        """The view for other processes, for as long as this one is open.

        Raises:
            SourceError: The server does not share the view.
        """
        with self._reading() as cursor:
            # It is meant to be idle for as long as others read.
            cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            name = _fetch(cursor, _SHARED, _Shared).item()
        return SharedView(
            self.tutor_ids,
            self.read_at,
            self.snapshot,
            self.ids_are_unique,
            self.is_utf8,
            self.score_is_numeric,
            name,
        )


@dataclass(frozen=True)
class SharedView:
    """A view for another process, which says itself where the platform is: no password travels.

    Attributes:
        name: The server's name of the snapshot. All others are those of the view.
    """

    tutor_ids: tuple[str, ...]
    read_at: datetime
    snapshot: str
    ids_are_unique: bool
    is_utf8: bool
    score_is_numeric: bool
    name: str

    def open(self, source: Source) -> View:
        """The view in this process, which connects whenever it reads."""
        return View(
            source,
            self.tutor_ids,
            self.read_at,
            self.snapshot,
            self.ids_are_unique,
            self.is_utf8,
            self.score_is_numeric,
            _name=self.name,
        )


@contextmanager
def open_view(source: Source, *, tutor_ids: Sequence[str] = ()) -> Iterator[View]:
    """A view of the platform, of some tutors or of all.

    Raises:
        SourceError: The platform cannot be read, or a table is not as the contract has it. Its
            cause tells whether to try again.
    """
    with _snapshot(source, tutor_ids=tutor_ids) as cursor:
        read_at, snapshot = _fetch(cursor, _INSTANT, _Instant).row(0)
        types = _check_contract(cursor, source)
        yield View(
            source,
            tuple(tutor_ids),
            read_at,
            snapshot,
            ids_are_unique=bool(_fetch(cursor, _IS_UNIQUE, _IsUnique).item()),
            is_utf8=_fetch(cursor, _ENCODING, _Encoding).item() == _UTF8,
            score_is_numeric=types["sessions", "engagement_score"] == "numeric",
            _cursor=cursor,
        )


def newest(
    source: Source, table: Literal["sessions", "tutor_events"], *, before: datetime
) -> datetime | None:
    """The instant of the newest session, login or message response before another instant.

    Returns:
        The instant in UTC, or none where there is no such row.

    Raises:
        SourceError: The platform cannot be read.
    """
    query = _bound(_NEWEST[table], end=before)
    with _snapshot(source) as cursor:
        found: datetime | None = _fetch(cursor, query, _Newest).item()
        return found


def unknown_tutors(source: Source, tutor_ids: Sequence[str]) -> list[str]:
    """Those of the ids that are not in the platform's tutors, sorted.

    Raises:
        SourceError: The platform cannot be read.
    """
    if not tutor_ids:
        return []
    with _snapshot(source) as cursor:
        # To have the server look for each of very many ids takes ten times as long as all tutors.
        known = _fetch(cursor, _bound(_TUTORS), SourceTutors)
    # An empty id stands for none.
    return sorted(set(tutor_ids) - (set(known["tutor_id"]) - {""}))


class _Newest(dy.Schema):
    newest = dy.Datetime(time_zone="UTC", nullable=True)


class _Instant(dy.Schema):
    read_at = dy.Datetime(time_zone="UTC")
    snapshot = dy.String()


class _Encoding(dy.Schema):
    encoding = dy.String()


class _IsEmpty(dy.Schema):
    is_empty = dy.Bool()


class _Shared(dy.Schema):
    name = dy.String()


class _IsUnique(dy.Schema):
    is_unique = dy.Bool()


class _StreamedSessions(dy.Schema):
    session_id = dy.String()
    tutor_id = dy.String()
    session_number = dy.Int32(nullable=True)
    scheduled_start = dy.Datetime(time_zone="UTC")
    flags = dy.Int16()
    late_start_minutes = dy.Int32(nullable=True)
    engagement_score = dy.Float64(nullable=True, allow_nan=True, allow_inf=True)


class _StreamedFeedback(dy.Schema):
    session_id = dy.String()
    feedback_id = dy.String()
    feedback_tutor_id = dy.String()
    overall_rating = dy.Int32(nullable=True)


class _StreamedEvents(dy.Schema):
    event_id = dy.String(nullable=True)
    tutor_id = dy.String()
    event_timestamp = dy.Datetime(time_zone="UTC")
    response_time_minutes = dy.String(nullable=True)


class _FoundColumns(dy.Schema):
    table_name = dy.String()
    column_name = dy.String(nullable=True)
    type = dy.String(nullable=True)
    is_enum = dy.Bool(nullable=True)
    readable = dy.Bool()


@contextmanager
def _snapshot(
    source: Source, *, tutor_ids: Sequence[str] = (), shared: str | None = None
) -> Iterator[dbapi.Cursor]:
    """A transaction that reads; of the given tutors, and in a snapshot that another one shares."""
    limits = transaction_limits(source.timeouts)
    set_all = ", ".join(f"set_config('{name}', ${n}, true)" for n, name in enumerate(limits, 1))
    with (
        _told(source),
        dbapi.connect(conninfo(source.url)) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        if shared is not None:
            _take_part(cursor, source, shared)
        cursor.execute(f"SELECT {set_all}", tuple(limits.values()))
        if tutor_ids:
            # Not in ASCII: the server has escapes of its own encoding's characters only.
            held = json.dumps(_held(cursor, tutor_ids), ensure_ascii=False)
            cursor.execute("SELECT set_config('tutormax.tutor_ids', $1, true)", (held,))
        yield cursor


def _held(cursor: dbapi.Cursor, tutor_ids: Sequence[str]) -> list[str]:
    """Those of the ids that the database's encoding has all characters of."""
    others = [tutor_id for tutor_id in tutor_ids if not tutor_id.isascii()]
    if not others or _fetch(cursor, _ENCODING, _Encoding).item() == _UTF8:
        return list(tutor_ids)
    # What the encoding lacks PostgreSQL does not take even to compare it, so that is done here.
    known = set(_fetch(cursor, _bound(_TUTORS), SourceTutors)["tutor_id"])
    return [tutor_id for tutor_id in tutor_ids if tutor_id.isascii() or tutor_id in known]


def _take_part(cursor: dbapi.Cursor, source: Source, shared: str) -> None:
    """See what the transaction sees that has exported its snapshot under this name."""
    given = sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(shared))
    try:
        cursor.execute(given.as_string(None))
    except dbapi.Error as error:
        if sqlstate(error) not in _SNAPSHOT_IS_GONE:
            raise
        raise SnapshotGoneError(
            f"The platform at {describe(source.url)} cannot be read: {reason(error)}. The"
            " transaction of the run has ended, as when the server restarts, or this connection"
            " leads to another server, as a pooler may do."
        ) from error


@contextmanager
def _told(source: Source) -> Iterator[None]:
    try:
        yield
    except dbapi.Error as error:
        kind = SourceTimeoutError if is_timeout(error) else SourceError
        raise kind(
            f"The platform at {describe(source.url)} cannot be read: {reason(error)}."
            " `tutormax db status` shows what is there."
        ) from error


def _check_contract(cursor: dbapi.Cursor, source: Source) -> dict[tuple[str, str | None], str]:
    """The types of the columns, by table and name."""
    found = _fetch(cursor, FOUND_COLUMNS, _FoundColumns)
    if found.is_empty():
        raise SourceError(
            f"The platform at {describe(source.url)} cannot be read: found none of the tables"
            f" {', '.join(NEEDED_COLUMNS)}, or no right to look into their schema; expected the"
            " tutoring platform's database. `tutormax db status` shows what is there."
        )
    columns = [FoundColumn(*row) for row in found.iter_rows()]
    clauses = [clause for _, clause in breaches(columns)]
    if clauses:
        raise SourceError(
            f"The platform at {describe(source.url)} cannot be read: {'; '.join(clauses)}."
            " `tutormax db status` shows what is there, `tutormax db roles` prints the rights that"
            " are needed."
        )
    return {(column.table_name, column.column_name): column.type or "" for column in columns}


def _bound(
    query: str,
    *,
    tutor_ids: Sequence[str] = (),
    tutor_range: TutorRange = ALL_TUTORS,
    is_utf8: bool = True,
    score: LiteralString = _SCORE,
    **instants: datetime,
) -> str:
    return (
        sql.SQL(query)
        .format(
            only_tutors=sql.SQL(_ONLY_TUTORS if tutor_ids else "")
            + _of_range(tutor_range, is_utf8=is_utf8),
            score=sql.SQL(score),
            **{name: sql.Literal(instant) for name, instant in instants.items()},
        )
        .as_string(None)
    )


def _of_range(tutor_range: TutorRange, *, is_utf8: bool) -> sql.Composed:
    """The condition that a tutor is of the range, in the order of the bytes of UTF-8."""
    tutor_id = sql.SQL(
        't.tutor_id::text COLLATE "C"' if is_utf8 else "convert_to(t.tutor_id::text, 'UTF8')"
    )
    conditions = []
    for operator, bound in ((">=", tutor_range.lower), ("<", tutor_range.upper)):
        if bound is not None:
            literal = sql.Literal(bound if is_utf8 else bound.encode())
            conditions.append(sql.SQL(f"{{}} {operator} {{}}").format(tutor_id, literal))
    condition = sql.SQL(" AND ").join(conditions)
    if tutor_range.lower is None and conditions:
        # Rows without a tutor are of one range, too.
        condition = sql.SQL("({} OR t.tutor_id IS NULL)").format(condition)
    return sql.SQL(" AND {}").format(condition) if conditions else sql.Composed([])


def _is_lost(connection: dbapi.Connection) -> bool:
    try:
        connection.rollback()
    except dbapi.Error:
        return True
    return False


def _at_once(
    source: Source,
    cursor: dbapi.Cursor,
    readers: Mapping[Table, Callable[[dbapi.Cursor], _Streamed]],
    tutor_ids: Sequence[str],
) -> dict[Table, _Streamed]:
    """What each reader gives; two read at once where the server gives us two connections.

    It need not: a role may have a limit, and a pooler may lead to another server, which does not
    know the snapshot.
    """
    if len(readers) < 2:
        return {table: read_table(cursor) for table, read_table in readers.items()}
    shared = _fetch(cursor, _SHARED, _Shared).item()
    (first, read_first), (second, read_second) = readers.items()
    opened: Future[dbapi.Cursor] = Future()

    def read_there() -> _Streamed | None:
        with _snapshot(source, tutor_ids=tutor_ids, shared=shared) as other:
            if not opened.set_running_or_notify_cancel():
                return None
            opened.set_result(other)
            return read_second(other)

    pool = ThreadPoolExecutor(1)
    reading = pool.submit(read_there)
    # A pooler without a free connection accepts one all the same, and has it wait.
    wait([opened, reading], timeout=_SECONDS_TO_CONNECT, return_when=FIRST_COMPLETED)
    try:
        of_first = read_first(cursor)
        of_second = read_second(cursor) if opened.cancel() else reading.result()
    except BaseException:
        if not opened.cancel():
            with suppress(dbapi.Error):
                opened.result().adbc_cancel()
        raise
    finally:
        # One that still waits finds the snapshot gone, and ends.
        pool.shutdown(wait=not opened.cancelled())
    assert of_second is not None  # noqa: S101 - it was opened
    return {first: of_first, second: of_second}


def _read_sessions(cursor: dbapi.Cursor, *, folder: Path, bound: Callable[[str], str]) -> _Streamed:
    """``SourceSessions`` in parts, and how many sessions and feedback that is."""
    sessions_expected = _estimate(cursor, bound(_SESSIONS))
    feedback = _FEEDBACK
    if _estimate(cursor, _FEEDBACK) > _MOST_FEEDBACK_PER_SESSION * sessions_expected:
        feedback += _OF_SESSIONS_READ
    part = pl.col("session_id").hash() % number_of_parts(sessions_expected)
    for name, query, schema in (
        ("sessions", bound(_SESSIONS), _StreamedSessions),
        ("student_feedback", bound(feedback), _StreamedFeedback),
    ):
        files = pl.PartitionBy(folder / name, key=part.alias("part"), include_key=False)
        _stream(cursor, query, schema, files)
    parts = [
        _scan(of_sessions, _StreamedSessions)
        .join(
            _scan(folder / "student_feedback" / of_sessions.name, _StreamedFeedback),
            on="session_id",
            how="left",
        )
        .with_columns((pl.col("flags") % 2 == 1).alias("started"), *_nullable_flags())
        .select(SourceSessions.column_names())
        for of_sessions in sorted((folder / "sessions").glob("*"))
    ]
    rows = {name: _count(folder / name) for name in ("sessions", "student_feedback")}
    return parts or [SourceSessions.create_empty().lazy()], rows


def _read_events(cursor: dbapi.Cursor, *, folder: Path, bound: Callable[[str], str]) -> _Streamed:
    """``SourceEvents`` in parts, and how many events that is."""
    path = folder / "tutor_events"
    _stream(
        cursor,
        bound(_EVENTS),
        _StreamedEvents,
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


_READERS: Mapping[Table, Callable[..., _Streamed]] = {
    "sessions": _read_sessions,
    "tutor_events": _read_events,
}


def number_of_parts(rows: int) -> int:
    """Parts to split so many rows of a table into."""
    return min(max(-(-rows // ROWS_OF_A_PART), 1), _MOST_PARTS)


def _estimate(cursor: dbapi.Cursor, query: str) -> int:
    """How many rows the planner expects."""
    statement = cursor.adbc_statement
    # What is no query cannot be copied.
    statement.set_options(**{_USE_COPY: "false"})
    try:
        cursor.execute(f"EXPLAIN (FORMAT JSON) {query}")
        [plan] = json.loads(pl.DataFrame(cursor.fetch_arrow()).to_series().ext.storage().item())
    finally:
        statement.set_options(**{_USE_COPY: "true"})
    return int(plan["Plan"]["Plan Rows"])


def _nullable_flags() -> Iterator[pl.Expr]:
    for place, name in enumerate(_NULLABLE_FLAGS):
        flag = pl.col("flags") // (2 * 4**place) % 4
        yield pl.when(flag != _UNKNOWN_FLAG).then(flag == 1).alias(name)


def _scan(folder: Path, schema: type[dy.Schema]) -> pl.LazyFrame:
    files = sorted(folder.glob("*"))
    return pl.scan_ipc(files) if files else schema.create_empty().lazy()


def _count(folder: Path) -> int:
    files = sorted(folder.glob("**/*.ipc"))
    return pl.scan_ipc(files).select(pl.len()).collect().item() if files else 0


def _stream(
    cursor: dbapi.Cursor, query: str, schema: type[dy.Schema], files: pl.PartitionBy
) -> None:
    """Write the rows of a query to files, batch by batch."""
    cursor.execute(query)

    def generate(
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,
    ) -> Iterator[pl.DataFrame]:
        # Who writes everything asks for no selection.
        for batch in batches(cursor.fetch_arrow()):
            _expect(batch, schema)
            yield batch

    try:
        rows = register_io_source(generate, schema=pl.Schema(schema))
        rows.sink_ipc(files, mkdir=True, engine="streaming")
    except ArrowStreamError as error:
        raise of_stream(error, is_lost=_is_lost(cursor.connection)) from error


def _fetch(cursor: dbapi.Cursor, query: str, schema: type[dy.Schema]) -> pl.DataFrame:
    cursor.execute(query)
    try:
        rows = pl.DataFrame(cursor.fetch_arrow())
    except pl.exceptions.ComputeError as error:
        raise of_stream(error, is_lost=_is_lost(cursor.connection)) from error
    _expect(rows, schema)
    return rows


def _expect(rows: pl.DataFrame, schema: type[dy.Schema]) -> None:
    for name, expected in pl.Schema(schema).items():
        found = rows.schema[name]
        if found != expected:
            raise SourceError(f"column {name} was read as {found}; expected {expected}")
