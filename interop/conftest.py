"""The servers, one of each for the whole run."""

from collections.abc import Iterator

import pytest

from interop import servers
from interop.servers import PASSWORD, READER, WRITER, Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The distribution's PostgreSQL, with the two users who run the job."""
    with servers.postgresql() as running:
        for user in (READER, WRITER):
            running.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{PASSWORD}'")
        yield running


@pytest.fixture(scope="session")
def pooler(server: Server) -> Iterator[int]:
    """The port of a PgBouncer in transaction mode before it."""
    with servers.pgbouncer(server) as port:
        yield port
