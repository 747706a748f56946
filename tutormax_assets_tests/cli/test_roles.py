"""``tutormax db roles``, and every command with the rights that it prints."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy as sa

from tutormax_assets.database.connection import conninfo, create_engine, describe
from tutormax_assets.database.tables import source_metadata
from tutormax_assets_tests.cli.conftest import Invoke, words
from tutormax_assets_tests.conftest import (
    PASSWORD,
    Platform,
    metrics_of,
    new_database,
    open_platform,
)
from tutormax_assets_tests.users import Users, open_users

DAY = "2025-11-07"


@pytest.fixture(scope="module")
def shared_users(server_url: sa.URL, small_template: str) -> Iterator[Users]:
    with open_users(server_url, template=small_template) as opened:
        yield opened


@pytest.fixture
def users(shared_users: Users) -> Users:
    """Users who have their rights, whatever the test before took from them."""
    shared_users.grant()
    return shared_users


@pytest.fixture
def platform(
    users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_dagster_home: Path
) -> Iterator[Platform]:
    """The environment names the writer, and for the sources the reader."""
    source = users.reader.set(password=PASSWORD).render_as_string(hide_password=False)
    variables = {"DAGSTER_HOME": str(shared_dagster_home), "TUTORMAX_SOURCE_URL": source}
    home = tmp_path / "home"
    with open_platform(users.writer, home, using=monkeypatch, **variables) as opened:
        yield opened


def test_the_commands_pass_with_the_rights_and_fail_with_a_sentence_without(
    platform: Platform, users: Users, invoke: Invoke
) -> None:
    def fails(*arguments: str, without: str, said: str) -> None:
        users.execute(f"REVOKE {without}")
        before = metrics_of(owner)
        result = invoke(*arguments)
        shown = words(result.output.replace("│", ""))
        users.grant()
        assert result.exit_code == 1
        assert said in shown
        assert "`tutormax db" in shown
        assert "Traceback" not in result.output
        assert metrics_of(owner).equals(before, null_equal=True)

    owner = create_engine(users.owner)
    run = ["run", "--date", DAY, "--max-retries", "0"]
    fails(
        *run,
        without="SELECT (no_show) ON sessions FROM {reader}",
        said="table sessions, column no_show: found no right to read it, expected SELECT",
    )
    fails(
        *run,
        without="INSERT ON tutor_performance_metrics FROM {writer}",
        said="permission denied for table tutor_performance_metrics",
    )
    result = invoke(*run, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["total_metrics_saved"] > 0
    assert invoke("backfill", "--from", "2025-11-06", "--to", "2025-11-06").exit_code == 0
    computed = metrics_of(owner)
    assert computed["calculation_date"].n_unique() == 2

    cleanup = ["cleanup", "--retention-days", "1"]
    denied = "permission denied for table "
    fails(
        *cleanup,
        without="DELETE ON tutor_performance_metrics FROM {writer}",
        said=denied + "tutor_performance_metrics",
    )
    assert invoke(*cleanup).exit_code == 0
    assert metrics_of(owner).is_empty()

    restore = ["restore", "--month", "2025-11"]
    fails(*restore, without="SELECT (tutor_id) ON tutors FROM {writer}", said=denied + "tutors")
    result = invoke(*restore)
    assert result.exit_code == 0, result.output
    assert metrics_of(owner).equals(computed, null_equal=True)
    owner.dispose()


def test_one_user_may_have_both_roles(
    platform: Platform, users: Users, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.delenv("TUTORMAX_SOURCE_URL")
    url = users.both.render_as_string(hide_password=False)
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", url)

    assert invoke("db", "status").exit_code == 0
    assert invoke("run", "--date", DAY).exit_code == 0


def test_the_status_shows_both_addresses_and_no_user(
    platform: Platform, users: Users, invoke: Invoke
) -> None:
    result = invoke("db", "status")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[:3] == [
        f"Database: {describe(users.writer)} (from TUTORMAX_DATABASE_URL)",
        f"Source tables: {describe(users.reader)} (from TUTORMAX_SOURCE_URL)",
        "tutors: as expected",
    ]
    assert "Not ready" not in result.stdout

    users.execute("REVOKE DELETE ON tutor_performance_metrics FROM {writer}")
    result = invoke("db", "status")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2] == (
        "table tutor_performance_metrics: found no right to DELETE,"
        " expected SELECT, INSERT, UPDATE, DELETE"
    )
    assert "`tutormax db roles` prints the rights" in result.stdout.splitlines()[-1]
    for secret in (PASSWORD, users.reader.username, users.writer.username):
        assert secret is not None
        assert secret not in result.output


def test_the_roles_are_printed_without_a_database_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", "postgresql://nobody@/none?host=/nowhere")

    unreachable = invoke("db", "roles")
    assert unreachable.exit_code == 0
    assert 'GRANT USAGE ON SCHEMA "public" TO' in unreachable.stdout
    assert "cannot be reached" in unreachable.stderr

    result = invoke("db", "roles", "--reader", "the_reader", "--schema", "platform")

    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.startswith("-- The rights of tutormax_assets")
    columns = '"tutor_id", "status", "created_at"'
    assert f'GRANT SELECT ({columns}) ON "platform"."tutors" TO "the_reader";' in (
        result.stdout.splitlines()
    )
    assert 'TO "tutormax_writer";' in result.stdout
    assert "PASSWORD" not in result.stdout


def test_the_owner_of_the_tables_runs_the_script_for_roles_that_exist(
    server_url: sa.URL, template_database: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner may create no role, and the tables lie in two schemas of the search path."""
    names = reader, writer, owner = [f"{name}_{uuid4().hex}" for name in ("r", "w", "o")]
    try:
        with new_database(server_url, template=template_database) as url:
            engine = create_engine(url)
            with engine.begin() as connection:
                for statement in (
                    *(f"CREATE ROLE {name}" for name in names),
                    f"ALTER ROLE {owner} LOGIN",
                    f"CREATE SCHEMA own AUTHORIZATION {owner}",
                    f"CREATE SCHEMA app AUTHORIZATION {owner}",
                    *(f"ALTER TABLE {name} SET SCHEMA app" for name in source_metadata.tables),
                    *(
                        f"ALTER TABLE app.{name} OWNER TO {owner}"
                        for name in source_metadata.tables
                    ),
                    "DROP TABLE tutor_performance_metrics CASCADE",
                    f"ALTER DATABASE {url.database} SET search_path = own, app",
                ):
                    connection.execute(sa.text(statement))
            engine.dispose()
            url = url.set(username=owner)
            monkeypatch.setenv("TUTORMAX_DATABASE_URL", url.render_as_string(hide_password=False))
            assert invoke("db", "upgrade").exit_code == 0

            result = invoke("db", "roles", "--reader", reader, "--writer", writer)

            assert (result.exit_code, result.stderr) == (0, "")
            assert result.stdout.splitlines()[-1] == (
                '--   ALTER ROLE tutormax SET search_path = "own", "app";'
            )
            with psycopg.connect(conninfo(url), autocommit=True) as connection:
                connection.execute(result.stdout.encode())
                query = (
                    "SELECT has_table_privilege(%s, 'own.tutor_performance_metrics', 'INSERT'),"
                    " has_column_privilege(%s, 'app.sessions', 'no_show', 'SELECT'),"
                    " has_schema_privilege(%s, 'app', 'USAGE')"
                )
                assert connection.execute(query, [writer, reader, reader]).fetchone() == (
                    True,
                    True,
                    True,
                )
    finally:
        with psycopg.connect(conninfo(server_url), autocommit=True) as connection:
            connection.execute(f"DROP ROLE {', '.join(names)}")


def test_the_printed_script_asks_for_an_upgrade_first(
    server_url: sa.URL, template_database: str, invoke: Invoke
) -> None:
    """The templates lack the table of revisions: the script is refused as a whole."""
    script = invoke("db", "roles", "--reader", "never_made", "--writer", "never_made_either").stdout
    url = server_url.set(database=template_database)
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        with pytest.raises(psycopg.errors.UndefinedTable):
            connection.execute(script.encode())
        connection.rollback()
        query = "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'never_made%'"
        assert connection.execute(query).fetchone() == (0,)


@pytest.mark.parametrize(
    "arguments",
    [["--reader", ""], ["--writer", "x" * 64], ["--schema", "a\nb"], ["--reader=r", "--writer=r"]],
)
def test_what_cannot_be_a_name_is_wrong_use(arguments: list[str], invoke: Invoke) -> None:
    result = invoke("db", "roles", *arguments)

    assert result.exit_code == 2
    assert "expected" in words(result.stderr)
    assert result.stdout == ""
