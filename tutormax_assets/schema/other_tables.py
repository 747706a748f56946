"""The tables beside the metrics table, and what belongs to them.

That is the view of since when a tier is held, and the trigger that deletes the reasons and changes
of a tutor who is deleted.
"""

import sqlalchemy as sa

from tutormax_assets.database.tables import (
    METRICS_TABLE,
    TRIGGER_OF_DELETED_TUTORS,
    metrics_metadata,
    tutor_live_metrics,
    tutor_tier_changes,
    tutor_tier_reasons,
    tutor_tier_since,
    tutors,
)

_FOLLOWING = (tutor_tier_reasons, tutor_tier_changes)
"""The tables that the trigger deletes from."""

_TABLES = (*_FOLLOWING, tutor_live_metrics)

_IS_THERE = sa.text("SELECT to_regclass(CAST(:name AS text)) IS NOT NULL")

# Its function names the tables with their schemas, which may have been renamed since.
_HAS_TRIGGER = sa.text("""
    SELECT EXISTS (
        SELECT FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
        WHERE tgrelid = to_regclass(CAST(:metrics AS text))
            AND tgname = :name
            AND tgenabled IN ('O', 'A')
            AND NOT EXISTS (
                SELECT
                FROM unnest(CAST(:tables AS text[])) AS named (name)
                JOIN pg_class ON pg_class.oid = to_regclass(named.name)
                JOIN pg_namespace ON pg_namespace.oid = relnamespace
                WHERE position(format('%I.%I', nspname, relname) IN prosrc) = 0
            )
    )
""").bindparams(
    metrics=METRICS_TABLE,
    name=TRIGGER_OF_DELETED_TUTORS,
    tables=[tutors.name, *(table.name for table in _FOLLOWING)],
)


def missing(connection: sa.Connection) -> list[str]:
    """What is not there: tables, the view, and the trigger on the metrics table."""
    names = [*(table.name for table in _TABLES), tutor_tier_since.name]
    found = [name for name in names if not connection.scalar(_IS_THERE, {"name": name})]
    if not connection.scalar(_HAS_TRIGGER):
        found.append(f"trigger {TRIGGER_OF_DELETED_TUTORS} of {METRICS_TABLE}")
    return found


def create(connection: sa.Connection) -> None:
    """Create what is missing."""
    if missing(connection):
        metrics_metadata.create_all(connection, tables=_TABLES)


def drop_foreign_keys(connection: sa.Connection) -> None:
    """Drop the foreign keys of reasons and changes, in whose place the trigger is."""
    for table in _FOLLOWING:
        connection.exec_driver_sql(
            f"ALTER TABLE {table.name} DROP CONSTRAINT IF EXISTS fk_{table.name}_tutor_id"
        )
