"""Where the database is, and the locks that keep writers apart."""

import traceback
from datetime import UTC, datetime
from urllib.parse import quote

import polars as pl
import psycopg
import pytest
import sqlalchemy as sa
from adbc_driver_postgresql import dbapi
from psycopg.conninfo import conninfo_to_dict

from tutormax_assets.database.connection import (
    conninfo,
    create_engine,
    database_url,
    describe,
    source_url,
)
from tutormax_assets.settings import Settings, SettingsError, load_settings

SECRET = "hunter2"
ADDRESS = f"reader:{SECRET}@db.example:6543/platform"


def settings_of(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings()


@pytest.mark.parametrize(
    "scheme",
    [
        "postgres",
        "postgresql",
        "postgresql+psycopg",
        "postgresql+psycopg2",
        "postgresql+asyncpg",
    ],
)
def test_every_usual_form_of_the_url_leads_to_psycopg(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    settings = settings_of(monkeypatch, TUTORMAX_DATABASE_URL=f"{scheme}://{ADDRESS}")

    url = database_url(settings)

    assert url.render_as_string(hide_password=False) == f"postgresql+psycopg://{ADDRESS}"
    assert settings.database_source == "TUTORMAX_DATABASE_URL"


@pytest.mark.parametrize(
    "text",
    [
        f"mysql://{ADDRESS}",
        f"postgresql+pg8000://{ADDRESS}",
        f"sqlite:///{SECRET}",
        ADDRESS,
        SECRET,
        f"postgresql://reader:{SECRET}@db.example:port/platform",
        f"postgresql://reader:{SECRET}@[::1/platform",
    ],
)
def test_another_url_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    with pytest.raises(SettingsError, match=r"TUTORMAX_DATABASE_URL .*expected postgresql:") as e:
        settings_of(monkeypatch, TUTORMAX_DATABASE_URL=text)

    assert SECRET not in str(e.value)


@pytest.mark.parametrize("variable", ["TUTORMAX_DATABASE_URL", "TUTORMAX_SOURCE_URL"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"postgresql://reader:hun@{SECRET}@db.example/platform", "has an @ too many"),
        (f"postgresql://reader:{SECRET}@db.example/platform?ssl=true", "has an option after its"),
        (f"postgresql://reader@db.example/platform?{SECRET}=1", "has an option after its"),
        (f"postgresql://reader@db.example/platform?port={SECRET}", "has an option after its"),
    ],
)
def test_a_url_that_libpq_would_not_take_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, expected: str
) -> None:
    with pytest.raises(SettingsError, match=f"{variable} {expected}") as error:
        settings_of(monkeypatch, **{variable: text})

    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_the_sources_are_read_where_the_metrics_are_unless_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(monkeypatch, TUTORMAX_DATABASE_URL=f"postgresql://{ADDRESS}")
    assert source_url(settings) == database_url(settings)

    replica = "postgres://someone@replica.example/platform?sslmode=require"
    settings = settings_of(monkeypatch, TUTORMAX_SOURCE_URL=replica)
    assert source_url(settings) == sa.make_url(replica).set(drivername="postgresql+psycopg")
    assert database_url(settings).host == "db.example"


def test_the_five_postgres_variables_make_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(
        monkeypatch,
        POSTGRES_HOST="db.example",
        POSTGRES_PORT="6543",
        POSTGRES_USER="reader",
        POSTGRES_PASSWORD="p@ss:w/rd %41",
        POSTGRES_DB="platform",
    )

    url = database_url(settings)

    assert settings.database_source == "POSTGRES_*"
    assert (url.host, url.port, url.username, url.password, url.database) == (
        "db.example",
        6543,
        "reader",
        "p@ss:w/rd %41",
        "platform",
    )
    assert sa.make_url(url.render_as_string(hide_password=False)) == url


def test_a_database_url_wins_over_postgres_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(
        monkeypatch, TUTORMAX_DATABASE_URL=f"postgresql://{ADDRESS}", POSTGRES_HOST="elsewhere"
    )

    assert database_url(settings).host == "db.example"


def test_a_database_is_described_without_user_and_password() -> None:
    url = sa.make_url(f"postgresql+psycopg://{ADDRESS}?sslmode=require&passfile=x")
    assert describe(url) == "db.example:6543/platform"
    local = sa.make_url(f"postgresql+psycopg://reader:{SECRET}@/platform?host=/run/pg")
    assert describe(local) == "/run/pg/platform"
    assert describe(sa.make_url("postgresql+psycopg:///platform")) == "local socket/platform"
    several = sa.make_url(f"postgresql+psycopg://u:{SECRET}@/platform?host=first:1&host=second:2")
    assert describe(several) == "first:1,second:2/platform"


def test_both_drivers_reach_the_same_database_under_our_name(engine: sa.Engine) -> None:
    query = "SELECT current_database(), current_setting('application_name')"
    expected = (engine.url.database, "tutormax_assets")
    with engine.connect() as connection:
        assert connection.execute(sa.text(query)).one() == expected
    with psycopg.connect(conninfo(engine.url)) as plain:
        assert plain.execute(query).fetchone() == expected
    with dbapi.connect(conninfo(engine.url)) as arrow, arrow.cursor() as cursor:
        cursor.execute(query)
        assert pl.DataFrame(cursor.fetch_arrow()).rows() == [expected]


def test_both_drivers_take_the_options_of_the_url(engine: sa.Engine) -> None:
    url = engine.url.update_query_dict({"application_name": "nightly"})
    query = "SHOW application_name"

    with psycopg.connect(conninfo(url)) as plain:
        assert plain.execute(query).fetchone() == ("nightly",)
    named = create_engine(url)
    with named.connect() as connection:
        found = connection.scalar(sa.text(query))
    named.dispose()
    assert found == "nightly"


def test_no_statement_stays_prepared_in_the_server(engine: sa.Engine) -> None:
    # A transaction pooler gives the next transaction another connection, which does not know it.
    with engine.connect() as connection:
        for number in range(10):
            connection.execute(sa.text("SELECT CAST(:number AS integer)"), {"number": number})
        prepared = connection.scalars(sa.text("SELECT statement FROM pg_prepared_statements"))
        assert prepared.all() == []


def test_both_drivers_speak_utf8_whatever_the_url_and_the_role_say(engine: sa.Engine) -> None:
    url = engine.url.update_query_dict({"client_encoding": "LATIN1"})
    name = sa.sql.quoted_name(str(url.database), quote=True)
    with engine.begin() as connection:
        connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET client_encoding = LATIN1')

    with psycopg.connect(conninfo(url)) as plain:
        assert plain.execute("SHOW client_encoding").fetchone() == ("UTF8",)
    pooled = create_engine(url)
    with pooled.connect() as connection:
        assert connection.scalar(sa.text("SHOW client_encoding")) == "UTF8"
    pooled.dispose()


def test_both_drivers_take_several_hosts() -> None:
    url = sa.make_url("postgresql+psycopg://u@/db?host=first:6543&host=second:6544")

    found = conninfo_to_dict(conninfo(url))

    [_, of_sqlalchemy] = url.get_dialect()().create_connect_args(url)
    assert of_sqlalchemy["host"] == "first,second"
    assert (found.get("host"), found.get("port")) == ("first,second", "6543,6544")


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("first:6543,second", ("first,second", "6543,5432")),
        ("[::1]:6543,[fd00::1]:6544", ("::1,fd00::1", "6543,6544")),
        ("%2Frun%2Fpostgresql", ("/run/postgresql", None)),
        ("%2Frun%2Fpg,db.example", ("/run/pg,db.example", ",")),
    ],
)
def test_several_hosts_and_sockets_are_named_as_libpq_has_it(
    monkeypatch: pytest.MonkeyPatch, hosts: str, expected: tuple[str, str | None]
) -> None:
    text = f"postgresql://reader:{SECRET}@{hosts}/platform?target_session_attrs=read-write"

    url = database_url(settings_of(monkeypatch, TUTORMAX_DATABASE_URL=text))

    found = conninfo_to_dict(conninfo(url))
    assert (found["host"], found.get("port")) == expected
    assert (found["user"], found["password"], found["dbname"]) == ("reader", SECRET, "platform")
    assert found["target_session_attrs"] == "read-write"
    assert describe(url) == f"{expected[0]}/platform"
    assert sa.make_url(url.render_as_string(hide_password=False)) == url


def test_both_drivers_reach_the_socket_that_a_url_names_encoded(
    monkeypatch: pytest.MonkeyPatch, engine: sa.Engine
) -> None:
    folder = quote(str(engine.url.query["host"]), safe="")
    text = f"postgresql://{engine.url.username}@{folder}/{engine.url.database}"
    url = database_url(settings_of(monkeypatch, TUTORMAX_DATABASE_URL=text))

    reached = create_engine(url)
    with reached.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    with dbapi.connect(conninfo(url)) as arrow, arrow.cursor() as cursor:
        cursor.execute("SELECT 1")
    reached.dispose()


def test_a_connection_string_keeps_awkward_passwords_and_options() -> None:
    url = sa.URL.create(
        "postgresql+psycopg",
        username="reader",
        password="it's a \\ 'secret' =",
        host="db.example",
        port=6543,
        database="platform",
        query={"sslmode": "require", "connect_timeout": "3"},
    )

    found = conninfo_to_dict(conninfo(url))

    assert found["password"] == "it's a \\ 'secret' ="
    assert (found["sslmode"], found["connect_timeout"]) == ("require", "3")
    assert (found["host"], found["port"], found["dbname"]) == ("db.example", "6543", "platform")


def test_a_connection_that_died_is_replaced_before_use(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
    killer = create_engine(engine.url)
    with killer.connect() as other:
        other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    killer.dispose()

    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT pg_backend_pid()")) != pid


def test_timestamps_are_read_whatever_the_date_style_of_the_database_is(engine: sa.Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for setting in ("DateStyle = 'SQL, DMY'", "TimeZone = 'Asia/Kathmandu'"):
            connection.exec_driver_sql(
                f'ALTER DATABASE "{engine.url.database}" SET {setting}',
            )
    elsewhere = create_engine(engine.url)
    instant = datetime(2025, 8, 7, 1, 2, 3, 4, tzinfo=UTC)
    query = sa.text("SELECT CAST('2025-08-07 01:02:03.000004+00' AS timestamptz)")

    with elsewhere.connect() as connection:
        assert connection.scalar(query) == instant
        connection.rollback()
        # The setting went with its transaction, as behind a pooler.
        assert connection.scalar(query) == instant
    with elsewhere.begin() as connection:
        style = connection.scalar(sa.text("SHOW DateStyle"))
        assert connection.scalar(query) == instant
    elsewhere.dispose()
    assert style == "ISO, YMD"
