"""The statements that bring staged rows into the metrics table."""

from datetime import UTC, datetime
from typing import Any, cast

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from tutormax_assets.database.tables import (
    METRICS_KEY,
    METRICS_TABLE,
    is_a_date,
    tutor_performance_metrics,
)
from tutormax_assets.metrics.schemas import TutorTiers

VALUES = tuple(
    name
    for name in TutorTiers.column_names()
    if name in tutor_performance_metrics.c and name not in METRICS_KEY
)

# With types of its own, filling it waits for no lock, and a column of the table that has another
# type is refused by its name instead of by the first value.
STAGED = sa.Table(
    "staged_metrics",
    sa.MetaData(),
    *(
        sa.Column(name, tutor_performance_metrics.c[name].type)
        for name in ("tutor_id", "window", *VALUES)
    ),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)

METRIC_ID = cast(sa.String, tutor_performance_metrics.c.metric_id.type)


def _metric_id(date: sa.ColumnElement[datetime]) -> sa.ColumnElement[str]:
    """An id that follows from the key, so that the table is the same whoever wrote a row first.

    It begins with the date and goes on with the tutor, so that new rows are neighbours in its
    index. A key that is too long for it is replaced by its digest, after two underscores: no other
    id has two and then none.
    """
    epoch = sa.func.extract("epoch", date).cast(sa.BigInteger)
    key = sa.func.concat_ws("_", epoch, STAGED.c.tutor_id, STAGED.c.window)
    digest = sa.func.encode(sa.func.sha256(sa.func.convert_to(key, "UTF8")), "hex")
    return sa.case(
        (sa.func.length(key) <= METRIC_ID.length, key),
        else_=sa.func.concat(epoch, "__", sa.func.left(digest, 32)),
    )


def with_metric_ids(rows: pl.DataFrame, calculation_date: datetime) -> pl.DataFrame | None:
    """The rows as the table has them, with their ids; None if an id needs a digest.

    Args:
        rows: ``tutor_id``, ``window`` and ``VALUES`` of one date.
        calculation_date: The instant that the reference date stands for.
    """
    epoch = int(calculation_date.timestamp())
    keyed = rows.select(
        pl.concat_str(pl.lit(str(epoch)), "tutor_id", "window", separator="_").alias("metric_id"),
        "tutor_id",
        pl.lit(calculation_date.astimezone(UTC).isoformat()).alias("calculation_date"),
        "window",
        *VALUES,
    )
    longest = keyed["metric_id"].str.len_chars().max()
    return None if isinstance(longest, int) and longest > (METRIC_ID.length or 0) else keyed


ASKED = sa.bindparam("tutor_ids", type_=postgresql.ARRAY(sa.String))

IS_ASKED = sa.or_(ASKED.is_(None), STAGED.c.tutor_id == sa.any_(ASKED))


_UPDATED_AT = tutor_performance_metrics.c.updated_at

# Later than what it replaces, whatever the clock says: the record goes by it.
_REPLACED_AT = sa.case(
    (
        is_a_date(_UPDATED_AT),
        sa.func.greatest(
            sa.func.now(), _UPDATED_AT + sa.cast("1 microsecond", postgresql.INTERVAL)
        ),
    ),
    else_=sa.func.now(),
)


def _insert_statement() -> Any:
    date = sa.bindparam("calculation_date", type_=sa.DateTime(timezone=True))
    rows = sa.select(
        _metric_id(date),
        STAGED.c.tutor_id,
        date,
        STAGED.c.window,
        *(STAGED.c[name] for name in VALUES),
    ).where(IS_ASKED)
    # In the order of their index, in which no two writers wait for each other in a circle.
    rows = rows.order_by(STAGED.c.tutor_id, STAGED.c.window)
    names = ["metric_id", *METRICS_KEY, *VALUES]
    return postgresql.insert(tutor_performance_metrics).from_select(names, rows)


def _upsert_statement() -> Any:
    target, insert = tutor_performance_metrics, _insert_statement()
    new_values = sa.tuple_(*(insert.excluded[name] for name in VALUES))
    return insert.on_conflict_do_update(
        index_elements=METRICS_KEY,
        set_={**{name: insert.excluded[name] for name in VALUES}, "updated_at": _REPLACED_AT},
        where=sa.tuple_(*(target.c[name] for name in VALUES)).is_distinct_from(new_values),
    )


def _count_rows(write: Any) -> sa.Select[int, int]:
    is_new: sa.Label[bool] = sa.literal_column("xmax = 0").label("is_new")
    written = write.returning(is_new).cte("written")
    return sa.select(
        sa.func.count().filter(written.c.is_new).label("inserted"),
        sa.func.count().label("written"),
    ).select_from(written)


INSERT = _count_rows(_insert_statement())

UPSERT = _count_rows(_upsert_statement())


def _replaced_statement() -> Any:
    target = tutor_performance_metrics.c
    date = sa.bindparam("calculation_date", type_=sa.DateTime(timezone=True))
    return (
        sa.select(
            target.tutor_id,
            target.window,
            *(target[name] for name in VALUES),
            sa.case((is_a_date(target.updated_at), target.updated_at), else_=sa.func.now()).label(
                "known_from"
            ),
            _REPLACED_AT.label("known_to"),
        )
        .join(
            STAGED,
            sa.and_(
                target.tutor_id == STAGED.c.tutor_id,
                target.window == STAGED.c.window,
                target.calculation_date == date,
            ),
        )
        .where(
            IS_ASKED,
            sa.tuple_(*(target[name] for name in VALUES)).is_distinct_from(
                sa.tuple_(*(STAGED.c[name] for name in VALUES))
            ),
        )
        .order_by(STAGED.c.tutor_id, STAGED.c.window)
        .with_for_update(of=tutor_performance_metrics)
    )


REPLACED = _replaced_statement()
"""The rows that the upsert is about to change, locked until the transaction ends."""

DATE_HAS_ROWS = sa.select(
    sa.exists().where(
        tutor_performance_metrics.c.calculation_date == sa.bindparam("calculation_date")
    )
)

# Refused where the upsert would be: without its unique key, or without a right that it needs.
PLAN_OF_UPSERT = sa.text(
    f"""
    EXPLAIN INSERT INTO {METRICS_TABLE} SELECT * FROM {METRICS_TABLE}
    ON CONFLICT ({", ".join(f'"{name}"' for name in METRICS_KEY)})
    DO UPDATE SET updated_at = now()
    """  # noqa: S608 - names only
)
