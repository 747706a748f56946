"""Connections to the platform's PostgreSQL: where it is, and the pool that leads there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from psycopg.conninfo import make_conninfo

from tutormax_assets.platform import embedded
from tutormax_assets.settings import Settings, SettingsError

APPLICATION_NAME = "tutormax_assets"
CONNECT_TIMEOUT_SECONDS = 10

_DRIVERS = {
    "postgres",
    "postgresql",
    "postgresql+psycopg",
    "postgresql+psycopg2",
    "postgresql+asyncpg",
}


def database_url(settings: Settings) -> sa.URL:
    """Where the platform's database is; starts the embedded server when nothing else is set.

    Returns:
        A URL for SQLAlchemy's psycopg driver.

    Raises:
        SettingsError: The URL cannot be parsed or is not PostgreSQL's.
        EmbeddedServerError: The embedded server does not start.
    """
    if settings.database_source == "embedded":
        return embedded.start(settings.home_path)
    if settings.database_url is None:
        password = settings.postgres_password
        return sa.URL.create(
            "postgresql+psycopg",
            username=settings.postgres_user,
            password=password.get_secret_value() if password else None,
            host=settings.postgres_host,
            port=settings.postgres_port,
            database=settings.postgres_db,
        )
    try:
        url = sa.make_url(settings.database_url.get_secret_value())
    except (sa.exc.ArgumentError, ValueError):
        raise SettingsError(
            "TUTORMAX_DATABASE_URL cannot be parsed; "
            "expected postgresql://user:password@host:port/database"
        ) from None
    if url.drivername not in _DRIVERS:
        raise SettingsError(
            f"TUTORMAX_DATABASE_URL begins with {url.drivername!r}; "
            "expected postgresql://user:password@host:port/database"
        )
    return url.set(drivername="postgresql+psycopg")


def create_engine(url: sa.URL) -> sa.Engine:
    """A pooled engine whose connections are tested before use and carry this project's name."""
    return sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_size=5,
        max_overflow=5,
        connect_args=_defaults(url),
    )


def conninfo(url: sa.URL) -> str:
    """The URL as a libpq connection string, the form that ADBC takes. It holds the password."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    return make_conninfo(**_defaults(url), **arguments)


def _defaults(url: sa.URL) -> dict[str, Any]:
    defaults = {"application_name": APPLICATION_NAME, "connect_timeout": CONNECT_TIMEOUT_SECONDS}
    return {name: value for name, value in defaults.items() if name not in url.query}


def describe(url: sa.URL) -> str:
    """The database as a person may see it: no user, no password, no options."""
    host = url.host or url.query.get("host", "local socket")
    return f"{host}{f':{url.port}' if url.port else ''}/{url.database}"


@contextmanager
def advisory_lock(engine: sa.Engine, name: str) -> Iterator[None]:
    """Hold PostgreSQL's advisory lock of that name; whoever else wants it waits."""
    with engine.begin() as connection:
        lock_for_transaction(connection, name)
        yield


def lock_for_transaction(connection: sa.Connection, name: str) -> None:
    """Take PostgreSQL's advisory lock of that name; whoever else wants it waits.

    The lock belongs to the transaction, so it ends with it, the process or the connection,
    whichever ends first, and passes through a transaction pooler.
    """
    key = sa.func.hashtextextended(f"{APPLICATION_NAME}:{name}", 0)
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
