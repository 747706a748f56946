"""PostgreSQL servers that are copied, promoted, restored and aged."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import sqlalchemy as sa

from tutormax_assets.database import embedded
from tutormax_assets.database.connection import conninfo

# Checkpoints are requested, and rows are frozen, only when a case says so.
_OPTIONS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "autovacuum_freeze_max_age": "2000000000",
}

_PATIENCE_SECONDS = 60.0

# As PostgreSQL lays out pg_xact: two bits for each transaction, pages of 8 KiB, files of 32 pages.
_STATUS_FILE_BYTES = 32 * 8192
_TRANSACTIONS_PER_STATUS_FILE = 4 * _STATUS_FILE_BYTES

_CATCH_UP = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"

_BURN = """
DO $$ BEGIN
    FOR i IN 1..{number} LOOP
        PERFORM pg_current_xact_id();
        COMMIT;
    END LOOP;
END $$
"""


@dataclass(frozen=True)
class Server:
    """A server of a home of its own.

    Attributes:
        home: Where its data are.
    """

    home: Path

    @property
    def url(self) -> sa.URL:
        """The URL of its database."""
        return embedded.url(self.home)

    @property
    def socket(self) -> str:
        """The host that libpq connects to."""
        return str(self.url.query["host"])

    def start(self, **options: str) -> None:
        """Start it with further options, and with an empty database if it has no data."""
        embedded.start(self.home, options={**_OPTIONS, **options})

    def stop(self) -> None:
        """Stop it after a checkpoint."""
        embedded.stop(self.home)

    def execute(self, statement: str, *, database: str = embedded.DATABASE) -> None:
        """Execute a statement outside a transaction."""
        with _connect(self.url.set(database=database)) as connection:
            connection.execute(statement.encode())

    def value(self, query: str, *, database: str = embedded.DATABASE) -> object:
        """The only value that a query yields."""
        with _connect(self.url.set(database=database)) as connection:
            row = connection.execute(query.encode()).fetchone()
        return None if row is None else row[0]

    def run(self, program: str, *arguments: str) -> None:
        """Run a program of PostgreSQL as the user of the server.

        Raises:
            RuntimeError: It fails.
        """
        server = embedded._locate(self.home)
        command = [str(embedded._binaries(server) / program), *arguments]
        code, said = embedded._run(server, command, subprocess.STDOUT)
        if code != 0:
            raise RuntimeError(f"{program} ended with {code}: {said[-1000:]}")

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder that the programs can write to, removed when the block ends."""
        path = embedded._new_private_folder(
            embedded._locate(self.home), Path(tempfile.gettempdir()), "tutormax-chaos-"
        )
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def copy_to(self, standby: "Server") -> None:
        """Make a standby of the running server; it is not started."""
        here = embedded._locate(standby.home)
        here.folder.mkdir(parents=True)
        data = embedded._new_private_folder(here, here.folder, "copy-")
        standby.run(
            *("pg_basebackup", "--pgdata", str(data), "--host", self.socket),
            *("--username", "postgres", "--checkpoint", "fast", "--write-recovery-conf"),
        )
        data.rename(here.data)

    def keep_disk(self) -> None:
        """Keep a copy of the data as they are on the disk of the running server."""
        data = embedded._locate(self.home).data
        self.execute("CHECKPOINT")
        _copy_folder(data, data.with_name("kept"))

    def restore_disk(self) -> None:
        """Start with the data that were kept, as after a crash at that time."""
        data = embedded._locate(self.home).data
        self.stop()
        shutil.rmtree(data)
        _copy_folder(data.with_name("kept"), data)
        self.start()

    def crash(self) -> None:
        """Kill one of its processes, upon which it ends all others and recovers."""
        with _connect(self.url) as connection:
            os.kill(connection.info.backend_pid, signal.SIGKILL)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._is_up():
            if time.monotonic() > deadline:
                raise TimeoutError("the server has not recovered")
            time.sleep(0.05)

    def promote(self) -> None:
        """Make a primary of the standby."""
        self.value("SELECT pg_promote()")

    def _is_up(self) -> bool:
        try:
            return self.value("SELECT true") is True
        except psycopg.OperationalError:
            return False

    def wait_for(self, primary: "Server") -> None:
        """Wait until the standby has replayed all of the primary's changes.

        Raises:
            TimeoutError: It has not within a minute.
        """
        # What is not flushed is not sent.
        primary.execute("CHECKPOINT")
        position = str(primary.value("SELECT pg_current_wal_flush_lsn()"))
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with _connect(self.url) as connection:
            while connection.execute(_CATCH_UP, [position]).fetchone() != (True,):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the standby has not replayed {position}")
                time.sleep(0.05)

    def burn(self, number: int) -> None:
        """Let so many transactions pass."""
        self.execute(_BURN.format(number=number))

    def freeze(self) -> None:
        """Freeze all rows of all databases, so that the server may use up to 2^31 further ids."""
        self.execute("ALTER DATABASE template0 ALLOW_CONNECTIONS true")
        self.run("vacuumdb", "--all", "--freeze", "--host", self.socket, "--username", "postgres")

    def age_to(self, transaction: int) -> None:
        """Let a transaction id be the next one; the server is restarted."""
        self.stop()
        server = embedded._locate(self.home)
        name = f"{transaction // _TRANSACTIONS_PER_STATUS_FILE:04X}"
        status = server.data / "pg_xact" / name
        if not status.exists():
            status.write_bytes(bytes(_STATUS_FILE_BYTES))
            status.chmod(0o600)
            if os.geteuid() == 0:
                os.chown(status, server.uid, server.gid)
        self.run("pg_resetwal", "--next-transaction-id", str(transaction), str(server.data))
        self.start()


@contextmanager
def servers(*names: str) -> Iterator[list[Server]]:
    """Servers that are not started, each of a home of its own; stopped when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="tutormax-chaos-"))
    # Run as root, the servers belong to another user, who must pass.
    folder.chmod(0o755)
    found = [Server(folder / name) for name in names]
    try:
        yield found
    finally:
        for server in reversed(found):
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _copy_folder(folder: Path, copy: Path) -> None:
    """Copy files with their owners."""
    shutil.copytree(folder, copy)
    for source in (folder, *folder.rglob("*")):
        found = source.stat()
        os.chown(copy / source.relative_to(folder), found.st_uid, found.st_gid)


def _connect(url: sa.URL) -> "psycopg.Connection[tuple[object, ...]]":
    return psycopg.connect(conninfo(url), autocommit=True)
