"""Runs that read only changed tutors, on servers whose transaction ids are not what they were.

Standbys are promoted, dumps restored, partitions exchanged, and transaction ids wrap around. After
each step the table and every Parquet file must equal those of a full run.
"""

import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import sqlalchemy as sa

from chaos.ground import END, Frames, Ground, differences, silent_log
from chaos.late import CHANGES
from chaos.report import Report
from chaos.servers import Server, servers
from tutormax_assets.api.runs import aggregate
from tutormax_assets.api.summary import ALL_TUTORS, CHANGED_TUTORS, NOTHING
from tutormax_assets.database.connection import create_engine
from tutormax_assets.database.tables import metrics_metadata, source_metadata
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.defs.refresh import find_stale_dates
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.runs.read_state import keep_state, load_state
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.settings import load_settings
from tutormax_assets.source.postgres import Source, open_view

TUTORS = 40

OTHER_SERVER = "the server crashed or was restarted, restored, failed over or replaced"
OTHER_FILES = "was rewritten, or has other partitions"
TOO_MANY_TRANSACTIONS = "transactions since it was read, expected at most"
TOO_MANY_TUTORS = "tutors have changed"
NOT_UNIQUE = "no index keeps ids of sessions and feedback unique"

_CHANGES_PER_STEP = 3
_OF_ROWS = [name for name in CHANGES if not name.startswith("tutor")]

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


@dataclass
class Lane:
    """A stored date, and the server that it is brought up to date from.

    Attributes:
        case: Name of the case.
        report: What is counted.
        choice: Chooses changes.
        folder: Holds the homes.
        variables: Settings of the runs.
        grounds: The home and the database, once ``lead_to`` has named it.
        number: Of the next change.
        steps: How often the date was brought up to date.
    """

    case: str
    report: Report
    choice: random.Random
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    grounds: list[Ground] = field(default_factory=list)
    number: int = 0
    steps: int = 0

    @property
    def here(self) -> Ground:
        """The home, and the database that the metrics are written to."""
        return self.grounds[-1]

    def lead_to(self, database: sa.URL, *, source: sa.URL | None = None) -> None:
        """Let the runs read and write another database, and read the platform from ``source``."""
        self.close()
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        variables = {"TUTORMAX_DATABASE_URL": _text(database)}
        if source is not None:
            variables["TUTORMAX_SOURCE_URL"] = _text(source)
        self.grounds.append(Ground(home, create_engine(database), variables))

    def close(self) -> None:
        """Close the connections."""
        for ground in self.grounds:
            ground.engine.dispose()

    def change(self, engine: sa.Engine | None = None, *, number: int = _CHANGES_PER_STEP) -> None:
        """Change some rows of the platform, each change in a transaction of its own."""
        for name in self.choice.sample(_OF_ROWS, number):
            with (engine or self.here.engine).begin() as connection:
                self.change_within(connection, name)

    def execute(self, *statements: str) -> None:
        """Execute statements in one transaction."""
        with self.here.engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def change_within(self, connection: sa.Connection, name: str) -> None:
        """Change some rows of the platform in a transaction that the caller commits."""
        self.number += 1
        seed = f"'{self.case} {self.number}'"
        connection.execute(sa.text(CHANGES[name].format(seed=seed).replace(":", r"\:")))
        self.report.count("changes")

    def expect(self, step: str, read: str, why: str = "") -> None:
        """Bring the date up to date, and compare with a full run.

        Args:
            step: What has happened.
            read: Which tutors the run has to read.
            why: Part of the reason that the log has to give for reading all of them.
        """
        self.steps += 1
        before = self.here.frames() if self.steps > 1 else {}
        with self.here.as_environment(**self.variables), _log() as lines:
            stale = find_stale_dates(load_settings(), [END]).get(END)
            [summary] = aggregate(load_settings(), [END], _OPTIONS, changed_only=True)
        self.report.count("steps")
        self.report.count(f"{self.case}: {summary.read}")
        found = self.here.frames()
        if not summary.all_saved:
            self._note(step, f"the run failed: {summary.errors[0]['error'][:500]}")
        if (summary.read, why in "\n".join(lines)) != (read, True):
            self._note(step, f"read {summary.read}, expected {read} {why}; log: {lines[:3]}")
        if self.steps > 1:
            self._expect_stale(step, stale, read, why)
            if (read == NOTHING) != (not differences(before, found)):
                self._note(step, f"read {read}, expected rows to change only with changed tutors")
        self._compare(step, found)

    def _expect_stale(self, step: str, stale: bool | str | None, read: str, why: str) -> None:
        """Check the answer to whether the date is stale."""
        is_known = read != ALL_TUTORS or why == TOO_MANY_TUTORS
        is_right = stale is (read != NOTHING) if is_known else why in str(stale)
        if not is_right:
            self._note(step, f"the date is stale: {stale}; the run read {read} {why}")

    def _compare(self, step: str, found: Frames) -> None:
        """Compare with a full run in another home, so that the state of this one stays."""
        home = self.folder / "full"
        shutil.copytree(self.here.storage, home / self.here.storage.name, dirs_exist_ok=True)
        there = replace(self.here, home=home)
        with there.as_environment(**self.variables), _log():
            [summary] = aggregate(load_settings(), [END], _OPTIONS)
        if not summary.all_saved:
            self._note(step, f"the full run failed: {summary.errors[0]['error'][:500]}")
        self.report.count("frames compared with a full run", len(found))
        for sentence in differences(found, there.frames()):
            self._note(step, sentence)
        shutil.rmtree(there.storage)

    def _note(self, step: str, sentence: str) -> None:
        self.report.count("wrong")
        self.report.wrong.append(f"{self.case}, {step}: {sentence}")


_OPTIONS = RunOptions(max_retries=2, retry_delay_seconds=0.1)


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
    for name in cases or CASES:
        if time.monotonic() > deadline:
            break
        begin = time.monotonic()
        with lane(name, report, seed=seed) as one:
            CASES[name](one)
        report.figures[f"{name}: seconds"] = round(time.monotonic() - begin, 1)
    return report


@contextmanager
def lane(case: str, report: Report, *, seed: int) -> Iterator[Lane]:
    """A lane of a case, whose homes are removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="tutormax-chaos-") as folder, silent_log():
        variables = {"TUTORMAX_REFRESH_MAX_SHARE": "0.5"}
        one = Lane(case, report, random.Random(f"{case} {seed}"), Path(folder), variables)
        try:
            yield one
        finally:
            one.close()


def fill(url: sa.URL, *, seed: int = 1) -> None:
    """Create all tables in a database, and generate a platform."""
    engine = create_engine(url)
    source_metadata.create_all(engine)
    metrics_metadata.create_all(engine)
    sample_platform.generate(
        engine, tutors=TUTORS, sessions_per_tutor=40, days=100, end=END, seed=seed
    )
    engine.dispose()


def _begin(one: Lane, server: Server) -> None:
    """Start a server with a generated platform, and store the date."""
    server.start()
    fill(server.url)
    one.lead_to(server.url)
    one.expect("first run", ALL_TUTORS)


def _promotion(one: Lane) -> None:
    with servers("primary", "standby") as (primary, standby):
        _begin(one, primary)
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
        _begin(one, first)
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


_MONTHS = ("2025-08-01", "2025-09-01", "2025-10-01", "2025-11-01")

_SPLIT = """
    CREATE TABLE plain (LIKE {table} INCLUDING DEFAULTS);
    INSERT INTO plain SELECT * FROM {table};
    DROP TABLE {table} CASCADE;
    CREATE TABLE {table} (LIKE plain INCLUDING DEFAULTS{key}) PARTITION BY {by}
"""


def _split(one: Lane, table: str, by: str, bounds: Sequence[str], *, key: str = "") -> None:
    """Replace a table by a partitioned one with the same rows."""
    parts = [
        f"CREATE TABLE {table}_{number} PARTITION OF {table} FOR VALUES {bound}"
        for number, bound in enumerate(bounds)
    ]
    rows = (f"INSERT INTO {table} SELECT * FROM plain", "DROP TABLE plain")
    one.execute(_SPLIT.format(table=table, by=by, key=key), *parts, *rows)


def _by_month() -> list[str]:
    ends = [f"('{month}')" for month in _MONTHS]
    return [
        f"FROM {lower} TO {upper}"
        for lower, upper in zip(["(MINVALUE)", *ends], [*ends, "(MAXVALUE)"], strict=True)
    ]


def _by_hash(count: int = 3) -> list[str]:
    return [f"WITH (MODULUS {count}, REMAINDER {rest})" for rest in range(count)]


@dataclass(frozen=True)
class Step:
    """What happens to partitions, and what a run has to read then.

    Attributes:
        name: What happens.
        statements: How.
        read: Which tutors have to be read.
        why: Part of the reason for reading all.
    """

    name: str
    statements: tuple[str, ...]
    read: str = CHANGED_TUTORS
    why: str = ""


_OF_SEPTEMBER = """
    (SELECT event_id FROM tutor_events_2 WHERE event_type = 'login' ORDER BY event_id LIMIT 1)
"""
_ANSWER = '{"response_time_minutes": 90}'
_DETACH = "ALTER TABLE tutor_events DETACH PARTITION tutor_events_3"
_OCTOBER = "FOR VALUES FROM ('2025-10-01') TO ('2025-11-01')"
_ATTACH = f"ALTER TABLE tutor_events ATTACH PARTITION tutor_events_3 {_OCTOBER}"
_SOME = "(SELECT event_id FROM tutor_events_3 WHERE event_type = 'login' ORDER BY event_id LIMIT 2)"

UNIQUE_IDS = (
    Step(
        "an event moves to another month",
        (
            "UPDATE tutor_events SET event_timestamp = event_timestamp + interval '1 month'"
            f" WHERE event_id = {_OF_SEPTEMBER}",
        ),
    ),
    Step(
        "an event moves to another tutor of the same month",
        (
            "UPDATE tutor_events SET tutor_id ="
            " (SELECT max(tutor_id) FROM tutors WHERE status = 'active')"
            f" WHERE event_id = {_OF_SEPTEMBER}",
        ),
    ),
    Step(
        "a session gets another id",
        (
            "UPDATE sessions SET session_id = 'moved ' || session_id"
            " WHERE session_id IN (SELECT session_id FROM sessions"
            " WHERE scheduled_start > '2025-10-01' ORDER BY session_id LIMIT 4)",
        ),
    ),
    Step("a partition is detached", (_DETACH,), ALL_TUTORS, OTHER_FILES),
    Step(
        "a partition with other rows is attached",
        (
            "CREATE TABLE other (LIKE tutor_events_3)",
            "INSERT INTO other SELECT event_id, tutor_id, event_type, event_timestamp,"
            f" '{_ANSWER}', created_at FROM tutor_events_3",
            f"ALTER TABLE tutor_events ATTACH PARTITION other {_OCTOBER}",
        ),
        ALL_TUTORS,
        OTHER_FILES,
    ),
    Step(
        "the first partition is attached again",
        ("ALTER TABLE tutor_events DETACH PARTITION other", _ATTACH),
        ALL_TUTORS,
        OTHER_FILES,
    ),
    Step(
        "rows are updated in a partition while it is detached",
        (
            _DETACH,
            "UPDATE tutor_events_3 SET event_type = 'message_response',"
            f" metadata = '{_ANSWER}' WHERE event_id IN {_SOME}",
            _ATTACH,
        ),
    ),
    Step(
        "rows are deleted from a partition while it is detached",
        (_DETACH, f"DELETE FROM tutor_events_3 WHERE event_id IN {_SOME}", _ATTACH),
    ),
    Step("a partition is truncated", ("TRUNCATE tutor_events_1",), ALL_TUTORS, OTHER_FILES),
)
"""Steps on partitions that keep the ids of sessions and feedback unique."""

_DETACH_SESSIONS = "ALTER TABLE sessions DETACH PARTITION sessions_3"

_OTHERS = (
    Step("sessions by month, feedback and events by tutor", ()),
    Step(
        "a session moves to another month",
        (
            "UPDATE sessions SET scheduled_start = scheduled_start - interval '1 month'"
            " WHERE session_id = (SELECT min(session_id) FROM sessions_3)",
        ),
    ),
    Step(
        "a rating moves to another tutor",
        (
            "UPDATE student_feedback SET tutor_id = (SELECT max(tutor_id) FROM student_feedback)"
            " WHERE feedback_id = (SELECT min(feedback_id) FROM student_feedback)",
        ),
    ),
    Step("a month of sessions is detached", (_DETACH_SESSIONS,)),
    Step(
        "a month of sessions is attached",
        (f"ALTER TABLE sessions ATTACH PARTITION sessions_3 {_OCTOBER}",),
    ),
)


def take_steps(one: Lane, steps: Sequence[Step]) -> None:
    """Take steps on partitions that keep ids unique, beside changes of rows."""
    _split(one, "sessions", "HASH (session_id)", _by_hash(), key=", PRIMARY KEY (session_id)")
    _split(one, "tutor_events", "RANGE (event_timestamp)", _by_month())
    # The rows of September are in partitions of a partition.
    one.execute("ALTER TABLE tutor_events DETACH PARTITION tutor_events_2")
    _split(one, "tutor_events_2", "HASH (tutor_id)", _by_hash())
    one.execute(
        "ALTER TABLE tutor_events ATTACH PARTITION tutor_events_2"
        " FOR VALUES FROM ('2025-09-01') TO ('2025-10-01')"
    )
    one.expect("partitions", ALL_TUTORS, OTHER_FILES if one.steps else "")
    for step in steps:
        one.execute(*step.statements)
        one.expect(step.name, step.read, step.why)


def _partitions(one: Lane) -> None:
    with servers("one") as (server,):
        _begin(one, server)
        one.change()
        take_steps(one, UNIQUE_IDS)
        one.change()
        one.expect("rows change", CHANGED_TUTORS)

        one.execute("DROP TABLE other")
        _split(one, "student_feedback", "HASH (tutor_id)", _by_hash())
        _split(one, "sessions", "RANGE (scheduled_start)", _by_month())
        _split(one, "tutor_events", "HASH (tutor_id)", _by_hash())
        for step in _OTHERS:
            one.execute(*step.statements)
            one.change()
            one.expect(step.name, ALL_TUTORS, NOT_UNIQUE)


_HALF = 2**31
_BILLION = 10**9


def _wraparound(one: Lane) -> None:
    with servers("one") as (server,):
        _begin(one, server)
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
    _begin(one, metrics)
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
    "partitions": _partitions,
    "wraparound": _wraparound,
    "crash": _crash,
    "disk restored": _disk_restored,
}
"""What happens to servers, by name."""


def _text(url: sa.URL) -> str:
    # The servers trust their socket, so any password will do.
    return url.set(password="any").render_as_string(hide_password=False)


@contextmanager
def _log() -> Iterator[list[str]]:
    """What is logged while the block lasts."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, collector = logging.getLogger(LOGGER), Collector()
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(collector)
