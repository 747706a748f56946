"""The source contract: the tables and columns that are read, their types, and the rights to them.

The source frames declare the names, and ``tables`` the types; the checks of a database and of a
lake, and the grants of the reading role, follow from both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import dataframely as dy
import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from tutormax_assets.database.tables import source_metadata
from tutormax_assets.metrics.schemas import SourceEvents, SourceSessions, SourceTutors, origins

SOURCE_FRAMES = (SourceTutors, SourceSessions, SourceEvents)


def _needed_columns() -> Mapping[str, tuple[str, ...]]:
    needed: dict[str, set[str]] = {}
    for frame in SOURCE_FRAMES:
        for columns in origins(frame).values():
            for table, column in columns:
                needed.setdefault(table, set()).add(column)
    # In the order in which the platform declares them.
    places = {name: table.c.keys().index for name, table in source_metadata.tables.items()}
    return {table: tuple(sorted(columns, key=places[table])) for table, columns in needed.items()}


NEEDED_COLUMNS = _needed_columns()
"""The columns that a snapshot reads, by table, as the source frames say."""


COLUMNS_AS_OF: Mapping[str, tuple[str, ...]] = {
    table: (*columns, *(("submitted_at",) if table == "student_feedback" else ()), "created_at")
    for table, columns in NEEDED_COLUMNS.items()
}
"""Likewise the columns that are read to leave out what was not known yet at an instant."""


def columns_read(frame: type[dy.Schema], table: str) -> dict[str, str]:
    """The columns of a source frame that come from a table, and what they are called there."""
    return {
        name: column
        for name, columns in origins(frame).items()
        for of_table, column in columns
        if of_table == table
    }


# The first one is the contract's; of the others every value is one of its values, too.
_ACCEPTED_TYPES: Mapping[type, tuple[str, ...]] = {
    sa.String: ("character varying", "text", "character"),
    sa.Integer: ("integer", "smallint", "bigint"),
    sa.Float: ("double precision", "real", "numeric"),
    sa.Boolean: ("boolean",),
    sa.DateTime: ("timestamp with time zone",),
    JSONB: ("jsonb", "json"),
}

# A domain counts as the type that it is over, through further domains. Tables are found as a query
# would find them.
FOUND_COLUMNS = f"""
SELECT
    t.name AS table_name,
    a.attname::text AS column_name,
    format_type(y.oid, NULL) AS type,
    y.typtype = 'e' AS is_enum,
    a.attnum IS NOT NULL AND has_column_privilege(t.oid, a.attnum, 'SELECT') AS readable
FROM (
    SELECT name, to_regclass(name)::oid AS oid
    FROM unnest(ARRAY[{", ".join(f"'{name}'" for name in NEEDED_COLUMNS)}]) AS name
) AS t
LEFT JOIN pg_attribute AS a
    ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN LATERAL (
    WITH RECURSIVE types AS (
        SELECT oid, typtype, typbasetype FROM pg_type WHERE oid = a.atttypid
        UNION ALL
        SELECT b.oid, b.typtype, b.typbasetype
        FROM types JOIN pg_type AS b ON b.oid = types.typbasetype
    )
    SELECT oid, typtype FROM types WHERE typbasetype = 0
) AS y ON true
WHERE t.oid IS NOT NULL
"""  # noqa: S608 - constants only
"""Query of the columns that the source tables have, for ``breaches``."""


@dataclass(frozen=True)
class FoundColumn:
    """A row of ``FOUND_COLUMNS``; without a column name, of a table that has none."""

    table_name: str
    column_name: str | None
    type: str | None
    is_enum: bool | None
    readable: bool


def breaches(
    found: list[FoundColumn], needed_columns: Mapping[str, Sequence[str]] = NEEDED_COLUMNS
) -> Iterator[tuple[str, str]]:
    """What is missing, of another type, or not to be read.

    Args:
        found: The rows of ``FOUND_COLUMNS``.
        needed_columns: The columns that are read, by table.

    Yields:
        Table, and a clause that names it, the column, what was found and what was expected.
    """
    tables = {row.table_name for row in found}
    columns = {(row.table_name, row.column_name): row for row in found}
    for table, needed in needed_columns.items():
        if table not in tables:
            yield (
                table,
                f"table {table}: found no such table, or no right to look into its schema;"
                f" expected one with the columns {', '.join(needed)}",
            )
            continue
        for column in needed:
            accepted = accepted_types(table, column)
            there = columns.get((table, column))
            name = f"table {table}, column {column}"
            if there is None:
                yield table, f"{name}: found no such column, expected {accepted[0]}"
            elif there.type not in accepted and not (there.is_enum and accepted[0] == _TEXT):
                yield table, f"{name}: found type {there.type}, expected {accepted[0]}"
            elif not there.readable:
                yield table, f"{name}: found no right to read it, expected SELECT"


def accepted_types(table: str, column: str) -> tuple[str, ...]:
    """The PostgreSQL types that a column may have, the contract's own first."""
    declared = source_metadata.tables[table].c[column].type
    return next(names for kind, names in _ACCEPTED_TYPES.items() if isinstance(declared, kind))


_TEXT = _ACCEPTED_TYPES[sa.String][0]

RESPONSE_TIME = "response_time_minutes"
"""What is read of the metadata of an event; in a lake it may be a column of its own."""


def lake_breaches(
    table: str,
    found: Mapping[str, Mapping[str, pl.DataType]],
    needed_columns: Mapping[str, Sequence[str]] = NEEDED_COLUMNS,
) -> Iterator[str]:
    """What is missing in the Parquet files of a dataset, or of another type.

    A column without any value, which has no type then, is of any. ``metadata`` may be missing where
    there is a column ``response_time_minutes``, which is a number.

    Args:
        table: Name of the dataset.
        found: The columns of each file, as Polars reads them, by the file's path.
        needed_columns: The columns that are read, by dataset.

    Yields:
        For each column, a clause that names table, column, the first file of those that break the
        contract, what was found there and what was expected.
    """
    for column in needed_columns[table]:
        declared = type(source_metadata.tables[table].c[column].type)
        expected, accepts = _ACCEPTED_IN_PARQUET[declared]
        for path, columns in found.items():
            name, dtype = column, columns.get(column)
            if declared is JSONB and dtype is None and RESPONSE_TIME in columns:
                name, dtype, expected, accepts = (
                    RESPONSE_TIME,
                    columns[RESPONSE_TIME],
                    "a number",
                    lambda dtype: dtype.is_numeric(),
                )
            if dtype is not None and (dtype == pl.Null or accepts(dtype)):
                continue
            what = "no such column" if dtype is None else f"type {dtype}"
            yield f"table {table}, column {name}: found {what} in {path}, expected {expected}"
            break


def _is_text(dtype: pl.DataType) -> bool:
    return dtype in (pl.String, pl.Categorical, pl.Enum)


def _is_metadata(dtype: pl.DataType) -> bool:
    if not isinstance(dtype, pl.Struct):
        return _is_text(dtype)
    time = pl.Schema(dtype).get(RESPONSE_TIME, pl.Null())
    return time.is_numeric() or time == pl.Null


# What a column may be in Parquet, by what it is declared as: how that is called, and as Polars
# reads it. Whole numbers are clamped and instants converted.
_ACCEPTED_IN_PARQUET: Mapping[type, tuple[str, Callable[[pl.DataType], bool]]] = {
    sa.String: ("text", _is_text),
    sa.Integer: ("an integer", lambda dtype: dtype.is_integer()),
    sa.Float: ("a floating-point number or a decimal", lambda d: d.is_float() or d.is_decimal()),
    sa.Boolean: ("a boolean", lambda dtype: dtype == pl.Boolean),
    sa.DateTime: (
        "a timestamp with a timezone",
        lambda dtype: isinstance(dtype, pl.Datetime) and dtype.time_zone is not None,
    ),
    JSONB: (f"JSON text, or a struct with a number {RESPONSE_TIME}", _is_metadata),
}
