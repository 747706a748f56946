"""Receivers of alerts on this machine: an HTTP server and an SMTP server."""

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

import pytest

TOKEN = "token-never-shown"
"""In the URL of every receiver."""


class WebhookServer(http.server.ThreadingHTTPServer):
    """Keeps what was posted to it, and answers as told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _WebhookHandler)
        self.answer = 200
        self.requests: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"json://reader:{TOKEN}@127.0.0.1:{self.server_port}/{TOKEN}"

    @property
    def titles(self) -> list[str]:
        return [request["title"] for request in self.requests]


class _WebhookHandler(http.server.BaseHTTPRequestHandler):
    server: WebhookServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(json.loads(body))
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class MailServer(socketserver.ThreadingTCPServer):
    """Takes any mail and keeps it."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _MailHandler)
        self.mails: list[EmailMessage] = []

    @property
    def url(self) -> str:
        port = self.server_address[1]
        return (
            f"mailto://reader:{TOKEN}@127.0.0.1:{port}"
            "?mode=insecure&from=tutormax@example.com&to=oncall@example.com"
        )


class _MailHandler(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        self._say("220 ready")
        while line := self.rfile.readline():
            match line[:4].upper().strip():
                case b"EHLO":
                    self._say("250-localhost\r\n250 AUTH PLAIN")
                case b"AUTH":
                    self._say("235 welcome")
                case b"DATA":
                    self._say("354 go on")
                    self._keep()
                    self._say("250 kept")
                case b"QUIT":
                    self._say("221 bye")
                    return
                case _:
                    self._say("250 fine")

    def _keep(self) -> None:
        lines = []
        while (line := self.rfile.readline()) != b".\r\n":
            lines.append(line.removeprefix(b"."))
        mail = message_from_bytes(b"".join(lines), policy=policy.default)
        assert isinstance(mail, EmailMessage)
        self.server.mails.append(mail)

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebhookServer]:
    """A webhook that alerts go to."""
    server = WebhookServer()
    monkeypatch.setenv("TUTORMAX_ALERTS", server.url)
    with serving(server):
        yield server


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    """A mail server that no setting names."""
    server = MailServer()
    with serving(server):
        yield server
