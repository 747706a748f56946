"""Writing a generated platform to PostgreSQL, some thousands of tutors at a time."""

import io
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import polars as pl
import sqlalchemy as sa
from psycopg import sql
from psycopg.errors import InsufficientPrivilege

from tutormax_assets.database.tables import source_metadata
from tutormax_assets.errors import TutormaxError
from tutormax_assets.sample.frames import SampleArguments, check_arguments, sample_frames

SLICE_TUTORS = 20_000
"""Tutors that are generated and written at a time; bounds the memory of a large platform.

A multiple of 20, so that every full slice holds the kinds in their exact shares.
"""


class PlatformNotEmptyError(TutormaxError):
    """The database or the lake already holds rows; the message says which and what to do."""


class PlatformTablesMissingError(TutormaxError):
    """A table of the platform does not exist; the message says which and what to run."""


def generate(
    engine: sa.Engine,
    *,
    append: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **arguments: Unpack[SampleArguments],
) -> dict[str, int]:
    """Write the rows of `sample_frames` into PostgreSQL, all in one transaction.

    An empty platform is locked until it is filled.

    Args:
        engine: Engine of psycopg on a database that has the platform's tables.
        append: Whether to add to the tutors that are there; the new ones are numbered after them.
        progress: Is called after each slice with the number of tutors written and ``tutors``.
        **arguments: Those of `sample_frames`.

    Returns:
        The number of rows written, for each table.

    Raises:
        PlatformNotEmptyError: There are tutors, and ``append`` is not set.
        PlatformTablesMissingError: A table of the platform does not exist.
        ValueError: An argument is out of its range.
    """
    check_arguments(**arguments)
    rows: dict[str, int] = {}
    with engine.begin() as connection:
        held = _tutors_held(connection)
        if held and not append:
            raise PlatformNotEmptyError(
                f"The database already holds {held:,} tutors; append to them, or use an empty "
                "database. Nothing was written."
            )
        # Checked row by row, foreign keys cost half of the time and indexes a quarter. Beside
        # rows that are there, or on tables of another role, they stay.
        restore = [] if held else _drop_foreign_keys_and_indexes(connection)
        first = _first_free_number(connection)
        for _, frames in slices(first_tutor=first, progress=progress, **arguments):
            for table, frame in frames.items():
                _copy(connection, table, frame)
                rows[table] = rows.get(table, 0) + len(frame)
        for statement in restore:
            connection.exec_driver_sql(statement)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ANALYZE {', '.join(rows)}")
    return rows


def slices(
    *,
    tutors: int,
    first_tutor: int = 0,
    progress: Callable[[int, int], None] | None,
    **arguments: Any,
) -> Iterator[tuple[int, dict[str, pl.DataFrame]]]:
    """Generate a platform a slice of its tutors at a time.

    Args:
        tutors: Number of tutors in all slices.
        first_tutor: Number of the first tutor.
        progress: Is called once the caller has consumed a slice, with the number of tutors so far
            and ``tutors``.
        **arguments: The other arguments of `sample_frames`.

    Yields:
        The number of tutors so far, and the frames of the slice.
    """
    for start in range(0, tutors, SLICE_TUTORS):
        done = min(start + SLICE_TUTORS, tutors)
        frames = sample_frames(tutors=done - start, first_tutor=first_tutor + start, **arguments)
        yield done, frames
        if progress is not None:
            progress(done, tutors)


def _tutors_held(connection: sa.Connection) -> int:
    existing = set(sa.inspect(connection).get_table_names())
    missing = [table for table in source_metadata.tables if table not in existing]
    if missing:
        raise PlatformTablesMissingError(
            f"The database has no table {', '.join(missing)}; run `tutormax db init` to create "
            "the platform's tables."
        )
    count = sa.select(sa.func.count()).select_from(source_metadata.tables["tutors"])
    return connection.execute(count).scalar_one()


def _first_free_number(connection: sa.Connection) -> int:
    """The number after the highest sample tutor's.

    Students count too, since they outlive a tutor that is deleted.
    """
    ids = sa.union_all(
        sa.select(source_metadata.tables["tutors"].c.tutor_id.label("id")),
        sa.select(source_metadata.tables["students"].c.student_id),
    ).subquery()
    number = sa.cast(sa.func.substring(ids.c.id, r"^[TP](\d{6,9})(?:-\d+)?$"), sa.BigInteger)
    last = connection.execute(sa.select(sa.func.max(number))).scalar_one()
    return 0 if last is None else last + 1


_FOREIGN_KEYS_AND_INDEXES = sa.text("""
    SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) AS remove,
        format(
            'ALTER TABLE %s ADD CONSTRAINT %I %s',
            conrelid::regclass, conname, pg_get_constraintdef(oid)
        ) AS restore,
        1 AS place
    FROM pg_constraint
    WHERE contype = 'f' AND conrelid = ANY (CAST(:tables AS regclass[]))
    UNION ALL
    SELECT format('DROP INDEX %s', indexrelid::regclass), pg_get_indexdef(indexrelid), 0
    FROM pg_index
    WHERE NOT indisunique AND indrelid = ANY (CAST(:tables AS regclass[]))
    ORDER BY place, restore
""")


def _drop_foreign_keys_and_indexes(connection: sa.Connection) -> list[str]:
    """Drop what slows a bulk load; return the statements that bring it back, indexes first.

    A role that does not own the tables may not do so: then nothing is dropped.
    """
    tables = list(source_metadata.tables)
    found = connection.execute(_FOREIGN_KEYS_AND_INDEXES, {"tables": tables}).all()
    try:
        with connection.begin_nested():
            for remove, *_ in found:
                connection.exec_driver_sql(remove)
    except sa.exc.ProgrammingError as error:
        if not isinstance(error.orig, InsufficientPrivilege):
            raise
        return []
    return [restore for _, restore, _ in found]


def _copy(connection: sa.Connection, table: str, frame: pl.DataFrame) -> None:
    arrays = [name for name, dtype in frame.schema.items() if dtype == pl.List(pl.String)]
    literals = (
        pl.concat_str(pl.lit("{"), pl.col(name).list.join(","), pl.lit("}")).alias(name)
        for name in arrays
    )
    csv = io.BytesIO()
    frame.with_columns(literals).write_csv(csv, include_header=False)
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, frame.columns))
    )
    driver = connection.connection.driver_connection
    if driver is None:
        raise RuntimeError("The connection is closed.")
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(csv.getbuffer())
