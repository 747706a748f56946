"""Golden data, roles, backfill, cleanup and restore on each of the servers."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal

from interop.servers import ADMIN, PASSWORD, READER, WRITER, Server, tcp_url
from tutormax_assets.database.connection import conninfo, create_engine
from tutormax_assets.database.tables import METRICS_KEY, source_metadata
from tutormax_assets_tests.conftest import GOLDEN, add, fill_golden, metrics_of
from tutormax_assets_tests.metrics.test_golden import EXACT, RATES

TUTORMAX = str(Path(sys.executable).with_name("tutormax"))
PATIENCE_SECONDS = 300

PARTITIONED = """
CREATE TABLE parts (LIKE sessions INCLUDING DEFAULTS) PARTITION BY RANGE (scheduled_start);
CREATE TABLE older PARTITION OF parts FOR VALUES FROM (MINVALUE) TO ('2025-10-15 00:00+00');
CREATE TABLE newer PARTITION OF parts FOR VALUES FROM ('2025-10-15 00:00+00') TO (MAXVALUE);
INSERT INTO parts SELECT * FROM sessions;
ALTER TABLE student_feedback DROP CONSTRAINT student_feedback_session_id_fkey;
DROP TABLE sessions;
ALTER TABLE parts RENAME TO sessions;
CREATE TABLE kinds (LIKE tutor_events INCLUDING DEFAULTS) PARTITION BY LIST (event_type);
CREATE TABLE logins PARTITION OF kinds FOR VALUES IN ('login');
CREATE TABLE others PARTITION OF kinds DEFAULT;
INSERT INTO kinds SELECT * FROM tutor_events;
DROP TABLE tutor_events;
ALTER TABLE kinds RENAME TO tutor_events;
"""

VIEWS = """
ALTER TABLE sessions RENAME TO session_rows;
CREATE VIEW sessions AS SELECT * FROM session_rows;
ALTER TABLE student_feedback RENAME TO feedback_rows;
CREATE VIEW student_feedback AS SELECT * FROM feedback_rows;
ALTER TABLE tutor_events RENAME TO event_rows;
CREATE VIEW tutor_events AS SELECT * FROM event_rows;
"""


@dataclass(frozen=True)
class Ground:
    """What is different from a new database of the server.

    Attributes:
        options: Further words of ``CREATE DATABASE``.
        settings: Settings of the database's sessions.
        schema: The schema of the tables.
        reshape: Statements that change the source tables.
        is_pooled: Whether a PgBouncer in transaction mode is between, with other clients.
    """

    options: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    schema: str = "public"
    reshape: str = ""
    is_pooled: bool = False


GROUNDS = {
    "TCP with a password": Ground(),
    "PgBouncer": Ground(is_pooled=True),
    "LATIN1": Ground("ENCODING 'LATIN1' LOCALE 'C'"),
    "SQL_ASCII": Ground("ENCODING 'SQL_ASCII' LOCALE 'C'"),
    "another schema": Ground(schema="tutoring", settings={"search_path": "tutoring"}),
    "partitioned tables": Ground(reshape=PARTITIONED),
    "views": Ground(reshape=VIEWS),
    "other settings": Ground(
        settings={
            "DateStyle": "SQL, DMY",
            "IntervalStyle": "sql_standard",
            "TimeZone": "Asia/Kathmandu",
            "bytea_output": "escape",
            "extra_float_digits": "0",
        }
    ),
}


@dataclass(frozen=True)
class Home:
    """A folder to run the commands in, and the database that they use."""

    folder: Path
    port: int
    database: str

    def tutormax(self, *arguments: str, owner: bool = False, code: int = 0) -> str:
        """What a command prints, run by the owner of the tables or by the two users."""
        writer, reader = (ADMIN, ADMIN) if owner else (WRITER, READER)
        done = subprocess.run(
            [TUTORMAX, *arguments],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder),
                "TUTORMAX_HOME": str(self.folder / "tutormax"),
                "TUTORMAX_DATABASE_URL": self._url(writer),
                "TUTORMAX_SOURCE_URL": self._url(reader),
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        return done.stdout

    def _url(self, user: str) -> str:
        return tcp_url(self.port, self.database, user).render_as_string(hide_password=False)


@pytest.mark.parametrize("name", GROUNDS)
def test_the_product_runs_on(
    name: str, server: Server, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ground = GROUNDS[name]
    with opened(ground, server) as engine:
        port = request.getfixturevalue("pooler") if ground.is_pooled else server.port
        home = Home(tmp_path, port, str(engine.url.database))
        home.tutormax("db", "status", code=1)
        home.tutormax("db", "upgrade", owner=True)
        give_rights(home, server, schema=ground.schema)
        home.tutormax("db", "status")

        if ground.is_pooled:
            compute_beside_other_clients(home)
        else:
            compute(home)
        saved = metrics_of(engine)
        assert_golden(saved)
        assert "Zoé" in saved["tutor_id"]
        home.tutormax("run", "--date", "2025-11-07", "--tutors", "Zoé")
        assert_frame_equal(metrics_of(engine), saved)

        archive_and_restore(home, engine, saved)
        rows_of_people = [tmp_path / "tutormax" / name for name in ("storage", "archive")]
        assert [path for folder in rows_of_people for path in open_to_others(folder)] == []


@contextmanager
def opened(ground: Ground, server: Server) -> Iterator[sa.Engine]:
    """A database of its own with the golden platform and a tutor whose id is not ASCII."""
    with server.database(ground.options, ground.settings) as database:
        engine = create_engine(server.url(database))
        if ground.schema != "public":
            server.execute(f"CREATE SCHEMA {ground.schema}", database=database)
        source_metadata.create_all(engine)
        fill_golden(engine)
        add(
            engine,
            source_metadata.tables["sessions"],
            {
                "session_id": "séance",
                "tutor_id": "Zoé",
                "scheduled_start": datetime.fromisoformat("2025-11-06 12:00+00:00"),
                "actual_start": datetime.fromisoformat("2025-11-06 12:00+00:00"),
            },
        )
        if ground.reshape:
            server.execute(ground.reshape, database=database)
        yield engine
        engine.dispose()


def give_rights(home: Home, server: Server, *, schema: str) -> None:
    """Run the script of ``tutormax db roles`` in psql, and let the users have the roles."""
    script = home.tutormax("db", "roles", *(["--schema", schema] if schema != "public" else []))
    psql = ["psql", "-q", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(server.port)]
    subprocess.run(
        [*psql, "-U", ADMIN, home.database],
        env={"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD, "PGCLIENTENCODING": "UTF8"},
        input=script,
        text=True,
        check=True,
    )
    server.execute(f"GRANT tutormax_reader TO {READER}")
    server.execute(f"GRANT tutormax_writer TO {WRITER}")


def compute(home: Home) -> None:
    """The golden dates, two of them in one run."""
    home.tutormax("run", "--date", "2025-10-01", "--include-inactive")
    home.tutormax("backfill", "--from", "2025-11-06", "--to", "2025-11-07", "--include-inactive")


def compute_beside_other_clients(home: Home) -> None:
    """Six weeks in two processes, while others use the same connections of the pooler."""
    ranges = [("2025-10-01", "2025-10-20"), ("2025-10-21", "2025-11-07")]
    failures: list[BaseException] = []

    def backfill(start: str, end: str) -> None:
        try:
            home.tutormax("backfill", "--from", start, "--to", end, "--include-inactive")
        except BaseException as failure:
            failures.append(failure)

    ended = threading.Event()

    def use() -> None:
        url = tcp_url(home.port, home.database, WRITER)
        with psycopg.connect(conninfo(url), autocommit=True, prepare_threshold=None) as connection:
            while not ended.is_set():
                # What a session is left with must not matter to the next transaction on it.
                connection.execute("SET search_path = pg_catalog; RESET search_path")
                connection.execute("SELECT count(*) FROM tutor_performance_metrics")
                ended.wait(0.01)

    users = [threading.Thread(target=use) for _ in range(3)]
    runs = [threading.Thread(target=backfill, args=dates) for dates in ranges]
    for thread in (*users, *runs):
        thread.start()
    for thread in runs:
        thread.join()
    ended.set()
    for thread in users:
        thread.join()
    assert failures == []


def assert_golden(saved: pl.DataFrame) -> None:
    """The rows of the golden dates are those of the service that this project replaces."""
    expected = pl.read_parquet(GOLDEN / "expected_metrics.parquet")
    both = expected.join(saved, on=METRICS_KEY, how="left", suffix="_found", validate="1:1")
    assert len(both) == 1755
    for column in EXACT:
        assert both.filter(pl.col(column).ne_missing(pl.col(f"{column}_found"))).is_empty(), column
    for column in RATES:
        off = (pl.col(column) - pl.col(f"{column}_found")).abs()
        is_null = pl.col(column).is_null() != pl.col(f"{column}_found").is_null()
        assert both.filter((off > 0.01 + 1e-9) | is_null).is_empty(), column


def archive_and_restore(home: Home, engine: sa.Engine, saved: pl.DataFrame) -> None:
    """Every row leaves for the archive and comes back as it was."""
    kept: dict[str, Any] = json.loads(home.tutormax("cleanup", "--retention-days", "1", "--json"))
    assert (kept["metrics"]["rows"], kept["metrics"]["rows_left"]) == (len(saved), 0)
    assert metrics_of(engine).is_empty()
    for month in ("2025-10", "2025-11"):
        home.tutormax("restore", "--month", month)
    assert_frame_equal(metrics_of(engine), saved)


def open_to_others(folder: Path) -> list[Path]:
    """What somebody else than the owner can read."""
    return [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]
