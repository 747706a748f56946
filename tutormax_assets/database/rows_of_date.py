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
from tutormax_assets.database.tables import tutors

# One connection keeps one core of the server busy, and it takes many rows to be worth another one.
_WRITERS = 2
_ROWS_FOR_WRITERS = 20_000

_DATE = "calculation_date"

FEATURE_NOT_SUPPORTED = "0A000"

LOCK_NOT_AVAILABLE = "55P03"


@dataclass(frozen=True)
class RowsOfDate:
    """Writes rows of one reference date.

    Attributes:
        engine: The database that holds the table.
        calculation_date: The instant that the reference date stands for.
        timeouts: How long a statement may take, and wait for another session's lock.
        retrying: Calls the writing again when its failure may pass.
        is_wanted: Asked in each transaction whether the run that wants the rows goes on.
    """

    engine: sa.Engine
    calculation_date: datetime
    timeouts: Timeouts
    retrying: tenacity.Retrying
    is_wanted: sa.Select[bool] | None = None

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
        if len(rows) < _ROWS_FOR_WRITERS:
            return [(rows, of_date)]
        first = rows["tutor_id"].sort()[len(rows) // _WRITERS]
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
        csv = rows.write_csv(include_header=False)
        try:
            self.retrying.copy()(self._write_once, table, csv, replaced, is_new=is_new)
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
        self, table: sa.Table, csv: str, replaced: sa.ColumnElement[bool], *, is_new: bool
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
            if not (is_new and _copy_new(connection, table, csv)):
                _replace(connection, table, csv, replaced)

    def _lock_name(self, table: sa.Table) -> str:
        return f"{table.name}:{self.calculation_date.timestamp():.0f}"


def _replace(
    connection: sa.Connection, table: sa.Table, csv: str, replaced: sa.ColumnElement[bool]
) -> None:
    """Delete what is not among the rows, and add what the table lacks."""
    staged = create_staged(connection, table)
    _copy(connection, staged.name, staged.c.keys(), csv)
    # Without statistics PostgreSQL takes the staged rows for a handful.
    _cursor(connection).execute(sql.SQL("ANALYZE {}").format(sql.Identifier(staged.name)))
    is_same = _has_key_of(table, staged) & sa.tuple_(*table.c).is_not_distinct_from(
        sa.tuple_(*staged.c)
    )
    connection.execute(sa.delete(table).where(replaced, ~sa.select(staged).where(is_same).exists()))
    insert_missing(connection, table, staged)


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
    """Insert the staged rows whose keys the table lacks and whose tutors exist."""
    # By name: the writer may read no other column.
    has_tutor = sa.exists(tutors.c.tutor_id).where(tutors.c.tutor_id == staged.c.tutor_id)
    is_held = sa.select(table).where(_has_key_of(table, staged)).exists()
    missing = sa.select(staged).where(has_tutor, ~is_held)
    connection.execute(sa.insert(table).from_select(table.c.keys(), missing))


def _has_key_of(table: sa.Table, staged: sa.Table) -> sa.ColumnElement[bool]:
    key = [column.name for column in table.primary_key]
    return sa.and_(*(table.c[name] == staged.c[name] for name in key))


def _copy_new(connection: sa.Connection, table: sa.Table, csv: str) -> bool:
    """Copy rows straight into the table; says whether it took them, which it does all or none."""
    try:
        with connection.begin_nested():
            _copy(connection, table.name, table.c.keys(), csv)
    except psycopg.Error as error:
        # A tutor was deleted, another writer was ahead, or row security refuses COPY.
        if not is_of_rows(error) and sqlstate(error) != FEATURE_NOT_SUPPORTED:
            raise
        return False
    return True


def copy_csv(connection: sa.Connection, table: str, rows: pl.DataFrame) -> None:
    """Copy rows into the columns of a table that have the same names."""
    _copy(connection, table, rows.columns, rows.write_csv(include_header=False))


def _copy(connection: sa.Connection, table: str, columns: Sequence[str], csv: str) -> None:
    query = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with _cursor(connection).copy(query) as copy:
        copy.write(csv)


def _cursor(connection: sa.Connection) -> psycopg.Cursor[Any]:
    driver: psycopg.Connection[Any] = cast("Any", connection.connection.driver_connection)
    return driver.cursor()


def _is_one_of(table: sa.Table, tutor_ids: Sequence[str]) -> sa.ColumnElement[bool]:
    # Not as a subquery: of a table without statistics, the planner takes it for a few rows.
    return table.c.tutor_id == sa.any_(sa.literal(list(tutor_ids), sa.ARRAY(sa.String)))
