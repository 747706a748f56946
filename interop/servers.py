"""PostgreSQL and PgBouncer as the distribution packages them, on ports of their own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import sqlalchemy as sa
from psycopg import sql

from tutormax_assets.database.connection import conninfo

PATIENCE_SECONDS = 30
ADMIN = "admin"
WRITER = "interop_writer"
READER = "interop_reader"
PASSWORD = "interop-password"

# Nothing here outlives a power failure.
_SERVER = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@dataclass(frozen=True)
class Server:
    """A running PostgreSQL that wants a password over TCP."""

    port: int
    version: str

    def url(self, database: str, user: str = ADMIN) -> sa.URL:
        """Where one of its databases is for a user."""
        return tcp_url(self.port, database, user)

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        """Execute statements as the superuser, each on its own."""
        with psycopg.connect(conninfo(self.url(database)), autocommit=True) as connection:
            connection.execute(statement.encode())

    @contextmanager
    def database(self, options: str, settings: Mapping[str, str]) -> Iterator[str]:
        """A new database, its name.

        Args:
            options: Further words of ``CREATE DATABASE``.
            settings: Settings of its sessions.
        """
        name = f"interop_{uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0 {options}")
        for setting, value in settings.items():
            quoted = sql.Literal(value).as_string(None)
            self.execute(f'ALTER DATABASE {name} SET "{setting}" = {quoted}')
        try:
            yield name
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")


def tcp_url(port: int, database: str, user: str) -> sa.URL:
    """A URL on loopback."""
    return sa.URL.create(
        "postgresql+psycopg", user, PASSWORD, host="127.0.0.1", port=port, database=database
    )


@contextmanager
def postgresql() -> Iterator[Server]:
    """The newest PostgreSQL that the system has packages of, freshly initialized."""
    binaries = _binaries()
    with _folder() as folder:
        password = folder / "password"
        password.write_text(PASSWORD)
        _give(password)
        data, port = folder / "data", free_port()
        initdb = [str(binaries / "initdb"), "-D", str(data), "-U", ADMIN, "-A", "scram-sha-256"]
        initdb += ["--pwfile", str(password), "--encoding=UTF8", "--locale=C.UTF-8"]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/", **_user())
        settings = {**_SERVER, "port": str(port), "unix_socket_directories": ""}
        command = [str(binaries / "postgres"), "-D", str(data)]
        command += [f"--{name}={value}" for name, value in settings.items()]
        with _running(command, folder / "server.log", stop=signal.SIGINT):
            version = _wait(lambda: _version(tcp_url(port, "postgres", ADMIN)))
            yield Server(port, version)


@contextmanager
def pgbouncer(server: Server) -> Iterator[int]:
    """A PgBouncer before the server that lends a connection for one transaction; its port."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    with _folder() as folder:
        port = free_port()
        users = folder / "users.txt"
        users.write_text("".join(f'"{user}" "{PASSWORD}"\n' for user in (ADMIN, WRITER, READER)))
        settings = folder / "pgbouncer.ini"
        settings.write_text(
            f"""[databases]
* = host=127.0.0.1 port={server.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
pool_mode = transaction
default_pool_size = 6
logfile = {folder / "pgbouncer.log"}
"""
        )
        for path in (users, settings):
            _give(path)
        with _running([program, str(settings)], folder / "output.log", stop=signal.SIGTERM):
            _wait(lambda: _version(tcp_url(port, "postgres", ADMIN)))
            yield port


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _binaries() -> Path:
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    # Other distributions keep them on the path.
    on_path = shutil.which("initdb")
    if not found and not on_path:
        raise AssertionError("PostgreSQL is not installed; `make interop` installs it")
    return found[-1].parent if found else Path(str(on_path)).resolve().parent


def _owner() -> pwd.struct_passwd:
    """Who runs the servers, which refuse to run as root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def _user() -> dict[str, Any]:
    owner = _owner()
    user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    return user if os.geteuid() == 0 else {}


def _give(path: Path) -> None:
    path.chmod(0o600 if path.is_file() else 0o700)
    if os.geteuid() == 0:
        os.chown(path, _owner().pw_uid, _owner().pw_gid)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="tutormax-interop-"))
    _give(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _running(command: list[str], log: Path, *, stop: signal.Signals) -> Iterator[None]:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd="/", stdout=stream, stderr=stream, start_new_session=True, **_user()
        )
    try:
        yield
    except BaseException:
        print(log.read_text(errors="replace")[-2000:])
        raise
    finally:
        process.send_signal(stop)
        process.wait(PATIENCE_SECONDS)


def _version(url: sa.URL) -> str:
    with psycopg.connect(conninfo(url)) as connection:
        [version] = connection.execute("SHOW server_version").fetchone() or ("",)
    return str(version)


def _wait(answer: Callable[[], str]) -> str:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return answer()
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
