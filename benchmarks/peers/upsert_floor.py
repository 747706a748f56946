"""What persisting the product's rows takes at least: COPY and upsert, a transaction per date."""

from time import perf_counter
from typing import Any

import psycopg
from psycopg import sql

from benchmarks.answers import TABLE, TWIN, VALUES
from benchmarks.peers import Task

_UPSERT = sql.SQL(
    "INSERT INTO {twin} SELECT * FROM staged"
    ' ON CONFLICT (tutor_id, calculation_date, "window") DO UPDATE SET {sets}'
).format(
    twin=TWIN,
    sets=sql.SQL(", ").join(
        sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name))
        for name in (*VALUES, "updated_at")
    ),
)


def measure(task: Task) -> dict[str, float]:
    """Write the rows of all reference dates that the table holds, the rows themselves at hand."""
    seconds = 0.0
    with psycopg.connect(task.conninfo) as connection:
        dates = connection.execute(
            sql.SQL("SELECT DISTINCT calculation_date FROM {} ORDER BY 1").format(TABLE)
        ).fetchall()
        connection.execute(
            sql.SQL("CREATE TEMPORARY TABLE staged (LIKE {}) ON COMMIT DELETE ROWS").format(TWIN)
        )
        connection.commit()
        for (instant,) in dates:
            rows = rows_of(connection, instant)
            connection.commit()
            started = perf_counter()
            with connection.cursor().copy("COPY staged FROM STDIN (FORMAT binary)") as copy:
                copy.write(rows)
            connection.execute(_UPSERT)
            connection.commit()
            seconds += perf_counter() - started
    return {"persist": seconds}


def rows_of(connection: psycopg.Connection[Any], instant: Any) -> bytes:
    """The product's rows of a reference date, as COPY takes them."""
    query = sql.SQL(
        'COPY (SELECT * FROM {} WHERE calculation_date = {} ORDER BY tutor_id, "window")'
        " TO STDOUT (FORMAT binary)"
    ).format(TABLE, sql.Literal(instant))
    with connection.cursor().copy(query) as copy:
        return b"".join(copy)
