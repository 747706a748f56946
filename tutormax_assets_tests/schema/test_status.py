"""Creating, upgrading and looking at the platform's database, on a real PostgreSQL."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from tutormax_assets.database import tables
from tutormax_assets.schema import adoption, old_rows
from tutormax_assets.schema.status import (
    SchemaError,
    SourceTable,
    UpgradeReport,
    initialize,
    status,
    upgrade,
)


@pytest.fixture
def empty(empty_database: sa.URL) -> Iterator[sa.Engine]:
    engine = sa.create_engine(empty_database)
    yield engine
    engine.dispose()


def _execute(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def test_an_empty_database_is_initialised_and_ready(empty: sa.Engine) -> None:
    initialize(empty, timezone="UTC")

    found = status(empty, timezone="UTC")
    assert found.ready
    assert found.metrics == "current"
    assert found.revision == found.newest_revision == "0004"
    assert set(sa.inspect(empty).get_table_names()) == {
        *tables.source_metadata.tables,
        *tables.OWN_TABLES,
        old_rows.SET_ASIDE_TABLE,
        "tutormax_assets_alembic_version",
    }
    assert upgrade(empty, timezone="UTC") == UpgradeReport(rows_before=0, rows_kept=0)


def test_a_database_that_has_source_tables_is_not_initialised(empty: sa.Engine) -> None:
    _execute(empty, "CREATE TABLE sessions (id int)", "CREATE TABLE students (id int)")

    with pytest.raises(SchemaError, match="empty database but found students, sessions"):
        initialize(empty, timezone="UTC")

    assert set(sa.inspect(empty).get_table_names()) == {"sessions", "students"}


def test_tables_can_be_created_again_elsewhere_with_all_their_constraints(
    empty: sa.Engine,
) -> None:
    initialize(empty, timezone="UTC")
    _execute(empty, "DROP TABLE tutor_performance_metrics CASCADE")
    tables.metrics_metadata.create_all(empty)

    inspector = sa.inspect(empty)
    assert inspector.get_unique_constraints(tables.METRICS_TABLE)
    assert inspector.get_foreign_keys(tables.METRICS_TABLE)


@pytest.mark.parametrize("dry_run", [True, False])
def test_without_tutors_an_upgrade_is_refused(empty: sa.Engine, dry_run: bool) -> None:
    _execute(empty, "CREATE TABLE invoices (id int)")

    with pytest.raises(SchemaError, match=r"expected .*'tutors'.* but found invoices; connect to"):
        upgrade(empty, timezone="UTC", dry_run=dry_run)

    assert sa.inspect(empty).get_table_names() == ["invoices"]


def test_the_platforms_own_alembic_is_left_alone(empty: sa.Engine) -> None:
    tables.tutors.create(empty)
    _execute(
        empty,
        "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('f00')",
    )

    upgrade(empty, timezone="UTC")

    with empty.connect() as connection:
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == "f00"
    assert status(empty, timezone="UTC").revision == "0004"


def test_a_dry_run_waits_for_no_writer(empty: sa.Engine) -> None:
    tables.tutors.create(empty)
    tables.tutor_performance_metrics.create(empty)
    _execute(empty, 'ALTER TABLE tutor_performance_metrics ALTER "window" TYPE varchar(10)')
    with empty.begin() as writer:
        writer.execute(sa.text("LOCK tutor_performance_metrics, tutors IN ROW EXCLUSIVE MODE"))
        preview = upgrade(empty, timezone="UTC", dry_run=True)

    assert preview == upgrade(empty, timezone="UTC")


def test_an_upgrade_gives_up_on_a_table_in_use(
    empty: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "LOCK_TIMEOUT_SECONDS", 0.1)
    tables.tutors.create(empty)
    tables.tutor_performance_metrics.create(empty)
    with empty.begin() as reader:
        reader.execute(sa.text("SELECT count(*) FROM tutor_performance_metrics"))
        with pytest.raises(SchemaError, match=r"another session holds a lock .*for 0\.1 s"):
            upgrade(empty, timezone="UTC")

    assert status(empty, timezone="UTC").metrics == "not managed"


def test_two_upgrades_at_once_do_not_collide(
    empty: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "LOCK_TIMEOUT_SECONDS", 0.1)
    tables.tutors.create(empty)
    with empty.begin() as other:
        other.execute(
            sa.text("SELECT pg_advisory_xact_lock(hashtext('tutormax_assets_alembic_version'))")
        )
        with pytest.raises(SchemaError, match="another session holds a lock"):
            upgrade(empty, timezone="UTC")


def test_a_role_that_may_not_create_gets_a_sentence(empty: sa.Engine) -> None:
    tables.tutors.create(empty)
    _execute(empty, f"ALTER DATABASE {empty.url.database} SET default_transaction_read_only = on")
    empty.dispose()

    with pytest.raises(SchemaError, match=r"found default_transaction_read_only on"):
        upgrade(empty, timezone="UTC")

    [clause] = upgrade(empty, timezone="UTC", dry_run=True).obstacles
    assert "found default_transaction_read_only on, expected off" in clause
    found = status(empty, timezone="UTC")
    assert not found.ready
    assert clause in found.lines()


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (
            ["ALTER TABLE tutors RENAME TO people", "CREATE VIEW tutors AS SELECT * FROM people"],
            "table tutors: found a view, expected a table",
        ),
        (
            ["ALTER TABLE tutors DROP CONSTRAINT tutors_pkey"],
            "table tutors, column tutor_id: found no primary key and no unique constraint",
        ),
        (
            ["ALTER TABLE tutors ALTER tutor_id TYPE uuid USING gen_random_uuid()"],
            "table tutors, column tutor_id: found no text, expected text",
        ),
    ],
)
def test_tutors_that_cannot_be_referred_to_are_named_by_the_dry_run(
    empty: sa.Engine, statements: list[str], said: str
) -> None:
    tables.tutors.create(empty)
    _execute(empty, *statements)

    [clause] = upgrade(empty, timezone="UTC", dry_run=True).obstacles

    assert clause.startswith(said)
    with pytest.raises(SchemaError, match=rf"cannot be upgraded: {said}.* Nothing was changed"):
        upgrade(empty, timezone="UTC")
    assert status(empty, timezone="UTC").metrics == "missing"


def test_rights_that_an_upgrade_lacks_are_named_by_the_dry_run(empty: sa.Engine) -> None:
    tables.tutors.create(empty)
    tables.tutor_performance_metrics.create(empty)
    _execute(
        empty,
        "ALTER TABLE tutor_performance_metrics"
        " DROP CONSTRAINT fk_tutor_performance_metrics_tutor_id",
        "GRANT SELECT ON tutors, tutor_performance_metrics TO pg_monitor",
    )
    monitor = sa.create_engine(
        empty.url.update_query_dict({"options": "-c role=pg_monitor"}), poolclass=sa.NullPool
    )

    report = upgrade(monitor, timezone="UTC", dry_run=True)

    assert report.obstacles == (
        "table tutors, column tutor_id: found no right to REFERENCES, expected it, which the"
        " foreign key of tutor_performance_metrics needs",
        "schema public: found no right to CREATE, expected it for"
        " tutor_performance_metrics_set_aside",
        "table tutor_performance_metrics: found an owner whose rights this user does not have,"
        " expected to upgrade as postgres",
        "schema public: found no right to CREATE, expected it for tutor_tier_reasons,"
        " tutor_tier_changes, tutor_live_metrics, tutor_tier_since, trigger"
        " delete_rows_of_deleted_tutors of tutor_performance_metrics",
    )
    assert report.lines()[-1] == f"cannot be done: {report.obstacles[-1]}"
    with pytest.raises(SchemaError, match="found no right to REFERENCES"):
        upgrade(monitor, timezone="UTC")


def test_a_table_that_vanished_after_its_migration_is_not_passed_over(empty: sa.Engine) -> None:
    initialize(empty, timezone="UTC")
    _execute(empty, "DROP TABLE tutor_performance_metrics CASCADE")

    assert status(empty, timezone="UTC").metrics == "missing"
    with pytest.raises(SchemaError, match="at revision 0004 but tutor_performance_metrics is not"):
        upgrade(empty, timezone="UTC")


def test_a_newer_versions_database_is_refused(empty: sa.Engine) -> None:
    initialize(empty, timezone="UTC")
    _execute(empty, "UPDATE tutormax_assets_alembic_version SET version_num = '9999'")

    assert status(empty, timezone="UTC").metrics == "ahead"
    with pytest.raises(SchemaError, match="revision 9999, which this version does not know"):
        upgrade(empty, timezone="UTC")


def test_status_names_what_is_missing(empty: sa.Engine) -> None:
    _execute(empty, "CREATE TABLE tutors (tutor_id text)")

    found = status(empty, timezone="UTC")

    assert not found.ready
    assert found.sources[0] == SourceTable(
        "tutors",
        True,
        ("table tutors, column status: found no such column, expected character varying",),
    )
    assert [source.present for source in found.sources] == [True, False, False, False]
    assert found.metrics == "missing"
    assert found.revision is None
    lines = found.lines()
    assert lines[0] == (
        "table tutors, column status: found no such column, expected character varying"
    )
    for line, table in zip(
        lines[1:4], ["sessions", "student_feedback", "tutor_events"], strict=True
    ):
        assert line.startswith(f"table {table}: found no such table, or no right to look into its")
    assert lines[4:] == [
        "tutor_performance_metrics: missing (revision none, newest 0004)",
        "  0 rows, newest calculation date -",
        "tutor_performance_metrics_set_aside: 0 rows",
    ]


def test_status_counts_rows_and_shows_the_newest_date(empty: sa.Engine) -> None:
    tables.source_metadata.create_all(empty)
    tables.tutor_performance_metrics.create(empty)
    _execute(
        empty,
        "INSERT INTO tutors (tutor_id, name, email, onboarding_date, status, subjects)"
        " VALUES ('t1', 'T', 'e', now(), 'active', '{}')",
        "INSERT INTO tutor_performance_metrics"
        ' (metric_id, tutor_id, calculation_date, "window", sessions_completed, no_show_count)'
        " VALUES ('a', 't1', '2025-11-07 00:00+00', '7day', 0, 0),"
        " ('b', 't1', '2025-11-08 00:00+00', '7day', 0, 0)",
    )
    infinite = (
        "INSERT INTO tutor_performance_metrics"
        ' (metric_id, tutor_id, calculation_date, "window", sessions_completed, no_show_count)'
        " VALUES ('c', 't1', 'infinity', '7day', 0, 0), ('d', 't1', '-infinity', '7day', 0, 0)"
    )
    assert status(empty, timezone="UTC").metrics == "not managed"

    upgrade(empty, timezone="UTC")

    found = status(empty, timezone="UTC")
    assert (found.rows, found.rows_set_aside) == (2, 0)
    assert found.newest_calculation_date == datetime(2025, 11, 8, tzinfo=UTC)
    assert found.lines()[4].startswith("tutor_performance_metrics: current")

    _execute(empty, infinite)
    found = status(empty, timezone="UTC")
    assert found.rows == 4
    assert found.newest_calculation_date == datetime(2025, 11, 8, tzinfo=UTC)
    [deviation] = found.unmet
    assert "found 2 rows" in deviation
