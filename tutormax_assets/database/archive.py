"""Old rows of ``tutor_performance_metrics`` in cold storage, and the way back.

The archive holds one Parquet file a calculation date, by month:
``<base>/tutor_performance_metrics/month=2025-08/2025-08-14.parquet``. A row is deleted from the
table only once it was read back from its file and restored into a copy of the table, only while it
has the values that it has there, and only if no other table refers to it. Each step may be
interrupted and done again: a file is replaced as a whole, its rows are unique by their key, and
what is still in the table is archived anew. ``<base>/tutor_performance_metrics/restored`` says
until which day the rows of a restored month stay in the table.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import psycopg
import sqlalchemy as sa
from psycopg import sql
from pydantic import BaseModel, ValidationError
from upath import UPath

from tutormax_assets.database import references
from tutormax_assets.database.connection import Timeouts, limit_transaction
from tutormax_assets.database.date_locks import date_lock
from tutormax_assets.database.faults import is_of_rows, reason
from tutormax_assets.database.metrics_table import MetricsTableError
from tutormax_assets.database.references import Reference, is_referred
from tutormax_assets.database.tables import (
    METRICS_KEY,
    METRICS_TABLE,
    is_a_date,
    tutor_performance_metrics,
    tutors,
)
from tutormax_assets.dates import midnight
from tutormax_assets.errors import TutormaxError
from tutormax_assets.storage.files import (
    entries,
    read_parquet,
    read_text,
    write_parquet,
    write_text,
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

_DEFAULT_TIMEOUTS = Timeouts()

_COLUMNS = sa.text("""
    SELECT attname::text AS name, attgenerated <> '' AS is_generated
    FROM pg_attribute
    WHERE attrelid = to_regclass(CAST(:name AS text)) AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
""")


class ArchiveError(TutormaxError):
    """The archive cannot be reached, or does not hold what it should; nothing was lost."""


class _NotRestorableError(Exception):
    """Rows do not come back into a copy of the table; the message says why."""


class _Restored(BaseModel):
    until: date


@dataclass(frozen=True)
class _Table:
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
        return [name for name in names if name in self.clause.c and name not in self.generated]


@dataclass(frozen=True)
class StoredDate:
    """A calculation date that the table holds rows of."""

    day: date
    rows: int

    @property
    def month(self) -> str:
        """Its month, as ``YYYY-MM``."""
        return f"{self.day:%Y-%m}"


@dataclass(frozen=True)
class ArchivedDate:
    """What became of the rows of one calculation date.

    Attributes:
        day: The date.
        path: The file that holds the rows.
        rows_archived: Rows that were read back from the file.
        rows_deleted: Rows that left the table.
        is_in_use: Whether nothing was done, because a run or another cleanup holds the date.
        refusal: Why rows would not come back from the archive, so that they stay in the table.
    """

    day: date
    path: str
    rows_archived: int = 0
    rows_deleted: int = 0
    is_in_use: bool = False
    refusal: str | None = None

    @property
    def rows_left(self) -> int:
        """Archived rows that stay in the table."""
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
    engine: sa.Engine, before: date, *, timezone: str, timeouts: Timeouts = _DEFAULT_TIMEOUTS
) -> Iterator[StoredDate]:
    """The calculation dates before a day of which rows can leave the table, oldest first.

    Rows that stay do not count: those that another table refers to, as far as the user may see
    them, and those with a timestamp that cannot be read, such as an infinite one.

    Args:
        engine: The database that holds the table.
        before: The first day that does not count.
        timezone: IANA timezone in which a day begins.
        timeouts: How long a statement may take, and wait for another session's lock.

    Raises:
        MetricsTableError: The table is missing or not as this version expects it.
    """
    first = None
    with _transaction(engine, timeouts) as connection:
        found = _table(connection)
        date_column = found.clause.c.calculation_date
        is_free = found.may_leave
        while True:
            # Each step is a look-up in the index; grouping would read every old row.
            oldest = connection.scalar(
                sa.select(date_column)
                .where(
                    date_column < midnight(before, timezone=timezone),
                    sa.true() if first is None else date_column >= first,
                    is_free,
                )
                .order_by(date_column)
                .limit(1)
            )
            if oldest is None:
                break
            day = oldest.astimezone(ZoneInfo(timezone)).date()
            start, first = _bounds(day, timezone=timezone)
            of_day = date_column >= start, date_column < first
            rows = connection.scalar(sa.select(sa.func.count()).where(*of_day, is_free))
            yield StoredDate(day, rows or 0)


def referred_rows(
    engine: sa.Engine, before: date, *, timezone: str, timeouts: Timeouts = _DEFAULT_TIMEOUTS
) -> dict[str, int]:
    """How many rows before a day stay because another table refers to them, by that table.

    Args:
        engine: The database that holds the table.
        before: The first day that does not count.
        timezone: IANA timezone in which a day begins.
        timeouts: How long a statement may take, and wait for another session's lock.

    Raises:
        MetricsTableError: The table is not as this version expects it, or the user may not see
            which of its rows are referred to.
    """
    with _transaction(engine, timeouts) as connection:
        found = _table(connection)
        _check_readable(found)
        is_old = found.clause.c.calculation_date < midnight(before, timezone=timezone)
        return references.referred_rows(connection, found.references, found.clause, is_old)


def undated_rows(
    engine: sa.Engine, before: date, *, timezone: str, timeouts: Timeouts = _DEFAULT_TIMEOUTS
) -> int:
    """How many rows before a day stay because a timestamp of theirs cannot be read.

    Args:
        engine: The database that holds the table.
        before: The first day that does not count.
        timezone: IANA timezone in which a day begins.
        timeouts: How long a statement may take, and wait for another session's lock.

    Raises:
        MetricsTableError: The table is not as this version expects it.
    """
    with _transaction(engine, timeouts) as connection:
        found = _table(connection)
        is_old = found.clause.c.calculation_date < midnight(before, timezone=timezone)
        query = sa.select(sa.func.count()).select_from(found.clause)
        return connection.scalar(query.where(is_old, ~found.is_dated)) or 0


def archive_date(
    engine: sa.Engine,
    base_path: str,
    day: date,
    *,
    timezone: str,
    timeouts: Timeouts = _DEFAULT_TIMEOUTS,
    batch_rows: int = DELETE_BATCH_ROWS,
) -> ArchivedDate:
    """Move the rows of one calculation date from the table to the archive.

    They are added to the date's file, read back from it, restored into a copy of the table,
    compared, and deleted in batches, each of which is its own transaction. A row that has other
    values by then, is locked, or is referred to by another table stays. Nothing is done while a
    run or another cleanup holds the date.

    Args:
        engine: The database that holds the table.
        base_path: Where the archive is, a path that fsspec knows.
        day: The calculation date.
        timezone: IANA timezone in which a day begins.
        timeouts: How long a statement may take, and wait for another session's lock.
        batch_rows: Rows that are deleted in one transaction.

    Raises:
        ArchiveError: The file cannot be read or written, or did not come back as it was written.
            No row was deleted.
        MetricsTableError: The table is missing, locked or not as this version expects it.
    """
    path = archive_file(base_path, day)
    start, end = _bounds(day, timezone=timezone)
    # A run would write rows that are being archived; a restore would bring them back in between.
    with _refusals(), date_lock(engine, day.isoformat()) as is_mine:
        if not is_mine:
            return ArchivedDate(day, str(path), is_in_use=True)
        with _transaction(engine, timeouts) as connection:
            found = _table(connection)
            _check_readable(found)
            rows = _rows(connection, found, start, end)
        if rows.is_empty():
            return ArchivedDate(day, str(path))
        archived = _archived(path, rows).select(found.clause.c.keys())
        deleted, refusal = 0, None
        try:
            for batch in archived.iter_slices(batch_rows):
                deleted += _delete_unchanged(engine, found, batch, timeouts)
        except _NotRestorableError as error:
            refusal = str(error)
    return ArchivedDate(
        day, str(path), rows_archived=len(archived), rows_deleted=deleted, refusal=refusal
    )


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
    engine: sa.Engine,
    base_path: str,
    day: date,
    *,
    timeouts: Timeouts = _DEFAULT_TIMEOUTS,
    dry_run: bool = False,
) -> RestoredDate:
    """Bring the archived rows of one calculation date back into the table, with all their values.

    A row that the table holds, by its id or by its key, stays as it is there. Generated columns are
    computed again. The archive is not changed.

    Args:
        engine: The database that holds the table.
        base_path: Where the archive is.
        day: The calculation date.
        timeouts: How long a statement may take, and wait for another session's lock.
        dry_run: Only count.

    Raises:
        ArchiveError: The file is missing or cannot be read.
        MetricsTableError: The table is missing or refuses the rows, or a run or a cleanup holds the
            date; none of its rows was restored.
    """
    path = archive_file(base_path, day)
    with _refusals(), date_lock(engine, day.isoformat()) as is_mine:
        if not (is_mine or dry_run):
            raise MetricsTableError(
                f"A run or a cleanup of {day} is under way, so its rows are not restored. Restore"
                " the month again when that has ended."
            )
        with _transaction(engine, timeouts) as connection:
            found = _table(connection)
            with _reaching(path):
                rows = read_parquet(path)
            if rows is None:
                raise ArchiveError(f"There is no file {path} in the archive.")
            # A column that the table has no more cannot be restored.
            rows = rows.select(found.restorable_columns(rows.columns))
            _stage(connection, rows, _STAGE_COLUMNS)
            unknown = connection.execute(_UNKNOWN_TUTORS).all()
            restored = _restore_staged(connection, rows.columns, dry_run=dry_run)
            connection.commit()
    return RestoredDate(
        day,
        str(path),
        rows_archived=len(rows),
        rows_restored=restored,
        unknown_tutors=tuple(tutor_id for tutor_id, _ in unknown),
        rows_of_unknown_tutors=sum(count for _, count in unknown),
    )


def restored_months(base_path: str) -> dict[str, date]:
    """The months that were restored, as ``YYYY-MM``, and the day until which each stays.

    Raises:
        ArchiveError: The archive cannot be reached.
    """
    with _reaching(base_path):
        months = (
            (entry.stem, read_text(entry))
            for entry in entries(_restored_folder(base_path))
            if re.fullmatch(r"\d{4}-\d\d\.json", entry.name)
        )
        try:
            return {
                month: _Restored.model_validate_json(text).until
                for month, text in sorted(months)
                if text is not None
            }
        except ValidationError as error:
            raise ArchiveError(
                f"A file in {_restored_folder(base_path)} does not say until which day its month"
                " stays in the table. Delete it, or restore the month again."
            ) from error


def keep_month(base_path: str, month: str, until: date) -> None:
    """Keep the rows of a restored month in the table until a day, in place of an earlier one.

    Raises:
        ArchiveError: The archive cannot be reached.
    """
    path = _restored_folder(base_path) / f"{month}.json"
    with _reaching(path):
        write_text(path, _Restored(until=until).model_dump_json())


def release_month(base_path: str, month: str) -> None:
    """Let the rows of a restored month leave the table again.

    Raises:
        ArchiveError: The archive cannot be reached.
    """
    path = _restored_folder(base_path) / f"{month}.json"
    with _reaching(path):
        path.unlink(missing_ok=True)


def _restored_folder(base_path: str) -> UPath:
    return UPath(base_path).joinpath(METRICS_TABLE, "restored")


def archive_file(base_path: str, day: date) -> UPath:
    """Where the archive holds the rows of a calculation date."""
    with _reaching(base_path):
        return UPath(base_path).joinpath(METRICS_TABLE, f"month={day:%Y-%m}", f"{day}.parquet")


def _bounds(day: date, *, timezone: str) -> tuple[datetime, datetime]:
    start = midnight(day, timezone=timezone)
    return start, midnight(day + timedelta(days=1), timezone=timezone)


@contextmanager
def _transaction(engine: sa.Engine, timeouts: Timeouts) -> Iterator[sa.Connection]:
    """A transaction that is rolled back unless the block commits it."""
    with _refusals(), engine.connect() as connection:
        limit_transaction(connection, timeouts)
        yield connection


def _table(connection: sa.Connection) -> _Table:
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
    return _Table(
        clause,
        frozenset(column.name for column in columns if column.is_generated),
        tuple(references.references(connection)),
    )


def _check_readable(found: _Table) -> None:
    for reference in found.references:
        if not reference.is_readable:
            raise MetricsTableError(
                f"Nothing is archived: {reference.missing_right}. Rows that it refers to must stay,"
                " so grant that to the user of TUTORMAX_DATABASE_URL."
            )


def _values(table: sa.FromClause, names: Sequence[str]) -> list[sa.ColumnElement[Any]]:
    """Columns in a form that can be read and compared: those that are not ours, as text."""
    return [
        table.c[name]
        if name in tutor_performance_metrics.c
        else sa.cast(table.c[name], sa.Text).label(name)
        for name in names
    ]


def _rows(connection: sa.Connection, found: _Table, start: datetime, end: datetime) -> pl.DataFrame:
    """The rows of a date that can be read and that no other table refers to."""
    table = found.clause
    schema = {column.name: _DTYPES[column.type.python_type] for column in table.c}
    query = sa.select(*_values(table, table.c.keys())).where(
        table.c.calculation_date >= start,
        table.c.calculation_date < end,
        found.may_leave,
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


_STAGE_COLUMNS = sql.SQL(
    "CREATE TEMP TABLE {staged} ON COMMIT DROP AS SELECT {columns} FROM {metrics} WITH NO DATA"
)
# With the constraints and the generated columns of the table, it takes what the table would take.
_STAGE_COPY = sql.SQL(
    "CREATE TEMP TABLE {staged}"
    " (LIKE {metrics} INCLUDING CONSTRAINTS INCLUDING GENERATED) ON COMMIT DROP"
)
_RESTORABLE = sql.SQL(
    " FROM {staged} AS staged"
    " WHERE EXISTS (SELECT FROM {tutors} AS tutors WHERE tutors.tutor_id = staged.tutor_id)"
    " AND NOT EXISTS (SELECT FROM {metrics} AS held WHERE held.metric_id = staged.metric_id)"
    " AND NOT EXISTS (SELECT FROM {metrics} AS held WHERE ({held}) = ({key}))"
)
# An identity column gets the archived value, whether it is GENERATED ALWAYS or BY DEFAULT.
_RESTORE = sql.SQL(
    "INSERT INTO {metrics} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns}"
    + _RESTORABLE.as_string(None)
    + " ORDER BY {key} ON CONFLICT DO NOTHING"
)
_COUNT_RESTORABLE = sql.SQL("SELECT count(*)" + _RESTORABLE.as_string(None))


def _composed(query: sql.SQL, columns: Sequence[str] = ()) -> sql.Composed:
    return query.format(
        metrics=sql.Identifier(METRICS_TABLE),
        tutors=sql.Identifier(tutors.name),
        staged=sql.Identifier(_STAGED),
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        key=sql.SQL(", ").join(sql.Identifier("staged", name) for name in METRICS_KEY),
        held=sql.SQL(", ").join(sql.Identifier("held", name) for name in METRICS_KEY),
    )


def _stage(connection: sa.Connection, rows: pl.DataFrame, create: sql.SQL) -> None:
    """Copy rows into a temporary table."""
    compose = partial(_composed, columns=rows.columns)
    cursor: Any = connection.connection.cursor()
    cursor.execute(compose(create))
    with cursor.copy(compose(sql.SQL("COPY {staged} ({columns}) FROM STDIN (FORMAT csv)"))) as copy:
        copy.write(rows.write_csv(include_header=False))
    # Without statistics PostgreSQL takes the staged rows for a handful.
    cursor.execute(compose(sql.SQL("ANALYZE {staged}")))


def _restore_staged(connection: sa.Connection, columns: Sequence[str], *, dry_run: bool) -> int:
    """Insert the staged rows that the table does not hold and whose tutors exist, or count them."""
    cursor: Any = connection.connection.cursor()
    if dry_run:
        return int(cursor.execute(_composed(_COUNT_RESTORABLE)).fetchone()[0])
    return int(cursor.execute(_composed(_RESTORE, columns)).rowcount)


def _delete_unchanged(
    engine: sa.Engine, found: _Table, archived: pl.DataFrame, timeouts: Timeouts
) -> int:
    """Delete these rows where the table still has the values that come back from the archive.

    Raises:
        _NotRestorableError: A copy of the table refuses the rows.
    """
    table = found.clause
    staged = sa.table(_STAGED, *(sa.column(column.name, column.type) for column in table.c))
    with _transaction(engine, timeouts) as connection:
        try:
            _stage(
                connection,
                archived.select(found.restorable_columns(archived.columns)),
                _STAGE_COPY,
            )
        except psycopg.Error as error:
            if not is_of_rows(error):
                raise
            raise _NotRestorableError(reason(error)) from error
        locked = (
            sa.select(table.c.metric_id)
            .join(staged, staged.c.metric_id == table.c.metric_id)
            .with_for_update(of=table, skip_locked=True)
            .cte("locked")
        )
        # What another session holds stays for the next time. What is locked here can neither
        # change nor be referred to any more, which a statement that begins afterwards relies on.
        connection.execute(
            sa.delete(staged).where(staged.c.metric_id.not_in(sa.select(locked.c.metric_id)))
        )
        names = table.c.keys()
        is_unchanged = sa.tuple_(*_values(table, names)).is_not_distinct_from(
            sa.tuple_(*_values(staged, names))
        )
        deleted = connection.execute(
            sa.delete(table).where(
                table.c.metric_id == staged.c.metric_id,
                is_unchanged,
                found.may_leave,
            )
        )
        connection.commit()
        return deleted.rowcount


_STAGED_ROWS = sa.table(_STAGED, sa.column("tutor_id", sa.String()))
_UNKNOWN_TUTORS = (
    sa.select(_STAGED_ROWS.c.tutor_id, sa.func.count())
    .where(~sa.exists(tutors.c.tutor_id).where(tutors.c.tutor_id == _STAGED_ROWS.c.tutor_id))
    .group_by(_STAGED_ROWS.c.tutor_id)
    .order_by(_STAGED_ROWS.c.tutor_id)
)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        raise MetricsTableError(
            f"Rows of {METRICS_TABLE} cannot be moved: {reason(error).rstrip('.')}."
            " `tutormax db status` shows what is there."
        ) from error


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
