"""Foreign keys of other tables that refer to the metrics table.

Whatever such a key does when a row is deleted or its key changes (CASCADE, SET NULL, an error), it
concerns rows that this project does not own. So a row that another table refers to stays.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from tutormax_assets.database.tables import METRICS_TABLE

# A partition of a table that refers to ours has the key too: its parent's includes it.
_REFERENCES = sa.text("""
    SELECT schema.nspname AS schema,
           other.relname AS name,
           CAST(CAST(other.oid AS regclass) AS text) AS shown,
           key.columns,
           key.referred,
           has_schema_privilege(schema.oid, 'USAGE')
               AND key.is_granted
               AND NOT row_security_active(other.oid) AS is_readable
    FROM pg_constraint AS found
    JOIN pg_class AS other ON other.oid = found.conrelid
    JOIN pg_namespace AS schema ON schema.oid = other.relnamespace
    CROSS JOIN LATERAL (
        SELECT array_agg(CAST(theirs.attname AS text) ORDER BY place) AS columns,
               array_agg(CAST(ours.attname AS text) ORDER BY place) AS referred,
               bool_and(has_column_privilege(found.conrelid, theirs.attnum, 'SELECT'))
                   AS is_granted
        FROM unnest(found.conkey, found.confkey) WITH ORDINALITY
            AS pair (theirs_number, ours_number, place)
        JOIN pg_attribute AS theirs
            ON theirs.attrelid = found.conrelid AND theirs.attnum = theirs_number
        JOIN pg_attribute AS ours
            ON ours.attrelid = found.confrelid AND ours.attnum = ours_number
    ) AS key
    WHERE found.contype = 'f'
      AND found.confrelid = to_regclass(CAST(:metrics AS text))
      AND NOT EXISTS (
          SELECT FROM pg_constraint AS parent
          WHERE parent.oid = found.conparentid AND parent.confrelid = found.confrelid
      )
    ORDER BY shown, found.conname
""")


@dataclass(frozen=True)
class Reference:
    """A foreign key of another table, or of the table itself, that refers to the metrics table.

    Attributes:
        schema: Schema of the other table.
        name: Its name in the schema.
        shown: Its name as SQL on this connection's search path has it.
        columns: Columns of the key.
        referred: The columns of the metrics table that they refer to, in the same order.
        is_readable: Whether the user sees every value of the key.
    """

    schema: str
    name: str
    shown: str
    columns: tuple[str, ...]
    referred: tuple[str, ...]
    is_readable: bool

    def refers_to(self, metrics: sa.FromClause) -> sa.ColumnElement[bool]:
        """Whether any row of the other table refers to a row of the metrics table."""
        other = sa.table(self.name, *map(sa.column, self.columns), schema=self.schema).alias()
        pairs = zip(self.columns, self.referred, strict=True)
        return sa.exists().where(*(other.c[theirs] == metrics.c[ours] for theirs, ours in pairs))

    @property
    def missing_right(self) -> str:
        """A clause that says which right the user lacks."""
        return (
            f"table {self.shown} refers to {METRICS_TABLE}: found no right to see all of its"
            f" {', '.join(self.columns)}, expected SELECT without row security"
        )


def references(connection: sa.Connection) -> list[Reference]:
    """The foreign keys that refer to the metrics table; none where there is no such table."""
    found = connection.execute(_REFERENCES, {"metrics": METRICS_TABLE})
    return [
        Reference(
            row.schema,
            row.name,
            row.shown,
            tuple(row.columns),
            tuple(row.referred),
            row.is_readable,
        )
        for row in found
    ]


def is_referred(references: Iterable[Reference], metrics: sa.FromClause) -> sa.ColumnElement[bool]:
    """Whether any of these keys refers to a row of the metrics table."""
    return sa.or_(sa.false(), *(reference.refers_to(metrics) for reference in references))


def referred_rows(
    connection: sa.Connection,
    references: Iterable[Reference],
    metrics: sa.FromClause,
    *conditions: sa.ColumnElement[bool],
) -> dict[str, int]:
    """How many rows of the metrics table are referred to, by the table that refers to them.

    Args:
        connection: A connection to the database.
        references: The keys that count.
        metrics: The metrics table, or a query that has the referred columns.
        conditions: Which of its rows count.
    """
    by_table: dict[str, list[Reference]] = {}
    for reference in references:
        by_table.setdefault(reference.shown, []).append(reference)
    counts = {
        shown: connection.scalar(
            sa.select(sa.func.count())
            .select_from(metrics)
            .where(is_referred(of_table, metrics), *conditions)
        )
        or 0
        for shown, of_table in by_table.items()
    }
    return {shown: count for shown, count in counts.items() if count}
