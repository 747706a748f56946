"""Writing the rows of a reference date into a table that mirrors an asset.

The rows that the table holds of a date become those that are given: others are deleted, missing
ones are added, and those that are the same stay untouched. New rows are copied straight into the
table.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, cast

import polars as pl
import psycopg
import sqlalchemy as sa
import tenacity
from psycopg import sql

from tutormax_assets.database.connection import (
    Timeouts,
    limit_transaction,
    lock_for_transaction,
)
from tutormax_assets.database.faults import is_of_rows, is_timeout, reason, sqlstate
from tutormax_assets.database.metrics_reading import (
    PARTS,
    MetricsTableError,
    MetricsTableTimeoutError,
)

# One connection keeps one core of the server busy, and it takes many rows to be worth another one.
WRITERS = 2
_ROWS_FOR_WRITERS = 20_000

_DATE = "calculation_date"

FEATURE_NOT_SUPPORTED = "0A000"

LOCK_NOT_AVAILABLE = "55P03"

# Joined and not compared with an array: PostgreSQL 13 searches long arrays one by one. Deleting a
# tutor deletes all metrics of the tutor, so a lock on one row is enough to prevent it.
_WITHOUT_METRICS_OF_DATE = sa.text("""
    WITH held AS MATERIALIZED (
        SELECT tutor_id
        FROM unnest(CAST(:tutor_ids AS text[])) AS one (tutor_id)
        JOIN tutor_performance_metrics AS metrics USING (tutor_id)
        WHERE metrics.calculation_date = ANY (:calculation_dates) AND metrics."window" = :window
        FOR KEY SHARE OF metrics
    )
    SELECT tutor_id
    FROM unnest(CAST(:tutor_ids AS text[])) AS one (tutor_id)
    LEFT JOIN held USING (tutor_id)
    WHERE held.tutor_id IS NULL
""")

_HOLD_METRICS = sa.text("""
    SELECT count(*)
    FROM unnest(CAST(:tutor_ids AS text[])) AS one (tutor_id)
    CROSS JOIN LATERAL (
        SELECT
        FROM tutor_performance_metrics AS metrics
        WHERE metrics.tutor_id = one.tutor_id
        ORDER BY metrics.calculation_date DESC
        LIMIT 1
        FOR KEY SHARE
    ) AS held
""")

# The writer may read no other column of tutors.
_GONE = sa.text("""
    SELECT one.tutor_id
    FROM unnest(CAST(:tutor_ids AS text[])) AS one (tutor_id)
    WHERE NOT EXISTS (
        SELECT tutors.tutor_id FROM tutors WHERE tutors.tutor_id = one.tutor_id
    )
""")


@dataclass(frozen=True)
class RowsOfDate:
    """Writes rows of one reference date.

    Attributes:
        engine: The database that holds the table.
        calculation_date: The instant that the reference date stands for.
        timeouts: How long a statement may take, and wait for another session's lock.
        retrying: Calls the writing again when its failure may pass.
        is_wanted: Asked in each transaction whether the run that wants the rows goes on.
        writers: How many connections write at once at most.
    """

    engine: sa.Engine
    calculation_date: datetime
    timeouts: Timeouts
    retrying: tenacity.Retrying
    is_wanted: sa.Select[bool] | None = None
    writers: int = WRITERS

    def write(
        self, table: sa.Table, rows: pl.DataFrame, *, tutor_ids: Sequence[str] | None = None
    ) -> dict[str, str]:
        """Bring the table's rows of the date to the given ones.

        Rows of tutors who are not in the database's ``tutors`` are left out. Rows that PostgreSQL
        refuses, or that another session keeps locked, stay as they are.

        Args:
            table: The table.
            rows: Its columns but for ``calculation_date``.
            tutor_ids: The tutors whose rows are replaced; everybody's when None.

        Returns:
            Why rows of a tutor stayed as they were, by ``tutor_id``.

        Raises:
            MetricsTableError: The table cannot be written. Some rows may have been.
        """
        rows = rows.select(
            pl.lit(self.calculation_date.astimezone(UTC).isoformat()).alias(_DATE)
            if column.name == _DATE
            else column.name
            for column in table.c
        )
        try:
            is_new = self.retrying.copy()(self._is_new, table, tutor_ids)
            parts = self._parts(table, rows, tutor_ids)
            with ThreadPoolExecutor(len(parts), thread_name_prefix=table.name) as pool:
                found = pool.map(lambda part: self._write(table, *part, is_new=is_new), parts)
                return {tutor: why for of_part in found for tutor, why in of_part.items()}
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            kind = MetricsTableTimeoutError if is_timeout(error) else MetricsTableError
            raise kind(
                f"{table.name} cannot be written: {reason(error).rstrip('.')}. `tutormax db status`"
                " shows what is missing, and `tutormax db upgrade` brings the tables up to date."
            ) from error

    def _is_new(self, table: sa.Table, tutor_ids: Sequence[str] | None) -> bool:
        """Whether the table holds no row of the date and these tutors."""
        is_of_date = table.c[_DATE] == self.calculation_date
        with self.engine.begin() as connection:
            limit_transaction(connection, replace(self.timeouts, lock_seconds=0))
            # What a run that has ended still writes on another machine has to be seen here.
            lock_for_transaction(connection, self._lock_name(table))
            limit_transaction(connection, self.timeouts)
            if not connection.scalar(sa.select(sa.exists().where(is_of_date))):
                return True
            if tutor_ids is None:
                return False
            is_asked = _is_one_of(table, tutor_ids)
            return not connection.scalar(sa.select(sa.exists().where(is_of_date, is_asked)))

    def _parts(
        self, table: sa.Table, rows: pl.DataFrame, tutor_ids: Sequence[str] | None
    ) -> list[tuple[pl.DataFrame, sa.ColumnElement[bool]]]:
        """The rows by writer, and which rows of the table they replace."""
        of_date = table.c[_DATE] == self.calculation_date
        if tutor_ids is not None:
            of_date &= _is_one_of(table, tutor_ids)
        if self.writers == 1 or len(rows) < _ROWS_FOR_WRITERS:
            return [(rows, of_date)]
        first = rows["tutor_id"].sort()[len(rows) // WRITERS]
        # Cut between tutors, in an order that both sides have whatever the database's encoding.
        bytes_ = sa.func.convert_to(table.c.tutor_id, "UTF8")
        return [
            (rows.filter(pl.col("tutor_id") < first), of_date & (bytes_ < first.encode())),
            (rows.filter(pl.col("tutor_id") >= first), of_date & (bytes_ >= first.encode())),
        ]

    def _write(
        self,
        table: sa.Table,
        rows: pl.DataFrame,
        replaced: sa.ColumnElement[bool],
        *,
        is_new: bool,
        tutor_ids: Sequence[str] | None = None,
    ) -> dict[str, str]:
        try:
            self.retrying.copy()(self._write_once, table, rows, replaced, is_new=is_new)
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            if not is_of_rows(error) and sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
            if tutor_ids is None:
                tutor_ids = self._tutors_of(table, rows, replaced)
            if len(tutor_ids) < 2:
                return dict.fromkeys(tutor_ids, reason(error))
            return self._write_by_tutor(table, rows, replaced, tutor_ids)
        return {}

    def _tutors_of(
        self, table: sa.Table, rows: pl.DataFrame, replaced: sa.ColumnElement[bool]
    ) -> list[str]:
        """Those of the rows, and of the rows that the table holds."""
        with self.engine.begin() as connection:
            limit_transaction(connection, self.timeouts)
            held = connection.scalars(sa.select(table.c.tutor_id).distinct().where(replaced)).all()
        return sorted({*held, *rows["tutor_id"]})

    def _write_by_tutor(
        self,
        table: sa.Table,
        rows: pl.DataFrame,
        replaced: sa.ColumnElement[bool],
        tutor_ids: Sequence[str],
    ) -> dict[str, str]:
        """Write parts of the rows, down to the tutors whose rows are refused."""
        size = -(-len(tutor_ids) // PARTS)
        culprits: dict[str, str] = {}
        for start in range(0, len(tutor_ids), size):
            ids = tutor_ids[start : start + size]
            culprits |= self._write(
                table,
                rows.filter(pl.col("tutor_id").is_in(ids)),
                replaced & _is_one_of(table, ids),
                is_new=False,
                tutor_ids=ids,
            )
        return culprits

    def _write_once(
        self, table: sa.Table, rows: pl.DataFrame, replaced: sa.ColumnElement[bool], *, is_new: bool
    ) -> None:
        with self.engine.begin() as connection:
            limit_transaction(connection, replace(self.timeouts, lock_seconds=0))
            lock_for_transaction(connection, self._lock_name(table), shared=True)
            limit_transaction(connection, self.timeouts)
            if self.is_wanted is not None and not connection.scalar(self.is_wanted):
                raise MetricsTableError(
                    f"The run has ended or lost its lock on the date; its rows of {table.name} are"
                    " not written. Rerun the date."
                )
            rows = of_held_tutors(connection, rows, [self.calculation_date])
            if not (is_new and _copy_new(connection, table, rows)):
                _replace(connection, table, rows, replaced)

    def _lock_name(self, table: sa.Table) -> str:
        return f"{table.name}:{self.calculation_date.timestamp():.0f}"


def _replace(
    connection: sa.Connection,
    table: sa.Table,
    rows: pl.DataFrame,
    replaced: sa.ColumnElement[bool],
) -> None:
    """Delete what is not among the rows, and add what the table lacks."""
    staged = create_staged(connection, table)
    copy_csv(connection, staged.name, rows)
    # Without statistics PostgreSQL takes the staged rows for a handful.
    _cursor(connection).execute(sql.SQL("ANALYZE {}").format(sql.Identifier(staged.name)))
    is_same = _has_key_of(table, staged) & sa.tuple_(*table.c).is_not_distinct_from(
        sa.tuple_(*staged.c)
    )
    connection.execute(sa.delete(table).where(replaced, ~sa.select(staged).where(is_same).exists()))
    insert_missing(connection, table, staged)


def of_held_tutors(
    connection: sa.Connection, rows: pl.DataFrame, calculation_dates: Sequence[datetime]
) -> pl.DataFrame:
    """The rows of tutors who are in the database's ``tutors``.

    Until the transaction ends nobody deletes these tutors: that would delete their metrics, which
    are locked as a foreign key would lock them. Afterwards a trigger on that table deletes the rows
    of a tutor who is deleted. It does not fire for a tutor without metrics: rows that are written
    for one outlive the tutor.

    Args:
        connection: A transaction that is to write the rows.
        rows: Rows with ``tutor_id``.
        calculation_dates: The instants that their reference dates stand for.
    """
    values: dict[str, Any] = {
        "calculation_dates": list(calculation_dates),
        "window": rows["window"].first(),
        "tutor_ids": rows["tutor_id"].unique(maintain_order=True).to_list(),
    }
    values["tutor_ids"] = connection.scalars(_WITHOUT_METRICS_OF_DATE, values).all()
    if not values["tutor_ids"]:
        return rows
    connection.execute(_HOLD_METRICS, values)
    gone = connection.scalars(_GONE, values).all()
    return rows.filter(~pl.col("tutor_id").is_in(gone))


def create_staged(connection: sa.Connection, table: sa.Table) -> sa.Table:
    """Create a temporary table, empty, with the columns of a table."""
    staged = sa.Table(
        f"staged_{table.name}",
        sa.MetaData(),
        *(sa.Column(column.name, column.type) for column in table.c),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )
    staged.create(connection, checkfirst=False)
    return staged


def insert_missing(connection: sa.Connection, table: sa.Table, staged: sa.Table) -> None:
    """Insert the staged rows whose keys the table lacks."""
    is_held = sa.select(table).where(_has_key_of(table, staged)).exists()
    missing = sa.select(staged).where(~is_held)
    connection.execute(sa.insert(table).from_select(table.c.keys(), missing))


def _has_key_of(table: sa.Table, staged: sa.Table) -> sa.ColumnElement[bool]:
    key = [column.name for column in table.primary_key]
    return sa.and_(*(table.c[name] == staged.c[name] for name in key))


def _copy_new(connection: sa.Connection, table: sa.Table, rows: pl.DataFrame) -> bool:
    """Copy rows straight into the table; says whether it took them, which it does all or none."""
    try:
        with connection.begin_nested():
            copy_csv(connection, table.name, rows)
    except psycopg.Error as error:
        # Another writer was ahead, or row security refuses COPY.
        if not is_of_rows(error) and sqlstate(error) != FEATURE_NOT_SUPPORTED:
            raise
        return False
    return True


def copy_csv(connection: sa.Connection, table: str, rows: pl.DataFrame) -> None:
    """Copy rows into the columns of a table that have the same names."""
    query = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, rows.columns))
    )
    with _cursor(connection).copy(query) as copy:
        copy.write(rows.write_csv(include_header=False))


def _cursor(connection: sa.Connection) -> psycopg.Cursor[Any]:
    driver: psycopg.Connection[Any] = cast("Any", connection.connection.driver_connection)
    return driver.cursor()


def _is_one_of(table: sa.Table, tutor_ids: Sequence[str]) -> sa.ColumnElement[bool]:
    # Not as a subquery: of a table without statistics, the planner takes it for a few rows.
    return table.c.tutor_id == sa.any_(sa.literal(list(tutor_ids), sa.ARRAY(sa.String)))
