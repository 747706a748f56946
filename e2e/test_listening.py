"""What ``tutormax dev`` opens to others: nothing."""

from pathlib import Path
from urllib.parse import urlsplit

import psutil


def test_only_the_ui_listens_and_only_on_loopback(ui: str) -> None:
    services = [
        process
        for process in psutil.Process().children(recursive=True)
        if any("dagster" in argument for argument in process.cmdline())
    ]
    # The UI, the daemon, the code location, and the one who starts them.
    assert len(services) >= 4

    listening = {
        connection.laddr
        for process in services
        for connection in process.net_connections(kind="inet")
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    }
    assert listening == {("127.0.0.1", urlsplit(ui).port)}


def test_sockets_of_the_code_location_are_its_owners(ui: str) -> None:
    sockets = {
        Path(str(connection.laddr))
        for process in psutil.Process().children(recursive=True)
        if "code-server" in process.cmdline() or "grpc" in process.cmdline()
        for connection in process.net_connections(kind="unix")
        if str(connection.laddr).startswith("/")
    }
    assert sockets
    assert [path for path in sockets if path.stat().st_mode & 0o022] == []
