"""The tables of reasons and changes, and the view of since when a tier is held."""

import sqlalchemy as sa

from tutormax_assets.database.tables import (
    metrics_metadata,
    tutor_tier_changes,
    tutor_tier_reasons,
    tutor_tier_since,
)

_TABLES = (tutor_tier_reasons, tutor_tier_changes)

_IS_THERE = sa.text("SELECT to_regclass(CAST(:name AS text)) IS NOT NULL")


def missing(connection: sa.Connection) -> list[str]:
    """Names of the tables and the view that are not there."""
    names = [*(table.name for table in _TABLES), tutor_tier_since.name]
    return [name for name in names if not connection.scalar(_IS_THERE, {"name": name})]


def create(connection: sa.Connection) -> None:
    """Create those tables, and the view, that are not there."""
    if missing(connection):
        metrics_metadata.create_all(connection, tables=_TABLES)
