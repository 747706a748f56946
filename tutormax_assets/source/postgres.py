"""Reading the platform: only the columns that are needed, as Arrow, in one consistent snapshot.

The transaction is REPEATABLE READ and READ ONLY, so that roster, sessions, feedback and events are
of the same instant. Its locks are those of any SELECT: no INSERT, UPDATE or DELETE waits for them.

Sessions and feedback are read by one connection, and events meanwhile by another that is given the
snapshot of the first.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeVar

import dataframely as dy
import polars as pl
import sqlalchemy as sa
from adbc_driver_postgresql import dbapi
from psycopg import sql

from tutormax_assets.database.connection import (
    Timeouts,
    conninfo,
    describe,
    transaction_limits,
)
from tutormax_assets.database.faults import is_timeout, reason, sqlstate
from tutormax_assets.metrics.quality import contradictory_tutors
from tutormax_assets.metrics.schemas import (
    SourceEvents,
    SourceSessions,
    SourceTutors,
)
from tutormax_assets.source.contract import FOUND_COLUMNS, NEEDED_COLUMNS, FoundColumn, breaches
from tutormax_assets.source.horizon import Horizon, UnknownChangesError, read_horizon
from tutormax_assets.source.id_hashes import IdHashes, fetch_ids, tutor_hashes
from tutormax_assets.source.queries import (
    ENCODING,
    INSTANT,
    IS_EMPTY,
    IS_UNIQUE,
    NEWEST,
    NUMERIC_SCORE,
    SCORE,
    SHARED,
    TUTORS,
    bind_values,
)
from tutormax_assets.source.streams import (
    READERS,
    HashesNotUniqueError,
    SourceError,
    SourceTimeoutError,
    Streamed,
    Table,
    fetch_frame,
)
from tutormax_assets.storage.shards import ALL_TUTORS, TutorRange

# Which one it is depends on the version, and on whether the transaction ended just now.
_SNAPSHOT_IS_GONE = ("22023", "42704", "55000")

_SECONDS_TO_CONNECT = 2

_UTF8 = "UTF8"

T = TypeVar("T")


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
    """Rows of the platform. Whoever takes a part from its list frees the memory of its rows.

    Attributes:
        sessions: ``SourceSessions`` in parts, at least one; all rows of a session are in one part.
        events: ``SourceEvents`` in parts, at least one.
        count: Number of rows of each table that was read.
        seconds: How long the reading took.
        hashes: Finds the ids of rows that have hashes of ids; None where they have the ids.
        note: Why ids were read although hashes were asked for; else empty.
    """

    sessions: list[pl.LazyFrame]
    events: list[pl.LazyFrame]
    count: Mapping[str, int]
    seconds: float
    hashes: IdHashes | None = None
    note: str = ""


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
        as_of: The instant at which rows had to be known; None if it does not matter.
    """

    source: Source
    tutor_ids: tuple[str, ...]
    read_at: datetime
    snapshot: str
    ids_are_unique: bool
    is_utf8: bool
    score_is_numeric: bool
    as_of: datetime | None = None
    _cursor: dbapi.Cursor | None = None
    _name: str | None = None

    def known_at(self, instant: datetime) -> "View":
        """The view without rows that were not known yet at an instant.

        It has to be opened with ``COLUMNS_AS_OF``.
        """
        return replace(self, as_of=instant)

    def tutors(self) -> pl.DataFrame:
        """``SourceTutors``: all of them, whichever tutors the view is about.

        A view of the platform may have an id twice, or none.

        Raises:
            SourceError: The platform cannot be read, has no tutors, or has one with two statuses.
        """
        with self._reading() as cursor:
            query = bind_values(TUTORS, as_of=self.as_of)
            tutors = fetch_frame(cursor, query, SourceTutors)
            if tutors.is_empty() and self.as_of is None:
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
        hashed: bool = False,
    ) -> PlatformRows:
        """Sessions with their feedback, and events, in ``[start, end)``.

        Args:
            folder: Not used: the rows are in memory.
            tables: What is wanted; the frames of the others are empty.
            start: First instant.
            end: First instant after them.
            tutor_range: Only rows of these tutors.
            hashed: Whether hashes of ids will do. The ids are read all the same where no index
                keeps them unique, or where two of them have the same hash.

        Raises:
            SourceError: The platform cannot be read. Its cause tells whether to try again.
        """
        began = perf_counter()
        bound = partial(
            bind_values,
            tutor_ids=self.tutor_ids,
            tutor_range=tutor_range,
            is_utf8=self.is_utf8,
            score=NUMERIC_SCORE if self.score_is_numeric else SCORE,
            as_of=self.as_of,
            start=start,
            end=end,
        )
        parts: dict[Table, list[pl.LazyFrame]] = {
            "sessions": [SourceSessions.create_empty().lazy()],
            "tutor_events": [SourceEvents.create_empty().lazy()],
        }
        count: dict[str, int] = {}
        read: dict[Table, Streamed] | None = None
        hashes, note = None, ""
        with self._reading() as cursor:
            if hashed:
                try:
                    hashes = self._hashes(cursor, bound)
                    read = self._read(cursor, tables, bound, hashed=True)
                except HashesNotUniqueError as error:
                    hashes, note = None, f"Ids are read in place of their hashes: {error}"
            if read is None:
                read = self._read(cursor, tables, bound, hashed=False)
        for table, (of_table, rows) in read.items():
            parts[table] = of_table
            count |= rows
        seconds = perf_counter() - began
        return PlatformRows(parts["sessions"], parts["tutor_events"], count, seconds, hashes, note)

    def _read(
        self,
        cursor: dbapi.Cursor,
        tables: Collection[Table],
        bound: Callable[[str], str],
        *,
        hashed: bool,
    ) -> dict[Table, Streamed]:
        readers = {
            table: partial(read_table, bound=bound, hashed=hashed)
            for table, read_table in READERS.items()
            if table in tables
        }
        return _at_once(self.source, cursor, readers, self.tutor_ids)

    def _hashes(self, cursor: dbapi.Cursor, bound: Callable[[str], str]) -> IdHashes:
        """How to find the ids of rows.

        Raises:
            HashesNotUniqueError: Two tutors have the same hash, or sessions or feedback may.
        """
        if not self.ids_are_unique:
            raise HashesNotUniqueError("no index keeps those of sessions and feedback unique")

        def fetch(query: str) -> pl.DataFrame:
            with self._reading() as again:
                return fetch_ids(again, bound(query))

        return IdHashes(tutor_hashes(cursor, bound), fetch)

    def horizon(self) -> Horizon:
        """Distinguishes the rows of the view from rows that come later.

        Raises:
            UnknownChangesError: The source does not support it.
            SourceError: The platform cannot be read.
        """
        if not self.ids_are_unique:
            raise UnknownChangesError("no index keeps ids of sessions and feedback unique")
        with self._reading() as cursor:
            return read_horizon(cursor, self.snapshot)

    def read(self, reader: Callable[[dbapi.Cursor], T]) -> T:
        """What a reader gives, in the snapshot of the view.

        Raises:
            SourceError: The platform cannot be read.
        """
        with self._reading() as cursor:
            return reader(cursor)

    def read_at_once(self, readers: Mapping[Table, Callable[[dbapi.Cursor], T]]) -> dict[Table, T]:
        """What each reader gives, in the snapshot of the view; two at once where that can be.

        Raises:
            SourceError: The platform cannot be read.
        """
        with self._reading() as cursor:
            return _at_once(self.source, cursor, readers, self.tutor_ids)

    def empty_tables(self, names: Iterable[str]) -> list[str]:
        """Those of the source tables that hold no row at all, whatever its date.

        Raises:
            SourceError: The platform cannot be read.
        """
        with self._reading() as cursor:
            return [name for name in names if fetch_frame(cursor, IS_EMPTY[name], _IsEmpty).item()]

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

    def share(self) -> "SharedView | None":
        """The view for other processes, for as long as this one is open; None on a standby.

        Raises:
            SourceError: The server does not share the view.
        """
        with self._reading() as cursor:
            # It is meant to be idle for as long as others read.
            cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            name = fetch_frame(cursor, SHARED, _Shared).item()
        if name is None:
            return None
        return SharedView(
            self.tutor_ids,
            self.read_at,
            self.snapshot,
            self.ids_are_unique,
            self.is_utf8,
            self.score_is_numeric,
            self.as_of,
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
    as_of: datetime | None
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
            self.as_of,
            _name=self.name,
        )


@contextmanager
def open_view(
    source: Source,
    *,
    tutor_ids: Sequence[str] = (),
    columns: Mapping[str, Sequence[str]] = NEEDED_COLUMNS,
) -> Iterator[View]:
    """A view of the platform, of some tutors or of all, in which these columns can be read.

    Raises:
        SourceError: The platform cannot be read, or a table is not as the contract has it. Its
            cause tells whether to try again.
    """
    with _snapshot(source, tutor_ids=tutor_ids) as cursor:
        read_at, snapshot = fetch_frame(cursor, INSTANT, _Instant).row(0)
        types = _check_contract(cursor, source, columns)
        yield View(
            source,
            tuple(tutor_ids),
            read_at,
            snapshot,
            ids_are_unique=bool(fetch_frame(cursor, IS_UNIQUE, _IsUnique).item()),
            is_utf8=fetch_frame(cursor, ENCODING, _Encoding).item() == _UTF8,
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
    query = bind_values(NEWEST[table], end=before)
    with _snapshot(source) as cursor:
        found: datetime | None = fetch_frame(cursor, query, _Newest).item()
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
        known = fetch_frame(cursor, bind_values(TUTORS), SourceTutors)
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
    name = dy.String(nullable=True)


class _IsUnique(dy.Schema):
    is_unique = dy.Bool()


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
    tutor_ids: Sequence[str] = (),
    shared: str | None = None,
    beside: dbapi.Connection | None = None,
) -> Iterator[dbapi.Cursor]:
    """A transaction that reads; of the given tutors, and in a snapshot that another one shares.

    One beside another connection does not read the server's types anew.
    """
    limits = transaction_limits(source.timeouts)
    set_all = ", ".join(f"set_config('{name}', ${n}, true)" for n, name in enumerate(limits, 1))
    with (
        _told(source),
        beside.adbc_clone() if beside else dbapi.connect(conninfo(source.url)) as connection,
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
    if not others or fetch_frame(cursor, ENCODING, _Encoding).item() == _UTF8:
        return list(tutor_ids)
    # What the encoding lacks PostgreSQL does not take even to compare it, so that is done here.
    known = set(fetch_frame(cursor, bind_values(TUTORS), SourceTutors)["tutor_id"])
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


def _check_contract(
    cursor: dbapi.Cursor, source: Source, needed_columns: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str | None], str]:
    """The types of the columns, by table and name."""
    found = fetch_frame(cursor, FOUND_COLUMNS, _FoundColumns)
    if found.is_empty():
        raise SourceError(
            f"The platform at {describe(source.url)} cannot be read: found none of the tables"
            f" {', '.join(NEEDED_COLUMNS)}, or no right to look into their schema; expected the"
            " tutoring platform's database. `tutormax db status` shows what is there."
        )
    columns = [FoundColumn(*row) for row in found.iter_rows()]
    clauses = [clause for _, clause in breaches(columns, needed_columns)]
    if clauses:
        raise SourceError(
            f"The platform at {describe(source.url)} cannot be read: {'; '.join(clauses)}."
            " `tutormax db status` shows what is there, `tutormax db roles` prints the rights that"
            " are needed."
        )
    return {(column.table_name, column.column_name): column.type or "" for column in columns}


def _at_once(
    source: Source,
    cursor: dbapi.Cursor,
    readers: Mapping[Table, Callable[[dbapi.Cursor], T]],
    tutor_ids: Sequence[str],
) -> dict[Table, T]:
    """What each reader gives; two read at once where the server gives us two connections.

    It need not: a role may have a limit, and a pooler may lead to another server, which does not
    know the snapshot. A standby's snapshot is not shared.
    """
    shared = fetch_frame(cursor, SHARED, _Shared).item() if len(readers) > 1 else None
    if shared is None:
        return {table: read_table(cursor) for table, read_table in readers.items()}
    (first, read_first), (second, read_second) = readers.items()
    opened: Future[dbapi.Cursor] = Future()

    def read_there() -> T | None:
        beside = cursor.connection
        with _snapshot(source, tutor_ids=tutor_ids, shared=shared, beside=beside) as other:
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
