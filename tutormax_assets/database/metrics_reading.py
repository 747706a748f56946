"""Reading the metrics table: the rows of a date, and how many there are."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import NamedTuple

import polars as pl
import sqlalchemy as sa
import tenacity
from adbc_driver_postgresql import dbapi
from psycopg import sql

from tutormax_assets.database.connection import (
    Timeouts,
    conninfo,
    limit_transaction,
    transaction_limits,
)
from tutormax_assets.database.faults import is_timeout, of_stream, reason
from tutormax_assets.database.tables import (
    METRICS_TABLE,
    tutor_performance_metrics,
    tutor_tier_since,
)
from tutormax_assets.errors import TutormaxError
from tutormax_assets.metrics.schemas import TutorTiers

READ_SCHEMA = {
    name: pl.String() if name == "performance_tier" else dtype
    for name, dtype in pl.Schema(TutorTiers).items()
    if name in tutor_performance_metrics.c
}

_TYPES = {pl.String(): "text", pl.Float64(): "double precision"}

# Of a batch with one culprit, quarters write less in vain than halves, in as many statements.
PARTS = 4


class MetricsTableError(TutormaxError):
    """The table cannot be written or read; the message says why and what to do."""

    affects_every_date = True


class MetricsTableTimeoutError(MetricsTableError):
    """A statement took too long; one that reads or writes less may not."""

    affects_every_date = False


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
                cursors.append(connections.enter_context(reading(engine, timeouts)))
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


class TierSince(NamedTuple):
    """The unbroken run of a tier that ends at a reference date. A missing date does not break it.

    Attributes:
        tier: The tier.
        tier_since: The first reference date of the run that the table has, as an instant.
        held_days: Days from the first to the last date of it, both included.
        dates_missing: Of these, those that the table does not have.
        previous_tier: The tier before it; None if there is none.
    """

    tier: str
    tier_since: datetime
    held_days: int
    dates_missing: int
    previous_tier: str | None


def read_tiers_since(
    engine: sa.Engine,
    tutor_ids: Sequence[str],
    *,
    calculation_date: datetime,
    timeouts: Timeouts,
) -> dict[tuple[str, str], TierSince]:
    """Since when tutors have the tiers of a reference date, by tutor and window.

    Args:
        engine: The database that holds the table.
        tutor_ids: The tutors.
        calculation_date: The instant that the reference date stands for.
        timeouts: How long the statement may take, and wait for another session's lock.

    Raises:
        MetricsTableError: The table cannot be read.
    """
    view = tutor_tier_since.c
    query = sa.select(
        view.tutor_id,
        view.window,
        view.performance_tier,
        view.tier_since,
        view.held_days,
        view.dates_missing,
        view.previous_tier,
    ).where(
        view.calculation_date == calculation_date,
        view.tutor_id == sa.any_(sa.literal(list(tutor_ids), sa.ARRAY(sa.String))),
    )
    try:
        with engine.begin() as connection:
            limit_transaction(connection, timeouts)
            return {(row[0], row[1]): TierSince(*row[2:]) for row in connection.execute(query)}
    except sa.exc.DBAPIError as error:
        raise _cannot_be_read(error) from error


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
    kind = MetricsTableTimeoutError if is_timeout(error) else MetricsTableError
    return kind(
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
def reading(engine: sa.Engine, timeouts: Timeouts) -> Iterator[dbapi.Cursor]:
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
    return rows.select(pl.col(name).cast(dtype) for name, dtype in READ_SCHEMA.items())


def stored_rows(
    connection: sa.Connection, calculation_date: datetime, tutor_ids: Sequence[str]
) -> pl.DataFrame:
    """As ``read_metrics``, on a connection that is there: another one costs more than a date."""
    query = sql.SQL("COPY ({}) TO STDOUT (FORMAT csv)").format(
        _rows_of(calculation_date, tutor_ids)
    )
    with connection.connection.cursor().copy(query) as copy:
        rows = b"".join(copy)
    return pl.read_csv(rows, has_header=False, schema=READ_SCHEMA, raise_if_empty=False)


def _rows_of(calculation_date: datetime, tutor_ids: Sequence[str]) -> sql.Composed:
    """The query of a date's rows, bound by the client: what is copied takes no parameters."""
    # Of an array that is joined, the planner knows the length, and takes few tutors one by one.
    asked = sql.SQL("JOIN unnest({}::text[]) AS asked (tutor_id) USING (tutor_id)").format(
        sql.Literal(list(dict.fromkeys(tutor_ids)))
    )
    return sql.SQL("SELECT {} FROM {} {} WHERE calculation_date = {}").format(
        sql.SQL(", ").join(
            sql.SQL("{}::{}").format(sql.Identifier(name), sql.SQL(_TYPES.get(dtype, "bigint")))
            for name, dtype in READ_SCHEMA.items()
        ),
        sql.Identifier(METRICS_TABLE),
        asked if tutor_ids else sql.SQL(""),
        sql.Literal(calculation_date),
    )
