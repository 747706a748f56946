"""Reasons and changes in cold storage, archived and restored with the metrics of their date.

They lie beside the metrics: ``<base>/tutor_tier_reasons/month=2025-08/2025-08-14.parquet``.
"""

from datetime import date, datetime
from typing import Any

import polars as pl
import sqlalchemy as sa
from upath import UPath

from tutormax_assets.database.archived_table import ArchiveError, reaching
from tutormax_assets.database.date_locks import lock_changes
from tutormax_assets.database.rows_of_date import (
    copy_csv,
    create_staged,
    insert_missing,
    of_held_tutors,
)
from tutormax_assets.database.tables import (
    tutor_performance_metrics,
    tutor_tier_changes,
    tutor_tier_reasons,
)
from tutormax_assets.storage.files import read_parquet, write_parquet

_TABLES = (tutor_tier_reasons, tutor_tier_changes)


def archive(
    connection: sa.Connection,
    base_path: str,
    bounds: tuple[datetime, datetime],
    day: date,
    *,
    leaving: pl.DataFrame,
) -> bool:
    """Move the reasons and changes of a date to the archive if all metrics of it leave.

    The caller holds the date and commits.

    Args:
        connection: A connection to the database that holds the tables.
        base_path: Where the archive is.
        bounds: The first instant of the day, and that of the day after it.
        day: The calculation date.
        leaving: Its metrics that are to leave the table.

    Returns:
        Whether any were moved.

    Raises:
        ArchiveError: A file cannot be written, or not read back. Nothing was deleted.
    """
    start, end = bounds
    metrics = tutor_performance_metrics.c.calculation_date
    held = connection.scalar(sa.select(sa.func.count()).where(metrics >= start, metrics < end))
    if held != len(leaving):
        return False
    lock_changes(connection, str(day))
    is_moved = False
    for table in _TABLES:
        is_of_day = (table.c.calculation_date >= start) & (table.c.calculation_date < end)
        rows = _read(connection, table, sa.select(table).where(is_of_day))
        if rows.is_empty():
            continue
        path = _file(base_path, table, day)
        with reaching(path):
            key = [column.name for column in table.primary_key]
            known = read_parquet(path)
            if known is not None:
                # What the archive has of these tutors is of an earlier run.
                of_others = known.join(leaving, on="tutor_id", how="anti")
                rows = pl.concat([rows, of_others], how="diagonal")
            write_parquet(path, rows.sort(key).lazy())
            found = read_parquet(path)
            if found is None or not found.equals(rows.sort(key)):
                raise ArchiveError(
                    f"{path} does not hold what was written. The table keeps its rows. Check the"
                    " storage, move the file away and run the cleanup again."
                )
        connection.execute(sa.delete(table).where(is_of_day))
        is_moved = True
    return is_moved


def restore(connection: sa.Connection, base_path: str, day: date) -> None:
    """Bring the archived reasons and changes of a date back.

    A tutor whose reasons the table has was computed again since: nothing of the tutor comes back.

    Raises:
        ArchiveError: A file cannot be read.
    """
    computed_again: set[str] | None = None
    for table in _TABLES:
        path = _file(base_path, table, day)
        with reaching(path):
            rows = read_parquet(path)
        if rows is None:
            # An earlier version archived the date.
            continue
        if computed_again is None:
            date_ = tutor_tier_reasons.c.calculation_date
            of_date = date_.in_(rows["calculation_date"].unique().to_list())
            query = sa.select(tutor_tier_reasons.c.tutor_id).where(of_date)
            computed_again = set(connection.scalars(query))
        rows = rows.filter(~pl.col("tutor_id").is_in(list(computed_again)))
        rows = rows.select(name for name in rows.columns if name in table.c)
        rows = of_held_tutors(connection, rows, rows["calculation_date"].unique().to_list())
        staged = create_staged(connection, table)
        copy_csv(connection, staged.name, rows)
        insert_missing(connection, table, staged)


def _file(base_path: str, table: sa.Table, day: date) -> UPath:
    with reaching(base_path):
        return UPath(base_path).joinpath(table.name, f"month={day:%Y-%m}", f"{day}.parquet")


_DTYPES: dict[type, pl.DataType] = {
    sa.String: pl.String(),
    sa.SmallInteger: pl.Int64(),
    sa.Integer: pl.Int64(),
    sa.BigInteger: pl.Int64(),
    sa.Float: pl.Float64(),
    sa.DateTime: pl.Datetime("us", "UTC"),
}


def _read(connection: sa.Connection, table: sa.Table, query: sa.Select[Any]) -> pl.DataFrame:
    rows = connection.execute(query)
    schema = {column.name: _DTYPES[type(column.type)] for column in table.c}
    return pl.DataFrame(rows.all(), schema=schema, orient="row")
