"""Writing ``tutor_performance_metrics``: COPY to a staging table, one upsert per batch of tutors.

Every batch is its own transaction, and rows that are already there with the same values are not
touched. The writers of one date take turns, so that two runs of it at once neither collide nor wait
for each other in a circle.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl
import psycopg
import sqlalchemy as sa
import tenacity
from psycopg import sql
from sqlalchemy.dialects import postgresql

from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.platform.connection import lock_for_transaction
from tutormax_assets.platform.tables import METRICS_KEY, METRICS_TABLE, tutor_performance_metrics

_VALUES = tuple(
    name
    for name in TutorTiers.column_names()
    if name in tutor_performance_metrics.c and name not in METRICS_KEY
)
_READ = {
    name: pl.String() if name == "performance_tier" else dtype
    for name, dtype in pl.Schema(TutorTiers).items()
    if name in tutor_performance_metrics.c
}


class MetricsTableError(Exception):
    """The table is missing or not as expected; the message says what to do."""


@dataclass(frozen=True)
class Batch:
    """What became of one batch of tutors.

    Attributes:
        number: Position of the batch, from 1.
        of: Number of batches.
        tutor_ids: The tutors of the batch.
        inserted: Rows that are new.
        updated: Rows whose values moved.
        unchanged: Rows that were there with the same values.
        error: Why none of the batch was saved; null when all of it was.
    """

    number: int
    of: int
    tutor_ids: list[str]
    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    error: str | None = None

    @property
    def saved(self) -> int:
        """Rows of the batch that the table holds now."""
        return self.inserted + self.updated + self.unchanged


def write_metrics(
    engine: sa.Engine,
    tiers: pl.DataFrame,
    *,
    calculation_date: datetime,
    batch_size: int,
    max_retries: int = 3,
    retry_delay_seconds: float = 5,
) -> Iterator[Batch]:
    """Bring the table's rows of one date and these tutors to the given values, batch by batch.

    A batch that fails is rolled back as a whole and reported; the following ones still run.

    Args:
        engine: The database that holds the table.
        tiers: ``TutorTiers``, all windows of a tutor included.
        calculation_date: The instant that the reference date stands for.
        batch_size: Tutors per transaction.
        max_retries: How often a batch is tried at most when the connection is the cause.
        retry_delay_seconds: Seconds before the second try; doubled before each further one.

    Yields:
        One ``Batch`` after each transaction.

    Raises:
        MetricsTableError: The table is missing or not as this version expects it.
    """
    tutor_ids = tiers["tutor_id"].unique().sort()
    batches = -(-len(tutor_ids) // batch_size)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_after_attempt(max(1, max_retries)),
        wait=tenacity.wait_exponential(multiplier=retry_delay_seconds, max=60),
        reraise=True,
    )
    for number in range(1, batches + 1):
        members = tutor_ids.slice((number - 1) * batch_size, batch_size)
        rows = tiers.join(members.to_frame(), on="tutor_id", how="semi")
        try:
            inserted, updated = retrying(_upsert, engine, rows, calculation_date)
        except sa.exc.ProgrammingError as error:
            raise MetricsTableError(
                f"{METRICS_TABLE} cannot be written: {reason(error)}."
                " Run `tutormax db upgrade` to bring the table to the expected form."
            ) from error
        except sa.exc.SQLAlchemyError as error:
            yield Batch(number, batches, members.to_list(), error=reason(error))
        else:
            unchanged = len(rows) - inserted - updated
            yield Batch(number, batches, members.to_list(), inserted, updated, unchanged)


def read_metrics(
    engine: sa.Engine, *, calculation_date: datetime, tutor_ids: Sequence[str]
) -> pl.DataFrame:
    """The table's rows of one date and these tutors: their key in the date, and their values.

    Args:
        engine: The database that holds the table.
        calculation_date: The instant that the reference date stands for.
        tutor_ids: The tutors whose rows are read.

    Returns:
        ``tutor_id``, ``window`` and the values as ``TutorTiers`` has them, tiers as text.

    Raises:
        MetricsTableError: The table cannot be read.
    """
    query = sql.SQL(
        # The driver and the planner would look at each of a list of ids by itself.
        "COPY (SELECT {} FROM {} WHERE calculation_date = {}"
        " AND tutor_id IN (SELECT jsonb_array_elements_text({}::jsonb))) TO STDOUT (FORMAT csv)"
    ).format(
        sql.SQL(", ").join(sql.Identifier(name) for name in _READ),
        sql.Identifier(METRICS_TABLE),
        sql.Literal(calculation_date),
        sql.Literal(json.dumps(list(tutor_ids))),
    )
    try:
        with engine.connect() as connection:
            cursor = connection.connection.cursor()
            with cursor.copy(query) as copy:
                rows = b"".join(copy)
    except (sa.exc.SQLAlchemyError, psycopg.Error) as error:
        raise MetricsTableError(
            f"{METRICS_TABLE} cannot be read: {reason(error)}."
            " `tutormax db status` shows what is there."
        ) from error
    return pl.read_csv(rows, has_header=False, schema=_READ, raise_if_empty=False)


def reason(error: BaseException) -> str:
    """The first line of what the database said; further lines may repeat values of the row."""
    original = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig else error
    lines = str(original).strip().splitlines()
    return lines[0] if lines else type(original).__name__


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)


def _upsert(engine: sa.Engine, rows: pl.DataFrame, calculation_date: datetime) -> tuple[int, int]:
    columns = ["tutor_id", "window", *_VALUES]
    staging = ", ".join(f'"{name}"' for name in columns)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TEMP TABLE staged_metrics ON COMMIT DROP AS"  # noqa: S608 - constants only
            f" SELECT {staging} FROM {METRICS_TABLE} WITH NO DATA"
        )
        cursor = connection.connection.cursor()
        with cursor.copy(f"COPY staged_metrics ({staging}) FROM STDIN (FORMAT csv)") as copy:
            copy.write(rows.select(columns).write_csv(include_header=False))
        # Who inserts a row that another transaction is inserting is refused by the primary key, of
        # which ON CONFLICT knows nothing; so the writers of a date take turns.
        lock_for_transaction(connection, f"{METRICS_TABLE}:{calculation_date.timestamp():.0f}")
        written = connection.execute(_UPSERT, {"calculation_date": calculation_date}).one()
        return written.inserted, written.written - written.inserted


def _upsert_statement() -> sa.Select[int, int]:
    target = tutor_performance_metrics
    date = sa.bindparam("calculation_date", type_=sa.DateTime(timezone=True))
    staged = sa.table(
        "staged_metrics",
        *(sa.column(name, target.c[name].type) for name in ("tutor_id", "window", *_VALUES)),
    )
    values = sa.tuple_(*(staged.c[name] for name in _VALUES))
    same = (
        sa.select(sa.literal(1))
        .where(
            target.c.tutor_id == staged.c.tutor_id,
            target.c.calculation_date == date,
            target.c.window == staged.c.window,
            sa.tuple_(*(target.c[name] for name in _VALUES)).is_not_distinct_from(values),
        )
        .exists()
    )
    # The id follows from the key, so that the table is the same whoever wrote a row first.
    digest = sa.func.sha256(
        sa.func.convert_to(
            sa.func.concat_ws(
                "|",
                staged.c.tutor_id,
                sa.func.extract("epoch", date).cast(sa.BigInteger),
                staged.c.window,
            ),
            "UTF8",
        )
    )
    metric_id = sa.func.concat("metric_", sa.func.left(sa.func.encode(digest, "hex"), 32))
    rows = (
        sa.select(
            metric_id,
            staged.c.tutor_id,
            date,
            staged.c.window,
            *(staged.c[name] for name in _VALUES),
        )
        .where(~same)
        .order_by(staged.c.tutor_id, staged.c.window)
    )
    insert = postgresql.insert(target).from_select(["metric_id", *METRICS_KEY, *_VALUES], rows)
    new_values = sa.tuple_(*(insert.excluded[name] for name in _VALUES))
    upsert: Any = insert.on_conflict_do_update(
        index_elements=METRICS_KEY,
        set_={**{name: insert.excluded[name] for name in _VALUES}, "updated_at": sa.func.now()},
        where=sa.tuple_(*(target.c[name] for name in _VALUES)).is_distinct_from(new_values),
    ).returning(sa.literal_column("xmax = 0").label("is_new"))
    written = upsert.cte("written")
    return sa.select(
        sa.func.count().filter(written.c.is_new).label("inserted"),
        sa.func.count().label("written"),
    ).select_from(written)


_UPSERT = _upsert_statement()
