"""``tutormax dev``: where the UI listens."""

import fcntl
import os
import socket
from pathlib import Path

import pytest

from tutormax_assets_tests.cli.conftest import Invoke, words


@pytest.mark.parametrize(
    ("arguments", "is_warned"),
    [
        ([], False),
        (["--host", "127.0.0.1"], False),
        (["--host", "localhost"], False),
        (["--host", "::1"], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "::"], True),
        (["--host", "10.0.0.1"], True),
        (["--host", "dagster.example.com"], True),
    ],
)
def test_a_ui_that_others_reach_is_warned_of(
    arguments: list[str], is_warned: bool, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    started: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.extend(command))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", "postgresql://nobody@/none?host=/nowhere")

    result = invoke("dev", *arguments)

    assert result.exit_code == 0
    host = arguments[-1] if arguments else "127.0.0.1"
    assert started[started.index("--host") + 1] == host
    assert ("Warning: the UI has no sign-on" in words(result.stderr)) == is_warned


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that takes the place of the process."""
    command: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, words: command.extend(words))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", "postgresql://nobody@/none?host=/nowhere")
    return command


def test_a_port_that_is_taken_starts_nothing(started: list[str], invoke: Invoke) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = invoke("dev", "--port", port)

    assert (result.exit_code, started) == (2, [])
    assert f"The UI cannot listen on 127.0.0.1:{port}: Address already in use." in result.stderr


def test_a_host_that_is_not_this_machine_starts_nothing(started: list[str], invoke: Invoke) -> None:
    result = invoke("dev", "--host", "192.0.2.1")

    assert (result.exit_code, started) == (2, [])
    assert "--host names an address of this machine" in result.stderr


def test_a_home_that_is_served_starts_no_second_daemon(
    started: list[str], invoke: Invoke, tmp_path: Path
) -> None:
    home = tmp_path / ".tutormax" / "dagster"
    home.mkdir(parents=True)
    with (home / "dev.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        result = invoke("dev", "--port", "39999")

    assert (result.exit_code, started) == (2, [])
    assert f"Another `tutormax dev`, process 4711, serves {home}." in result.stderr
