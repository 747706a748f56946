"""What keeps a user from writing to a database, or from upgrading this project's tables there.

Each obstacle is a clause that says what was found and what is expected. Only the catalog is read.
"""

from collections.abc import Iterator, Sequence

import sqlalchemy as sa

from tutormax_assets.database.tables import METRICS_TABLE, tutors

_SERVER = sa.text("""
    SELECT current_database() AS database,
           pg_is_in_recovery() AS is_standby,
           CAST(current_setting('default_transaction_read_only') AS boolean) AS is_read_only
""")

_TUTORS = sa.text("""
    SELECT relation.relkind::text AS kind,
           type.typcategory = 'S' AS is_text,
           EXISTS (
               SELECT FROM pg_index
               WHERE indrelid = relation.oid
                 AND indkey[0] = attribute.attnum
                 AND indnkeyatts = 1
                 AND indisunique AND indimmediate AND indisvalid AND indpred IS NULL
           ) AS is_unique,
           has_column_privilege(relation.oid, attribute.attnum, 'REFERENCES') AS may_refer,
           has_column_privilege(relation.oid, attribute.attnum, 'SELECT')
               AND NOT row_security_active(relation.oid) AS sees_all
    FROM pg_class AS relation
    JOIN pg_attribute AS attribute
        ON attribute.attrelid = relation.oid AND attribute.attname = 'tutor_id'
    JOIN pg_type AS type ON type.oid = attribute.atttypid
    WHERE relation.oid = to_regclass(CAST(:tutors AS text))
""")

_OWNER = sa.text("""
    SELECT pg_get_userbyid(relowner) AS owner,
           pg_has_role(relowner, 'USAGE') AS is_owner,
           has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE') AS may_write,
           relnamespace::regnamespace::text AS schema,
           has_schema_privilege(relnamespace, 'CREATE') AS may_create
    FROM pg_class
    WHERE oid = to_regclass(CAST(:metrics AS text))
""")

_SCHEMA = sa.text("""
    SELECT current_schema() AS schema,
           has_schema_privilege(current_schema(), 'CREATE') AS may_create
""")

_MAY_INSERT = sa.text("""
    SELECT has_table_privilege(to_regclass(CAST(:name AS text)), 'INSERT')
""")

_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}


def of_server(connection: sa.Connection) -> Iterator[str]:
    """What keeps everybody from writing to the database."""
    found = connection.execute(_SERVER).one()
    if found.is_standby:
        yield (
            f"database {found.database}: found a read-only standby, expected the primary: let"
            " TUTORMAX_DATABASE_URL lead to it"
        )
    elif found.is_read_only:
        yield (
            f"database {found.database}: found default_transaction_read_only on, expected off:"
            " reset it for this user and this database"
        )


def of_upgrade(
    connection: sa.Connection,
    *,
    creates: Sequence[str],
    alters: bool,
    indexes: bool,
    refers: bool,
    fills: str,
) -> Iterator[str]:
    """What keeps the user from an upgrade.

    Args:
        connection: A connection to the platform's database.
        creates: Names of the tables that it creates.
        alters: Whether it changes columns, constraints or indexes of a metrics table that exists.
        indexes: Whether it adds an index to such a table, or a constraint that has one.
        refers: Whether it adds the foreign key to ``tutors``.
        fills: Name of the table of rows set aside.
    """
    yield from of_server(connection)
    if refers:
        yield from _of_reference(connection)
    schema = connection.execute(_SCHEMA).one()
    if creates and not schema.may_create:
        where = f"schema {schema.schema}" if schema.schema else "search_path"
        found = "no right to CREATE" if schema.schema else "no schema that exists"
        yield f"{where}: found {found}, expected it for {', '.join(creates)}"
    table = connection.execute(_OWNER, {"metrics": METRICS_TABLE}).one_or_none()
    if table is not None:
        if not table.is_owner and (alters or not table.may_write):
            yield (
                f"table {METRICS_TABLE}: found an owner whose rights this user does not have,"
                f" expected to upgrade as {table.owner}"
            )
        if indexes and not table.may_create and (not creates or table.schema != schema.schema):
            yield f"schema {table.schema}: found no right to CREATE, expected it for indexes"
    if connection.scalar(_MAY_INSERT, {"name": fills}) is False:
        yield f"table {fills}: found no right to INSERT, expected it for rows that cannot stay"


def _of_reference(connection: sa.Connection) -> Iterator[str]:
    found = connection.execute(_TUTORS, {"tutors": tutors.name}).one_or_none()
    needed = f"which the foreign key of {METRICS_TABLE} needs"
    if found is None:
        yield f"table {tutors.name}: found no column tutor_id, expected one, {needed}"
    elif found.kind in _KINDS:
        yield f"table {tutors.name}: found {_KINDS[found.kind]}, expected a table, {needed}"
    else:
        if not found.is_text:
            yield f"table {tutors.name}, column tutor_id: found no text, expected text, {needed}"
        if not found.is_unique:
            yield (
                f"table {tutors.name}, column tutor_id: found no primary key and no unique"
                f" constraint of it alone, expected one, {needed}"
            )
        if not found.may_refer:
            yield (
                f"table {tutors.name}, column tutor_id: found no right to REFERENCES, expected it,"
                f" {needed}"
            )
        if not found.sees_all:
            yield (
                f"table {tutors.name}, column tutor_id: found row security or no right to SELECT,"
                f" expected to see all rows, which the trigger of {METRICS_TABLE} needs"
            )
