"""Locks of reference dates, between processes and threads, on a real PostgreSQL."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from tutormax_assets.database.connection import conninfo, create_engine
from tutormax_assets.database.date_locks import MOST_LOCKS, DateLocks, date_lock, try_lock_date
from tutormax_assets.database.faults import retrying
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.defs.log import LOGGER
from tutormax_assets_tests.conftest import PASSWORD, captured_log

SECONDS = 30
LOG = logging.getLogger(LOGGER)


def locks_of(engine: sa.Engine, *keys: str, max_retries: int = 0) -> DateLocks:
    tries = retrying(max_retries=max_retries, retry_delay_seconds=0, log=LOG)
    return DateLocks(engine, keys, retrying=tries, log=LOG)


@contextmanager
def held(engine: sa.Engine, *keys: str) -> Iterator[DateLocks]:
    locks = locks_of(engine, *keys)
    locks.take()
    try:
        yield locks
    finally:
        locks.release()


def is_free(engine: sa.Engine, key: str) -> bool:
    with engine.begin() as connection:
        return try_lock_date(connection, key)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_run_of_a_date_waits_and_says_so(engine: sa.Engine) -> None:
    order = []

    def second() -> None:
        with held(engine, "2025-11-06", "2025-11-07"):
            order.append("second")

    with captured_log() as log:
        with held(engine, "2025-11-07"):
            thread = threading.Thread(target=second)
            thread.start()
            until(lambda: bool(log))
            assert is_free(engine, "2025-11-08")
            assert not is_free(engine, "2025-11-07")
            order.append("first")
        thread.join(SECONDS)

    assert order == ["first", "second"]
    assert log == [
        "INFO Another run of 2025-11-07 is under way; waiting until it has ended",
        "INFO The other run of 2025-11-07 has ended",
    ]
    # The server notices in its own time that a connection was closed.
    until(lambda: is_free(engine, "2025-11-07"))


def test_overlapping_ranges_never_wait_for_each_other_in_a_circle(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutormax_assets.database.date_locks.POLL_SECONDS", 0.001)
    keys = [f"2025-11-{day:02}" for day in range(1, 8)]
    ranges = [keys, keys[::-1], keys[:4], keys[3:], keys[2:5][::-1]]
    inside: list[set[str]] = []
    taken = []

    def take_and_release(mine: list[str]) -> None:
        for _ in range(10):
            with held(engine, *mine):
                assert not any(other & set(mine) for other in inside)
                inside.append(set(mine))
                taken.append(mine)
                inside.remove(set(mine))

    threads = [threading.Thread(target=take_and_release, args=[mine]) for mine in ranges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(taken) == 50


def test_a_range_beyond_the_room_for_locks_takes_one_for_all_dates(engine: sa.Engine) -> None:
    keys = [f"date {number}" for number in range(MOST_LOCKS + 1)]
    locks_held = sa.text(
        "SELECT count(*) FROM pg_locks JOIN pg_database ON oid = database"
        " WHERE locktype = 'advisory' AND datname = current_database()"
    )
    with held(engine, *keys), engine.connect() as connection:
        assert connection.scalar(locks_held) == 1
        assert not is_free(engine, "2025-11-07")
    with held(engine, *keys[1:]), engine.connect() as connection:
        assert connection.scalar(locks_held) == MOST_LOCKS + 1
        assert not is_free(engine, keys[1])
        assert is_free(engine, keys[0])


def test_what_holds_the_locks_holds_nothing_else_back(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        name = connection.scalar(sa.text("SELECT current_database()"))
        # A role or a database may have such limits; this connection is meant to be idle.
        for limit in ("idle_in_transaction_session_timeout", "transaction_timeout"):
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET {limit} = 200')
    engine.dispose()
    session = sa.text(
        "SELECT backend_xid, backend_xmin, now() - xact_start > interval '0.5 s' AS is_old"
        " FROM pg_stat_activity WHERE state = 'idle in transaction'"
        " AND datname = current_database()"
    )

    def holder() -> sa.Row[Any]:
        with engine.connect() as connection:
            return connection.execute(session).one()

    with held(engine, "2025-11-07") as locks:
        until(lambda: holder().is_old)
        assert (holder().backend_xid, holder().backend_xmin) == (None, None)
        assert not locks.renew()


def test_locks_whose_connection_is_lost_are_taken_again(engine: sa.Engine) -> None:
    with held(engine, "2025-11-06", "2025-11-07") as locks, captured_log() as log:
        assert not locks.renew()
        terminate = sa.text(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with engine.connect() as connection:
            connection.execute(terminate)
        until(lambda: is_free(engine, "2025-11-07"))

        assert locks.renew()

        assert not is_free(engine, "2025-11-07")
        assert not locks.renew()
    [line] = log
    assert line.startswith("WARNING The connection that holds 2025-11-06 to 2025-11-07 was lost: ")


def test_a_process_that_is_killed_frees_its_dates_at_once(
    engine: sa.Engine, database: sa.URL
) -> None:
    code = (
        "import sys, psycopg\n"
        "connection = psycopg.connect(sys.argv[1])\n"
        'taken = connection.execute("SELECT pg_try_advisory_xact_lock("\n'
        "    \"hashtextextended('tutormax_assets:reference date:2025-11-07', 0))\").fetchone()\n"
        "print(taken, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, conninfo(database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "(True,)\n"
        assert not is_free(engine, "2025-11-07")
        process.kill()
        process.wait(SECONDS)
        killed = time.monotonic()
        until(lambda: is_free(engine, "2025-11-07"))
        assert time.monotonic() - killed < 5


def test_a_database_that_cannot_be_reached_is_tried_again_and_told_of() -> None:
    url = sa.make_url(f"postgresql+psycopg://u:{PASSWORD}@/platform?host=/nowhere")
    with captured_log() as log, pytest.raises(MetricsTableError) as error:
        locks_of(create_engine(url), "2025-11-07", max_retries=2).take()

    assert len(log) == 2
    assert str(error.value).startswith("The platform at /nowhere/platform cannot be reached: ")
    assert PASSWORD not in f"{error.value}{log}"


def test_a_date_is_held_for_a_block_unless_a_run_has_it(engine: sa.Engine) -> None:
    with held(engine, "2025-11-07"), date_lock(engine, "2025-11-07") as is_mine:
        assert not is_mine

    # The server notices in its own time that a connection was closed.
    until(lambda: is_free(engine, "2025-11-07"))
    with date_lock(engine, "2025-11-07") as is_mine:
        assert is_mine
        assert not is_free(engine, "2025-11-07")
        assert is_free(engine, "2025-11-08")
    until(lambda: is_free(engine, "2025-11-07"))
