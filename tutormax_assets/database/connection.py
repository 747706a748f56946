"""Connections to the platform's PostgreSQL: where it is, and the pool that leads there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import sqlalchemy as sa
from psycopg import pq
from psycopg.conninfo import make_conninfo

from tutormax_assets.database import embedded
from tutormax_assets.settings import Settings
from tutormax_assets.urls import postgres_url

APPLICATION_NAME = "tutormax_assets"

# A peer that vanishes silently is noticed within a minute, in the midst of a read as well.
_LIBPQ_DEFAULTS = {
    "application_name": APPLICATION_NAME,
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 50_000,
}

# The server converts text from and to the encoding of its database; the drivers here, and all that
# is bound by the client, take UTF-8 for granted.
_ENCODING = {"client_encoding": "UTF8"}

TEXT_FORMS = {
    "extra_float_digits": "3",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "lc_monetary": "C",
}
"""Settings of the server under which the text of a value is read back as the same value."""


def database_url(settings: Settings) -> sa.URL:
    """Where the platform's database is; starts the embedded server when nothing else is set.

    Returns:
        A URL for SQLAlchemy's psycopg driver.

    Raises:
        EmbeddedServerError: The embedded server does not start.
    """
    if settings.database_source == "embedded":
        return embedded.start(settings.home_path)
    if settings.database_url is not None:
        return postgres_url(settings.database_url)
    password = settings.postgres_password
    return sa.URL.create(
        "postgresql+psycopg",
        username=settings.postgres_user,
        password=password.get_secret_value() if password else None,
        host=settings.postgres_host,
        port=settings.postgres_port,
        database=settings.postgres_db,
    )


def source_url(settings: Settings) -> sa.URL:
    """Where the source tables are read: as the settings say, else where the metrics are written.

    Returns:
        A URL for SQLAlchemy's psycopg driver.

    Raises:
        EmbeddedServerError: The embedded server does not start.
    """
    if settings.source_url is None:
        return database_url(settings)
    return postgres_url(settings.source_url)


def create_engine(url: sa.URL) -> sa.Engine:
    """A pooled engine whose connections are tested before use and carry this project's name.

    It prepares no statement in the server: behind a transaction pooler, the next transaction may
    run on another connection of the server, which does not know the statement. Its transactions
    read timestamps whatever the DateStyle of the server is.
    """
    engine = sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_size=5,
        max_overflow=5,
        connect_args={**_defaults(url), **_ENCODING, "prepare_threshold": None},
    )
    sa.event.listen(engine, "begin", _set_date_style)
    return engine


@contextmanager
def engine_of(settings: Settings) -> Iterator[sa.Engine]:
    """An engine on the platform's database, disposed of when the block ends.

    Raises:
        EmbeddedServerError: The embedded server does not start.
    """
    engine = create_engine(database_url(settings))
    try:
        yield engine
    finally:
        engine.dispose()


def _set_date_style(connection: sa.Connection) -> None:
    driver: Any = connection.connection.driver_connection
    style = driver.info.parameter_status("DateStyle") or ""
    # psycopg reads timestamps with a timezone in no other style.
    if style.startswith("ISO") or driver.autocommit:
        return
    # A pooler may refuse a setting at the start of a session and lose it within one. Unlike a
    # SELECT, this statement takes no snapshot.
    connection.exec_driver_sql(f"SET LOCAL DateStyle = '{TEXT_FORMS['DateStyle']}'")


def conninfo(url: sa.URL) -> str:
    """The URL as a libpq connection string, the form that ADBC takes. It holds the password."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    return make_conninfo(**{**_defaults(url), **arguments, **_ENCODING})


def psql_environment(url: sa.URL) -> dict[str, str]:
    """The variables that lead psql to a database. They hold the password."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    return {
        option.envvar.decode(): option.val.decode()
        for option in pq.Conninfo.parse(make_conninfo(**arguments).encode())
        if option.envvar and option.val
    }


def _defaults(url: sa.URL) -> dict[str, Any]:
    return {name: value for name, value in _LIBPQ_DEFAULTS.items() if name not in url.query}


def describe(url: sa.URL) -> str:
    """The database as a person may see it: no user, no password, no options."""
    host = url.host or url.query.get("host", "local socket")
    host = host if isinstance(host, str) else ",".join(host)
    return f"{host}{f':{url.port}' if url.port else ''}/{url.database}"


@dataclass(frozen=True)
class Timeouts:
    """How long a statement may take, and how long it may wait for another session's lock."""

    statement_seconds: float = 600
    lock_seconds: float = 5

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those of the settings."""
        return cls(settings.statement_timeout_seconds, settings.lock_timeout_seconds)


def limit_transaction(connection: sa.Connection, timeouts: Timeouts) -> None:
    """Bound the statements of the current transaction, and what a client that hangs would hold.

    Values arrive with all their digits and in one form, whatever the settings of the user are.
    """
    set_for_transaction(connection, {**transaction_limits(timeouts), **TEXT_FORMS})


def set_for_transaction(connection: sa.Connection, values: Mapping[str, str]) -> None:
    """Change settings of the server until the transaction ends.

    They belong to the transaction, so they pass through a transaction pooler.
    """
    connection.execute(
        sa.select(*(sa.func.set_config(name, value, True) for name, value in values.items()))
    )


def transaction_limits(timeouts: Timeouts) -> dict[str, str]:
    """The server's settings, by name, that bound a transaction."""
    return {
        "statement_timeout": f"{timeouts.statement_seconds}s",
        "lock_timeout": f"{timeouts.lock_seconds}s",
        "idle_in_transaction_session_timeout": f"{timeouts.statement_seconds}s",
    }


def lock_for_transaction(connection: sa.Connection, name: str, *, shared: bool = False) -> None:
    """Take PostgreSQL's advisory lock of that name; whoever else wants it waits.

    Those who want it shared wait only for one who does not.

    The lock belongs to the transaction, so it ends with it, the process or the connection,
    whichever ends first, and passes through a transaction pooler.
    """
    lock = sa.func.pg_advisory_xact_lock_shared if shared else sa.func.pg_advisory_xact_lock
    connection.execute(sa.select(lock(lock_key(name))))


def lock_key(name: str) -> sa.ColumnElement[int]:
    """The number by which PostgreSQL knows the advisory lock of that name."""
    return sa.func.hashtextextended(f"{APPLICATION_NAME}:{name}", 0)
