"""``tutormax dev``: the Dagster UI over the same instance and database as the other commands."""

import errno
import fcntl
import os
import socket
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tutormax_assets.cli.terminal import EXIT_USAGE, fail, messages, sentences, settings


def dev(
    host: Annotated[str, typer.Option("--host", help="Address that the UI listens on.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", "-p", min=1, max=65535, help="Its port.")] = 3000,
) -> None:
    """Start the Dagster UI and daemon over the same instance and database as the other commands.

    Schedule and sensors run, unless TUTORMAX_AUTOMATION says otherwise or they are off in the UI.
    Anybody who reaches the UI can start runs, so it listens on this machine only unless told.
    """
    environment = settings()
    with sentences():
        from tutormax_assets.database.connection import database_url, describe
        from tutormax_assets.defs.resources import load_policy
        from tutormax_assets.runs.instance import dagster_home

        load_policy(environment)
        home = dagster_home(environment)
        _take(home)
        _try_port(host, port)
        url = database_url(environment)
    messages.print(f"Database: {describe(url)} ({environment.whence})", soft_wrap=True)
    messages.print(f"UI: http://{host}:{port} (Ctrl-C stops it)")
    if not _is_loopback(host):
        messages.print(
            Text.assemble(
                ("Warning:", "bold yellow"),
                f" the UI has no sign-on, and whoever reaches {host}:{port} can start runs and"
                " delete their history. Leave it on 127.0.0.1 and put your own sign-on in front:"
                " see deploy/README.md.",
            ),
            soft_wrap=True,
        )
    os.environ["DAGSTER_HOME"] = str(home)
    if "automation" not in environment.model_fields_set:
        os.environ["TUTORMAX_AUTOMATION"] = "true"
    if "ui_url" not in environment.model_fields_set:
        os.environ["TUTORMAX_UI_URL"] = f"http://{host}:{port}"
    # Its successor is another package; what it does is the same.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:Function `dev_command` is superseded")
    command = [sys.executable, "-m", "dagster", "dev", "-m", "tutormax_assets.definitions"]
    command += ["--host", host, "--port", str(port)]
    try:
        os.execv(sys.executable, command)  # noqa: S606 - our own command, no shell
    except OSError as error:
        fail(f"Dagster does not start: {error}", code=EXIT_USAGE)


def _take(home: Path) -> None:
    """Keep other calls from serving the home, until Dagster ends; exit 2 if another one does."""
    # filelock's file would be closed when Dagster takes the place of this process.
    file = os.open(home / "dev.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(file, 20).decode() or "unknown"
        fail(
            f"Another `tutormax dev`, process {pid}, serves {home}. Use its UI or stop it, since"
            " two daemons would start each run twice; or set TUTORMAX_HOME to another folder.",
            code=EXIT_USAGE,
        )
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    os.set_inheritable(file, True)


def _try_port(host: str, port: int) -> None:
    """Exit 2 unless the UI can listen there."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
    except OSError as error:
        advice = (
            "Stop the program that listens there, or choose another port with --port."
            if error.errno == errno.EADDRINUSE
            else "--host names an address of this machine, such as 127.0.0.1."
        )
        fail(f"The UI cannot listen on {host}:{port}: {error.strerror}. {advice}", code=EXIT_USAGE)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
