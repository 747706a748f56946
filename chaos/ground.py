"""Where things are broken: a home with an embedded server of its own, and the real command line."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import polars as pl
import sqlalchemy as sa
from adbc_driver_postgresql import dbapi
from upath import UPath

from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.database import embedded
from tutormax_assets.database.connection import conninfo, create_engine
from tutormax_assets.database.tables import METRICS_TABLE, metrics_metadata, source_metadata
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.storage.partition import STATE_SUFFIX, open_partition, scan_partition

TUTORMAX = str(Path(sys.executable).with_name("tutormax"))
ROOT = Path(__file__).resolve().parents[1]

END = date(2025, 11, 7)
"""Day before which the rows of the generated platforms end."""

# Both are their own reverse, so that the source has two states.
OTHER_STATE = (
    "UPDATE sessions SET no_show = NOT no_show WHERE hashtext(session_id) % 5 = 0",
    "UPDATE student_feedback SET overall_rating = 6 - overall_rating"
    " WHERE hashtext(session_id) % 3 = 0",
)
"""Statements that lead from one state of the source to the other."""

# When a row was written says nothing about what was computed.
_TABLE = f"""
    SELECT metric_id, tutor_id, (calculation_date AT TIME ZONE 'UTC')::date AS date, "window",
        sessions_completed, avg_rating, first_session_success_rate, reschedule_rate, no_show_count,
        engagement_score, learning_objectives_met_pct, response_time_avg_minutes, performance_tier
    FROM {METRICS_TABLE}
"""

_MIRRORED = ("tutor_tier_reasons", "tutor_tier_changes")

Frames = dict[str, pl.DataFrame]
"""The rows of the table under its name, those of each Parquet file under its path; sorted."""


@dataclass(frozen=True)
class Ground:
    """A home of ``tutormax`` with a running server.

    Attributes:
        home: What ``TUTORMAX_HOME`` says.
        engine: An engine on the home's database.
        variables: Further settings, by variable.
    """

    home: Path
    engine: sa.Engine
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def storage(self) -> Path:
        """Where the Parquet is."""
        return self.home / "storage"

    def environment(self, **variables: str) -> dict[str, str]:
        """The variables of a command; nothing of the developer's settings."""
        kept = {n: os.environ[n] for n in ("PATH", "HOME", "PYTHONPATH") if n in os.environ}
        return {**kept, "TUTORMAX_HOME": str(self.home), **self.variables, **variables}

    @contextmanager
    def as_environment(self, **variables: str) -> Iterator[None]:
        """Let this process have the variables that a command would have."""
        with patch.dict(os.environ, self.environment(**variables), clear=True):
            yield

    def start(
        self,
        *arguments: str,
        log: Path,
        nice: int = 0,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> "Command":
        """Start a command in a process group of its own; its output goes to the file ``log``."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["nice", "-n", str(nice), TUTORMAX, *arguments],
                env=self.environment(**variables),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Command(process, log)

    def run(
        self,
        *arguments: str,
        log: Path,
        patience: float = 120,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> "Command":
        """Run a command to its end, or kill it after so many seconds."""
        command = self.start(*arguments, log=log, variables=variables)
        command.wait(patience)
        return command

    def frames(self, days: Sequence[date] = ()) -> Frames:
        """What the table and the Parquet hold of these reference dates; of all when none is named.

        Raises:
            polars.exceptions.PolarsError: A Parquet file cannot be read.
        """
        table = query(self.engine.url, _TABLE)
        if days:
            table = table.filter(pl.col("date").is_in(list(days)))
        keys = {day.isoformat() for day in days}
        listings = [p for p in self.storage.glob("*/*.json") if not days or p.stem in keys]
        partitions = {
            f"{listing.parent.name}/{listing.stem}": _sorted(
                scan_partition(_folder(listing)).collect()
            )
            for listing in listings
            # What moved depends on which other dates were there.
            if listing.parent.name != TUTOR_TIER_CHANGES
        }
        return {
            METRICS_TABLE: _sorted(table),
            **partitions,
            **{
                f"{listing.parent.name} (table)/{listing.stem}": self._apart(listing)
                for listing in listings
                if listing.parent.name in _MIRRORED
            },
        }

    def _apart(self, listing: Path) -> pl.DataFrame:
        """The rows that only one of a partition and the table of the same name has."""
        stored = scan_partition(_folder(listing)).collect()
        columns = ", ".join(f'"{column}"' for column in stored.columns)
        held = query(
            self.engine.url,
            f"SELECT {columns} FROM {listing.parent.name}"
            f" WHERE calculation_date = '{listing.stem} 00:00+00'",
        )
        sides = [rows.select(pl.col(stored.columns).cast(pl.String)) for rows in (stored, held)]
        return pl.concat([_only_in(*sides), _only_in(*reversed(sides))])

    def leftovers(self) -> list[Path]:
        """Files in the storage that are of no partition."""
        listings = list(self.storage.glob("*/*.json"))
        known = {
            *listings,
            *(listing.with_suffix(STATE_SUFFIX) for listing in listings),
            *(
                Path(str(file))
                for listing in listings
                for file in open_partition(_folder(listing)).rows().files
            ),
        }
        return [
            path
            for path in self.storage.rglob("*")
            if path.is_file() and path not in known and path.suffix != ".html"
        ]


def _folder(listing: Path) -> UPath:
    return UPath(listing.with_suffix(".parquet"))


@dataclass(frozen=True)
class Command:
    """A command that was started, and the file that holds what it says."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def code(self) -> int | None:
        """The exit code; none while it runs."""
        return self.process.poll()

    @property
    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")

    def wait(self, patience: float) -> bool:
        """Whether it ended by itself within so many seconds; if not, it is killed."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return True

    def kill(self) -> bool:
        """Kill it and whatever it started with SIGKILL; whether it was still running."""
        was_running = self.process.poll() is None
        if was_running:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return was_running


@contextmanager
def ground(**variables: str) -> Iterator[Ground]:
    """A home with all tables, empty, for as long as the block lasts."""
    home = Path(tempfile.mkdtemp(prefix="tutormax-chaos-"))
    # Run as root, the server belongs to another user, who must pass.
    home.chmod(0o755)
    try:
        engine = create_engine(embedded.start(home))
        source_metadata.create_all(engine)
        metrics_metadata.create_all(engine)
        yield Ground(home, engine, variables)
        engine.dispose()
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def ground_on(engine: sa.Engine, **variables: str) -> Iterator[Ground]:
    """A home without a server, over a database that is there and has all tables."""
    url = engine.url.set(password="any").render_as_string(hide_password=False)
    with tempfile.TemporaryDirectory(prefix="tutormax-chaos-") as home:
        yield Ground(Path(home), engine, {"TUTORMAX_DATABASE_URL": url, **variables})


@contextmanager
def database(template: Ground) -> Iterator[sa.Engine]:
    """A database that is a copy of the ground's, on the same server, while the block lasts."""
    name = f"copy_{time.monotonic_ns()}"
    template.engine.dispose()
    admin = sa.create_engine(
        template.engine.url.set(database="postgres"), isolation_level="AUTOCOMMIT"
    )
    engine = create_engine(template.engine.url.set(database=name))
    with admin.connect() as connection:
        connection.exec_driver_sql(
            f'CREATE DATABASE "{name}" TEMPLATE "{template.engine.url.database}"'
        )
        try:
            yield engine
        finally:
            engine.dispose()
            connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')
    admin.dispose()


@contextmanager
def silent_log() -> Iterator[None]:
    """Nothing of the log of runs in this process is shown while the block lasts."""
    logger = logging.getLogger(LOGGER)
    handler = logging.NullHandler()
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)


def query(url: sa.URL, statement: str) -> pl.DataFrame:
    """The rows of a query."""
    with dbapi.connect(conninfo(url)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return pl.DataFrame(cursor.fetch_arrow())


def execute(engine: sa.Engine, statement: str, **values: Any) -> None:
    """Execute a statement in a transaction of its own."""
    with engine.begin() as connection:
        connection.execute(sa.text(statement), values)


def differences(found: Frames, expected: Frames) -> list[str]:
    """A sentence for each frame that is not as expected."""
    sentences = [f"{name} is there and should not be" for name in found.keys() - expected.keys()]
    for name, rows in expected.items():
        if name not in found:
            sentences.append(f"{name} is missing")
        elif not found[name].equals(rows):
            sentences.append(
                f"{name} has {len(found[name])} rows, expected {len(rows)}; "
                f"{len(_only_in(found[name], rows))} of them are not expected, "
                f"{len(_only_in(rows, found[name]))} are missing"
            )
    return sorted(sentences)


def _sorted(rows: pl.DataFrame) -> pl.DataFrame:
    # Rows of one tutor and date come in the order in which the database holds them.
    return rows.sort(pl.all(), nulls_last=False)


def _only_in(rows: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
    return rows.join(others, on=rows.columns, how="anti", nulls_equal=True)
