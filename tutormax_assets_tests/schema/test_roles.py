"""The rights of ``tutormax db roles`` are enough, and none is more than enough."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from psycopg import sql

from tutormax_assets.database import tables
from tutormax_assets.database.connection import Timeouts, conninfo, create_engine
from tutormax_assets.database.faults import may_pass, retrying
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.metrics_writing import write_metrics
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.schema.roles import WRITER_RIGHTS, grants
from tutormax_assets.schema.status import status
from tutormax_assets.source.contract import COLUMNS_AS_OF, NEEDED_COLUMNS
from tutormax_assets.source.horizon import TRACKED_TABLES
from tutormax_assets.source.postgres import Source
from tutormax_assets.source.streams import SourceError
from tutormax_assets_tests.conftest import add
from tutormax_assets_tests.source.reading import read
from tutormax_assets_tests.users import Users, open_users

START = datetime(2025, 11, 1, tzinfo=UTC)
END = datetime(2025, 11, 7, tzinfo=UTC)
ALL_TABLES = {**tables.source_metadata.tables, **tables.metrics_metadata.tables}
RELATIONS: list[Any] = [*ALL_TABLES.values(), tables.tutor_tier_since]
EVERY_COLUMN = [(table.name, column.name) for table in RELATIONS for column in table.c]
WRITES = {
    "INSERT INTO {} DEFAULT VALUES",
    "UPDATE {} SET tutor_id = tutor_id",
    "DELETE FROM {}",
    "TRUNCATE {}",
    "LOCK {} IN SHARE ROW EXCLUSIVE MODE",
    "ALTER TABLE {} ADD injected int",
    "CREATE INDEX ON {} (tutor_id)",
    "DROP TABLE {}",
}


@pytest.fixture(scope="module")
def shared_users(server_url: sa.URL, small_template: str) -> Iterator[Users]:
    with open_users(server_url, template=small_template) as opened:
        yield opened


@pytest.fixture
def users(shared_users: Users) -> Users:
    """Users who have their rights, whatever the test before took from them."""
    shared_users.grant()
    return shared_users


def refused(url: sa.URL, statement: str, *names: str) -> bool:
    """Whether a user may not; what a statement does is rolled back."""
    query = sql.SQL(statement).format(*map(sql.Identifier, names))
    with psycopg.connect(conninfo(url)) as connection:
        try:
            connection.execute(query)
        except psycopg.errors.InsufficientPrivilege:
            return True
        except psycopg.errors.NotNullViolation:
            return False
        finally:
            connection.rollback()
    return False


def test_the_reader_reads_the_columns_of_the_contract_and_no_other(users: Users) -> None:
    read = {
        (table, column)
        for table, column in EVERY_COLUMN
        if not refused(users.reader, "SELECT {1} FROM {0} LIMIT 1", table, column)
    }

    assert read == {(table, name) for table, names in COLUMNS_AS_OF.items() for name in names}
    private = {("tutors", "name"), ("tutors", "email"), ("student_feedback", "free_text_feedback")}
    private |= {("students", column.name) for column in tables.students.c}
    assert private < set(EVERY_COLUMN) - read


def test_the_writer_reads_its_own_table_and_the_ids_of_tutors(users: Users) -> None:
    read = {
        (table, column)
        for table, column in EVERY_COLUMN
        if not refused(users.writer, "SELECT {1} FROM {0} LIMIT 1", table, column)
    }

    own = {
        (table.name, column.name)
        for table in RELATIONS[-1 - len(tables.OWN_TABLES) :]
        for column in table.c
    }
    assert read == {("tutors", "tutor_id"), *own}


def test_only_the_writer_writes_and_only_rows_of_its_own_tables(users: Users) -> None:
    def written(url: sa.URL) -> set[tuple[str, str]]:
        return {
            (statement.split()[0], table)
            for table in ALL_TABLES
            if table != "students"
            for statement in WRITES
            if not refused(url, statement, table)
        }

    assert written(users.reader) == set()
    # PostgreSQL lets those who may write lock the table; a run never does.
    allowed = {"INSERT", "DELETE", "LOCK"}
    assert written(users.writer) == {
        ("UPDATE", tables.METRICS_TABLE),
        ("UPDATE", tables.tutor_live_metrics.name),
        *((word, table) for word in allowed for table in tables.OWN_TABLES),
    }


@pytest.mark.parametrize("role", ["reader", "writer", "both"])
def test_nobody_may_create_or_look_at_students(users: Users, role: str) -> None:
    url = getattr(users, role)

    assert refused(url, "CREATE TABLE {} (id int)", "another")
    assert refused(url, "CREATE TEMP TABLE {} (id int)", "another") == (role == "reader")
    for statement in ("SELECT FROM {}", "INSERT INTO {} DEFAULT VALUES", "DELETE FROM {}"):
        assert refused(url, statement, "students")


def test_more_than_the_rights_is_taken_back(users: Users) -> None:
    users.execute("GRANT SELECT ON tutors TO {reader}")
    users.execute("GRANT SELECT (free_text_feedback) ON student_feedback TO {reader}")
    users.execute("GRANT TRUNCATE ON tutor_performance_metrics TO {writer}")
    assert not refused(users.reader, "SELECT email FROM tutors")

    users.grant()

    assert refused(users.reader, "SELECT email FROM tutors")
    assert refused(users.reader, "SELECT free_text_feedback FROM student_feedback")
    assert refused(users.writer, "TRUNCATE tutor_performance_metrics")


@pytest.mark.parametrize(
    ("table", "column"),
    [(table, column) for table, columns in NEEDED_COLUMNS.items() for column in columns],
)
def test_a_column_that_may_not_be_read_is_named(users: Users, table: str, column: str) -> None:
    users.execute(f'REVOKE SELECT ("{column}") ON {table} FROM {{reader}}')

    with pytest.raises(SourceError) as error:
        read(Source(users.reader), start=START, end=END)

    clause = f"table {table}, column {column}: found no right to read it, expected SELECT"
    assert f" cannot be read: {clause}. `tutormax db status`" in str(error.value)


def test_a_user_who_may_not_connect_is_told_so_at_once(users: Users) -> None:
    users.execute(f'REVOKE CONNECT ON DATABASE "{users.owner.database}" FROM {{reader}}')

    with pytest.raises(SourceError, match="permission denied for database") as error:
        read(Source(users.reader), start=START, end=END)

    assert not may_pass(error.value)


def test_a_reader_with_a_single_connection_reads_the_same(users: Users) -> None:
    users.execute("ALTER ROLE {reader} CONNECTION LIMIT 1")

    alone = read(Source(users.reader), start=START, end=END)
    owners = read(Source(users.owner), start=START, end=END)

    users.execute("ALTER ROLE {reader} CONNECTION LIMIT -1")
    for ours, theirs in ((alone.sessions, owners.sessions), (alone.events, owners.events)):
        assert not ours.is_empty()
        assert_frame_equal(ours, theirs, check_row_order=False)


@pytest.mark.parametrize("role", ["reader", "both"])
def test_what_the_reader_reads_is_what_the_owner_reads(users: Users, role: str) -> None:
    ours = read(Source(getattr(users, role)), start=START, end=END)
    owners = read(Source(users.owner), start=START, end=END)

    for table in ("tutors", "sessions", "events"):
        frame = getattr(ours, table)
        assert not frame.is_empty()
        assert frame.sort(frame.columns[0]).equals(
            getattr(owners, table).sort(frame.columns[0]), null_equal=True
        )


def test_the_status_is_seen_with_both_users_and_names_every_right_that_is_missing(
    users: Users,
) -> None:
    engine, source = create_engine(users.writer), create_engine(users.reader)
    found = status(engine, timezone="UTC", source=source)
    assert found.ready
    assert (found.metrics, found.rows, found.rows_set_aside) == ("current", 0, 0)
    assert found.lines()[0] == "tutors: as expected"

    # With the writer alone, nothing that is private is needed to say what is missing.
    alone = status(engine, timezone="UTC")
    assert not alone.ready
    assert alone.lines()[0] == (
        "table tutors, column status: found no right to read it, expected SELECT"
    )
    assert "table sessions, column session_id: found no right" in alone.lines()[1]

    for statement in (
        "REVOKE UPDATE, DELETE ON tutor_performance_metrics FROM {writer}",
        "REVOKE SELECT ON tutor_performance_metrics_set_aside FROM {writer}",
        "REVOKE SELECT ON tutormax_assets_alembic_version FROM {writer}",
        f'REVOKE TEMPORARY ON DATABASE "{users.owner.database}" FROM {{writer}}',
    ):
        users.execute(statement)
    found = status(engine, timezone="UTC", source=source)
    assert not found.ready
    assert (found.metrics, found.rows, found.rows_set_aside) == ("unknown", 0, None)
    assert found.lines()[-5:] == [
        "tutor_performance_metrics_set_aside: no right to count the rows",
        "table tutor_performance_metrics: found no right to UPDATE, DELETE,"
        " expected SELECT, INSERT, UPDATE, DELETE",
        "table tutor_performance_metrics_set_aside: found no right to SELECT, expected SELECT",
        "table tutormax_assets_alembic_version: found no right to SELECT, expected SELECT",
        f"database {users.owner.database}: found no right to create temporary tables,"
        " expected TEMPORARY",
    ]
    users.execute("REVOKE ALL ON tutor_performance_metrics FROM {writer}")
    assert status(engine, timezone="UTC", source=source).rows is None
    users.execute("REVOKE USAGE ON SCHEMA public FROM {reader}")
    assert (
        status(engine, timezone="UTC", source=source)
        .lines()[0]
        .startswith(
            "table tutors: found no such table, or no right to look into its schema; expected one"
        )
    )
    engine.dispose()
    source.dispose()


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ("SELECT ON tutor_performance_metrics", "for table tutor_performance_metrics"),
        ("INSERT ON tutor_performance_metrics", "for table tutor_performance_metrics"),
        ("UPDATE ON tutor_performance_metrics", "for table tutor_performance_metrics"),
    ],
)
def test_a_right_to_write_that_is_missing_is_named(users: Users, right: str, said: str) -> None:
    revoke = right.replace("{database}", f'"{users.owner.database}"')
    users.execute(f"REVOKE {revoke} FROM {{writer}}")
    engine = create_engine(users.writer)
    tiers = TutorTiers.sample(1, overrides={"tutor_id": ["T000001"]})
    no_retry = retrying(max_retries=0, retry_delay_seconds=0, log=logging.getLogger("test"))

    with pytest.raises(MetricsTableError) as error:
        list(
            write_metrics(
                engine,
                tiers,
                calculation_date=END,
                batch_size=10,
                retrying=no_retry,
                timeouts=Timeouts(),
            )
        )

    engine.dispose()
    assert f"permission denied {said}" in str(error.value)
    assert not may_pass(error.value)


def test_rows_that_are_replaced_need_temporary_tables(users: Users) -> None:
    users.execute(f'REVOKE TEMPORARY ON DATABASE "{users.owner.database}" FROM {{writer}}')
    owner, engine = create_engine(users.owner), create_engine(users.writer)
    row = {"metric_id": "m", "tutor_id": "T000001", "calculation_date": END, "window": "7day"}
    add(owner, tables.tutor_performance_metrics, row)
    no_retry = retrying(max_retries=0, retry_delay_seconds=0, log=logging.getLogger("test"))
    tiers = TutorTiers.sample(1, overrides={"tutor_id": ["T000001"], "window": ["7day"]})

    with pytest.raises(MetricsTableError, match="to create temporary tables in database"):
        list(
            write_metrics(
                engine,
                tiers,
                calculation_date=END,
                batch_size=10,
                retrying=no_retry,
                timeouts=Timeouts(),
            )
        )

    with owner.begin() as connection:
        connection.execute(sa.delete(tables.tutor_performance_metrics))
    owner.dispose()
    engine.dispose()


def test_names_of_any_characters_stay_names() -> None:
    script = grants(reader="r\"'$$ {x}", writer="w; DROP ROLE r", schema="s.t")

    assert 'GRANT USAGE ON SCHEMA "s.t" TO "r""\'$$ {x}", "w; DROP ROLE r";' in script
    assert script.count('ON "s.t".') == (
        2 * len(NEEDED_COLUMNS) + len(TRACKED_TABLES) + 2 * (1 + len(WRITER_RIGHTS))
    )
    assert 'SET search_path = "s.t";' in script.splitlines()[-1]
    outside = [line for line in script.splitlines() if not line.startswith("--")]
    assert (outside[0], outside[-1]) == ("BEGIN;", "COMMIT;")
