"""Writing ``tutor_performance_metrics``: COPY to a staging table, one upsert per batch of tutors.

What the table holds of the date is read first, and only tutors with a row that moved are sent.
Every batch is its own transaction; of many rows, two batches are written at once. A batch that is
refused because of its rows is split until only the culprits are left out. Two runs of one date at
once neither collide nor wait for each other in a circle.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from threading import Event
from typing import Any, NamedTuple, cast

import polars as pl
import psycopg
import sqlalchemy as sa
import tenacity
from adbc_driver_postgresql import dbapi
from psycopg import sql
from sqlalchemy.dialects import postgresql

from tutormax_assets.database.connection import (
    Timeouts,
    conninfo,
    limit_transaction,
    lock_for_transaction,
    transaction_limits,
)
from tutormax_assets.database.faults import (
    is_of_rows,
    is_timeout,
    may_pass,
    of_stream,
    reason,
    sqlstate,
)
from tutormax_assets.database.tables import (
    METRICS_KEY,
    METRICS_TABLE,
    tutor_performance_metrics,
    tutors,
)
from tutormax_assets.errors import TutormaxError
from tutormax_assets.metrics.schemas import TutorTiers

_VALUES = tuple(
    name
    for name in TutorTiers.column_names()
    if name in tutor_performance_metrics.c and name not in METRICS_KEY
)
_READ = {
    name: pl.String() if name == "performance_tier" else dtype
    for name, dtype in pl.Schema(TutorTiers).items()
    if name in tutor_performance_metrics.c
}

_TYPES = {pl.String(): "text", pl.Float64(): "double precision"}

# With types of its own, filling it waits for no lock, and a column of the table that has another
# type is refused by its name instead of by the first value.
_STAGED = sa.Table(
    "staged_metrics",
    sa.MetaData(),
    *(
        sa.Column(name, tutor_performance_metrics.c[name].type)
        for name in ("tutor_id", "window", *_VALUES)
    ),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)

# The locks of a whole table that an INSERT, and the check of its foreign key, wait for.
_A_TABLE_IS_LOCKED = sa.text(
    """
    SELECT EXISTS (
        SELECT FROM pg_locks
        WHERE relation IN (to_regclass(:metrics), to_regclass(:tutors))
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND mode IN (
                'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'
            )
    )
    """
).bindparams(metrics=METRICS_TABLE, tutors=tutors.name)

_REFERENCE_TO_TUTORS = next(
    constraint.name
    for constraint in tutor_performance_metrics.constraints
    if isinstance(constraint, sa.ForeignKeyConstraint)
)

# Of a batch with one culprit, quarters write less in vain than halves, in as many statements.
_PARTS = 4

_REFUSALS = (sa.exc.SQLAlchemyError, psycopg.Error)
_INSUFFICIENT_PRIVILEGE = "42501"
_LOCK_NOT_AVAILABLE = "55P03"
_UNIQUE_VIOLATION = "23505"

_METRIC_ID = cast(sa.String, tutor_performance_metrics.c.metric_id.type)

# One connection keeps one core of the server busy, and two the indexes' last pages: a third one
# gained nothing. It takes some thousands of rows to be worth its connecting.
_WRITERS = 2
_ROWS_FOR_WRITERS = 5_000


class MetricsTableError(TutormaxError):
    """The table cannot be written or read; the message says why and what to do."""

    affects_every_date = True


class MetricsTableTimeoutError(MetricsTableError):
    """A statement took too long; one that writes less may not."""

    affects_every_date = False


@dataclass(frozen=True)
class Batch:
    """What became of one batch of tutors.

    Attributes:
        number: Position of the batch, from 1.
        of: Number of batches.
        tutor_ids: The tutors of the batch.
        inserted: Rows that are new.
        updated: Rows whose values moved.
        unchanged: Rows that were there with the same values.
        errors: Why a tutor was left out, by ``tutor_id``; the others are saved.
    """

    number: int
    of: int
    tutor_ids: list[str]
    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def saved(self) -> int:
        """Rows of the batch that the table holds now."""
        return self.inserted + self.updated + self.unchanged


class _Written(NamedTuple):
    batch: Batch
    failure: Exception | None


def write_metrics(
    engine: sa.Engine,
    tiers: pl.DataFrame,
    *,
    calculation_date: datetime,
    batch_size: int,
    retrying: tenacity.Retrying,
    timeouts: Timeouts,
    is_wanted: sa.Select[bool] | None = None,
) -> Iterator[Batch]:
    """Bring the table's rows of one date and these tutors to the given values, batch by batch.

    A batch is split until only the culprits are left out: within its transaction if PostgreSQL
    refuses some of its rows, and into transactions if another session keeps some of them, or their
    rows of ``tutors``, locked. Those wait for such locks too, but not longer than a statement may
    take in all.

    Args:
        engine: The database that holds the table.
        tiers: ``TutorTiers``, all windows of a tutor included.
        calculation_date: The instant that the reference date stands for.
        batch_size: Tutors per transaction at most, of those with a row that moved.
        retrying: Calls the writing of a batch again when its failure may pass.
        timeouts: How long a statement may take, and wait for another session's lock.
        is_wanted: Asked in each transaction whether the run that wants the rows goes on.

    Yields:
        One ``Batch`` after each batch, in their order, those included in which the writing ends
        with an error.

    Raises:
        MetricsTableError: The table cannot be written, whatever the rows, or the run has ended.
            What was saved stays, and batches that are not under way are not tried.
    """
    stored = _look(engine, tiers, calculation_date, timeouts)
    rows = _with_moved(tiers, stored)
    moved = rows.filter("is_moved")
    writers = _WRITERS if len(moved) >= _ROWS_FOR_WRITERS else 1
    batches = _batches(rows, size=_even(moved["tutor_id"].n_unique(), batch_size, writers))
    writing = _Writing(
        engine=engine,
        calculation_date=calculation_date,
        is_new=stored is not None and stored.is_empty(),
        of=len(batches),
        retrying=retrying,
        timeouts=timeouts,
        is_wanted=is_wanted,
    )
    failure: Exception | None = None
    for batch, failed in _in_turn(writing.write, enumerate(batches, start=1), writers=writers):
        failure = failure or failed
        yield batch
    if failure is not None:
        kind = MetricsTableTimeoutError if is_timeout(failure) else MetricsTableError
        raise kind(_sentence(failure)) from failure


def read_metrics(
    engine: sa.Engine,
    *,
    calculation_dates: Iterable[datetime],
    tutor_ids: Sequence[str] = (),
    retrying: tenacity.Retrying,
    timeouts: Timeouts,
) -> Iterator[pl.DataFrame]:
    """The table's rows of some dates: their key in the date, and their values.

    Args:
        engine: The database that holds the table.
        calculation_dates: The instants that the reference dates stand for.
        tutor_ids: Only rows of these tutors; all when empty.
        retrying: Calls the reading of a date again when its failure may pass.
        timeouts: How long a statement may take, and wait for another session's lock.

    Yields:
        A frame for each date, in their order: ``tutor_id``, ``window`` and the values as
        ``TutorTiers`` has them, tiers as text.

    Raises:
        MetricsTableError: The table cannot be read.
    """
    with ExitStack() as connections:
        cursors: list[dbapi.Cursor] = []

        def read(calculation_date: datetime) -> pl.DataFrame:
            if not cursors:
                cursors.append(connections.enter_context(_reading(engine, timeouts)))
            try:
                return _read(cursors[0], calculation_date, tutor_ids)
            except dbapi.Error:
                # Nothing more can be read in a transaction that failed.
                cursors.clear()
                raise

        for calculation_date in calculation_dates:
            try:
                rows = retrying.copy()(read, calculation_date)
            except dbapi.Error as error:
                raise _cannot_be_read(error) from error
            yield rows


def count_rows_at_other_times(
    engine: sa.Engine,
    *,
    days: Iterable[tuple[datetime, datetime]],
    retrying: tenacity.Retrying,
    timeouts: Timeouts,
) -> list[int]:
    """Count the table's rows within days that are not at the begin of the day: none is a run's.

    Args:
        engine: The database that holds the table.
        days: The instants at which each day begins and ends.
        retrying: Calls the counting again when its failure may pass.
        timeouts: How long a statement may take, and wait for another session's lock.

    Raises:
        MetricsTableError: The table cannot be read.
    """
    date = tutor_performance_metrics.c.calculation_date
    queries = [sa.select(sa.func.count()).where(date > begin, date < end) for begin, end in days]

    def count() -> list[int]:
        with engine.begin() as connection:
            limit_transaction(connection, timeouts)
            return [connection.scalar(query) or 0 for query in queries]

    try:
        return retrying.copy()(count)
    except sa.exc.DBAPIError as error:
        raise _cannot_be_read(error) from error


def _cannot_be_read(error: Exception) -> MetricsTableError:
    return MetricsTableError(
        f"{METRICS_TABLE} cannot be read: {reason(error)}."
        " `tutormax db status` shows what is there."
    )


class DateCounts(NamedTuple):
    """What the table holds of a date.

    Attributes:
        tutors: Number of tutors.
        rows: Number of rows.
    """

    tutors: int
    rows: int


def count_rows(engine: sa.Engine, calculation_date: datetime) -> DateCounts:
    """Count the table's tutors and rows of a date, whoever wrote them."""
    columns = tutor_performance_metrics.c
    counts = sa.select(sa.func.count(columns.tutor_id.distinct()), sa.func.count()).where(
        columns.calculation_date == calculation_date
    )
    with engine.connect() as connection:
        return DateCounts(*connection.execute(counts).one())


@contextmanager
def _reading(engine: sa.Engine, timeouts: Timeouts) -> Iterator[dbapi.Cursor]:
    """A transaction of the driver that hands over many rows at once, as psycopg does not."""
    limits = transaction_limits(timeouts)
    numbered = enumerate(limits, start=1)
    set_all = ", ".join(f"set_config('{name}', ${n}, true)" for n, name in numbered)
    with dbapi.connect(conninfo(engine.url)) as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT {set_all}", tuple(limits.values()))
        yield cursor


def _read(
    cursor: dbapi.Cursor, calculation_date: datetime, tutor_ids: Sequence[str]
) -> pl.DataFrame:
    cursor.execute(_rows_of(calculation_date, tutor_ids).as_string(None))
    try:
        rows = pl.DataFrame(cursor.fetch_arrow())
    except pl.exceptions.ComputeError as error:
        raise of_stream(error, is_lost=True) from error
    return rows.select(pl.col(name).cast(dtype) for name, dtype in _READ.items())


def _stored(
    connection: sa.Connection, calculation_date: datetime, tutor_ids: Sequence[str]
) -> pl.DataFrame:
    """As ``read_metrics``, on a connection that is there: another one costs more than a date."""
    query = sql.SQL("COPY ({}) TO STDOUT (FORMAT csv)").format(
        _rows_of(calculation_date, tutor_ids)
    )
    with connection.connection.cursor().copy(query) as copy:
        rows = b"".join(copy)
    return pl.read_csv(rows, has_header=False, schema=_READ, raise_if_empty=False)


def _rows_of(calculation_date: datetime, tutor_ids: Sequence[str]) -> sql.Composed:
    """The query of a date's rows, bound by the client: what is copied takes no parameters."""
    # Of an array that is joined, the planner knows the length, and takes few tutors one by one.
    asked = sql.SQL("JOIN unnest({}::text[]) AS asked (tutor_id) USING (tutor_id)").format(
        sql.Literal(list(dict.fromkeys(tutor_ids)))
    )
    return sql.SQL("SELECT {} FROM {} {} WHERE calculation_date = {}").format(
        sql.SQL(", ").join(
            sql.SQL("{}::{}").format(sql.Identifier(name), sql.SQL(_TYPES.get(dtype, "bigint")))
            for name, dtype in _READ.items()
        ),
        sql.Identifier(METRICS_TABLE),
        asked if tutor_ids else sql.SQL(""),
        sql.Literal(calculation_date),
    )


def _look(
    engine: sa.Engine, tiers: pl.DataFrame, calculation_date: datetime, timeouts: Timeouts
) -> pl.DataFrame | None:
    """What the table holds of these tutors; nothing where the date is new, None if unknown."""
    try:
        with engine.connect() as connection:
            limit_transaction(connection, replace(timeouts, lock_seconds=0))
            # A batch of a run that has ended may be under way on another machine. What it writes
            # has to be seen here, or this run would take an older value for its own.
            lock_for_transaction(connection, _lock_name(calculation_date))
            connection.rollback()
            limit_transaction(connection, timeouts)
            if connection.scalar(_DATE_HAS_ROWS, {"calculation_date": calculation_date}):
                return _stored(connection, calculation_date, tiers["tutor_id"].to_list())
            connection.execute(_PLAN_OF_UPSERT)
            return pl.DataFrame(schema=_READ)
    # Whatever it is, the writing meets it too, and tries again or says what to do.
    except (*_REFUSALS, pl.exceptions.PolarsError):
        return None


def _with_moved(tiers: pl.DataFrame, stored: pl.DataFrame | None) -> pl.DataFrame:
    """The rows as they are staged, by tutor, and whether any row of the tutor is another one."""
    rows = tiers.select(pl.col(name).cast(dtype) for name, dtype in _READ.items())
    rows = rows.sort("tutor_id", "window")
    if stored is None or stored.is_empty():
        return rows.with_columns(is_moved=pl.lit(True))
    moved = rows.join(stored, on=list(_READ), how="anti", nulls_equal=True)
    return rows.with_columns(is_moved=pl.col("tutor_id").is_in(moved["tutor_id"].implode()))


def _batches(rows: pl.DataFrame, *, size: int) -> list[pl.DataFrame]:
    """Cut the rows so that each part has so many tutors with moved rows, the last one fewer."""
    is_first = pl.col("tutor_id").ne_missing(pl.col("tutor_id").shift())
    place = (is_first & pl.col("is_moved")).cum_sum().cast(pl.Int64)
    number = (place - 1).clip(lower_bound=0) // size
    return rows.with_columns(number=number).partition_by("number", include_key=False)


def _even(tutors: int, batch_size: int, writers: int) -> int:
    """The size of a batch, at most the given one, that gives all writers as many batches."""
    rounds = -(-tutors // (batch_size * writers))
    return batch_size if writers == 1 else -(-tutors // (rounds * writers))


def _in_turn(
    write: Callable[[tuple[int, pl.DataFrame], Event], _Written],
    batches: Iterable[tuple[int, pl.DataFrame]],
    *,
    writers: int,
) -> Iterator[_Written]:
    """Write batches, some at once, and give what became of them in their order.

    After one that fails, those that are under way are ended and no other is begun.
    """
    over = Event()
    if writers == 1:
        for item in batches:
            done = write(item, over)
            yield done
            if done.failure is not None:
                return
        return
    waiting = iter(batches)
    pool = ThreadPoolExecutor(writers, thread_name_prefix=METRICS_TABLE)
    try:
        # One more than are written, so that nobody waits while a result is looked at.
        under_way = deque(pool.submit(write, item, over) for item in islice(waiting, writers + 1))
        while under_way:
            done = under_way.popleft().result()
            if done.failure is not None:
                waiting = iter(())
                under_way = deque(future for future in under_way if not future.cancel())
            under_way.extend(pool.submit(write, item, over) for item in islice(waiting, 1))
            yield done
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)


@dataclass
class _Writing:
    """The writing of one date, by one or several threads."""

    engine: sa.Engine
    calculation_date: datetime
    is_new: bool
    of: int
    retrying: tenacity.Retrying
    timeouts: Timeouts
    is_wanted: sa.Select[bool] | None
    waited_seconds: float = 0.0

    def write(self, numbered: tuple[int, pl.DataFrame], over: Event) -> _Written:
        """Write a batch; when it is over for all, it is not tried again."""
        number, batch = numbered
        parts = [batch.filter("is_moved")] if batch["is_moved"].any() else []
        attempt = self.retrying.copy(
            sleep=tenacity.sleep_using_event(over),
            stop=lambda state: over.is_set() or self.retrying.stop(state),
        )
        rows = Counter(unchanged=len(batch) - int(batch["is_moved"].sum()))
        errors: dict[str, str] = {}
        failure: Exception | None = None
        while parts and failure is None:
            part = parts.pop()
            tutors_of_part = part["tutor_id"].n_unique()
            try:
                counts, refused = attempt(self._write_part, part)
                rows.update(counts)
                errors |= refused
            except _REFUSALS as error:
                if sqlstate(error) == _LOCK_NOT_AVAILABLE:
                    self.waited_seconds += self.timeouts.lock_seconds
                    # The whole batch has been tried again for it.
                    attempt = attempt.copy(retry=tenacity.retry_if_exception(_may_pass_unlocked))
                may_accept_others = is_of_rows(error) or (
                    self.waited_seconds <= self.timeouts.statement_seconds
                    and _is_of_row_lock(self.engine, error)
                )
                if not may_accept_others:
                    parts.append(part)
                    failure = error
                elif tutors_of_part == 1:
                    errors[part["tutor_id"][0]] = _why(error)
                else:
                    parts += _split(part)
        if failure is not None:
            for part in parts:
                errors |= dict.fromkeys(part["tutor_id"], _sentence(failure))
        tutor_ids = batch["tutor_id"].unique(maintain_order=True).to_list()
        return _Written(
            Batch(number, self.of, tutor_ids, **rows, errors=dict(sorted(errors.items()))), failure
        )

    def _write_part(self, rows: pl.DataFrame) -> tuple[dict[str, int], dict[str, str]]:
        """Write rows in one transaction: their numbers, and why a tutor's are not among them."""
        try:
            return self._execute(_INSERT if self.is_new else _UPSERT, rows, alone=False)
        except sa.exc.IntegrityError as error:
            if sqlstate(error) != _UNIQUE_VIOLATION:
                raise
        # Another writer was ahead with the same rows. ON CONFLICT knows nothing of those that a
        # transaction is about to insert, so this one is tried while nobody else writes the date.
        return self._execute(_UPSERT, rows, alone=True)

    def _execute(
        self, write: sa.Executable, rows: pl.DataFrame, *, alone: bool
    ) -> tuple[dict[str, int], dict[str, str]]:
        columns = _STAGED.c.keys()
        with self.engine.begin() as connection:
            # Of the locks that are taken below, only that of the date may be held for long: another
            # writer has it for as long as its statement takes.
            limit_transaction(connection, replace(self.timeouts, lock_seconds=0))
            _STAGED.create(connection, checkfirst=False)
            copy_rows = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(
                sql.Identifier(_STAGED.name), sql.SQL(", ").join(map(sql.Identifier, columns))
            )
            with connection.connection.cursor().copy(copy_rows) as copy:
                copy.write(rows.select(columns).write_csv(include_header=False))
            lock_for_transaction(connection, _lock_name(self.calculation_date), shared=not alone)
            limit_transaction(connection, self.timeouts)
            if self.is_wanted is not None and not connection.scalar(self.is_wanted):
                raise MetricsTableError(
                    "The run that these rows are of has ended, or lost its right to the date: they"
                    " are not written. Run the date again if need be."
                )
            return self._save(connection, write, rows, alone=alone)

    def _save(
        self, connection: sa.Connection, write: sa.Executable, rows: pl.DataFrame, *, alone: bool
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Write what is staged, but for the rows of tutors that are refused."""
        counts: Counter[str] = Counter()
        errors: dict[str, str] = {}
        # In the order of their ids, as all writers do.
        parts = deque([rows])
        while parts:
            part = parts.popleft()
            tutor_ids = None if part is rows else part["tutor_id"].unique().to_list()
            values = {"calculation_date": self.calculation_date, "tutor_ids": tutor_ids}
            try:
                with connection.begin_nested():
                    written = connection.execute(write, values).one()
            except sa.exc.DBAPIError as error:
                may_be_ahead = sqlstate(error) == _UNIQUE_VIOLATION and not alone
                if may_be_ahead or not is_of_rows(error):
                    raise
                if part["tutor_id"].n_unique() == 1:
                    errors[part["tutor_id"][0]] = _why(error)
                else:
                    parts.extendleft(reversed(_split(part)))
            else:
                counts["inserted"] += written.inserted
                counts["updated"] += written.written - written.inserted
                counts["unchanged"] += len(part) - written.written
        return counts, errors


def _lock_name(calculation_date: datetime) -> str:
    return f"{METRICS_TABLE}:{calculation_date.timestamp():.0f}"


def _split(rows: pl.DataFrame) -> list[pl.DataFrame]:
    """The rows of a part of the tutors each, in the order of their ids."""
    tutor_ids = rows.select(pl.col("tutor_id").unique().sort())
    size = -(-len(tutor_ids) // _PARTS)
    return [
        rows.join(members, on="tutor_id", how="semi") for members in tutor_ids.iter_slices(size)
    ]


def _may_pass_unlocked(error: BaseException) -> bool:
    return may_pass(error) and sqlstate(error) != _LOCK_NOT_AVAILABLE


def _is_of_row_lock(engine: sa.Engine, error: BaseException) -> bool:
    """Whether it waited for a lock in vain, and no lock of a whole table is there to be it.

    What PostgreSQL says of the wait tells neither: it is in the server's language, and the check
    of a foreign key has the same context for both.
    """
    if sqlstate(error) != _LOCK_NOT_AVAILABLE:
        return False
    try:
        with engine.connect() as connection:
            return not connection.scalar(_A_TABLE_IS_LOCKED)
    except sa.exc.SQLAlchemyError:
        return False


def _why(error: BaseException) -> str:
    """Why one tutor is left out, without values of its rows."""
    diagnosis = _diagnosis(error)
    constraint = diagnosis and diagnosis.constraint_name
    if constraint == _REFERENCE_TO_TUTORS:
        return (
            "The tutor is not in the database's tutors: deleted since the roster of the date was"
            " read, or in the lake only"
        )
    said = reason(error)
    return f"{said} (constraint {constraint})" if constraint and constraint not in said else said


def _diagnosis(error: BaseException) -> psycopg.errors.Diagnostic | None:
    original = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    return original.diag if isinstance(original, psycopg.Error) else None


def _sentence(error: BaseException) -> str:
    """Why the table cannot be written, and what to do."""
    said = f"{METRICS_TABLE} cannot be written: {reason(error).rstrip('.')}."
    state = sqlstate(error) or ""
    if state.startswith("42") and state != _INSUFFICIENT_PRIVILEGE:
        return f"{said} Run `tutormax db upgrade` to bring the table to the expected form."
    if may_pass(error):
        return f"{said} Trying again did not help; run the date again when it has passed."
    return said


def _metric_id(date: sa.ColumnElement[datetime]) -> sa.ColumnElement[str]:
    """An id that follows from the key, so that the table is the same whoever wrote a row first.

    It begins with the date and goes on with the tutor, so that new rows are neighbours in its
    index. A key that is too long for it is replaced by its digest, after two underscores: no other
    id has two and then none.
    """
    epoch = sa.func.extract("epoch", date).cast(sa.BigInteger)
    key = sa.func.concat_ws("_", epoch, _STAGED.c.tutor_id, _STAGED.c.window)
    digest = sa.func.encode(sa.func.sha256(sa.func.convert_to(key, "UTF8")), "hex")
    return sa.case(
        (sa.func.length(key) <= _METRIC_ID.length, key),
        else_=sa.func.concat(epoch, "__", sa.func.left(digest, 32)),
    )


_ASKED = sa.bindparam("tutor_ids", type_=postgresql.ARRAY(sa.String))
_IS_ASKED = sa.or_(_ASKED.is_(None), _STAGED.c.tutor_id == sa.any_(_ASKED))


def _insert_statement() -> Any:
    date = sa.bindparam("calculation_date", type_=sa.DateTime(timezone=True))
    rows = sa.select(
        _metric_id(date),
        _STAGED.c.tutor_id,
        date,
        _STAGED.c.window,
        *(_STAGED.c[name] for name in _VALUES),
    ).where(_IS_ASKED)
    # In the order of their index, in which no two writers wait for each other in a circle.
    rows = rows.order_by(_STAGED.c.tutor_id, _STAGED.c.window)
    names = ["metric_id", *METRICS_KEY, *_VALUES]
    return postgresql.insert(tutor_performance_metrics).from_select(names, rows)


def _upsert_statement() -> Any:
    target, insert = tutor_performance_metrics, _insert_statement()
    new_values = sa.tuple_(*(insert.excluded[name] for name in _VALUES))
    return insert.on_conflict_do_update(
        index_elements=METRICS_KEY,
        set_={**{name: insert.excluded[name] for name in _VALUES}, "updated_at": sa.func.now()},
        where=sa.tuple_(*(target.c[name] for name in _VALUES)).is_distinct_from(new_values),
    )


def _counted(write: Any) -> sa.Select[int, int]:
    is_new: sa.Label[bool] = sa.literal_column("xmax = 0").label("is_new")
    written = write.returning(is_new).cte("written")
    return sa.select(
        sa.func.count().filter(written.c.is_new).label("inserted"),
        sa.func.count().label("written"),
    ).select_from(written)


_INSERT = _counted(_insert_statement())
_UPSERT = _counted(_upsert_statement())

_DATE_HAS_ROWS = sa.select(
    sa.exists().where(
        tutor_performance_metrics.c.calculation_date == sa.bindparam("calculation_date")
    )
)

# Refused where the upsert would be: without its unique key, or without a right that it needs.
_PLAN_OF_UPSERT = sa.text(
    f"""
    EXPLAIN INSERT INTO {METRICS_TABLE} SELECT * FROM {METRICS_TABLE}
    ON CONFLICT ({", ".join(f'"{name}"' for name in METRICS_KEY)})
    DO UPDATE SET updated_at = now()
    """  # noqa: S608 - names only
)
