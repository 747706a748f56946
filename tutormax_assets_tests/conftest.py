"""What every test stands on: an environment of its own, and databases of a real PostgreSQL."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy as sa
from filelock import FileLock
from psycopg import sql

from tutormax_assets.platform import embedded
from tutormax_assets.platform.connection import conninfo, create_engine
from tutormax_assets.platform.tables import metrics_metadata, source_metadata

# Nothing in a test outlives a power failure.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

_TEMPLATE = "tutormax_template"
_SERVER_HOME = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """One home for the whole run: made here, and handed on to the workers of pytest-xdist."""
    if hasattr(config, "workerinput"):
        config.stash[_SERVER_HOME] = Path(config.workerinput["server_home"])
        return
    home = Path(tempfile.mkdtemp(prefix="tutormax-tests-"))
    # When the tests run as root, the server runs as another user, who must pass.
    home.chmod(0o755)
    config.stash[_SERVER_HOME] = home


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["server_home"] = str(node.config.stash[_SERVER_HOME])


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and _SERVER_HOME in config.stash:
        embedded.stop(config.stash[_SERVER_HOME])
        shutil.rmtree(config.stash[_SERVER_HOME])


@pytest.fixture(autouse=True)
def _environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the developer's variables, ``.env`` or ``.tutormax``."""
    for name in os.environ:
        if name.startswith(("TUTORMAX_", "POSTGRES_")) or name == "DAGSTER_HOME":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def server_url(pytestconfig: pytest.Config) -> sa.URL:
    """The server of this test run."""
    return embedded.start(pytestconfig.stash[_SERVER_HOME], options=FAST)


@pytest.fixture(scope="session")
def template_database(server_url: sa.URL, pytestconfig: pytest.Config) -> str:
    """Name of a database with all tables, empty, to make others from."""
    with FileLock(pytestconfig.stash[_SERVER_HOME] / "template.lock"), _admin(server_url) as admin:
        query = "SELECT 1 FROM pg_database WHERE datname = %s"
        if admin.execute(query, [_TEMPLATE]).fetchone() is None:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
            engine = create_engine(server_url.set(database=_TEMPLATE))
            source_metadata.create_all(engine)
            metrics_metadata.create_all(engine)
            engine.dispose()
    return _TEMPLATE


@pytest.fixture
def empty_database(server_url: sa.URL) -> Iterator[sa.URL]:
    """A database without tables."""
    with _new_database(server_url, template="template1") as url:
        yield url


@pytest.fixture
def database(server_url: sa.URL, template_database: str) -> Iterator[sa.URL]:
    """A database with all tables, empty."""
    with _new_database(server_url, template=template_database) as url:
        yield url


@pytest.fixture
def engine(database: sa.URL) -> Iterator[sa.Engine]:
    """An engine on ``database``."""
    engine = create_engine(database)
    yield engine
    engine.dispose()


def _admin(server_url: sa.URL) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(conninfo(server_url.set(database="postgres")), autocommit=True)


@contextmanager
def _new_database(server_url: sa.URL, *, template: str) -> Iterator[sa.URL]:
    url = server_url.set(database=f"test_{uuid4().hex}")
    name = sql.Identifier(str(url.database))
    with _admin(server_url) as admin:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        admin.execute(create.format(name, sql.Identifier(template)))
        try:
            yield url
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
