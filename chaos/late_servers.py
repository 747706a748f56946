"""Runs that read only changed tutors, on servers whose transaction ids are not what they were.

Standbys are promoted, dumps restored, partitions exchanged, and transaction ids lost or wrapped
around. After each step the table and every Parquet file must equal those of a full run.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence

import sqlalchemy as sa

from chaos.ground import END
from chaos.lane import (
    OTHER_FILES,
    OTHER_SERVER,
    TOO_MANY_TRANSACTIONS,
    TOO_MANY_TUTORS,
    Lane,
    begin,
    fill,
    lane,
)
from chaos.late_partitions import partitions
from chaos.report import Report
from chaos.servers import Server, servers
from tutormax_assets.api.summary import ALL_TUTORS, CHANGED_TUTORS, NOTHING
from tutormax_assets.database.connection import create_engine
from tutormax_assets.runs.read_state import keep_state, load_state
from tutormax_assets.source.postgres import Source, open_view

_LOGIN = sa.text("""
    INSERT INTO tutor_events (event_id, tutor_id, event_type, event_timestamp, created_at)
    SELECT 'login', tutor_id, 'login', CAST(:end AS date) - interval '2 days', now()
    FROM tutors WHERE status = 'active' ORDER BY tutor_id LIMIT 1
""").bindparams(end=END)
_ANSWERED = sa.text("""
    UPDATE tutor_events SET event_type = 'message_response',
        metadata = jsonb_build_object('response_time_minutes', 90)
    WHERE event_id = 'login'
""")


def run(*, seconds: float, seed: int, cases: Sequence[str] = ()) -> Report:
    """Run the cases, each on servers of its own.

    Args:
        seconds: When to begin no further case.
        seed: Seed of the changes.
        cases: Names of those to run; all when empty.

    Returns:
        Figures of what happened, how the date was brought up to date, and what was wrong.
    """
    names = ("steps", "changes", "frames compared with a full run", "wrong")
    report = Report("late", dict.fromkeys(names, 0))
    deadline = time.monotonic() + seconds
    # Where time is short, each seed has other cases.
    chosen = [*cases] or random.Random(seed).sample([*CASES], len(CASES))
    for name in chosen:
        if time.monotonic() > deadline:
            report.figures[f"{name}: seconds"] = "no time left"
            continue
        began = time.monotonic()
        with lane(name, report, seed=seed) as one:
            CASES[name](one)
        report.figures[f"{name}: seconds"] = round(time.monotonic() - began, 1)
    return report


def _promotion(one: Lane) -> None:
    with servers("primary", "standby") as (primary, standby):
        begin(one, primary)
        primary.copy_to(standby)
        standby.start()
        _read_standby(one, primary, standby)

        one.lead_to(primary.url)
        one.change()
        one.expect("back on the primary", ALL_TUTORS, OTHER_SERVER)
        one.change()
        standby.wait_for(primary)
        standby.stop()
        # The standby never learns of what follows, and assigns the same transaction ids again.
        primary.burn(200)
        one.change()
        one.expect("changes that the promotion loses", CHANGED_TUTORS)
        primary.stop()
        standby.start()
        standby.promote()
        one.lead_to(standby.url)
        one.change()
        standby.burn(400)
        one.expect("promotion", ALL_TUTORS, OTHER_SERVER)
        one.change()
        one.expect("after the promotion", CHANGED_TUTORS)


def _read_standby(one: Lane, primary: Server, standby: Server) -> None:
    """Read the platform from the standby; the metrics go to the primary."""
    writer = create_engine(primary.url)
    one.lead_to(primary.url, source=standby.url)
    with writer.begin() as connection:
        connection.execute(_LOGIN)
    one.change()
    standby.wait_for(primary)
    one.expect("read from the standby", ALL_TUTORS, OTHER_SERVER)
    one.change()
    standby.wait_for(primary)
    one.expect("change replayed", CHANGED_TUTORS)
    standby.execute("SELECT pg_wal_replay_pause()")
    one.change()
    # The metrics table on the primary stays as the run left it.
    one.expect("change not replayed", NOTHING)
    standby.execute("SELECT pg_wal_replay_resume()")
    standby.wait_for(primary)
    one.expect("change replayed later", CHANGED_TUTORS)
    with writer.connect() as connection:
        # More savepoints than a standby keeps track of by itself.
        for _ in range(100):
            with connection.begin_nested():
                connection.execute(_ANSWERED)
        standby.wait_for(primary)
        one.change()
        standby.wait_for(primary)
        one.expect("change beside an open transaction", CHANGED_TUTORS)
        connection.commit()
    standby.wait_for(primary)
    one.expect("open transaction committed", CHANGED_TUTORS)
    writer.dispose()


def _dump_and_restore(one: Lane) -> None:
    with servers("first", "second") as (first, second), first.folder() as folder:
        begin(one, first)
        first.burn(200)
        one.change()
        one.expect("change", CHANGED_TUTORS)
        one.change()
        dump = str(folder / "dump")
        _dump(first, dump)
        one.change()

        _restore(first, dump, "--clean")
        one.expect("restored in place", ALL_TUTORS, OTHER_FILES)
        first.execute("CREATE DATABASE restored")
        _restore(first, dump, database="restored")
        one.lead_to(first.url.set(database="restored"))
        one.change()
        one.expect("restored into another database", ALL_TUTORS, OTHER_SERVER)
        one.change()
        one.expect("change in that database", CHANGED_TUTORS)

        newest = int(str(first.value("SELECT pg_current_xact_id()")))
        second.start()
        _restore(second, dump)
        one.lead_to(second.url)
        one.change()
        # Until the ids of the first server are known here as well.
        second.burn(newest - int(str(second.value("SELECT pg_current_xact_id()"))) + 100)
        one.expect("restored into another server", ALL_TUTORS, OTHER_SERVER)
        one.change()
        one.expect("change on that server", CHANGED_TUTORS)


def _dump(server: Server, path: str) -> None:
    connection = ("--host", server.socket, "--username", "postgres", "--dbname", "tutormax")
    server.run("pg_dump", *connection, "--format=custom", "--file", path)


def _restore(server: Server, path: str, *options: str, database: str = "tutormax") -> None:
    connection = ("--host", server.socket, "--username", "postgres", "--dbname", database)
    server.run("pg_restore", *connection, *options, path)


_HALF = 2**31
_BILLION = 10**9


def _wraparound(one: Lane) -> None:
    with servers("one") as (server,):
        begin(one, server)
        one.change()
        one.expect("young server", CHANGED_TUTORS)
        _age(one, server, _BILLION - 10**8)
        one.change()
        one.expect("900 million transactions later", CHANGED_TUTORS)
        _age(one, server, _HALF - 300)
        one.change()
        one.expect("1,247 million transactions later", ALL_TUTORS, TOO_MANY_TRANSACTIONS)
        _cross(one, server, "2^31")

        _age(one, server, 32 * 10**8)
        one.change()
        one.variables["TUTORMAX_REFRESH_MAX_TRANSACTIONS"] = str(2**31 - 1)
        one.expect("1,053 million transactions later, as allowed", CHANGED_TUTORS)
        del one.variables["TUTORMAX_REFRESH_MAX_TRANSACTIONS"]
        _age(one, server, 2 * _HALF - 300)
        one.change()
        one.expect("1,095 million transactions later", ALL_TUTORS, TOO_MANY_TRANSACTIONS)
        _cross(one, server, "2^32")
        server.freeze()
        one.change()
        one.expect("frozen after 2^32", CHANGED_TUTORS)
        # Rows of the first transactions have the ids that are assigned again now.
        server.burn(1500)
        one.change()
        one.expect("ids are assigned again", ALL_TUTORS, TOO_MANY_TUTORS)


def _age(one: Lane, server: Server, transaction: int) -> None:
    """Freeze all rows, and let a transaction id be the next one."""
    one.here.engine.dispose()
    server.freeze()
    server.age_to(transaction)
    _forget_restart(one, server)


def _forget_restart(one: Lane, server: Server) -> None:
    """Let the stored date be of the running server, as if it had aged without a restart."""
    storage = str(one.here.storage)
    state = load_state(storage, str(END))
    if state is None or state.horizon is None:
        raise RuntimeError("the stored date has no horizon")
    with open_view(Source(server.url)) as view:
        running = view.horizon().server
    horizon = state.horizon.model_copy(update={"server": running})
    keep_state(storage, str(END), state.model_copy(update={"horizon": horizon}))


def _cross(one: Lane, server: Server, border: str) -> None:
    """Change rows on both sides of an id that is less than 600 transactions away."""
    one.change()
    server.burn(600)
    one.expect(f"{border} passed after the changes", CHANGED_TUTORS)
    one.change()
    one.expect(f"changes after {border}", CHANGED_TUTORS)
    server.freeze()
    one.expect(f"frozen after {border}", NOTHING)
    one.change()
    one.expect(f"changes after the freezing after {border}", CHANGED_TUTORS)


def _begin_apart(one: Lane, metrics: Server, platform: Server) -> None:
    """Store the date of a platform that the runs do not write to."""
    begin(one, metrics)
    # Nothing is flushed unless it has to be.
    platform.start(wal_writer_delay="10s")
    fill(platform.url, seed=2)
    one.lead_to(metrics.url, source=platform.url)
    one.expect("platform of its own", ALL_TUTORS, OTHER_SERVER)


def _crash(one: Lane) -> None:
    with servers("metrics", "platform") as (metrics, platform):
        _begin_apart(one, metrics, platform)
        platform.execute("CHECKPOINT")
        engine = create_engine(platform.url)
        platform.burn(200)
        one.change(engine)
        one.expect("change that the crash may lose", CHANGED_TUTORS)
        engine.dispose()
        platform.crash()
        one.change(engine)
        platform.burn(400)
        one.expect("crash", ALL_TUTORS, OTHER_SERVER)
        one.change(engine)
        one.expect("change after the crash", CHANGED_TUTORS)
        engine.dispose()


def _disk_restored(one: Lane) -> None:
    with servers("metrics", "platform") as (metrics, platform):
        _begin_apart(one, metrics, platform)
        platform.keep_disk()
        platform.burn(200)
        engine = create_engine(platform.url)
        one.change(engine)
        one.expect("change that the restore loses", CHANGED_TUTORS)
        engine.dispose()
        platform.restore_disk()
        one.change(engine)
        platform.burn(400)
        one.expect("disk restored", ALL_TUTORS, OTHER_SERVER)
        one.change(engine)
        one.expect("change after the restore", CHANGED_TUTORS)
        engine.dispose()


CASES: Mapping[str, Callable[[Lane], None]] = {
    "promotion": _promotion,
    "dump and restore": _dump_and_restore,
    "partitions": partitions,
    "wraparound": _wraparound,
    "crash": _crash,
    "disk restored": _disk_restored,
}
"""What happens to servers, by name."""
