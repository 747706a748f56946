"""A platform of its own, the Dagster UI over it, and a browser that looks at it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

TUTORMAX = str(Path(sys.executable).with_name("tutormax"))
TODAY = datetime.now(UTC).date()
START_SECONDS = 90

# Chromium's own calls home have no business in a test.
BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with a generated platform of which one row in fifty breaks the source contract."""
    home = tmp_path_factory.mktemp("home")
    # Run as root, the server belongs to another user, who must pass.
    for folder in (home, *home.parents[:2]):
        folder.chmod(0o755)
    tutormax(home, "db", "init")
    tutormax(home, "generate", "--tutors", "200", "--bad-rows", "0.02")
    yield home
    tutormax(home, "db", "stop")


@pytest.fixture(scope="session")
def ui(home: Path) -> Iterator[str]:
    """The address of ``tutormax dev``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (home / "dev.log").open("wb") as log:
        process = subprocess.Popen(
            [TUTORMAX, "dev", "--port", str(port)],
            env=environment(home),
            cwd=home,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_until_it_answers(url, process, home / "dev.log")
            yield url
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    assert executable, "Chromium is not installed; `make e2e` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new page."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    yield page
    page.close()


def tutormax(home: Path, *arguments: str) -> str:
    """What a command of the CLI prints."""
    done = subprocess.run(
        [TUTORMAX, *arguments],
        env=environment(home),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(home: Path) -> dict[str, str]:
    """Nothing of the developer's settings; automation is left to be turned on in the UI."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "TUTORMAX_HOME": str(home), "TUTORMAX_AUTOMATION": "false"}


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{url}/server_info", timeout=2)
            return
        time.sleep(0.2)
    raise AssertionError(f"{url} has not answered in {START_SECONDS} s:\n{log.read_text()}")


def day(before: int) -> date:
    """The date so many days before today."""
    return TODAY - timedelta(days=before)
