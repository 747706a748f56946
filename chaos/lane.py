"""A stored date that is brought up to date from one server after another."""

import logging
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import sqlalchemy as sa

from chaos.ground import END, Frames, Ground, differences, silent_log
from chaos.late import CHANGES
from chaos.report import Report
from chaos.servers import Server
from tutormax_assets.api.runs import aggregate
from tutormax_assets.api.summary import ALL_TUTORS, NOTHING
from tutormax_assets.database.connection import create_engine
from tutormax_assets.database.tables import metrics_metadata, source_metadata
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.defs.refresh import find_stale_dates
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.settings import load_settings

TUTORS = 40

OTHER_SERVER = "the server crashed or was restarted, restored, failed over or replaced"
OTHER_FILES = "was rewritten, or has other partitions"
TOO_MANY_TRANSACTIONS = "transactions since it was read, expected at most"
TOO_MANY_TUTORS = "tutors have changed"
NOT_UNIQUE = "no index keeps ids of sessions and feedback unique"

_OPTIONS = RunOptions(max_retries=2, retry_delay_seconds=0.1)
_CHANGES_PER_STEP = 3
_OF_ROWS = [name for name in CHANGES if not name.startswith("tutor")]


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


def begin(one: Lane, server: Server) -> None:
    """Start a server with a generated platform, and store the date."""
    server.start()
    fill(server.url)
    one.lead_to(server.url)
    one.expect("first run", ALL_TUTORS)


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
