"""A faulty way to a PostgreSQL: forwards connections of a Unix socket until a fault strikes.

A fault is armed and strikes the first connections that reach it, ``times`` of them. Bytes are
counted for each connection from its beginning, which a pool may have made earlier.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import sqlalchemy as sa

ALWAYS = 1_000_000_000
"""For ``times``: every connection that reaches the fault."""

_PORT = 5432
_CHUNK = 65_536
_COMMIT = b"COMMIT\0"

Kind = Literal["refuse", "cut", "black_hole", "commit"]


@dataclass
class _Fault:
    kind: Kind
    times: int
    bytes_from_server: int | None = None
    bytes_to_server: int | None = None
    of: bytes = b""
    is_forwarded: bool = True
    first_connection: int = 0

    def limit(self, *, to_server: bool) -> int | None:
        return self.bytes_to_server if to_server else self.bytes_from_server


@dataclass
class _Connection:
    """Two sockets and what has passed between them."""

    client: socket.socket
    server: socket.socket
    number: int
    to_server: int = 0
    from_server: int = 0
    tail: bytes = b""
    transaction: set[bytes] = field(default_factory=set)
    """Texts that a fault waits for and that were sent since the last COMMIT."""
    awaits_answer: bool = False
    is_mute: bool = False

    def close(self) -> None:
        for end in (self.client, self.server):
            # Wakes the thread that reads from it, which closing alone does not.
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Leads clients to a server until a fault strikes; a context manager.

    Example:
        with Proxy(server_socket_dir, tmp_path / "proxy") as proxy:
            engine = create_engine(proxy.url(url))
            proxy.cut_after(bytes_from_server=20_000)

    Attributes:
        connections: Number of connections that were made, refused ones included.
        strikes: Number of times that a fault struck.
        most_from_server: Most bytes of one connection that passed from the server.
        most_to_server: Most bytes of one connection that passed to the server.
    """

    def __init__(self, server_socket_dir: Path, folder: Path) -> None:
        """Say where the server is and where the proxy listens.

        Args:
            server_socket_dir: Folder of the server's socket ``.s.PGSQL.5432``.
            folder: Folder of the proxy's, made when missing; a path of at most 90 bytes.
        """
        self.connections = 0
        self.strikes = 0
        self.most_from_server = 0
        self.most_to_server = 0
        self._server_path = server_socket_dir / f".s.PGSQL.{_PORT}"
        self._folder = folder
        self._path = folder / f".s.PGSQL.{_PORT}"
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._open: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._hang_up()
        self.cut_all()
        for thread in self._threads:
            thread.join(10)

    def url(self, url: sa.URL) -> sa.URL:
        """The same database, reached through the proxy."""
        return url.set(host=None, port=_PORT).update_query_dict({"host": str(self._folder)})

    def cut_after(
        self,
        bytes_from_server: int | None = None,
        bytes_to_server: int | None = None,
        times: int = 1,
        *,
        spare: int = 0,
    ) -> None:
        """Close a connection once so many bytes have passed in a direction, and forward no more.

        Args:
            bytes_from_server: After so many bytes that the server sent.
            bytes_to_server: After so many bytes that the client sent.
            times: How many connections it strikes.
            spare: How many of the connections that are made from now on are spared first; with 0,
                those that are open already are struck as well.
        """
        first = self.connections + 1 + spare if spare else 0
        fault = _Fault("cut", times, bytes_from_server, bytes_to_server, first_connection=first)
        self._arm(fault)

    def black_hole(
        self,
        bytes_from_server: int | None = None,
        bytes_to_server: int | None = None,
        times: int = 1,
    ) -> None:
        """Like ``cut_after``, but without closing: neither side hears of the other again."""
        self._arm(_Fault("black_hole", times, bytes_from_server, bytes_to_server))

    def swallow_commit(self, times: int = 1, *, of: str = "", is_forwarded: bool = True) -> None:
        """Close a connection at a COMMIT, of which the client does not hear how it ended.

        Args:
            times: How many of them.
            of: Only of a transaction in which the client has sent this text.
            is_forwarded: Whether the server commits before the connection is closed.
        """
        self._arm(_Fault("commit", times, of=of.encode(), is_forwarded=is_forwarded))

    def refuse(self, times: int = 1, *, spare: int = 0) -> None:
        """Close connections as soon as they are made; the first few may be spared."""
        self._arm(_Fault("refuse", times, first_connection=self.connections + 1 + spare))

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens while the block lasts, and what was open is closed."""
        self._hang_up()
        self.cut_all()
        try:
            yield
        finally:
            self._listen()

    def disarm(self) -> None:
        """Forget the faults that have not struck yet."""
        with self._lock:
            self._faults.clear()

    def cut_all(self) -> None:
        """Close whatever is open now."""
        with self._lock:
            connections, self._open = self._open, []
        for connection in connections:
            connection.close()

    def _arm(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _listen(self) -> None:
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self._path))
        self._listener.listen(64)
        self._start(self._accept, self._listener)

    def _hang_up(self) -> None:
        # The file stays, so that who connects is refused rather than finds nothing.
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # It was closed.
                return
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with self._lock:
                self.connections += 1
                connection = _Connection(client, server, self.connections)
                is_refused = self._is_refused(connection)
            try:
                if not is_refused:
                    server.connect(os.fspath(self._server_path))
            except OSError:  # The server is down, and so it looks to the client.
                is_refused = True
            if is_refused:
                connection.close()
                continue
            with self._lock:
                self._open.append(connection)
            self._start(self._forward, connection, True)
            self._start(self._forward, connection, False)

    def _forward(self, connection: _Connection, to_server: bool) -> None:
        source = connection.client if to_server else connection.server
        target = connection.server if to_server else connection.client
        with suppress(OSError):
            while chunk := source.recv(_CHUNK):
                with self._lock:
                    chunk, is_cut = self._let_through(connection, chunk, to_server=to_server)
                if chunk:
                    target.sendall(chunk)
                if is_cut:
                    break
        connection.close()

    def _let_through(
        self, connection: _Connection, chunk: bytes, *, to_server: bool
    ) -> tuple[bytes, bool]:
        """What is forwarded of the bytes, and whether the connection is closed afterwards."""
        if connection.is_mute:
            return b"", False
        if connection.awaits_answer and not to_server:
            return b"", True
        passed = connection.to_server if to_server else connection.from_server
        for kind in ("cut", "black_hole"):
            for fault in self._faults:
                limit = fault.limit(to_server=to_server)
                if fault.kind != kind or connection.number < fault.first_connection:
                    continue
                if limit is not None and passed + len(chunk) >= limit:
                    self._spend(fault)
                    connection.is_mute = kind == "black_hole"
                    return chunk[: max(0, limit - passed)], kind == "cut"
        if to_server:
            connection.to_server += len(chunk)
            self.most_to_server = max(self.most_to_server, connection.to_server)
            return self._watch_commit(connection, chunk)
        connection.from_server += len(chunk)
        self.most_from_server = max(self.most_from_server, connection.from_server)
        return chunk, False

    def _watch_commit(self, connection: _Connection, chunk: bytes) -> tuple[bytes, bool]:
        faults = [fault for fault in self._faults if fault.kind == "commit"]
        # A text may begin at the end of what came before.
        text = connection.tail + chunk
        connection.tail = text[-max([len(_COMMIT), *(len(f.of) for f in faults)]) :]
        connection.transaction |= {fault.of for fault in faults if fault.of in text}
        if not text.endswith(_COMMIT) or not chunk:
            return chunk, False
        sent, connection.transaction = connection.transaction, set()
        connection.tail = b""
        for fault in faults:
            if fault.of in sent:
                self._spend(fault)
                connection.awaits_answer = fault.is_forwarded
                return (chunk, False) if fault.is_forwarded else (b"", True)
        return chunk, False

    def _is_refused(self, connection: _Connection) -> bool:
        for fault in self._faults:
            if fault.kind == "refuse" and connection.number >= fault.first_connection:
                self._spend(fault)
                return True
        return False

    def _spend(self, fault: _Fault) -> None:
        self.strikes += 1
        fault.times -= 1
        if fault.times <= 0:
            self._faults.remove(fault)
