"""TLS in front of a PostgreSQL that is built without it, and a server that lets nobody in."""

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import sqlalchemy as sa

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_GSS_REQUEST = struct.pack("!ii", 8, 80877104)


@contextmanager
def refusing_server(sqlstate: str, message: str) -> Iterator[sa.URL]:
    """The address of a server that answers each start of a session with an error."""

    def refuse(client: socket.socket) -> None:
        with client.makefile("rb") as stream:
            while (header := stream.read(8)) in (_SSL_REQUEST, _GSS_REQUEST):
                client.sendall(b"N")
            stream.read(struct.unpack("!i", header[:4])[0] - 8)
        fields = {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": message}
        body = b"".join(f"{kind}{text}\0".encode() for kind, text in fields.items()) + b"\0"
        client.sendall(b"E" + struct.pack("!i", len(body) + 4) + body)

    with _serving(refuse) as port:
        yield sa.URL.create("postgresql+psycopg", host="127.0.0.1", port=port, database="platform")


@contextmanager
def tls_proxy(server_url: sa.URL, context: ssl.SSLContext | None) -> Iterator[sa.URL]:
    """The server's address on TCP for as long as the block lasts; it ends once all have gone.

    Args:
        server_url: A server on a Unix socket.
        context: The server's side of TLS; without one it says that it does not speak TLS.
    """
    upstream = f"{server_url.query['host']}/.s.PGSQL.{server_url.port}"

    def forward(client: socket.socket) -> None:
        while (request := client.recv(8, socket.MSG_WAITALL)) == _GSS_REQUEST:
            client.sendall(b"N")
        if request != _SSL_REQUEST or context is None:
            client.sendall(b"N")
            return
        client.sendall(b"S")
        with (
            context.wrap_socket(client, server_side=True) as encrypted,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.connect(upstream)
            back = threading.Thread(target=_copy, args=(server, encrypted))
            back.start()
            _copy(encrypted, server)
            back.join()

    with _serving(forward) as port:
        yield server_url.set(host="127.0.0.1", port=port, query={})


@contextmanager
def _serving(serve_one: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server on loopback that deals with each client in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(client: socket.socket) -> None:
        with suppress(OSError), closing(client):
            serve_one(client)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(client,)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        # Closing alone would not wake the thread that waits in accept.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for thread in threads:
            thread.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
