"""Writing ``tutor_performance_metrics``: COPY to a staging table, one upsert per batch of tutors.

Every batch is its own transaction, and rows that are already there with the same values are not
touched. A batch that is refused because of its rows is split until only the culprits are left out.
The writers of one date take turns, so that two runs of it at once neither collide nor wait for each
other in a circle.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import polars as pl
import psycopg
import sqlalchemy as sa
import tenacity
from psycopg import sql
from sqlalchemy.dialects import postgresql

from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.platform.connection import Timeouts, limit_transaction, lock_for_transaction
from tutormax_assets.platform.faults import is_of_rows, may_pass, reason, sqlstate
from tutormax_assets.platform.tables import (
    METRICS_KEY,
    METRICS_TABLE,
    tutor_performance_metrics,
    tutors,
)

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

# Of a batch with one culprit, quarters write less in vain than halves, in as many transactions.
_PARTS = 4

_REFUSALS = (sa.exc.SQLAlchemyError, psycopg.Error)
_INSUFFICIENT_PRIVILEGE = "42501"
_LOCK_NOT_AVAILABLE = "55P03"


class MetricsTableError(Exception):
    """The table cannot be written or read; the message says why and what to do."""


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


def write_metrics(
    engine: sa.Engine,
    tiers: pl.DataFrame,
    *,
    calculation_date: datetime,
    batch_size: int,
    retrying: tenacity.Retrying,
    timeouts: Timeouts,
) -> Iterator[Batch]:
    """Bring the table's rows of one date and these tutors to the given values, batch by batch.

    A batch is split, each part a transaction of its own, until only the culprits are left out: if
    PostgreSQL refuses its rows, or if another session keeps some of them, or their rows of
    ``tutors``, locked. The parts wait for such locks too, but not longer than a statement may take
    in all.

    Args:
        engine: The database that holds the table.
        tiers: ``TutorTiers``, all windows of a tutor included.
        calculation_date: The instant that the reference date stands for.
        batch_size: Tutors per transaction.
        retrying: Calls the writing of a batch again when its failure may pass.
        timeouts: How long a statement may take, and wait for another session's lock.

    Yields:
        One ``Batch`` after each batch, that included in which the writing ends with an error.

    Raises:
        MetricsTableError: The table cannot be written, whatever the rows. What was saved stays,
            and the following batches are not tried.
    """
    batches = _split(tiers, size=batch_size)
    waited_seconds = 0.0
    for number, batch in enumerate(batches, start=1):
        parts = [batch]
        attempt = retrying
        rows: Counter[str] = Counter()
        errors: dict[str, str] = {}
        failure: Exception | None = None
        while parts and failure is None:
            part = parts.pop()
            tutors_of_part = part["tutor_id"].n_unique()
            try:
                rows.update(attempt(_upsert, engine, part, calculation_date, timeouts))
            except _REFUSALS as error:
                if sqlstate(error) == _LOCK_NOT_AVAILABLE:
                    waited_seconds += timeouts.lock_seconds
                    # The whole batch has been tried again for it.
                    attempt = retrying.copy(retry=tenacity.retry_if_exception(_may_pass_unlocked))
                may_accept_others = is_of_rows(error) or (
                    waited_seconds <= timeouts.statement_seconds and _is_of_row_lock(engine, error)
                )
                if not may_accept_others:
                    parts.append(part)
                    failure = error
                elif tutors_of_part == 1:
                    errors[part["tutor_id"][0]] = _why(error)
                else:
                    parts += _split(part, size=-(-tutors_of_part // _PARTS))
        if failure is not None:
            broken_off = MetricsTableError(_sentence(failure))
            for part in parts:
                errors |= dict.fromkeys(part["tutor_id"], str(broken_off))
        tutor_ids = batch["tutor_id"].unique().sort().to_list()
        yield Batch(number, len(batches), tutor_ids, **rows, errors=dict(sorted(errors.items())))
        if failure is not None:
            raise broken_off from failure


def read_metrics(
    engine: sa.Engine, *, calculation_date: datetime, tutor_ids: Sequence[str]
) -> pl.DataFrame:
    """The table's rows of one date and these tutors: their key in the date, and their values.

    Args:
        engine: The database that holds the table.
        calculation_date: The instant that the reference date stands for.
        tutor_ids: The tutors whose rows are read.

    Returns:
        ``tutor_id``, ``window`` and the values as ``TutorTiers`` has them, tiers as text.

    Raises:
        MetricsTableError: The table cannot be read.
    """
    query = sql.SQL(
        # The driver and the planner would look at each of a list of ids by itself.
        "COPY (SELECT {} FROM {} WHERE calculation_date = {}"
        " AND tutor_id IN (SELECT jsonb_array_elements_text({}::jsonb))) TO STDOUT (FORMAT csv)"
    ).format(
        sql.SQL(", ").join(sql.Identifier(name) for name in _READ),
        sql.Identifier(METRICS_TABLE),
        sql.Literal(calculation_date),
        sql.Literal(json.dumps(list(tutor_ids))),
    )
    try:
        with engine.connect() as connection:
            cursor = connection.connection.cursor()
            with cursor.copy(query) as copy:
                rows = b"".join(copy)
    except (sa.exc.SQLAlchemyError, psycopg.Error) as error:
        raise MetricsTableError(
            f"{METRICS_TABLE} cannot be read: {reason(error)}."
            " `tutormax db status` shows what is there."
        ) from error
    return pl.read_csv(rows, has_header=False, schema=_READ, raise_if_empty=False)


def _upsert(
    engine: sa.Engine, rows: pl.DataFrame, calculation_date: datetime, timeouts: Timeouts
) -> dict[str, int]:
    columns = _STAGED.c.keys()
    with engine.begin() as connection:
        # Of the locks that are taken below, only that of the date may be held for long: another
        # writer has it for as long as its statement takes.
        limit_transaction(connection, replace(timeouts, lock_seconds=0))
        _STAGED.create(connection, checkfirst=False)
        copy_rows = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(
            sql.Identifier(_STAGED.name), sql.SQL(", ").join(map(sql.Identifier, columns))
        )
        with connection.connection.cursor().copy(copy_rows) as copy:
            copy.write(rows.select(columns).write_csv(include_header=False))
        # Who inserts a row that another transaction is inserting is refused by the primary key, of
        # which ON CONFLICT knows nothing; so the writers of a date take turns.
        lock_for_transaction(connection, f"{METRICS_TABLE}:{calculation_date.timestamp():.0f}")
        limit_transaction(connection, timeouts)
        written = connection.execute(_UPSERT, {"calculation_date": calculation_date}).one()
    return {
        "inserted": written.inserted,
        "updated": written.written - written.inserted,
        "unchanged": len(rows) - written.written,
    }


def _split(rows: pl.DataFrame, *, size: int) -> list[pl.DataFrame]:
    """The rows of so many tutors each, in the order of their ids."""
    tutor_ids = rows.select(pl.col("tutor_id").unique().sort())
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
        return "The tutor is no longer in tutors: deleted since the roster of the date was read"
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


def _upsert_statement() -> sa.Select[int, int]:
    target = tutor_performance_metrics
    date = sa.bindparam("calculation_date", type_=sa.DateTime(timezone=True))
    staged = _STAGED
    values = sa.tuple_(*(staged.c[name] for name in _VALUES))
    same = (
        sa.select(sa.literal(1))
        .where(
            target.c.tutor_id == staged.c.tutor_id,
            target.c.calculation_date == date,
            target.c.window == staged.c.window,
            # Says to the planner that a batch is a part of the date: it would read all of it.
            target.c.tutor_id >= sa.select(sa.func.min(staged.c.tutor_id)).scalar_subquery(),
            target.c.tutor_id <= sa.select(sa.func.max(staged.c.tutor_id)).scalar_subquery(),
            sa.tuple_(*(target.c[name] for name in _VALUES)).is_not_distinct_from(values),
        )
        .exists()
    )
    # The id follows from the key, so that the table is the same whoever wrote a row first.
    digest = sa.func.sha256(
        sa.func.convert_to(
            sa.func.concat_ws(
                "|",
                staged.c.tutor_id,
                sa.func.extract("epoch", date).cast(sa.BigInteger),
                staged.c.window,
            ),
            "UTF8",
        )
    )
    metric_id = sa.func.concat("metric_", sa.func.left(sa.func.encode(digest, "hex"), 32))
    rows = (
        sa.select(
            metric_id,
            staged.c.tutor_id,
            date,
            staged.c.window,
            *(staged.c[name] for name in _VALUES),
        )
        .where(~same)
        .order_by(staged.c.tutor_id, staged.c.window)
    )
    insert = postgresql.insert(target).from_select(["metric_id", *METRICS_KEY, *_VALUES], rows)
    new_values = sa.tuple_(*(insert.excluded[name] for name in _VALUES))
    upsert: Any = insert.on_conflict_do_update(
        index_elements=METRICS_KEY,
        set_={**{name: insert.excluded[name] for name in _VALUES}, "updated_at": sa.func.now()},
        where=sa.tuple_(*(target.c[name] for name in _VALUES)).is_distinct_from(new_values),
    ).returning(sa.literal_column("xmax = 0").label("is_new"))
    written = upsert.cte("written")
    return sa.select(
        sa.func.count().filter(written.c.is_new).label("inserted"),
        sa.func.count().label("written"),
    ).select_from(written)


_UPSERT = _upsert_statement()
