"""URLs of PostgreSQL databases, checked."""

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pydantic import SecretStr

if TYPE_CHECKING:
    import sqlalchemy as sa


_DRIVERS = {
    "postgres",
    "postgresql",
    "postgresql+psycopg",
    "postgresql+psycopg2",
    "postgresql+asyncpg",
}


def postgres_url(value: SecretStr) -> "sa.URL":
    """The URL of a PostgreSQL database, for SQLAlchemy's psycopg driver.

    As libpq does, it takes several hosts, and a socket's folder as a percent-encoded host.

    Raises:
        ValueError: It cannot be parsed or is not PostgreSQL's. What the URL holds is not repeated,
            for a password that is not encoded may be anywhere in it.
    """
    import psycopg
    import sqlalchemy as sa
    from psycopg.conninfo import make_conninfo

    expected = "expected postgresql://user:password@host:port/database"
    text, hosts = _without_hosts(value.get_secret_value())
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise ValueError(f"cannot be parsed; {expected}") from None
    if url.drivername not in _DRIVERS:
        raise ValueError(f"begins with {url.drivername!r}; {expected}")
    url = url.set(drivername="postgresql+psycopg")
    if "@" in (url.host or ""):
        raise ValueError(f"has an @ too many; {expected}, with %40 for an @ in user or password")
    if hosts:
        url = url.update_query_dict(hosts)
    try:
        _, arguments = url.get_dialect()().create_connect_args(url)
        make_conninfo(**arguments)
    except (psycopg.Error, sa.exc.ArgumentError):
        raise ValueError(
            "has an option after its ? that libpq does not know or cannot take;"
            " expected connection parameters such as sslmode=verify-full&sslrootcert=/path"
        ) from None
    return url


def _without_hosts(text: str) -> tuple[str, dict[str, str]]:
    """A URL without several hosts or a socket, and the options that name those instead."""
    scheme, separator, rest = text.partition("://")
    authority = re.split("[/?]", rest, maxsplit=1)[0]
    credentials, at, hosts = authority.rpartition("@")
    pairs = [re.fullmatch(r"(\[[^]]*\]|[^:]*)(?::(\d*))?", host) for host in hosts.split(",")]
    if not all(pairs) or (len(pairs) == 1 and "%" not in hosts):
        return text, {}
    options = {"host": ",".join(unquote(pair[1].strip("[]")) for pair in pairs if pair)}
    if any(pair[2] for pair in pairs if pair):
        options["port"] = ",".join(pair[2] or "5432" for pair in pairs if pair)
    return f"{scheme}{separator}{credentials}{at}{rest.removeprefix(authority)}", options
