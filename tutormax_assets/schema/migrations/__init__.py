"""Alembic's environment for the tables that this project owns in the platform's database."""

from typing import Any

from tutormax_assets.database.tables import metrics_metadata
from tutormax_assets.schema.old_rows import set_aside_metadata

VERSION_TABLE = "tutormax_assets_alembic_version"
"""The platform has an Alembic of its own in the same database, in `alembic_version`."""

target_metadata = [metrics_metadata, set_aside_metadata]


def is_owned(
    item: Any,
    name: str | None,
    kind: str,
    reflected: bool,
    counterpart: Any,
) -> bool:
    """Whether Alembic compares an object: all but what only the database knows.

    The platform's tables are there too, and an adopted table may have more columns and indexes
    than this project knows of.
    """
    return not (reflected and counterpart is None)
