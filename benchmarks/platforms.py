"""The platforms that are measured: generated once, each in a home with a server of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from benchmarks.answers import TABLE, TWIN
from tutormax_assets.database import embedded
from tutormax_assets.database.connection import conninfo
from tutormax_assets.database.tables import TABLES_OF_DATES

_VENV = Path(__file__).resolve().parents[1] / ".venv"

PRODUCT = _VENV / "bin" if _VENV.exists() else Path(sys.executable).parent
"""The product's interpreter and command; ``make bench`` installs the peers elsewhere."""

TUTORMAX = str(PRODUCT / "tutormax")
SOURCE_TABLES = ("tutors", "sessions", "student_feedback", "tutor_events")


class PlatformError(Exception):
    """A platform cannot be made or used; the message says why."""


@dataclass(frozen=True)
class Size:
    """What a platform is generated from.

    Attributes:
        tutors: Number of tutors, of any status.
        sessions_per_tutor: Sessions of a tutor over all days, on average.
        days: Days that the rows lie in.
    """

    tutors: int
    sessions_per_tutor: int
    days: int


@dataclass(frozen=True)
class Platform:
    """A generated platform in a home, its server running.

    Attributes:
        home: What ``TUTORMAX_HOME`` says.
        conninfo: libpq's connection string of its database.
        tutors: Number of tutors, of any status.
        sessions: Number of sessions.
        end: Day after the last one that has rows: the reference date.
    """

    home: Path
    conninfo: str
    tutors: int
    sessions: int
    end: date

    def environment(self) -> dict[str, str]:
        """The variables of a command; nothing of the developer's settings."""
        kept = {n: os.environ[n] for n in ("PATH", "HOME", "PYTHONPATH") if n in os.environ}
        return {**kept, "TUTORMAX_HOME": str(self.home)}

    def connect(self) -> psycopg.Connection[Any]:
        """A connection that commits each statement."""
        return psycopg.connect(self.conninfo, autocommit=True)

    def forget(self, first: date, last: date) -> None:
        """Bring tables and Parquet to the state before these reference dates ran, and the twin."""
        self.clear(first, last)
        self.renew_twin()

    def clear(self, first: date, last: date) -> None:
        """Bring tables and Parquet to the state before these reference dates ran."""
        with self.connect() as connection:
            for name in TABLES_OF_DATES:
                table = sql.Identifier(name)
                connection.execute(
                    sql.SQL("DELETE FROM {} WHERE calculation_date BETWEEN %s AND %s").format(
                        table
                    ),
                    [midnight(first), midnight(last)],
                )
                connection.execute(sql.SQL("VACUUM ANALYZE {}").format(table))
        for asset in (self.home / "storage").glob("*"):
            for partition in asset.glob("????-??-??.*"):
                if str(first) <= partition.stem <= str(last):
                    shutil.rmtree(partition) if partition.is_dir() else partition.unlink()
        with self.connect() as connection:
            # What one contestant has written is not written to disk in the time of the next one.
            connection.execute("CHECKPOINT")

    def renew_twin(self) -> None:
        """Make the twin anew: an empty table with the columns, keys and indexes of the table."""
        with self.connect() as connection:
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(TWIN))
            connection.execute(
                sql.SQL(
                    "CREATE TABLE {twin} (LIKE {table} INCLUDING ALL,"
                    " FOREIGN KEY (tutor_id) REFERENCES tutors ON DELETE CASCADE)"
                ).format(twin=TWIN, table=TABLE)
            )
            # What one contestant has written is not written to disk in the time of the next one.
            connection.execute("CHECKPOINT")


def midnight(day: date) -> datetime:
    """The instant that a reference date stands for; the benchmark's timezone is UTC."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


@contextmanager
def opened(home: Path) -> Iterator[Platform]:
    """The platform in a home; its server is stopped at the end if it did not run before.

    Raises:
        PlatformError: The home holds no platform with sessions.
    """
    was_running = embedded.is_running(home)
    url = conninfo(embedded.start(home))
    try:
        yield found(home, url)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(TWIN))
    finally:
        if not was_running:
            embedded.stop(home)


@contextmanager
def generated(folder: Path, size: Size, *, end: date) -> Iterator[Platform]:
    """A platform of a size in a home below the folder; made unless one of that size is there.

    One that is there keeps its reference date.

    Raises:
        PlatformError: It cannot be made.
    """
    home = folder / f"{size.tutors}x{size.sessions_per_tutor}x{size.days}"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise PlatformError(f"{home} is no folder; remove it, or name another --folder.") from None
    holds = home / "platform.json"
    wanted = asdict(size)
    if not holds.exists() or json.loads(holds.read_text()) != wanted:
        holds.unlink(missing_ok=True)
        try:
            _generate(home, size, end)
        finally:
            embedded.stop(home)
        holds.write_text(json.dumps(wanted))
    with opened(home) as platform:
        yield platform


def found(home: Path, url: str) -> Platform:
    """The platform of a database, its pages as later reads find them.

    Raises:
        PlatformError: The database holds no sessions.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        if connection.execute("SELECT to_regclass('sessions')").fetchone() == (None,):
            raise PlatformError(f"{home} holds no platform: found no table sessions.")
        # What reading for the first time does to the pages is no one's time.
        for table in SOURCE_TABLES:
            connection.execute(sql.SQL("VACUUM ANALYZE {}").format(sql.Identifier(table)))
        row = connection.execute(
            "SELECT (SELECT count(*) FROM tutors), count(*),"
            " (max(scheduled_start) AT TIME ZONE 'UTC')::date FROM sessions"
        ).fetchone()
    if row is None or row[2] is None:
        raise PlatformError(f"{home} holds no platform: found no session in the table sessions.")
    return Platform(home, url, row[0], row[1], row[2] + timedelta(days=1))


def _generate(home: Path, size: Size, end: date) -> None:
    platform = Platform(home, "", 0, 0, end)
    options = {
        "--tutors": size.tutors,
        "--sessions-per-tutor": size.sessions_per_tutor,
        "--days": size.days,
        "--end": end,
    }
    arguments = [str(word) for option in options.items() for word in option]
    for command in (["db", "init"], ["generate", *arguments]):
        done = subprocess.run(
            [TUTORMAX, *command],
            env=platform.environment(),
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise PlatformError(
                f"tutormax {' '.join(command)} in {home} failed: {done.stderr.strip()}."
                " Remove the folder, or name another one."
            )
