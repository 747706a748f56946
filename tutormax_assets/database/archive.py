"""Old rows of ``tutor_performance_metrics`` in cold storage, and the way back.

The archive holds one Parquet file a calculation date, by month:
``<base>/tutor_performance_metrics/month=2025-08/2025-08-14.parquet``. A row is deleted from the
table only once it was read back from its file and restored into a copy of the table, only while it
has the values that it has there, and only if no other table refers to it. Each step may be
interrupted and done again: a file is replaced as a whole, its rows are unique by their key, and
what is still in the table is archived anew. ``<base>/tutor_performance_metrics/restored`` says
until which day the rows of a restored month stay in the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import psycopg
import sqlalchemy as sa
from upath import UPath

from tutormax_assets.database import archived_reasons, references, revisions
from tutormax_assets.database.archived_table import (
    DEFAULT_TIMEOUTS,
    ArchiveError,
    TableColumns,
    archive_file,
    check_readable,
    exact_values,
    local_bounds,
    reaching,
    read_rows,
    read_table,
    refusals,
    transaction,
)
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.date_locks import date_lock
from tutormax_assets.database.faults import is_of_rows, reason
from tutormax_assets.database.restore import STAGE_COPY, STAGED, NotRestorableError, stage
from tutormax_assets.database.tables import (
    METRICS_KEY,
    TABLES_OF_DATES,
)
from tutormax_assets.dates import midnight
from tutormax_assets.storage.files import (
    read_parquet,
    write_parquet,
)

DELETE_BATCH_ROWS = 50_000
"""Rows that are deleted in one transaction."""

VACUUM_FROM_ROWS = 10_000
"""Deleted rows from which on the space is given back at once and not when autovacuum comes by."""


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


def dates_before(
    engine: sa.Engine, before: date, *, timezone: str, timeouts: Timeouts = DEFAULT_TIMEOUTS
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
    with transaction(engine, timeouts) as connection:
        found = read_table(connection)
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
            start, first = local_bounds(day, timezone=timezone)
            of_day = date_column >= start, date_column < first
            rows = connection.scalar(sa.select(sa.func.count()).where(*of_day, is_free))
            yield StoredDate(day, rows or 0)


def referred_rows(
    engine: sa.Engine, before: date, *, timezone: str, timeouts: Timeouts = DEFAULT_TIMEOUTS
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
    with transaction(engine, timeouts) as connection:
        found = read_table(connection)
        check_readable(found)
        is_old = found.clause.c.calculation_date < midnight(before, timezone=timezone)
        return references.referred_rows(connection, found.references, found.clause, is_old)


def undated_rows(
    engine: sa.Engine, before: date, *, timezone: str, timeouts: Timeouts = DEFAULT_TIMEOUTS
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
    with transaction(engine, timeouts) as connection:
        found = read_table(connection)
        is_old = found.clause.c.calculation_date < midnight(before, timezone=timezone)
        query = sa.select(sa.func.count()).select_from(found.clause)
        return connection.scalar(query.where(is_old, ~found.is_dated)) or 0


def archive_date(
    engine: sa.Engine,
    base_path: str,
    day: date,
    *,
    timezone: str,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    batch_rows: int = DELETE_BATCH_ROWS,
) -> ArchivedDate:
    """Move the rows of one calculation date from the table to the archive.

    They are added to the date's file, read back from it, restored into a copy of the table,
    compared, and deleted in batches, each of which is its own transaction. A row that has other
    values by then, is locked, or is referred to by another table stays. Nothing is done while a
    run or another cleanup holds the date. Reasons and changes go
    when all metrics of their date are to leave.

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
    start, end = local_bounds(day, timezone=timezone)
    # A run would write rows that are being archived; a restore would bring them back in between.
    with refusals(), date_lock(engine, day.isoformat()) as is_mine:
        if not is_mine:
            return ArchivedDate(day, str(path), is_in_use=True)
        with transaction(engine, timeouts) as connection:
            found = read_table(connection)
            check_readable(found)
            rows = read_rows(connection, found, start, end)
        if rows.is_empty():
            return ArchivedDate(day, str(path))
        _keep_superseded(base_path, day, rows)
        archived = _read_archive(path, rows).select(found.clause.c.keys())
        # Before the metrics, which the next cleanup finds again if this one is killed in between.
        with transaction(engine, timeouts) as connection:
            if archived_reasons.archive(connection, base_path, (start, end), day, leaving=rows):
                connection.commit()
        deleted, refusal = 0, None
        try:
            for batch in archived.iter_slices(batch_rows):
                deleted += _delete_unchanged(engine, found, batch, timeouts)
        except NotRestorableError as error:
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
            connection.exec_driver_sql(f"VACUUM (ANALYZE) {', '.join(TABLES_OF_DATES)}")
        except sa.exc.DBAPIError as error:
            return reason(error)
        finally:
            driver.remove_notice_handler(note)
    return warnings[0] if warnings else None


def _read_archive(path: UPath, rows: pl.DataFrame) -> pl.DataFrame:
    """Add rows to a file of the archive, and give them as they were read back from it."""
    with reaching(path):
        known = read_parquet(path)
        merged = rows if known is None else _merge(rows, known)
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


def _keep_superseded(base_path: str, day: date, rows: pl.DataFrame) -> None:
    """Keep what the archive says of rows that were computed again since they left the table."""
    with reaching(base_path):
        known = read_parquet(archive_file(base_path, day))
    replaced = None if known is None else revisions.superseded(known, rows)
    if replaced is not None and not replaced.is_empty():
        revisions.RevisionRecord(base_path, None, run_id=None, policy_digest=None).keep(
            replaced, day
        )


def _merge(rows: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """Both, unique by key; of two rows with the same key, the newest stays."""
    # The rows of the table come first, so that of two as new as each other the table's stays.
    return (
        pl.concat([rows, known], how="diagonal")
        .sort("updated_at", descending=True, nulls_last=True, maintain_order=True)
        .unique(METRICS_KEY, keep="first", maintain_order=True)
        .sort(METRICS_KEY)
    )


def _delete_unchanged(
    engine: sa.Engine, found: TableColumns, archived: pl.DataFrame, timeouts: Timeouts
) -> int:
    """Delete these rows where the table still has the values that come back from the archive.

    Raises:
        NotRestorableError: A copy of the table refuses the rows.
    """
    table = found.clause
    staged = sa.table(STAGED, *(sa.column(column.name, column.type) for column in table.c))
    with transaction(engine, timeouts) as connection:
        try:
            stage(
                connection,
                archived.select(found.restorable_columns(archived.columns)),
                STAGE_COPY,
            )
        except psycopg.Error as error:
            if not is_of_rows(error):
                raise
            raise NotRestorableError(reason(error)) from error
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
        is_unchanged = sa.tuple_(*exact_values(table, names)).is_not_distinct_from(
            sa.tuple_(*exact_values(staged, names))
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
