"""Old rows of ``tutor_performance_metrics`` in cold storage, and the way back.

The archive holds one Parquet file a calculation date, by month:
``<base>/tutor_performance_metrics/month=2025-08/2025-08-14.parquet``. A row is deleted from the
table only once it was read back from its file, and only while it has the values that it has there.
Each step may be interrupted and done again: a file is replaced as a whole, its rows are unique by
their key, and what is still in the table is archived anew.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.dialects import postgresql
from upath import UPath

from tutormax_assets.parquet import entries, read_parquet, write_parquet
from tutormax_assets.partitions import midnight
from tutormax_assets.platform.connection import advisory_lock
from tutormax_assets.platform.faults import reason
from tutormax_assets.platform.metrics_table import MetricsTableError
from tutormax_assets.platform.tables import (
    METRICS_KEY,
    METRICS_TABLE,
    tutor_performance_metrics,
    tutors,
)

DELETE_BATCH_ROWS = 50_000
"""Rows that are deleted in one transaction."""

VACUUM_FROM_ROWS = 10_000
"""Deleted rows from which on the space is given back at once and not when autovacuum comes by."""

_READ_ROWS = 50_000
_STAGED = "staged_metrics"
_DTYPES: dict[type, pl.DataType] = {
    str: pl.String(),
    int: pl.Int64(),
    float: pl.Float64(),
    datetime: pl.Datetime("us", "UTC"),
}

_COLUMNS = sa.text("""
    SELECT attname::text
    FROM pg_attribute
    WHERE attrelid = to_regclass(CAST(:name AS text)) AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
""")


class ArchiveError(Exception):
    """The archive cannot be reached, or does not hold what it should; nothing was lost."""


@dataclass(frozen=True)
class StoredDate:
    """A calculation date that the table holds rows of."""

    day: date
    rows: int


@dataclass(frozen=True)
class ArchivedDate:
    """What became of the rows of one calculation date.

    Attributes:
        day: The date.
        path: The file that holds the rows.
        rows_archived: Rows that were read back from the file.
        rows_deleted: Rows that left the table.
    """

    day: date
    path: str
    rows_archived: int = 0
    rows_deleted: int = 0

    @property
    def rows_left(self) -> int:
        """Rows that stay, because the table has other values than the archive."""
        return self.rows_archived - self.rows_deleted


@dataclass(frozen=True)
class RestoredDate:
    """What became of the archived rows of one calculation date.

    Attributes:
        day: The date.
        path: The file that holds the rows.
        rows_archived: Rows of the file.
        rows_restored: Rows that are in the table again.
        unknown_tutors: Tutors who no longer exist; their rows are not restored.
        rows_of_unknown_tutors: Number of those rows.
    """

    day: date
    path: str
    rows_archived: int
    rows_restored: int
    unknown_tutors: tuple[str, ...]
    rows_of_unknown_tutors: int

    @property
    def rows_kept(self) -> int:
        """Rows that the table holds already; they stay as they are there."""
        return self.rows_archived - self.rows_restored - self.rows_of_unknown_tutors


def dates_before(
    engine: sa.Engine, before: date, *, timezone: str, limit: int | None = None
) -> list[StoredDate]:
    """The calculation dates before a day that the table holds rows of, oldest first.

    Args:
        engine: The database that holds the table.
        before: The first day that does not count.
        timezone: IANA timezone in which a day begins.
        limit: Number of dates to look for; all when left out.

    Raises:
        MetricsTableError: The table is missing or not as this version expects it.
    """
    column = tutor_performance_metrics.c.calculation_date
    found: list[StoredDate] = []
    in_range = [column < midnight(before, timezone=timezone)]
    with engine.connect() as connection:
        _table(connection)
        while limit is None or len(found) < limit:
            # Each step is a look-up in the index; grouping would read every old row.
            oldest = connection.scalar(sa.select(sa.func.min(column)).where(*in_range))
            if oldest is None:
                break
            day = oldest.astimezone(ZoneInfo(timezone)).date()
            start, end = _bounds(day, timezone=timezone)
            of_day = sa.select(sa.func.count()).where(column >= start, column < end)
            found.append(StoredDate(day, connection.scalar(of_day) or 0))
            in_range[1:] = [column >= end]
    return found


def archive_date(
    engine: sa.Engine,
    base_path: str,
    day: date,
    *,
    timezone: str,
    batch_rows: int = DELETE_BATCH_ROWS,
) -> ArchivedDate:
    """Move the rows of one calculation date from the table to the archive.

    They are added to the date's file, read back from it, compared, and deleted in batches, each of
    which is its own transaction. A row that has other values by then stays.

    Args:
        engine: The database that holds the table.
        base_path: Where the archive is, a path that fsspec knows.
        day: The calculation date.
        timezone: IANA timezone in which a day begins.
        batch_rows: Rows that are deleted in one transaction.

    Raises:
        ArchiveError: The file cannot be read or written, or did not come back as it was written.
            No row was deleted.
        MetricsTableError: The table is missing or not as this version expects it.
    """
    path = archive_file(base_path, day)
    start, end = _bounds(day, timezone=timezone)
    # Another cleanup would read the same rows; a restore would bring them back in between.
    with advisory_lock(engine, str(path)):
        with engine.connect() as connection:
            table = _table(connection)
            rows = _rows(connection, table, start, end)
        if rows.is_empty():
            return ArchivedDate(day, str(path))
        archived = _archived(path, rows)
        deleted = sum(
            _delete_unchanged(engine, table, batch) for batch in archived.iter_slices(batch_rows)
        )
    return ArchivedDate(day, str(path), rows_archived=len(archived), rows_deleted=deleted)


def vacuum(engine: sa.Engine) -> str | None:
    """Give the space of deleted rows back and bring the planner's statistics up to date.

    Returns:
        What kept PostgreSQL from it; null when it was done.
    """
    warnings: list[str] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        warnings.append(diagnostic.message_primary or "")

    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        driver: Any = connection.connection.driver_connection
        # To a role that may not, PostgreSQL says so as a warning.
        driver.add_notice_handler(note)
        try:
            connection.exec_driver_sql(f"VACUUM (ANALYZE) {METRICS_TABLE}")
        except sa.exc.DBAPIError as error:
            return reason(error)
        finally:
            driver.remove_notice_handler(note)
    return warnings[0] if warnings else None


def archived_dates(base_path: str, month: str) -> list[date]:
    """The calculation dates of a month that the archive holds, oldest first.

    Args:
        base_path: Where the archive is.
        month: The month as ``YYYY-MM``.

    Raises:
        ArchiveError: The archive cannot be reached, or does not hold the month.
    """
    with _reaching(base_path):
        folder = archive_file(base_path, date.fromisoformat(f"{month}-01")).parent
        days = sorted(
            date.fromisoformat(entry.stem)
            for entry in entries(folder)
            if re.fullmatch(r"\d{4}-\d\d-\d\d\.parquet", entry.name)
        )
        if days:
            return days
        months = sorted(
            entry.name.removeprefix("month=")
            for entry in entries(folder.parent)
            if re.fullmatch(r"month=\d{4}-\d\d", entry.name)
        )
    holds = f"it holds {', '.join(months)}" if months else "it holds nothing"
    raise ArchiveError(
        f"The archive at {base_path} has no month {month}; {holds}."
        " TUTORMAX_ARCHIVE says where the archive is."
    )


def restore_date(
    engine: sa.Engine, base_path: str, day: date, *, dry_run: bool = False
) -> RestoredDate:
    """Bring the archived rows of one calculation date back into the table, with all their values.

    A row that the table holds, by its id or by its key, stays as it is there. The archive is not
    changed.

    Args:
        engine: The database that holds the table.
        base_path: Where the archive is.
        day: The calculation date.
        dry_run: Only count.

    Raises:
        ArchiveError: The file is missing or cannot be read.
        MetricsTableError: The table is missing or refuses the rows; none of them was restored.
    """
    path = archive_file(base_path, day)
    with advisory_lock(engine, str(path)), engine.begin() as connection:
        table = _table(connection)
        with _reaching(path):
            rows = read_parquet(path)
        if rows is None:
            raise ArchiveError(f"There is no file {path} in the archive.")
        # A column that the table has no more cannot be restored.
        rows = rows.select(name for name in rows.columns if name in table.c)
        staged = _stage(connection, table, rows)
        unknown = connection.execute(_unknown_tutors(staged)).all()
        restorable = _restorable(table, staged, rows.columns)
        if dry_run:
            count = sa.select(sa.func.count()).select_from(restorable.subquery())
            restored = connection.scalar(count) or 0
        else:
            insert = postgresql.insert(table).from_select(rows.columns, restorable)
            inserted = connection.execute(
                insert.on_conflict_do_nothing(), execution_options={"preserve_rowcount": True}
            )
            restored = inserted.rowcount
    return RestoredDate(
        day,
        str(path),
        rows_archived=len(rows),
        rows_restored=restored,
        unknown_tutors=tuple(tutor_id for tutor_id, _ in unknown),
        rows_of_unknown_tutors=sum(count for _, count in unknown),
    )


def archive_file(base_path: str, day: date) -> UPath:
    """Where the archive holds the rows of a calculation date."""
    with _reaching(base_path):
        return UPath(base_path).joinpath(METRICS_TABLE, f"month={day:%Y-%m}", f"{day}.parquet")


def _bounds(day: date, *, timezone: str) -> tuple[datetime, datetime]:
    start = midnight(day, timezone=timezone)
    return start, midnight(day + timedelta(days=1), timezone=timezone)


def _table(connection: sa.Connection) -> sa.TableClause:
    """The table with the columns that it has in this database, which may be more than ours."""
    names = connection.scalars(_COLUMNS, {"name": METRICS_TABLE}).all()
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
    return sa.table(
        METRICS_TABLE,
        *(sa.column(name, ours[name].type if name in ours else sa.Text()) for name in names),
    )


def _values(table: sa.FromClause, names: Sequence[str]) -> list[sa.ColumnElement[Any]]:
    """Columns in a form that can be read and compared: those that are not ours, as text."""
    return [
        table.c[name]
        if name in tutor_performance_metrics.c
        else sa.cast(table.c[name], sa.Text).label(name)
        for name in names
    ]


def _rows(
    connection: sa.Connection, table: sa.TableClause, start: datetime, end: datetime
) -> pl.DataFrame:
    schema = {column.name: _DTYPES[column.type.python_type] for column in table.c}
    query = sa.select(*_values(table, table.c.keys())).where(
        table.c.calculation_date >= start, table.c.calculation_date < end
    )
    result = connection.execution_options(yield_per=_READ_ROWS).execute(query)
    chunks = [
        pl.DataFrame([_in_utc(row) for row in part], schema=schema, orient="row")
        for part in result.partitions()
    ]
    return pl.concat([pl.DataFrame(schema=schema), *chunks]).sort(METRICS_KEY)


def _in_utc(row: sa.Row[Any]) -> tuple[Any, ...]:
    # They come in the timezone of the database session.
    return tuple(value.astimezone(UTC) if isinstance(value, datetime) else value for value in row)


def _archived(path: UPath, rows: pl.DataFrame) -> pl.DataFrame:
    """Add rows to a file of the archive, and give them as they were read back from it."""
    with _reaching(path):
        known = read_parquet(path)
        merged = rows if known is None else _merged(rows, known)
        if known is None or not merged.equals(known):
            write_parquet(path, merged.lazy())
        found = read_parquet(path)
        if found is None or not found.equals(merged):
            raise ArchiveError(
                f"{path} does not hold what was written: expected {len(merged)} rows, found"
                f" {0 if found is None else len(found)} or other values. The table keeps its rows."
                " Check the storage, move the file away and run the cleanup again."
            )
        return found.join(rows, on=METRICS_KEY, how="semi")


def _merged(rows: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """Both, unique by key; of two rows with the same key, the newest stays."""
    # The rows of the table come first, so that of two as new as each other the table's stays.
    return (
        pl.concat([rows, known], how="diagonal")
        .sort("updated_at", descending=True, nulls_last=True, maintain_order=True)
        .unique(METRICS_KEY, keep="first", maintain_order=True)
        .sort(METRICS_KEY)
    )


def _stage(connection: sa.Connection, table: sa.TableClause, rows: pl.DataFrame) -> sa.TableClause:
    """Copy rows into a temporary table whose columns have the types of the table's."""
    columns = sql.SQL(", ").join(map(sql.Identifier, rows.columns))
    create = sql.SQL("CREATE TEMP TABLE {} ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA")
    names = {"table": sql.Identifier(METRICS_TABLE), "staged": sql.Identifier(_STAGED)}
    try:
        cursor: Any = connection.connection.cursor()
        cursor.execute(create.format(names["staged"], columns, names["table"]))
        copy_in = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)")
        with cursor.copy(copy_in.format(names["staged"], columns)) as copy:
            copy.write(rows.write_csv(include_header=False))
        # Without statistics PostgreSQL takes the staged rows for a handful.
        cursor.execute(sql.SQL("ANALYZE {}").format(names["staged"]))
    except psycopg.Error as error:
        raise MetricsTableError(f"Archived rows cannot be staged: {reason(error)}.") from error
    return sa.table(_STAGED, *(sa.column(name, table.c[name].type) for name in rows.columns))


def _delete_unchanged(engine: sa.Engine, table: sa.TableClause, archived: pl.DataFrame) -> int:
    """Delete these rows where the table still has the values that the archive has."""
    with engine.begin() as connection:
        staged = _stage(connection, table, archived)
        names = table.c.keys()
        unchanged = (
            sa.select(table.c.metric_id)
            .join(staged, staged.c.metric_id == table.c.metric_id)
            .where(
                sa.tuple_(*_values(table, names)).is_not_distinct_from(
                    sa.tuple_(*_values(staged, names))
                )
            )
            # In the order in which a run writes, so that neither waits for the other in a circle.
            .order_by(*(table.c[name] for name in METRICS_KEY))
            .with_for_update(of=table)
            .cte("unchanged")
        )
        delete = sa.delete(table).where(table.c.metric_id.in_(sa.select(unchanged.c.metric_id)))
        return connection.execute(delete).rowcount


def _unknown_tutors(staged: sa.TableClause) -> sa.Select[str, int]:
    known = sa.exists(tutors.c.tutor_id).where(tutors.c.tutor_id == staged.c.tutor_id)
    return (
        sa.select(staged.c.tutor_id, sa.func.count())
        .where(~known)
        .group_by(staged.c.tutor_id)
        .order_by(staged.c.tutor_id)
    )


def _restorable(
    table: sa.TableClause, staged: sa.TableClause, names: Sequence[str]
) -> sa.Select[Any]:
    """The staged rows that the table does not hold and whose tutors exist."""
    return (
        sa.select(*(staged.c[name] for name in names))
        .where(
            sa.exists(tutors.c.tutor_id).where(tutors.c.tutor_id == staged.c.tutor_id),
            ~sa.exists().where(table.c.metric_id == staged.c.metric_id),
            ~sa.exists().where(*(table.c[name] == staged.c[name] for name in METRICS_KEY)),
        )
        .order_by(*(staged.c[name] for name in METRICS_KEY))
    )


@contextmanager
def _reaching(path: object) -> Iterator[None]:
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
