"""Reading a stream of batches while other threads go on."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import polars as pl
import pytest
import sqlalchemy as sa
from adbc_driver_postgresql import dbapi
from polars.testing import assert_frame_equal

from tutormax_assets.database.connection import conninfo
from tutormax_assets.source.arrow_stream import ArrowStreamError, batches


@contextmanager
def cursor_of(engine: sa.Engine, *, batch_bytes: int = 1_000) -> Iterator[dbapi.Cursor]:
    with dbapi.connect(conninfo(engine.url)) as connection, connection.cursor() as cursor:
        cursor.adbc_statement.set_options(
            **{"adbc.postgresql.batch_size_hint_bytes": str(batch_bytes)}
        )
        yield cursor


def test_the_batches_are_the_rows_in_their_order(engine: sa.Engine) -> None:
    query = """
        SELECT g::integer AS number, CASE WHEN g % 3 > 0 THEN 'text ' || g END AS text
        FROM generate_series(1, 1000) AS g
    """
    with cursor_of(engine) as cursor:
        cursor.execute(query)
        of_stream = list(batches(cursor.fetch_arrow()))
        cursor.execute(query)
        at_once = pl.DataFrame(cursor.fetch_arrow())

    assert len(of_stream) > 1
    assert_frame_equal(pl.concat(of_stream), at_once)


def test_a_query_without_rows_has_no_rows(engine: sa.Engine) -> None:
    with cursor_of(engine) as cursor:
        cursor.execute("SELECT 1 AS number WHERE false")
        assert sum(len(batch) for batch in batches(cursor.fetch_arrow())) == 0


def test_a_stream_that_breaks_off_says_what_the_server_said(engine: sa.Engine) -> None:
    with cursor_of(engine) as cursor:
        cursor.execute("SELECT 1 / (g - 900000) FROM generate_series(1, 1000000) AS g")
        read = batches(cursor.fetch_arrow())
        assert len(next(read)) > 0
        with pytest.raises(ArrowStreamError, match="division by zero"):
            list(read)
        cursor.connection.rollback()


def test_a_stream_that_is_left_can_be_followed_by_another(engine: sa.Engine) -> None:
    with cursor_of(engine) as cursor:
        cursor.execute("SELECT g FROM generate_series(1, 1000000) AS g")
        with closing(batches(cursor.fetch_arrow())) as read:
            next(read)
        cursor.execute("SELECT 2 AS number")
        assert [batch.item() for batch in batches(cursor.fetch_arrow())] == [2]


def test_other_threads_go_on_while_the_server_is_waited_for(engine: sa.Engine) -> None:
    """The last row comes only when another thread lets go of a lock."""
    locked = threading.Event()
    released = threading.Event()

    def hold_the_lock() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT pg_advisory_lock(7)")
            locked.set()
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
            while not connection.exec_driver_sql(waits).scalar():
                pass
            connection.exec_driver_sql("SELECT pg_advisory_unlock(7)")
            released.set()

    other = threading.Thread(target=hold_the_lock)
    other.start()
    locked.wait()
    with cursor_of(engine) as cursor:
        cursor.execute(
            "SELECT g, CASE WHEN g = 100000 THEN pg_advisory_lock_shared(7)::text END"
            " FROM generate_series(1, 100000) AS g"
        )
        assert sum(len(batch) for batch in batches(cursor.fetch_arrow())) == 100_000
    other.join()
    assert released.is_set()
