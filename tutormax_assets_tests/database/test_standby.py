"""A server and its hot standby: the platform can be read from both, and written to one."""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import psycopg
import pytest
import sqlalchemy as sa
from adbc_driver_postgresql import dbapi

from tutormax_assets.database import embedded
from tutormax_assets.database.connection import conninfo, create_engine
from tutormax_assets.database.tables import metrics_metadata, source_metadata
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.schema.status import SchemaError, status, upgrade
from tutormax_assets.source.postgres import Source, open_view
from tutormax_assets_tests.conftest import (
    FAST,
    PASSWORD,
    SMALL_PLATFORM_END,
    captured_log,
    open_platform,
)

# One process runs them all, so that there is one pair of servers.
pytestmark = pytest.mark.xdist_group("standby")

DAY = SMALL_PLATFORM_END.isoformat()


@dataclass(frozen=True)
class Pair:
    primary: sa.URL
    standby: sa.URL


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """A generated platform of 10 tutors, and its copy, which stays in recovery."""
    with tempfile.TemporaryDirectory(prefix="tutormax-pair-") as folder:
        # When the tests run as root, the servers run as another user, who must pass.
        Path(folder).chmod(0o755)
        homes = Path(folder, "primary"), Path(folder, "standby")
        try:
            primary = embedded.start(homes[0], options=FAST)
            _fill(primary)
            _copy(homes[0], homes[1])
            yield Pair(primary, embedded.start(homes[1], options=FAST))
        finally:
            for home in reversed(homes):
                embedded.stop(home)


def _fill(url: sa.URL) -> None:
    engine = create_engine(url)
    source_metadata.create_all(engine)
    metrics_metadata.create_all(engine)
    sample_platform.generate(
        engine,
        tutors=10,
        sessions_per_tutor=10,
        days=30,
        end=SMALL_PLATFORM_END,
        seed=1,
        bad_rows=0,
    )
    engine.dispose()


def _copy(home: Path, to: Path) -> None:
    source, target = embedded._locate(home), embedded._locate(to)
    target.folder.mkdir(parents=True)
    data = embedded._new_private_folder(target, target.folder, "copy-")
    command = [str(embedded._binaries(target) / "pg_basebackup"), "--pgdata", str(data)]
    command += ["--host", str(source.socket), "--username", "postgres"]
    command += ["--checkpoint", "fast", "--write-recovery-conf"]
    code, said = embedded._run(target, command, subprocess.STDOUT)
    assert code == 0, said
    data.rename(target.data)


def test_a_standby_cannot_be_written_to_and_says_so_at_once(pair: Pair, tmp_path: Path) -> None:
    with open_platform(pair.standby, tmp_path) as platform, captured_log() as lines:
        [summary] = platform.run(DAY, max_retries=3, retry_delay_seconds=60)

    assert (
        "The server is a read-only standby: let TUTORMAX_DATABASE_URL lead to the primary"
        in (summary.errors[0]["error"])
    )
    assert not [line for line in lines if "trying again" in line]

    engine = create_engine(pair.standby)
    found = status(engine, timezone="UTC")
    assert not found.ready
    [clause] = upgrade(engine, timezone="UTC", dry_run=True).obstacles
    assert "found a read-only standby, expected the primary" in clause
    assert clause in found.lines()
    with pytest.raises(SchemaError, match="found a read-only standby"):
        upgrade(engine, timezone="UTC")
    engine.dispose()


def count_students(cursor: dbapi.Cursor) -> int:
    cursor.execute("SELECT count(*) FROM students WHERE name = 'of a savepoint'")
    return int(pl.DataFrame(cursor.fetch_arrow()).item())


def commit_another(pair: Pair) -> None:
    with psycopg.connect(conninfo(pair.primary)) as writer:
        writer.execute("INSERT INTO students (student_id, name) VALUES ('other', 'other')")


def replayed_students(pair: Pair) -> int:
    """How many another reader of the standby sees, once it has replayed all that is committed."""
    deadline = time.monotonic() + 30
    with (
        psycopg.connect(conninfo(pair.primary), autocommit=True) as writer,
        psycopg.connect(conninfo(pair.standby), autocommit=True) as reader,
    ):
        writer.execute("CHECKPOINT")
        [written] = writer.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone() or ("",)
        is_behind = "SELECT pg_last_wal_replay_lsn() < %s::pg_lsn"
        while reader.execute(is_behind, [written]).fetchone() == (True,):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        query = "SELECT count(*) FROM students WHERE name = 'of a savepoint'"
        [found] = reader.execute(query).fetchone() or (0,)
    return int(found)


def test_reading_a_standby_hides_nothing_of_a_transaction_in_progress(pair: Pair) -> None:
    # With more than 64 savepoints, a standby does not know which of its rows are in progress.
    with psycopg.connect(conninfo(pair.primary)) as writer, writer.transaction():
        for number in range(100):
            with writer.transaction():
                writer.execute(
                    "INSERT INTO students (student_id, name) VALUES (%s, 'of a savepoint')",
                    [f"savepoint {number}"],
                )
        commit_another(pair)
        assert replayed_students(pair) == 0
        with open_view(Source(pair.standby)) as view:
            assert view.share() is None
            found = view.read_at_once({"sessions": count_students, "tutor_events": count_students})
            assert found == {"sessions": 0, "tutor_events": 0}
    assert replayed_students(pair) == 100


def test_the_platform_is_read_from_the_standby_and_the_metrics_go_to_the_primary(
    pair: Pair, tmp_path: Path
) -> None:
    standby = pair.standby.set(password=PASSWORD).render_as_string(hide_password=False)
    with open_platform(pair.primary, tmp_path, TUTORMAX_SOURCE_URL=standby) as platform:
        # The primary's sessions become unreadable, of which the standby does not hear.
        standby_engine = create_engine(pair.standby)
        with standby_engine.connect() as connection:
            connection.execute(sa.select(sa.func.pg_wal_replay_pause()))
        standby_engine.dispose()
        platform.execute("ALTER TABLE sessions RENAME COLUMN no_show TO unknown")

        [summary] = platform.run(DAY)
        assert (summary.errors, summary.total_metrics_saved) == ([], 3 * summary.total_tutors)
        assert len(platform.metrics()) == summary.total_metrics_saved > 0
