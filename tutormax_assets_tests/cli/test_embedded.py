"""The commands on an embedded server of their own: the demo, and after a kill."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from polars.testing import assert_frame_equal

from tutormax_assets.database import embedded
from tutormax_assets.database.connection import create_engine
from tutormax_assets_tests.cli.conftest import Invoke, tutormax, words
from tutormax_assets_tests.conftest import metrics_of


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where nothing was started; the server's user may pass, which matters for root."""
    folder = Path(tempfile.mkdtemp(prefix="tutormax-cli-"))
    folder.chmod(0o755)
    monkeypatch.setenv("TUTORMAX_HOME", str(folder / "home"))
    yield folder / "home"
    embedded.stop(folder / "home")
    shutil.rmtree(folder)


def postmaster_of(home: Path) -> psutil.Process:
    pid_file = home / "postgres" / "data" / "postmaster.pid"
    return psutil.Process(int(pid_file.read_text().splitlines()[0]))


def test_without_a_server_status_and_stop_start_none(home: Path, invoke: Invoke) -> None:
    result = invoke("db", "status")
    assert result.exit_code == 1
    assert "is not running (embedded, because neither" in words(result.stdout)
    result = invoke("db", "stop")
    assert (result.exit_code, result.stdout) == (0, "It was not running.\n")
    assert not home.exists()


def test_the_demo_twice_and_a_run_after_a_kill(home: Path, invoke: Invoke) -> None:
    result = invoke("demo", "--tutors", "20")
    assert result.exit_code == 0
    shown = words(result.stdout)
    for part in (
        "tutor_performance_metrics: 0 rows of 0 tutors and 0 dates",
        "Success rate 100.0%",
        "The first two tutors",
        "Tiers over 30 days",
        "set-aside --date",
        "db stop",
    ):
        assert part in shown
    engine = create_engine(embedded.url(home))
    rows = metrics_of(engine)
    assert len(rows) > 30
    engine.dispose()

    postmaster = postmaster_of(home)
    for process in (postmaster, *postmaster.children()):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    done = tutormax("run", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # Nothing changed; had midnight passed in between, another date would be there as well.
    found = metrics_of(engine).filter(calculation_date=rows["calculation_date"][0])
    assert_frame_equal(found, rows)
    engine.dispose()

    other = invoke("demo", "--tutors", "21")
    assert other.exit_code == 2
    assert "--tutors is 21, but the platform of an earlier call has 20 tutors" in other.stderr
    result = invoke("demo")
    assert result.exit_code == 0
    assert "The platform of an earlier call is used again: 20 tutors." in words(result.stdout)
    assert f"{len(rows)} unchanged" in result.stderr
    result = invoke("db", "status")
    assert result.exit_code == 0
    assert "(embedded, because neither TUTORMAX_DATABASE_URL nor" in words(result.stdout)
    assert invoke("db", "stop").stdout == "Stopped.\n"
    assert not embedded.is_running(home)
