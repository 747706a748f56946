"""The metrics table as the archive takes it: its columns, its rows, and where they are kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import psycopg
import sqlalchemy as sa
from upath import UPath

from tutormax_assets.database import references
from tutormax_assets.database.connection import Timeouts, limit_transaction
from tutormax_assets.database.faults import reason
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.references import Reference, is_referred
from tutormax_assets.database.tables import (
    METRICS_KEY,
    METRICS_TABLE,
    is_a_date,
    tutor_performance_metrics,
)
from tutormax_assets.dates import midnight
from tutormax_assets.errors import TutormaxError

_READ_ROWS = 50_000

_DTYPES: dict[type, pl.DataType] = {
    str: pl.String(),
    int: pl.Int64(),
    float: pl.Float64(),
    datetime: pl.Datetime("us", "UTC"),
}

DEFAULT_TIMEOUTS = Timeouts()

_COLUMNS = sa.text("""
    SELECT attname::text AS name, attgenerated <> '' AS is_generated
    FROM pg_attribute
    WHERE attrelid = to_regclass(CAST(:name AS text)) AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
""")


class ArchiveError(TutormaxError):
    """The archive cannot be reached, or does not hold what it should; nothing was lost."""


@dataclass(frozen=True)
class TableColumns:
    """The table as this database has it, with columns that may be more than ours."""

    clause: sa.TableClause
    generated: frozenset[str]
    """Columns that PostgreSQL computes; nothing can be written to them."""
    references: tuple[Reference, ...]

    @property
    def may_leave(self) -> sa.ColumnElement[bool]:
        """Whether a row can be read and no other table refers to it, as far as the user sees."""
        readable = [reference for reference in self.references if reference.is_readable]
        return self.is_dated & ~is_referred(readable, self.clause)

    @property
    def is_dated(self) -> sa.ColumnElement[bool]:
        """Whether Python has all timestamps of a row: PostgreSQL knows infinite ones."""
        return sa.and_(
            *(
                column.is_(None) | is_a_date(column)
                for column in self.clause.c
                if isinstance(column.type, sa.DateTime)
            )
        )

    def restorable_columns(self, names: Sequence[str]) -> list[str]:
        """Those of the names that the table has and that can be given."""
        return [name for name in names if name in self.clause.c and name not in self.generated]


def archive_file(base_path: str, day: date) -> UPath:
    """Where the archive holds the rows of a calculation date."""
    with reaching(base_path):
        return UPath(base_path).joinpath(METRICS_TABLE, f"month={day:%Y-%m}", f"{day}.parquet")


def local_bounds(day: date, *, timezone: str) -> tuple[datetime, datetime]:
    """The first instant of a local day, and of the day after it."""
    start = midnight(day, timezone=timezone)
    return start, midnight(day + timedelta(days=1), timezone=timezone)


@contextmanager
def transaction(engine: sa.Engine, timeouts: Timeouts) -> Iterator[sa.Connection]:
    """A transaction that is rolled back unless the block commits it."""
    with refusals(), engine.connect() as connection:
        limit_transaction(connection, timeouts)
        yield connection


def read_table(connection: sa.Connection) -> TableColumns:
    """The table with the columns that it has in this database, which may be more than ours."""
    columns = connection.execute(_COLUMNS, {"name": METRICS_TABLE}).all()
    names = [column.name for column in columns]
    ours = tutor_performance_metrics.c
    missing = [column.name for column in ours if column.name not in names]
    is_unique = names and any(
        index["unique"] and set(index["column_names"]) == set(METRICS_KEY)
        for index in sa.inspect(connection).get_indexes(METRICS_TABLE)
    )
    if missing or not is_unique:
        found = (
            "does not exist"
            if not names
            else f"lacks {', '.join(missing)}"
            if missing
            else f"is not unique by {', '.join(METRICS_KEY)}"
        )
        raise MetricsTableError(
            f"{METRICS_TABLE} {found}, so its rows cannot be archived."
            " Run `tutormax db upgrade` to bring the table to the expected form."
        )
    clause = sa.table(
        METRICS_TABLE,
        *(sa.column(name, ours[name].type if name in ours else sa.Text()) for name in names),
    )
    return TableColumns(
        clause,
        frozenset(column.name for column in columns if column.is_generated),
        tuple(references.references(connection)),
    )


def check_readable(found: TableColumns) -> None:
    """Check that the tables that refer to this one can be read.

    Raises:
        MetricsTableError: One of them cannot.
    """
    for reference in found.references:
        if not reference.is_readable:
            raise MetricsTableError(
                f"Nothing is archived: {reference.missing_right}. Rows that it refers to must stay,"
                " so grant that to the user of TUTORMAX_DATABASE_URL."
            )


def exact_values(table: sa.FromClause, names: Sequence[str]) -> list[sa.ColumnElement[Any]]:
    """Columns in a form that can be read and compared: those that are not ours, as text."""
    return [
        table.c[name]
        if name in tutor_performance_metrics.c
        else sa.cast(table.c[name], sa.Text).label(name)
        for name in names
    ]


def read_rows(
    connection: sa.Connection, found: TableColumns, start: datetime, end: datetime
) -> pl.DataFrame:
    """The rows of a date that can be read and that no other table refers to."""
    table = found.clause
    schema = {column.name: _DTYPES[column.type.python_type] for column in table.c}
    query = sa.select(*exact_values(table, table.c.keys())).where(
        table.c.calculation_date >= start,
        table.c.calculation_date < end,
        found.may_leave,
    )
    result = connection.execution_options(yield_per=_READ_ROWS).execute(query)
    chunks = [
        pl.DataFrame([_row_in_utc(row) for row in part], schema=schema, orient="row")
        for part in result.partitions()
    ]
    return pl.concat([pl.DataFrame(schema=schema), *chunks]).sort(METRICS_KEY)


def _row_in_utc(row: sa.Row[Any]) -> tuple[Any, ...]:
    # They come in the timezone of the database session.
    return tuple(value.astimezone(UTC) if isinstance(value, datetime) else value for value in row)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the database refuses in the block into a ``MetricsTableError``."""
    try:
        yield
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        raise MetricsTableError(
            f"Rows of {METRICS_TABLE} cannot be moved: {reason(error).rstrip('.')}."
            " `tutormax db status` shows what is there."
        ) from error


@contextmanager
def reaching(path: object) -> Iterator[None]:
    """Turn what the filesystem refuses in the block into an ``ArchiveError``."""
    try:
        yield
    except ArchiveError:
        raise
    # What a filesystem raises depends on which one it is.
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ArchiveError(
            f"{path} cannot be read or written: {lines[0] if lines else type(error).__name__}."
            " The table keeps its rows. TUTORMAX_ARCHIVE says where the archive is; check that it"
            " is reachable and that the file is whole."
        ) from error
