"""SQL for two roles that hold the rights a run needs and no other: a reader and a writer.

The reader's columns are those of the source contract. Nothing is executed here.
"""

from collections.abc import Iterator, Mapping, Sequence

import sqlalchemy as sa
from psycopg import sql

from tutormax_assets.database.tables import (
    METRICS_TABLE,
    tutor_live_metrics,
    tutor_tier_changes,
    tutor_tier_reasons,
    tutor_tier_since,
)
from tutormax_assets.schema.migrations import VERSION_TABLE
from tutormax_assets.schema.old_rows import SET_ASIDE_TABLE
from tutormax_assets.source.contract import COLUMNS_AS_OF, NEEDED_COLUMNS
from tutormax_assets.source.horizon import TRACKED_TABLES

WRITER_RIGHTS: Mapping[str, tuple[str, ...]] = {
    METRICS_TABLE: ("SELECT", "INSERT", "UPDATE", "DELETE"),
    tutor_tier_reasons.name: ("SELECT", "INSERT", "DELETE"),
    tutor_tier_changes.name: ("SELECT", "INSERT", "DELETE"),
    tutor_tier_since.name: ("SELECT",),
    tutor_live_metrics.name: ("SELECT", "INSERT", "UPDATE", "DELETE"),
    SET_ASIDE_TABLE: ("SELECT",),
    VERSION_TABLE: ("SELECT",),
}
"""What the writer may do with this project's tables, by table."""

_NONE: Mapping[str, str] = {}

_HEAD = """\
-- The rights of tutormax_assets, for two roles that cannot log in: a reader of the columns that a
-- run needs, and a writer of this project's tables. To be run by the owner of the tables, in the
-- platform's database, after `tutormax db upgrade`; it can be run again at any time. Only roles
-- that do not exist yet need CREATEROLE. A warning that no privileges were granted means that the
-- owner of the database or of the schema has to grant them; `tutormax db status` names what
-- is missing."""

# DELETE and the ids ask for a reason.
_WRITER = """\
-- Batches are staged in temporary tables. DELETE is for `tutormax cleanup`, which moves old rows to
-- the archive; tutor_id is for `tutormax restore`, which leaves out tutors who are gone."""

_XMIN = """\
-- The transaction ids of rows tell which have changed since a run. A view has none; it is read as a
-- whole each time."""

_USERS = """\
-- Users who log in are yours to create; psql's \\password keeps the password out of its history:
--   CREATE ROLE tutormax_source LOGIN IN ROLE {reader};
--   CREATE ROLE tutormax LOGIN IN ROLE {writer};
-- or one user for both:
--   CREATE ROLE tutormax LOGIN IN ROLE {reader}, {writer};"""

_SEARCH_PATH = """
-- The tables are looked for on the search path of the user:
--   ALTER ROLE tutormax SET search_path = {schemas};"""


def find_schemas(connection: sa.Connection) -> dict[str, str]:
    """The schemas of the tables that the script names, by table, as the search path finds them."""
    names = [*NEEDED_COLUMNS, *WRITER_RIGHTS]
    query = sa.text("""
        SELECT name, nspname
        FROM unnest(CAST(:names AS text[])) AS name
        JOIN pg_class AS relation ON relation.oid = to_regclass(name)
        JOIN pg_namespace AS schema ON schema.oid = relation.relnamespace
        ORDER BY array_position(current_schemas(true), nspname)
    """)
    return {row.name: row.nspname for row in connection.execute(query, {"names": names})}


def grants(*, reader: str, writer: str, schema: str, schemas: Mapping[str, str] = _NONE) -> str:
    """SQL that creates both roles where they are missing and gives them their rights.

    Of the tables that it names, whatever else the two roles were given is taken from them.

    Args:
        reader: Name of the role that reads the source tables.
        writer: Name of the role that writes the metrics table, another one.
        schema: Name of the schema that holds the tables.
        schemas: The schema of each table that another one may hold.

    Returns:
        A script for ``psql``, one transaction; comments say how to create users who log in.
    """
    of_table = {table: schemas.get(table, schema) for table in (*NEEDED_COLUMNS, *WRITER_RIGHTS)}
    path = list(dict.fromkeys((*schemas.values(), *of_table.values())))
    names = {
        "reader": sql.Identifier(reader),
        "writer": sql.Identifier(writer),
        "schemas": sql.SQL(", ").join(map(sql.Identifier, path)),
    }
    reads = {table: _select(columns) for table, columns in COLUMNS_AS_OF.items()}
    writes = {
        table: sql.SQL(", ").join(map(sql.SQL, rights)) for table, rights in WRITER_RIGHTS.items()
    }
    parts: list[sql.Composable] = [
        sql.SQL(_HEAD),
        sql.SQL("BEGIN;"),
        *map(_role, (reader, writer)),
        _of_database("CONNECT", reader),
        _of_database("CONNECT, TEMPORARY", writer),
        sql.SQL("GRANT USAGE ON SCHEMA {schemas} TO {reader}, {writer};").format(**names),
        *_of_tables(reads, of_table, names["reader"]),
        sql.SQL(_XMIN),
        *(_xmin(of_table[table], table, names["reader"]) for table in TRACKED_TABLES),
        sql.SQL(_WRITER),
        *_of_tables({**writes, "tutors": _select(["tutor_id"])}, of_table, names["writer"]),
        sql.SQL("COMMIT;"),
        sql.SQL(_USERS + (_SEARCH_PATH if path != ["public"] else "")).format(**names),
    ]
    return sql.SQL("\n").join(parts).as_string(None)


def _role(name: str) -> sql.Composable:
    # PostgreSQL asks for CREATEROLE before it sees that the role exists.
    create = sql.SQL(
        "BEGIN IF to_regrole({}) IS NULL THEN CREATE ROLE {} NOLOGIN; END IF;"
        " EXCEPTION WHEN duplicate_object THEN NULL; END"
    )
    role = sql.Identifier(name)
    return _do(create.format(role.as_string(None), role))


def _of_database(rights: str, role: str) -> sql.Composable:
    # Which database it is, is known where this runs.
    grant = sql.SQL("BEGIN EXECUTE format({}, current_database(), {}); END")
    return _do(grant.format(f"GRANT {rights} ON DATABASE %I TO %I", role))


def _do(block: sql.Composable) -> sql.Composable:
    # In a string, and not between dollars, which a name may hold.
    return sql.SQL("DO {};").format(block.as_string(None))


def _select(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL("SELECT ({})").format(sql.SQL(", ").join(map(sql.Identifier, columns)))


def _xmin(schema: str, table: str, role: sql.Composable) -> sql.Composable:
    grant = sql.SQL(
        "BEGIN GRANT SELECT (xmin) ON {} TO {}; EXCEPTION WHEN undefined_column THEN NULL; END"
    )
    return _do(grant.format(sql.Identifier(schema, table), role))


def _of_tables(
    rights: Mapping[str, sql.Composable], schemas: Mapping[str, str], role: sql.Composable
) -> Iterator[sql.Composable]:
    for table, given in rights.items():
        on = sql.Identifier(schemas[table], table)
        yield sql.SQL("REVOKE ALL ON {} FROM {};").format(on, role)
        yield sql.SQL("GRANT {} ON {} TO {};").format(given, on, role)
