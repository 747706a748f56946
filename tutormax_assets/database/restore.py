"""Bringing archived metrics back into the table, and keeping a restored month for a while."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import polars as pl
import sqlalchemy as sa
from psycopg import sql
from pydantic import BaseModel, ValidationError
from upath import UPath

from tutormax_assets.database import archived_reasons
from tutormax_assets.database.archived_table import (
    DEFAULT_TIMEOUTS,
    ArchiveError,
    archive_file,
    reaching,
    read_table,
    refusals,
    transaction,
)
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.date_locks import date_lock
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.tables import (
    METRICS_KEY,
    METRICS_TABLE,
    tutors,
)
from tutormax_assets.storage.files import (
    entries,
    read_parquet,
    read_text,
    write_text,
)

STAGED = "staged_metrics"


class NotRestorableError(Exception):
    """Rows do not come back into a copy of the table; the message says why."""


class _Restored(BaseModel):
    until: date


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


def archived_dates(base_path: str, month: str) -> list[date]:
    """The calculation dates of a month that the archive holds, oldest first.

    Args:
        base_path: Where the archive is.
        month: The month as ``YYYY-MM``.

    Raises:
        ArchiveError: The archive cannot be reached, or does not hold the month.
    """
    with reaching(base_path):
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
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
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
    with refusals(), date_lock(engine, day.isoformat()) as is_mine:
        if not (is_mine or dry_run):
            raise MetricsTableError(
                f"A run or a cleanup of {day} is under way, so its rows are not restored. Restore"
                " the month again when that has ended."
            )
        with transaction(engine, timeouts) as connection:
            found = read_table(connection)
            with reaching(path):
                rows = read_parquet(path)
            if rows is None:
                raise ArchiveError(f"There is no file {path} in the archive.")
            # A column that the table has no more cannot be restored.
            rows = rows.select(found.restorable_columns(rows.columns))
            stage(connection, rows, _STAGE_COLUMNS)
            unknown = connection.execute(_UNKNOWN_TUTORS).all()
            restored = restore_staged(connection, rows.columns, dry_run=dry_run)
            if not dry_run:
                archived_reasons.restore(connection, base_path, day)
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
    with reaching(base_path):
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
    with reaching(path):
        write_text(path, _Restored(until=until).model_dump_json())


def release_month(base_path: str, month: str) -> None:
    """Let the rows of a restored month leave the table again.

    Raises:
        ArchiveError: The archive cannot be reached.
    """
    path = _restored_folder(base_path) / f"{month}.json"
    with reaching(path):
        path.unlink(missing_ok=True)


def _restored_folder(base_path: str) -> UPath:
    return UPath(base_path).joinpath(METRICS_TABLE, "restored")


_STAGE_COLUMNS = sql.SQL(
    "CREATE TEMP TABLE {staged} ON COMMIT DROP AS SELECT {columns} FROM {metrics} WITH NO DATA"
)

# With the constraints and the generated columns of the table, it takes what the table would take.
STAGE_COPY = sql.SQL(
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


def _compose(query: sql.SQL, columns: Sequence[str] = ()) -> sql.Composed:
    return query.format(
        metrics=sql.Identifier(METRICS_TABLE),
        tutors=sql.Identifier(tutors.name),
        staged=sql.Identifier(STAGED),
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        key=sql.SQL(", ").join(sql.Identifier("staged", name) for name in METRICS_KEY),
        held=sql.SQL(", ").join(sql.Identifier("held", name) for name in METRICS_KEY),
    )


def stage(connection: sa.Connection, rows: pl.DataFrame, create: sql.SQL) -> None:
    """Copy rows into a temporary table."""
    compose = partial(_compose, columns=rows.columns)
    cursor: Any = connection.connection.cursor()
    cursor.execute(compose(create))
    with cursor.copy(compose(sql.SQL("COPY {staged} ({columns}) FROM STDIN (FORMAT csv)"))) as copy:
        copy.write(rows.write_csv(include_header=False))
    # Without statistics PostgreSQL takes the staged rows for a handful.
    cursor.execute(compose(sql.SQL("ANALYZE {staged}")))


def restore_staged(connection: sa.Connection, columns: Sequence[str], *, dry_run: bool) -> int:
    """Insert the staged rows that the table does not hold and whose tutors exist, or count them."""
    cursor: Any = connection.connection.cursor()
    if dry_run:
        return int(cursor.execute(_compose(_COUNT_RESTORABLE)).fetchone()[0])
    return int(cursor.execute(_compose(_RESTORE, columns)).rowcount)


_STAGED_ROWS = sa.table(STAGED, sa.column("tutor_id", sa.String()))

_UNKNOWN_TUTORS = (
    sa.select(_STAGED_ROWS.c.tutor_id, sa.func.count())
    .where(~sa.exists(tutors.c.tutor_id).where(tutors.c.tutor_id == _STAGED_ROWS.c.tutor_id))
    .group_by(_STAGED_ROWS.c.tutor_id)
    .order_by(_STAGED_ROWS.c.tutor_id)
)
