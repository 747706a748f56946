"""Writing ``tutor_performance_metrics``: COPY to a staging table, one upsert per batch of tutors.

What the table holds of the date is read first, and only tutors with a row that moved are sent.
Every batch is its own transaction; of many rows, two batches are written at once. A batch that is
refused because of its rows is split until only the culprits are left out. Two runs of one date at
once neither collide nor wait for each other in a circle.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from threading import Event
from typing import Any, NamedTuple

import polars as pl
import psycopg
import sqlalchemy as sa
import tenacity

from tutormax_assets.database.connection import (
    Timeouts,
    limit_transaction,
    lock_for_transaction,
)
from tutormax_assets.database.faults import (
    is_of_rows,
    is_timeout,
    may_pass,
    reason,
    sqlstate,
)
from tutormax_assets.database.metrics_reading import (
    PARTS,
    READ_SCHEMA,
    MetricsTableError,
    MetricsTableTimeoutError,
    stored_rows,
)
from tutormax_assets.database.revisions import RevisionRecord
from tutormax_assets.database.rows_of_date import (
    FEATURE_NOT_SUPPORTED,
    LOCK_NOT_AVAILABLE,
    copy_csv,
)
from tutormax_assets.database.tables import (
    METRICS_TABLE,
    tutor_performance_metrics,
    tutors,
)
from tutormax_assets.database.upsert import (
    DATE_HAS_ROWS,
    INSERT,
    PLAN_OF_UPSERT,
    REPLACED,
    STAGED,
    UPSERT,
    with_metric_ids,
)
from tutormax_assets.errors import TutormaxError

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

_REFUSALS = (sa.exc.SQLAlchemyError, psycopg.Error)

_INSUFFICIENT_PRIVILEGE = "42501"

_UNIQUE_VIOLATION = "23505"

# One connection keeps one core of the server busy, and two the indexes' last pages: a third one
# gained nothing. It takes some thousands of rows to be worth its connecting.
WRITERS = 2

_ROWS_FOR_WRITERS = 5_000


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
    record: RevisionRecord | None = None,
    writers: int = WRITERS,
    over: Event | None = None,
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
        record: Keeps the values that are replaced; they are lost when None.
        writers: How many batches are written at once at most, each by a connection of its own.
        over: Once it is set, no further batch is begun by a single writer, and none tried again.

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
    writers = writers if len(moved) >= _ROWS_FOR_WRITERS else 1
    batches = _batches(rows, size=_even(moved["tutor_id"].n_unique(), batch_size, writers))
    writing = _Writing(
        engine=engine,
        calculation_date=calculation_date,
        is_new=stored is not None and stored.is_empty(),
        of=len(batches),
        retrying=retrying,
        timeouts=timeouts,
        is_wanted=is_wanted,
        record=record,
    )
    failure: Exception | None = None
    numbered = enumerate(batches, start=1)
    for batch, failed in _in_turn(writing.write, numbered, writers=writers, over=over):
        failure = failure or failed
        yield batch
    if failure is not None:
        kind = MetricsTableTimeoutError if is_timeout(failure) else MetricsTableError
        raise kind(_sentence(failure)) from failure
    if over is not None and over.is_set():
        raise MetricsTableError("The run was stopped before all rows were written.")


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
            if connection.scalar(DATE_HAS_ROWS, {"calculation_date": calculation_date}):
                return stored_rows(connection, calculation_date, tiers["tutor_id"].to_list())
            connection.execute(PLAN_OF_UPSERT)
            return pl.DataFrame(schema=READ_SCHEMA)
    # Whatever it is, the writing meets it too, and tries again or says what to do.
    except (*_REFUSALS, pl.exceptions.PolarsError):
        return None


def _with_moved(tiers: pl.DataFrame, stored: pl.DataFrame | None) -> pl.DataFrame:
    """The rows as they are staged, by tutor, and whether any row of the tutor is another one."""
    rows = tiers.select(pl.col(name).cast(dtype) for name, dtype in READ_SCHEMA.items())
    rows = rows.sort("tutor_id", "window")
    if stored is None or stored.is_empty():
        return rows.with_columns(is_moved=pl.lit(True))
    moved = rows.join(stored, on=list(READ_SCHEMA), how="anti", nulls_equal=True)
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
    over: Event | None,
) -> Iterator[_Written]:
    """Write batches, some at once, and yield the outcomes in the order of the batches.

    After one that fails, those that are under way are ended and no other is begun.
    """
    if writers == 1:
        over = over or Event()
        for item in batches:
            done = write(item, over)
            yield done
            if done.failure is not None or over.is_set():
                return
        return
    over = Event()
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
    record: RevisionRecord | None
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
                if sqlstate(error) == LOCK_NOT_AVAILABLE:
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
        if self.is_new and self._copy_new(rows):
            return {"inserted": len(rows)}, {}
        try:
            return self._execute(INSERT if self.is_new else UPSERT, rows, alone=False)
        except sa.exc.IntegrityError as error:
            if sqlstate(error) != _UNIQUE_VIOLATION:
                raise
        # Another writer was ahead with the same rows. ON CONFLICT knows nothing of those that a
        # transaction is about to insert, so this one is tried while nobody else writes the date.
        return self._execute(UPSERT, rows, alone=True)

    def _copy_new(self, rows: pl.DataFrame) -> bool:
        """Copy rows straight into the table, all or none; says whether it took them."""
        keyed = with_metric_ids(rows, self.calculation_date)
        if keyed is None:
            return False
        try:
            with self.engine.begin() as connection:
                self._begin(connection, alone=False)
                copy_csv(connection, METRICS_TABLE, keyed)
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            # Which of the rows it is comes out when they are staged. Row security refuses COPY.
            if is_of_rows(error) or sqlstate(error) == FEATURE_NOT_SUPPORTED:
                return False
            raise
        return True

    def _begin(self, connection: sa.Connection, *, alone: bool) -> None:
        """Take the lock of the date, and ask whether the run goes on."""
        # Of the locks that are taken below, only that of the date may be held for long: another
        # writer has it for as long as its statement takes.
        limit_transaction(connection, replace(self.timeouts, lock_seconds=0))
        lock_for_transaction(connection, _lock_name(self.calculation_date), shared=not alone)
        limit_transaction(connection, self.timeouts)
        if self.is_wanted is not None and not connection.scalar(self.is_wanted):
            raise MetricsTableError(
                "The run that these rows are of has ended, or lost its right to the date: they"
                " are not written. Run the date again if need be."
            )

    def _execute(
        self, write: sa.Executable, rows: pl.DataFrame, *, alone: bool
    ) -> tuple[dict[str, int], dict[str, str]]:
        with self.engine.begin() as connection:
            limit_transaction(connection, replace(self.timeouts, lock_seconds=0))
            STAGED.create(connection, checkfirst=False)
            copy_csv(connection, STAGED.name, rows.select(STAGED.c.keys()))
            self._begin(connection, alone=alone)
            return self._save(connection, write, rows, alone=alone)

    def _save(
        self, connection: sa.Connection, write: sa.Executable, rows: pl.DataFrame, *, alone: bool
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Write what is staged, but for the rows of tutors that are refused."""
        counts: Counter[str] = Counter()
        errors: dict[str, str] = {}
        replaced: list[sa.Row[Any]] = []
        # In the order of their ids, as all writers do.
        parts = deque([rows])
        while parts:
            part = parts.popleft()
            tutor_ids = None if part is rows else part["tutor_id"].unique().to_list()
            values = {"calculation_date": self.calculation_date, "tutor_ids": tutor_ids}
            try:
                with connection.begin_nested():
                    changing = (
                        connection.execute(REPLACED, values).all()
                        if self.record is not None and write is UPSERT
                        else []
                    )
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
                replaced += changing
        if self.record is not None and replaced:
            self._keep(self.record, replaced)
        return counts, errors

    def _keep(self, record: RevisionRecord, replaced: Sequence[sa.Row[Any]]) -> None:
        """Record the values that are about to be replaced; if that fails, replace nothing."""
        instants = dict.fromkeys(("known_from", "known_to"), pl.Datetime("us", "UTC"))
        rows = pl.DataFrame(replaced, schema={**READ_SCHEMA, **instants}, orient="row")
        try:
            record.keep(rows, self.calculation_date.date())
        except TutormaxError as error:
            raise MetricsTableError(
                f"{len(replaced)} rows of {METRICS_TABLE} are not updated, because what they say"
                f" now cannot be kept: {error}"
            ) from error


def _lock_name(calculation_date: datetime) -> str:
    return f"{METRICS_TABLE}:{calculation_date.timestamp():.0f}"


def _split(rows: pl.DataFrame) -> list[pl.DataFrame]:
    """The rows of a part of the tutors each, in the order of their ids."""
    tutor_ids = rows.select(pl.col("tutor_id").unique().sort())
    size = -(-len(tutor_ids) // PARTS)
    return [
        rows.join(members, on="tutor_id", how="semi") for members in tutor_ids.iter_slices(size)
    ]


def _may_pass_unlocked(error: BaseException) -> bool:
    return may_pass(error) and sqlstate(error) != LOCK_NOT_AVAILABLE


def _is_of_row_lock(engine: sa.Engine, error: BaseException) -> bool:
    """Whether it waited for a lock in vain, and no lock of a whole table is there to be it.

    What PostgreSQL says of the wait tells neither: it is in the server's language, and the check
    of a foreign key has the same context for both.
    """
    if sqlstate(error) != LOCK_NOT_AVAILABLE:
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
