"""What a database must have to be read, found in a real PostgreSQL."""

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from tutormax_assets.database import tables
from tutormax_assets.source import contract
from tutormax_assets.source.contract import FoundColumn
from tutormax_assets.source.postgres import Source
from tutormax_assets_tests.conftest import add
from tutormax_assets_tests.source.reading import read

START = datetime(2025, 11, 1, tzinfo=UTC)
END = datetime(2025, 11, 7, tzinfo=UTC)


def breaches(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        rows = connection.execute(sa.text(contract.FOUND_COLUMNS)).all()
    return [clause for _, clause in contract.breaches([FoundColumn(*row) for row in rows])]


def execute(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_the_platforms_own_tables_keep_the_contract(engine: sa.Engine) -> None:
    assert breaches(engine) == []
    assert contract.NEEDED_COLUMNS.keys() < tables.source_metadata.tables.keys()


@pytest.mark.parametrize(
    ("statement", "clause"),
    [
        (
            "ALTER TABLE tutors RENAME COLUMN status TO state",
            "table tutors, column status: found no such column, expected character varying",
        ),
        (
            "ALTER TABLE sessions ALTER scheduled_start TYPE timestamp",
            "table sessions, column scheduled_start: found type timestamp without time zone,"
            " expected timestamp with time zone",
        ),
        (
            "ALTER TABLE tutor_events ALTER event_type TYPE varchar[] USING ARRAY[event_type]",
            "table tutor_events, column event_type: found type character varying[],"
            " expected character varying",
        ),
        (
            "ALTER TABLE student_feedback ALTER overall_rating TYPE text",
            "table student_feedback, column overall_rating: found type text, expected integer",
        ),
        (
            "DROP TABLE student_feedback",
            "table student_feedback: found no such table, or no right to look into its schema;"
            " expected one with the columns feedback_id, session_id, tutor_id, overall_rating",
        ),
    ],
)
def test_a_breach_names_table_column_found_and_expected(
    engine: sa.Engine, statement: str, clause: str
) -> None:
    execute(engine, statement)

    assert breaches(engine) == [clause]


def test_domains_and_enums_count_as_what_they_are_over(engine: sa.Engine) -> None:
    execute(
        engine,
        "CREATE DOMAIN id AS varchar(50)",
        "CREATE DOMAIN tutor_key AS id CHECK (value <> '')",
        "CREATE TYPE state AS ENUM ('active', 'inactive')",
        "CREATE DOMAIN current_state AS state NOT NULL",
        "ALTER TABLE sessions ALTER session_id TYPE tutor_key",
        "ALTER TABLE tutors ALTER status TYPE current_state USING status::state",
    )
    instant = {"scheduled_start": START, "session_id": "s", "tutor_id": "t"}
    execute(engine, "INSERT INTO students (student_id, name) VALUES ('a_student', 'n')")
    execute(
        engine,
        "INSERT INTO tutors (tutor_id, name, email, onboarding_date, status, subjects)"
        " VALUES ('t', 'n', 'e', now(), 'active', '{}')",
    )
    add(engine, tables.sessions, instant)

    assert breaches(engine) == []
    rows = read(Source(engine.url), start=START, end=END)
    assert rows.tutors.rows() == [("t", "active")]
    assert rows.sessions["session_id"].to_list() == ["s"]


def test_views_and_partitioned_tables_in_other_schemas_are_found_as_a_query_finds_them(
    engine: sa.Engine,
) -> None:
    execute(
        engine,
        "CREATE SCHEMA platform",
        "CREATE SCHEMA renamed",
        "ALTER TABLE sessions SET SCHEMA platform",
        "ALTER TABLE platform.sessions RENAME TO kept",
        "CREATE TABLE platform.sessions (LIKE platform.kept) PARTITION BY RANGE (scheduled_start)",
        "CREATE TABLE platform.sessions_2025 PARTITION OF platform.sessions"
        " FOR VALUES FROM ('2025-01-01') TO ('2026-01-01')",
        "CREATE TABLE platform.people (person_id varchar(50), state text, email text)",
        "INSERT INTO platform.people VALUES ('t', 'active', 'private')",
        "DROP TABLE tutors CASCADE",
        "CREATE VIEW renamed.tutors AS"
        " SELECT person_id AS tutor_id, state AS status FROM platform.people",
    )
    name = str(engine.url.database)

    assert [clause.split(":")[0] for clause in breaches(engine)] == [
        "table tutors",
        "table sessions",
    ]
    execute(engine, f'ALTER DATABASE "{name}" SET search_path = renamed, platform, public')
    # Connections that are open have the search path of before.
    engine.dispose()
    assert breaches(engine) == []
    assert read(Source(engine.url), start=START, end=END).tutors.rows() == [("t", "active")]
