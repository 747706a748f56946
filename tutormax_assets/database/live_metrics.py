"""Replacing the rows of ``tutor_live_metrics``."""

from datetime import UTC, datetime
from typing import Any

import polars as pl
import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from tutormax_assets.database.connection import (
    Timeouts,
    limit_transaction,
    lock_for_transaction,
)
from tutormax_assets.database.faults import reason, sqlstate
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.rows_of_date import copy_csv
from tutormax_assets.database.tables import tutor_live_metrics, tutors

_TARGET = tutor_live_metrics

_KEY = ("tutor_id", "window")

_VALUES = tuple(column.name for column in _TARGET.c if column.name not in _KEY)

_STAGED = sa.Table(
    "staged_live_metrics",
    sa.MetaData(),
    *(sa.Column(column.name, column.type) for column in _TARGET.c),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)

_FOREIGN_KEY_VIOLATION = "23503"

_REFUSALS = (sa.exc.SQLAlchemyError, psycopg.Error)


def replace_live_metrics(
    engine: sa.Engine,
    tiers: pl.DataFrame,
    *,
    calculated_at: datetime,
    of_all_tutors: bool,
    timeouts: Timeouts,
) -> int:
    """Replace the rows of tutors, unless they are of a later instant already.

    Args:
        engine: The database that holds the table.
        tiers: ``TutorTiers``.
        calculated_at: The instant at which the windows end.
        of_all_tutors: Whether older rows of other tutors and windows are deleted.
        timeouts: How long a statement may take, and wait for another session's lock.

    Returns:
        Number of rows that were written or deleted.

    Raises:
        MetricsTableError: The table cannot be written. Its cause tells whether to try again.
    """
    at = calculated_at.astimezone(UTC)
    rows = tiers.with_columns(pl.lit(at.isoformat()).alias("calculated_at"))
    rows = rows.select(_TARGET.c.keys()).sort(_KEY)
    try:
        with engine.begin() as connection:
            limit_transaction(connection, timeouts)
            # Two writers at once would wait for each other in a circle.
            lock_for_transaction(connection, _TARGET.name)
            _STAGED.create(connection, checkfirst=False)
            copy_csv(connection, _STAGED.name, rows)
            changed = connection.execute(_UPSERT).rowcount
            if of_all_tutors:
                changed += connection.execute(_DELETE, {"calculated_at": at}).rowcount
            return changed
    except _REFUSALS as error:
        if sqlstate(error) == _FOREIGN_KEY_VIOLATION:
            raise TutorDeletedError(_sentence(error)) from error
        raise MetricsTableError(_sentence(error)) from error


class TutorDeletedError(MetricsTableError):
    """A tutor was deleted while rows were written; the next attempt leaves the tutor out."""

    may_pass = True


def _upsert() -> Any:
    rows = (
        sa.select(_STAGED)
        # Who was deleted since the platform was read is left out.
        .where(sa.exists().where(tutors.c.tutor_id == _STAGED.c.tutor_id))
        .order_by(*(_STAGED.c[name] for name in _KEY))
    )
    insert = postgresql.insert(_TARGET).from_select(_TARGET.c.keys(), rows)
    return insert.on_conflict_do_update(
        index_elements=_KEY,
        set_={name: insert.excluded[name] for name in _VALUES},
        where=_TARGET.c.calculated_at < insert.excluded.calculated_at,
    ).execution_options(preserve_rowcount=True)


def _delete() -> Any:
    is_staged = sa.exists().where(*(_STAGED.c[name] == _TARGET.c[name] for name in _KEY))
    at = sa.bindparam("calculated_at", type_=sa.DateTime(timezone=True))
    return sa.delete(_TARGET).where(_TARGET.c.calculated_at < at, ~is_staged)


_UPSERT = _upsert()

_DELETE = _delete()


def _sentence(error: BaseException) -> str:
    said = f"{_TARGET.name} cannot be used: {reason(error).rstrip('.')}."
    if (sqlstate(error) or "").startswith("42P01"):
        return f"{said} `tutormax db upgrade` creates it."
    return said
