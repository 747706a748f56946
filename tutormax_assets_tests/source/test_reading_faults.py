"""Reading the platform when the server, the network or another session does not play along."""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal

from chaos.proxy import Proxy
from tutormax_assets.database import tables
from tutormax_assets.database.connection import Timeouts, create_engine
from tutormax_assets.database.faults import retrying
from tutormax_assets.source import postgres, streams
from tutormax_assets.source.contract import NEEDED_COLUMNS, accepted_types
from tutormax_assets.source.postgres import Source
from tutormax_assets.source.streams import SourceError
from tutormax_assets_tests.conftest import add, captured_log, new_database
from tutormax_assets_tests.source import reading
from tutormax_assets_tests.source.reading import Rows

START = datetime(2025, 8, 9, tzinfo=UTC)
END = datetime(2025, 11, 7, tzinfo=UTC)


@pytest.fixture(scope="module")
def engine(server_url: sa.URL, small_template: str) -> Iterator[sa.Engine]:
    """A generated platform. Whatever a test does to it, it undoes."""
    with new_database(server_url, template=small_template) as url:
        engine = create_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture
def proxy(engine: sa.Engine) -> Iterator[Proxy]:
    """Leads to the server of ``engine``."""
    with (
        # The path of a socket has to be short.
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        Proxy(Path(str(engine.url.query["host"])), Path(folder)) as proxy,
    ):
        yield proxy


def read(url: sa.URL, *, max_retries: int = 0, timeouts: Timeouts | None = None) -> Rows:
    again = retrying(
        max_retries=max_retries, retry_delay_seconds=0, log=logging.getLogger("tutormax_assets")
    )
    source = Source(url, timeouts or Timeouts())
    return again(reading.read, source, start=START, end=END)


@pytest.fixture
def between_the_tables(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Do something after the tutors were read and before the sessions are."""
    fetch = streams.fetch_frame

    def install(action: Callable[[], None]) -> None:
        def fetch_then_act(cursor: Any, query: str, schema: Any) -> pl.DataFrame:
            rows = fetch(cursor, query, schema)
            if "t.status" in query:
                action()
            return rows

        monkeypatch.setattr(postgres, "fetch_frame", fetch_then_act)

    return install


def test_all_tables_are_read_as_of_one_instant(
    database: sa.URL, between_the_tables: Callable[[Callable[[], None]], None]
) -> None:
    engine = create_engine(database)
    add(engine, tables.tutors, {"tutor_id": "t"})

    def commit_more() -> None:
        add(engine, tables.tutors, {"tutor_id": "late"})
        at = {"tutor_id": "t", "scheduled_start": START}
        add(engine, tables.sessions, {"session_id": "late", **at})
        at = {"tutor_id": "t", "event_timestamp": START}
        add(engine, tables.tutor_events, {"event_id": "late", **at})

    between_the_tables(commit_more)
    first = read(database)
    assert (len(first.tutors), len(first.sessions), len(first.events)) == (1, 0, 0)
    assert first.empty_tables == ("sessions", "student_feedback", "tutor_events")
    between_the_tables(lambda: None)
    second = read(database)
    assert (len(second.tutors), len(second.sessions), len(second.events)) == (2, 1, 1)
    assert second.empty_tables == ("student_feedback",)
    assert second.read_at > first.read_at

    def seen(snapshot: str) -> list[str]:
        visible = sa.text(
            "SELECT tutor_id FROM tutors"
            " WHERE pg_visible_in_snapshot(xmin::text::xid8, CAST(:snapshot AS pg_snapshot))"
        )
        with engine.connect() as connection:
            return sorted(connection.scalars(visible, {"snapshot": snapshot}))

    assert seen(first.snapshot) == ["t"]
    assert seen(second.snapshot) == ["late", "t"]
    engine.dispose()


def test_no_write_of_a_customer_waits_for_the_reader(
    engine: sa.Engine, between_the_tables: Callable[[Callable[[], None]], None]
) -> None:
    done: list[str] = []

    def write_everything() -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("SET LOCAL lock_timeout = '100ms'")
            for table in ("tutors", "sessions", "student_feedback", "tutor_events"):
                [key] = tables.source_metadata.tables[table].primary_key
                connection.exec_driver_sql(f"UPDATE {table} SET {key.name} = {key.name}")
                connection.exec_driver_sql(f"DELETE FROM {table}")
                done.append(table)
            modes = connection.scalars(
                sa.text(
                    "SELECT DISTINCT mode FROM pg_locks JOIN pg_stat_activity USING (pid)"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    " AND locktype = 'relation'"
                )
            )
            assert set(modes) == {"AccessShareLock"}
            connection.rollback()

    between_the_tables(write_everything)

    rows = read(engine.url)

    assert done == ["tutors", "sessions", "student_feedback", "tutor_events"]
    assert len(rows.tutors) == 30


def test_a_lock_is_waited_for_briefly_and_then_tried_for_again(engine: sa.Engine) -> None:
    holder = engine.connect()
    holder.exec_driver_sql("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE")

    class LetGo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            holder.close()

    logger, handler = logging.getLogger("tutormax_assets"), LetGo()
    logger.addHandler(handler)
    try:
        with captured_log() as lines:
            rows = read(engine.url, max_retries=1, timeouts=Timeouts(lock_seconds=1))
    finally:
        logger.removeHandler(handler)
        holder.close()

    assert lines == [
        "WARNING canceling statement due to lock timeout. Another session holds a lock: see who in"
        " pg_locks, or raise TUTORMAX_LOCK_TIMEOUT_SECONDS; trying again in 0 s (1 of 1)"
    ]
    assert not rows.sessions.is_empty()


def test_a_statement_that_takes_too_long_is_ended_and_not_tried_again(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tutors RENAME TO kept")
        connection.exec_driver_sql(
            "CREATE VIEW tutors AS SELECT tutor_id, status FROM kept WHERE pg_sleep(60) IS NOT NULL"
        )
    try:
        with (
            captured_log() as lines,
            pytest.raises(SourceError, match=r"statement timeout.*_STATEMENT_TIMEOUT_SECONDS"),
        ):
            read(engine.url, max_retries=3, timeouts=Timeouts(statement_seconds=1))
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP VIEW tutors")
            connection.exec_driver_sql("ALTER TABLE kept RENAME TO tutors")
    assert lines == []


def everything(rows: Rows) -> pl.DataFrame:
    frames = (rows.tutors, rows.sessions, rows.events)
    return pl.concat([frame.sort(pl.first()) for frame in frames], how="diagonal")


def test_a_refused_connection_is_tried_again(engine: sa.Engine, proxy: Proxy) -> None:
    proxy.refuse(times=2)

    with captured_log() as lines:
        rows = read(proxy.url(engine.url), max_retries=2)

    assert [line.rpartition("; ")[2] for line in lines] == [
        "trying again in 0 s (1 of 2)",
        "trying again in 0 s (2 of 2)",
    ]
    assert_frame_equal(everything(rows), everything(read(engine.url)))


@pytest.mark.parametrize("bytes_read", [10, 500, 2_500, 6_000, 20_000, 60_000, 120_000])
def test_a_connection_that_is_lost_on_the_way_is_made_again(
    engine: sa.Engine, proxy: Proxy, bytes_read: int
) -> None:
    """Wherever it is lost: while connecting, in the contract's query, in the midst of a table."""
    proxy.cut_after(bytes_from_server=bytes_read)

    with captured_log() as lines:
        rows = read(proxy.url(engine.url), max_retries=1)

    [line] = lines
    assert "closed the connection unexpectedly; trying again in 0 s (1 of 1)" in line
    assert_frame_equal(everything(rows), everything(read(engine.url)))


def test_a_server_that_stays_away_fails_with_a_sentence(engine: sa.Engine, proxy: Proxy) -> None:
    proxy.cut_after(bytes_from_server=60_000, times=3)

    with pytest.raises(SourceError) as error:
        read(proxy.url(engine.url), max_retries=2)

    assert re.fullmatch(
        r"The platform at \S+ cannot be read: (PQgetCopyData\(\) failed: )?server closed the"
        r" connection unexpectedly\. `tutormax db status` shows what is there\.",
        str(error.value),
    )
    assert proxy.connections == 3


@contextmanager
def replaced_by_view(engine: sa.Engine, table: str, **columns: str | None) -> Iterator[None]:
    """A view under the table's name, in which columns are other expressions, or missing."""
    needed = {name: columns.get(name, name) for name in NEEDED_COLUMNS[table]}
    shown = ", ".join(f"{what} AS {name}" for name, what in needed.items() if what is not None)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO kept")
        connection.exec_driver_sql(f"CREATE VIEW {table} AS SELECT {shown} FROM kept")
    try:
        yield
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP VIEW {table}")
            connection.exec_driver_sql(f"ALTER TABLE kept RENAME TO {table}")


@pytest.mark.parametrize(
    ("table", "column"),
    [(table, column) for table, columns in NEEDED_COLUMNS.items() for column in columns],
)
def test_a_column_that_is_missing_or_of_another_type_is_named(
    engine: sa.Engine, table: str, column: str
) -> None:
    expected = accepted_types(table, column)[0]
    for what, found in ((None, "no such column"), ("'x'::bytea", "type bytea")):
        with replaced_by_view(engine, table, **{column: what}), pytest.raises(SourceError) as error:
            read(engine.url)
        assert (
            f" cannot be read: table {table}, column {column}: found {found}, expected {expected}. "
        ) in str(error.value)


@pytest.mark.parametrize("table", NEEDED_COLUMNS)
def test_a_table_that_is_missing_is_named(engine: sa.Engine, table: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO kept")
    try:
        with pytest.raises(SourceError, match=rf"read: table {table}: found no such table.*; expe"):
            read(engine.url)
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE kept RENAME TO {table}")


@pytest.mark.parametrize("table", ["sessions", "student_feedback", "tutor_events"])
def test_a_table_that_is_empty_is_named_and_the_others_are_read(
    engine: sa.Engine, table: str
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO kept")
        connection.exec_driver_sql(f"CREATE VIEW {table} AS SELECT * FROM kept WHERE false")
    try:
        rows = read(engine.url)
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP VIEW {table}")
            connection.exec_driver_sql(f"ALTER TABLE kept RENAME TO {table}")
    assert rows.empty_tables == (table,)
    assert len(rows.tutors) == 30


def test_wider_numbers_enums_and_domains_are_read_as_the_contract_has_them(
    engine: sa.Engine,
) -> None:
    before = read(engine.url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TYPE status AS ENUM ('ACTIVE', 'CHURNED')")
        connection.exec_driver_sql("CREATE DOMAIN minutes AS bigint")
    wider = {
        "late_start_minutes": "CASE WHEN late_start_minutes < 0 THEN -5000000000"
        " WHEN late_start_minutes > 10 THEN 5000000000 ELSE late_start_minutes END::minutes",
        "engagement_score": "engagement_score::numeric",
        "session_number": "session_number::smallint",
    }
    with replaced_by_view(engine, "tutors", status="upper('active')::status"):
        assert set(read(engine.url).tutors["status"]) == {"ACTIVE"}
    with replaced_by_view(engine, "sessions", **wider):
        rows = read(engine.url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TYPE status")
        connection.exec_driver_sql("DROP DOMAIN minutes")

    same = pl.exclude("late_start_minutes")
    assert_frame_equal(
        rows.sessions.sort("session_id").select(same),
        before.sessions.sort("session_id").select(same),
    )
    # What does not fit is on the same side of the contract and of the policy's limit.
    late = pl.col("late_start_minutes")
    side = pl.when(late < 0).then(-1).when(late > 10).then(1).otherwise(0)
    assert_frame_equal(
        rows.sessions.sort("session_id").select(side),
        before.sessions.sort("session_id").select(side),
    )
    assert {-1, 2**31 - 1} <= set(rows.sessions["late_start_minutes"])
