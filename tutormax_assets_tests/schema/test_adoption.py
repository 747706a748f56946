"""A metrics table as a predecessor may have left it, adopted on a real PostgreSQL."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from tutormax_assets.database import tables
from tutormax_assets.schema.adoption import UpgradeReport
from tutormax_assets.schema.changes import SchemaError
from tutormax_assets.schema.migrations import is_owned, target_metadata
from tutormax_assets.schema.old_rows import SET_ASIDE_TABLE
from tutormax_assets.schema.status import status, upgrade

LEGACY_COLUMNS = {
    "metric_id": "varchar(50) PRIMARY KEY",
    "tutor_id": "varchar(50) NOT NULL REFERENCES tutors (tutor_id) ON DELETE CASCADE",
    "calculation_date": "timestamptz NOT NULL",
    '"window"': "varchar(10) NOT NULL",
    "sessions_completed": "integer NOT NULL",
    "avg_rating": "double precision",
    "first_session_success_rate": "double precision",
    "reschedule_rate": "double precision",
    "no_show_count": "integer NOT NULL",
    "engagement_score": "double precision",
    "learning_objectives_met_pct": "double precision",
    "response_time_avg_minutes": "double precision",
    "performance_tier": "varchar(15)",
    "created_at": "timestamptz NOT NULL",
    "updated_at": "timestamptz NOT NULL",
}

LEGACY_INDEXES = (
    "CREATE INDEX ix_tutor_performance_metrics_tutor_id ON tutor_performance_metrics (tutor_id)",
    "CREATE INDEX ix_tutor_performance_metrics_calculation_date"
    " ON tutor_performance_metrics (calculation_date)",
    'CREATE INDEX ix_tutor_performance_metrics_window ON tutor_performance_metrics ("window")',
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Platform:
    """A platform's database that holds two tutors, t1 and t2."""

    engine: sa.Engine

    def execute(self, *statements: str) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))

    def rows(self, table: str = tables.METRICS_TABLE) -> list[Row]:
        with self.engine.connect() as connection:
            result = connection.execute(
                sa.text(f"SELECT to_jsonb(t) AS original, t.*, t.xmin::text FROM {table} AS t")
            )
            return [dict(row) for row in result.mappings()]

    def kept(self) -> dict[str, Row]:
        return {row["metric_id"]: row for row in self.rows()}

    def moved(self) -> dict[str, Row]:
        return {row["metric_id"]: row for row in self.rows(SET_ASIDE_TABLE)}

    def create_legacy_table(self, *extra: str, indexed: bool = True, **types: str) -> None:
        columns = LEGACY_COLUMNS | {
            '"window"' if name == "window" else name: kind for name, kind in types.items()
        }
        definitions = [f"{name} {kind}" for name, kind in columns.items()]
        self.execute(
            f"CREATE TABLE tutor_performance_metrics ({', '.join([*definitions, *extra])})",
            *(LEGACY_INDEXES if indexed else ()),
        )

    def insert(self, metric_id: str, **values: Any) -> None:
        row = {
            "metric_id": metric_id,
            "tutor_id": "t1",
            "calculation_date": "2025-11-08 02:30:00+00",
            "window": "SEVEN_DAY",
            "sessions_completed": 3,
            "avg_rating": 4.33,
            "no_show_count": 0,
            "performance_tier": "AT_RISK",
            "created_at": "2025-11-08 02:31:00+00",
            "updated_at": "2025-11-08 02:31:00+00",
        } | values
        # Through JSON the literals take the type that the column has.
        with self.engine.begin() as connection:
            connection.execute(
                sa.text(
                    "INSERT INTO tutor_performance_metrics SELECT * FROM jsonb_populate_record("
                    "NULL::tutor_performance_metrics, CAST(:row AS jsonb))"
                ).bindparams(sa.bindparam("row", row, sa.dialects.postgresql.JSONB))
            )

    def upgrade(self, timezone: str = "UTC") -> UpgradeReport:
        """The dry run, which must change nothing, and then the real one, which must agree."""
        before = self.rows()
        preview = upgrade(self.engine, timezone=timezone, dry_run=True)
        assert self.rows() == before
        report = upgrade(self.engine, timezone=timezone)
        assert preview == report
        self.assert_nothing_lost(before, report)
        return report

    def assert_nothing_lost(self, before: list[Row], report: UpgradeReport) -> None:
        kept, moved = self.kept(), self.moved()
        assert kept.keys().isdisjoint(moved)
        assert kept.keys() | moved.keys() == {row["metric_id"] for row in before}
        assert report.rows_before == len(before)
        assert report.rows_kept == len(kept)
        assert sum(report.rows_moved.values()) == len(moved)
        converted = {"original", "xmin", "window", "performance_tier", "calculation_date"}
        for row in before:
            if row["metric_id"] in moved:
                assert moved[row["metric_id"]]["original"] == row["original"]
            else:
                after = kept[row["metric_id"]]
                same = row.keys() - converted
                assert {name: _utc(after[name]) for name in same} == {
                    name: _utc(row[name]) for name in same
                }

    def differences(self) -> list[Any]:
        """What Alembic would change to bring the database to the declared tables."""
        with self.engine.connect() as connection:
            context = MigrationContext.configure(
                connection,
                opts={
                    "target_metadata": target_metadata,
                    "compare_type": True,
                    "compare_server_default": True,
                    "include_object": is_owned,
                },
            )
            return [
                difference
                for metadata in target_metadata
                for difference in compare_metadata(context, metadata)
            ]


def _utc(value: Any) -> Any:
    naive = isinstance(value, datetime) and value.tzinfo is None
    return value.replace(tzinfo=UTC) if naive else value


@pytest.fixture
def platform(empty_database: sa.URL) -> Iterator[Platform]:
    engine = sa.create_engine(empty_database)
    tables.tutors.create(engine)
    platform = Platform(engine)
    platform.execute(
        "INSERT INTO tutors (tutor_id, name, email, onboarding_date, status, subjects)"
        " SELECT id, id, id, now(), 'active', '{}' FROM (VALUES ('t1'), ('t2')) AS t (id)"
    )
    yield platform
    engine.dispose()


def test_a_missing_table_is_created_as_declared(platform: Platform) -> None:
    preview = upgrade(platform.engine, timezone="UTC", dry_run=True)
    assert not sa.inspect(platform.engine).has_table(tables.METRICS_TABLE)

    report = upgrade(platform.engine, timezone="UTC")

    assert preview == report
    assert report.rows_before == 0
    *created, of_0002, of_0003, of_0004 = report.changes
    assert created == [
        "table tutor_performance_metrics is created",
        "table tutor_performance_metrics_set_aside is created",
    ]
    assert of_0002.startswith("migration 0002: ")
    assert of_0003.startswith("migration 0003: ")
    assert of_0004.startswith("migration 0004: ")
    assert platform.differences() == []


def test_the_predecessors_table_becomes_the_declared_one(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.insert("only")
    platform.insert("thirty", window="THIRTY_DAY", performance_tier="NEEDS_ATTENTION")
    platform.insert("ninety", window="NINETY_DAY", performance_tier=None)
    platform.insert("wanted", tutor_id="t2", window="7day", performance_tier="At Risk")
    platform.insert("mixed", tutor_id="t2", window="30Day", performance_tier="exemplary")

    report = platform.upgrade()

    kept = platform.kept()
    assert {i: (row["window"], row["performance_tier"]) for i, row in kept.items()} == {
        "only": ("7day", "At Risk"),
        "thirty": ("30day", "Needs Attention"),
        "ninety": ("90day", None),
        "wanted": ("7day", "At Risk"),
        "mixed": ("30day", "Exemplary"),
    }
    assert {row["calculation_date"] for row in kept.values()} == {datetime(2025, 11, 8, tzinfo=UTC)}
    assert report.rows_moved == {}
    assert (report.windows_renamed, report.tiers_renamed, report.dates_moved) == (4, 3, 5)
    assert "column window: type VARCHAR(10) becomes VARCHAR(20)" in report.changes
    assert platform.differences() == []


def test_the_newest_of_a_day_stays_and_the_others_are_set_aside(platform: Platform) -> None:
    platform.create_legacy_table()
    later, latest = "2025-11-08 09:00:00+00", "2025-11-08 10:00:00+00"
    platform.insert("first")
    platform.insert("rerun", calculation_date=later, updated_at=latest, window="7day")
    platform.insert("same update, older", updated_at=latest, created_at="2025-11-08 01:00+00")
    platform.insert("a tie", tutor_id="t2")
    platform.insert("b tie", tutor_id="t2", calculation_date="2025-11-08 23:59:59.999999+00")
    platform.insert("next day", calculation_date="2025-11-09 00:00:00+00")

    report = platform.upgrade()

    assert platform.kept().keys() == {"rerun", "b tie", "next day"}
    assert report.rows_moved == {"duplicate": 3}
    assert platform.kept()["rerun"]["created_at"] == datetime(2025, 11, 8, 2, 31, tzinfo=UTC)
    first = platform.moved()["first"]
    assert first["reason"] == "duplicate"
    assert first["window"] == "SEVEN_DAY"
    assert first["tutor_id"] == "t1"
    assert first["calculation_date"] == datetime(2025, 11, 8, 2, 30, tzinfo=UTC)
    assert first["set_aside_at"] is not None
    assert first["original"]["avg_rating"] == 4.33


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"window": "YEAR"}, "unknown window"),
        ({"window": ""}, "unknown window"),
        ({"performance_tier": "GOOD"}, "unknown tier"),
        ({"tutor_id": "gone"}, "unknown tutor"),
        ({"tutor_id": None}, "missing tutor_id"),
        ({"calculation_date": None}, "missing calculation_date"),
        ({"window": None}, "missing window"),
        ({"no_show_count": None}, "missing no_show_count"),
        ({"updated_at": None}, "missing updated_at"),
        ({"tutor_id": "t" * 51}, "too long tutor_id"),
    ],
)
def test_a_row_that_cannot_stay_is_set_aside_with_its_reason(
    platform: Platform, values: Row, reason: str
) -> None:
    platform.create_legacy_table(
        tutor_id="text",
        calculation_date="timestamptz",
        window="text",
        no_show_count="integer",
        updated_at="timestamptz",
    )
    platform.insert("good")
    # Newer than the good row of the same day: it must not push that one out.
    platform.insert("bad", **({"updated_at": "2025-11-08 12:00:00+00"} | values))

    report = platform.upgrade()

    assert report.rows_moved == {reason: 1}
    assert platform.kept().keys() == {"good"}
    assert platform.moved()["bad"]["reason"] == reason
    assert platform.differences() == []


def test_rows_of_no_possible_date_are_set_aside(platform: Platform) -> None:
    platform.create_legacy_table(calculation_date="timestamptz")
    platform.insert("good")
    dates = ["infinity", "-infinity", "4714-11-24 00:00+00 BC", "294276-12-31 23:59+00"]
    for number, date in enumerate(dates):
        platform.insert(f"bad {number}", calculation_date=date)

    preview = upgrade(platform.engine, timezone="America/New_York", dry_run=True)
    report = upgrade(platform.engine, timezone="America/New_York")

    assert preview == report
    assert report.rows_moved == {"calculation_date out of range": len(dates)}
    assert platform.kept().keys() == {"good"}
    moved = platform.moved()
    # Python has none of these dates; the original keeps them.
    assert {row["calculation_date"] for row in moved.values()} == {None}
    assert moved["bad 0"]["original"]["calculation_date"] == "infinity"


def test_a_metric_id_that_does_not_fit_is_set_aside_whole(platform: Platform) -> None:
    platform.create_legacy_table(metric_id="text PRIMARY KEY")
    platform.insert("m" * 51)
    platform.insert("m" * 50, tutor_id="t2")

    platform.upgrade()

    assert platform.kept().keys() == {"m" * 50}
    assert platform.differences() == []


def test_native_enum_columns_become_text(platform: Platform) -> None:
    platform.execute(
        "CREATE TYPE metricwindow AS ENUM ('SEVEN_DAY', 'THIRTY_DAY', 'NINETY_DAY')",
        "CREATE TYPE performancetier AS ENUM ('EXEMPLARY', 'STRONG', 'AT_RISK')",
    )
    platform.create_legacy_table(
        window="metricwindow NOT NULL",
        performance_tier="performancetier DEFAULT 'STRONG'::performancetier",
    )
    platform.insert("a")
    platform.insert("b", performance_tier="EXEMPLARY", updated_at="2025-11-09 00:00+00")

    report = platform.upgrade()

    assert platform.kept()["b"]["window"] == "7day"
    assert platform.kept()["b"]["performance_tier"] == "Exemplary"
    assert platform.moved()["a"]["original"]["performance_tier"] == "AT_RISK"
    assert "column window: type metricwindow becomes VARCHAR(20)" in report.changes
    assert platform.differences() == []


def test_times_without_a_zone_are_read_as_utc(platform: Platform) -> None:
    platform.execute(f"ALTER DATABASE {platform.engine.url.database} SET timezone = 'Asia/Tokyo'")
    platform.engine.dispose()
    naive = "timestamp NOT NULL DEFAULT timezone('utc', now())"
    platform.create_legacy_table(calculation_date=naive, created_at=naive, updated_at=naive)
    values = {name: "2025-11-08 23:30:00" for name in ("calculation_date", "updated_at")}
    platform.insert("a", **values, created_at="2025-11-08 23:00:00")

    platform.upgrade()

    row = platform.kept()["a"]
    assert row["calculation_date"] == datetime(2025, 11, 8, tzinfo=UTC)
    assert row["created_at"] == datetime(2025, 11, 8, 23, tzinfo=UTC)
    assert {"created_at", "updated_at"} <= _now_defaults(platform)


def _now_defaults(platform: Platform) -> set[str]:
    columns = sa.inspect(platform.engine).get_columns(tables.METRICS_TABLE)
    return {column["name"] for column in columns if column["default"] == "now()"}


@pytest.mark.parametrize(
    ("timezone", "stored", "midnight"),
    [
        ("America/New_York", "2025-11-08 02:30+00", "2025-11-07 05:00+00:00"),
        ("America/New_York", "2025-11-08 05:00+00", "2025-11-08 05:00+00:00"),
        ("America/New_York", "2025-07-08 03:59+00", "2025-07-07 04:00+00:00"),
        ("Asia/Kolkata", "2025-11-08 18:29+00", "2025-11-07 18:30+00:00"),
        # Havana's clocks go from 01:00 back to 00:00 on this day.
        ("America/Havana", "2025-11-02 12:00+00", "2025-11-02 04:00+00:00"),
        ("America/Havana", "2025-11-02 04:00+00", "2025-11-02 04:00+00:00"),
    ],
)
def test_a_date_becomes_the_midnight_that_began_its_day_in_the_timezone(
    platform: Platform, timezone: str, stored: str, midnight: str
) -> None:
    platform.create_legacy_table()
    platform.insert("a", calculation_date=stored)

    platform.upgrade(timezone)

    assert platform.kept()["a"]["calculation_date"] == datetime.fromisoformat(midnight)


def test_extra_columns_survive_and_do_not_stop_a_writer(platform: Platform) -> None:
    platform.create_legacy_table(
        r'"Rated\: % by" text NOT NULL', "number bigint GENERATED ALWAYS AS IDENTITY"
    )
    platform.execute("ALTER TABLE tutor_performance_metrics ALTER number DROP IDENTITY")
    platform.insert("a", **{"Rated: % by": "Ann", "number": 1})
    platform.insert("b", **{"Rated: % by": "Bo", "number": 2})

    report = platform.upgrade()

    assert platform.kept()["b"]["Rated: % by"] == "Bo"
    assert platform.moved()["a"]["original"]["Rated: % by"] == "Ann"
    assert (
        "column Rated: % by: NOT NULL is dropped, since this project does not fill it"
        in report.changes
    )
    platform.execute(
        "INSERT INTO tutor_performance_metrics"
        ' (metric_id, tutor_id, calculation_date, "window", sessions_completed, no_show_count)'
        " VALUES ('c', 't2', '2025-11-08', '7day', 0, 0)"
    )


def test_orphans_are_set_aside_and_a_cascading_key_is_added(platform: Platform) -> None:
    platform.create_legacy_table(tutor_id="varchar(36) NOT NULL")
    platform.insert("orphan", tutor_id="gone")
    platform.insert("a")

    report = platform.upgrade()

    assert report.rows_moved == {"unknown tutor": 1}
    platform.execute("DELETE FROM tutors WHERE tutor_id = 't1'")
    assert platform.rows() == []


def test_a_key_that_does_not_cascade_is_replaced(platform: Platform) -> None:
    platform.create_legacy_table(tutor_id="varchar(50) NOT NULL REFERENCES tutors (tutor_id)")
    platform.insert("a")

    platform.upgrade()

    keys = sa.inspect(platform.engine).get_foreign_keys(tables.METRICS_TABLE)
    assert [key["options"] for key in keys] == [{"ondelete": "CASCADE"}]
    assert platform.differences() == []


def test_checks_that_admit_only_old_names_are_dropped_and_others_stay(platform: Platform) -> None:
    platform.create_legacy_table(
        """CONSTRAINT metricwindow CHECK ("window" IN ('SEVEN_DAY', 'THIRTY_DAY', 'NINETY_DAY'))""",
        "CONSTRAINT tier CHECK (performance_tier IN ('EXEMPLARY', 'STRONG', 'AT_RISK'))",
        "CONSTRAINT no_shows CHECK (no_show_count >= 0)",
        "CONSTRAINT risky CHECK (performance_tier <> 'At Risk' OR no_show_count >= 0)",
        """CONSTRAINT old_and_new CHECK ("window" IN ('SEVEN_DAY', '7day', '30day', '90day'))""",
    )
    platform.insert("a")

    report = platform.upgrade()

    checks = sa.inspect(platform.engine).get_check_constraints(tables.METRICS_TABLE)
    assert {check["name"] for check in checks} == {"no_shows", "risky", "old_and_new"}
    assert "check tier is dropped: it admits only old names of performance_tier" in report.changes


def test_another_index_under_a_name_of_ours_is_not_dropped(platform: Platform) -> None:
    platform.create_legacy_table(indexed=False)
    platform.execute(
        "CREATE INDEX ix_tutor_performance_metrics_window"
        " ON tutor_performance_metrics (no_show_count)"
    )

    with pytest.raises(SchemaError, match=r"ix_tutor_performance_metrics_window is taken .*rename"):
        upgrade(platform.engine, timezone="UTC", dry_run=True)


def test_equivalent_indexes_and_keys_keep_their_names(
    platform: Platform,
) -> None:
    platform.create_legacy_table(
        'CONSTRAINT "one\\: % a day" UNIQUE (tutor_id, calculation_date, "window")', indexed=False
    )
    platform.execute(
        'CREATE INDEX "by\\: % date" ON tutor_performance_metrics (calculation_date)',
        'CREATE INDEX partial ON tutor_performance_metrics ("window", calculation_date)'
        " WHERE no_show_count > 0",
    )
    platform.insert("a")
    platform.insert("b", calculation_date="2025-11-08 00:00+00")

    platform.upgrade()

    inspector = sa.inspect(platform.engine)
    assert [key["name"] for key in inspector.get_unique_constraints(tables.METRICS_TABLE)] == [
        "one: % a day"
    ]
    assert {index["name"] for index in inspector.get_indexes(tables.METRICS_TABLE)} == {
        "by: % date",
        "ix_tutor_performance_metrics_window",
        "partial",
        "one: % a day",
    }
    assert status(platform.engine, timezone="UTC").deviations == ()


def test_rates_of_other_numeric_types_keep_what_they_show(platform: Platform) -> None:
    platform.create_legacy_table(
        avg_rating="real NOT NULL",
        engagement_score="numeric(5, 2)",
        no_show_count="bigint NOT NULL",
    )
    platform.insert("a", engagement_score=81.25)

    report = upgrade(platform.engine, timezone="UTC")

    row = platform.kept()["a"]
    assert (row["avg_rating"], row["engagement_score"]) == (4.33, 81.25)
    assert "column avg_rating: NOT NULL is dropped" in report.changes
    assert platform.differences() == []


def test_columns_that_may_be_null_are_added(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.execute(
        "ALTER TABLE tutor_performance_metrics"
        " DROP COLUMN performance_tier, DROP COLUMN engagement_score"
    )
    platform.execute(
        "INSERT INTO tutor_performance_metrics VALUES"
        " ('a', 't1', '2025-11-08', 'SEVEN_DAY', 1, NULL, NULL, NULL, 0, NULL, NULL, now(), now())"
    )

    platform.upgrade()

    assert platform.kept()["a"]["performance_tier"] is None
    assert platform.differences() == []


def test_a_trigger_that_stamps_rows_is_passed_by_and_kept(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.execute(
        "CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN NEW.updated_at := now(); RETURN NEW; END'",
        "CREATE TRIGGER stamp BEFORE UPDATE ON tutor_performance_metrics"
        " FOR EACH ROW EXECUTE FUNCTION stamp()",
    )
    platform.insert("a")

    platform.upgrade()

    adopted = platform.kept()["a"]["updated_at"]
    assert adopted == datetime(2025, 11, 8, 2, 31, tzinfo=UTC)
    platform.execute("UPDATE tutor_performance_metrics SET no_show_count = 1")
    assert platform.kept()["a"]["updated_at"] > adopted


def test_a_table_that_is_right_already_is_left_untouched(platform: Platform) -> None:
    tables.tutor_performance_metrics.create(platform.engine)
    platform.insert(
        "a", window="7day", performance_tier="At Risk", calculation_date="2025-11-08 00:00+00"
    )
    before = platform.rows()

    report = platform.upgrade()

    assert platform.rows() == before
    assert report.changes[0] == "table tutor_performance_metrics_set_aside is created"
    assert len(report.changes) == 4


def test_adopting_again_changes_nothing(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.insert("a")
    platform.insert("b")
    platform.upgrade()
    kept, moved = platform.rows(), platform.rows(SET_ASIDE_TABLE)

    again = upgrade(platform.engine, timezone="UTC")
    platform.execute("DROP TABLE tutormax_assets_alembic_version")
    unmanaged = upgrade(platform.engine, timezone="UTC")

    assert again == replace(unmanaged, changes=()) == UpgradeReport(rows_before=1, rows_kept=1)
    assert again.lines() == ["tutor_performance_metrics is up to date (1 rows); nothing to do"]
    assert platform.rows() == kept
    assert platform.rows(SET_ASIDE_TABLE) == moved


def test_rows_of_the_old_service_are_adopted_again_at_every_revision(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.insert("adopted")
    platform.upgrade()
    assert status(platform.engine, timezone="UTC").deviations == ()
    # What a run of this project writes on the next night, windows of another policy included.
    computed = {"calculation_date": "2025-11-09 00:00+00", "performance_tier": "Strong"}
    platform.insert("computed", window="7day", **computed)
    platform.insert("other policy", window="14day", **computed)
    ours = platform.kept()
    assert status(platform.engine, timezone="UTC").deviations == ()

    # The old cron was not stopped: later than the run, and of a tutor whom the run left out.
    night = {"calculation_date": "2025-11-09 02:30+00", "updated_at": "2025-11-09 02:31+00"}
    platform.insert("later", **night)
    platform.insert("alone", tutor_id="t2", **night)
    platform.insert("tier", tutor_id="t2", window="30day", calculation_date="2025-11-09 00:00+00")
    found = status(platform.engine, timezone="UTC")
    assert (found.rows, found.newest_calculation_date) == (
        6,
        datetime(2025, 11, 9, 2, 30, tzinfo=UTC),
    )
    assert found.deviations == (
        "table tutor_performance_metrics: found 2 rows with another name in window, 3 rows with"
        " another name in performance_tier, 2 rows with a calculation_date other than midnight in"
        " the configured timezone (TUTORMAX_TIMEZONE), expected none: stop what writes them, such"
        " as the replaced service, then run `tutormax db upgrade`",
    )

    report = platform.upgrade()

    assert report.rows_moved == {"duplicate": 1}
    assert (report.windows_renamed, report.tiers_renamed, report.dates_moved) == (1, 2, 1)
    kept = platform.kept()
    assert {name: kept[name] for name in ours} == ours
    assert kept["alone"]["calculation_date"] == datetime(2025, 11, 9, tzinfo=UTC)
    assert kept.keys() == {*ours, "alone", "tier"}
    assert platform.differences() == []
    assert status(platform.engine, timezone="UTC").deviations == ()


def test_a_date_that_no_driver_reads_is_set_aside(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.insert("a")
    platform.insert("b", calculation_date="infinity")
    platform.insert("c", calculation_date="0044-03-15 00:00+00 BC")
    assert status(platform.engine, timezone="UTC").newest_calculation_date is not None
    reason = "calculation_date out of range"
    assert upgrade(platform.engine, timezone="UTC").rows_moved == {reason: 2}

    platform.insert("d", window="7day", calculation_date="-infinity", performance_tier="Strong")

    assert "1 rows with a calc" in status(platform.engine, timezone="UTC").deviations[0]
    assert upgrade(platform.engine, timezone="UTC").rows_moved == {reason: 1}
    assert platform.kept().keys() == {"a"}


def test_conversions_alone_are_no_reason_to_say_nothing_to_do(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.upgrade()
    platform.insert("a")

    lines = platform.upgrade().lines()

    assert lines[1:] == [
        "window names changed in 1 rows, tier names in 1, dates moved to midnight in 1"
    ]


def test_a_key_that_was_dropped_after_the_upgrade_is_given_back(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.upgrade()
    key = "uq_tutor_performance_metrics_tutor_date_window"
    platform.execute(f"ALTER TABLE tutor_performance_metrics DROP CONSTRAINT {key}")

    [found] = status(platform.engine, timezone="UTC").deviations
    assert found.endswith(f"`tutormax db upgrade` brings back: constraint {key} is added")

    assert platform.upgrade().changes == (f"constraint {key} is added",)
    assert platform.differences() == []


def test_dates_that_move_to_another_day_are_counted(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.insert("night in UTC, evening before in New York")
    platform.insert("same day", calculation_date="2025-11-08 12:00+00", tutor_id="t2")
    platform.insert("stays", calculation_date="2025-11-09 05:00+00")

    report = platform.upgrade("America/New_York")

    assert (report.dates_moved, report.days_moved) == (2, 1)
    assert report.lines()[2].startswith("  1 of these dates move to another day: ")


def test_the_report_reads_as_sentences(platform: Platform) -> None:
    platform.create_legacy_table()
    platform.insert("a")
    platform.insert("b")
    platform.insert("c", tutor_id="t2", window="YEAR")

    lines = platform.upgrade().lines()

    assert lines[:4] == [
        "tutor_performance_metrics: 3 rows found, 1 stay, "
        "2 move to tutor_performance_metrics_set_aside",
        "  1 duplicate",
        "  1 unknown window",
        "window names changed in 1 rows, tier names in 1, dates moved to midnight in 1",
    ]
    assert "constraint uq_tutor_performance_metrics_tutor_date_window is added" in lines


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_view_on_a_column_whose_type_changes_is_named(platform: Platform, dry_run: bool) -> None:
    platform.create_legacy_table()
    platform.execute(
        'CREATE VIEW dashboard AS SELECT "window" FROM tutor_performance_metrics',
        "CREATE VIEW harmless AS SELECT avg_rating FROM tutor_performance_metrics",
    )
    platform.insert("a")
    before = platform.rows()

    with pytest.raises(SchemaError, match="drop dashboard, upgrade, and create what was dropped"):
        upgrade(platform.engine, timezone="UTC", dry_run=dry_run)

    assert platform.rows() == before


@pytest.mark.parametrize("action", ["CASCADE", "SET NULL", "NO ACTION"])
def test_rows_that_others_refer_to_are_neither_moved_nor_given_another_key(
    platform: Platform, action: str
) -> None:
    platform.create_legacy_table('UNIQUE (tutor_id, calculation_date, "window")')
    platform.insert("stays", calculation_date="2025-11-09", window="7day")
    platform.insert("older", calculation_date="2025-11-08 01:00:00+00")
    platform.insert("newer", updated_at="2025-11-09 02:31:00+00")
    actions = f"ON DELETE {action} ON UPDATE {action}"
    platform.execute(
        "CREATE TABLE alerts (metric_id varchar(50)"
        f" REFERENCES tutor_performance_metrics {actions})",
        "INSERT INTO alerts VALUES ('stays'), ('older'), ('older'), ('newer')",
        'CREATE TABLE notes (tutor varchar(50), day timestamptz, "of" varchar(10),'
        ' FOREIGN KEY (tutor, day, "of") REFERENCES tutor_performance_metrics'
        f' (tutor_id, calculation_date, "window") {actions})',
        "INSERT INTO notes VALUES ('t1', '2025-11-09', '7day'),"
        " ('t1', '2025-11-08 02:30:00+00', 'SEVEN_DAY')",
    )
    tables_before = [platform.rows(name) for name in ("alerts", "notes", tables.METRICS_TABLE)]

    for dry_run in (True, False):
        with pytest.raises(SchemaError) as error:
            upgrade(platform.engine, timezone="UTC", dry_run=dry_run)
        said = str(error.value)
        assert "table alerts refers to 1 of them by metric_id; table notes refers to 1" in said
        assert "by tutor, day, of. Nothing was changed" in said
    assert tables_before == [
        platform.rows(name) for name in ("alerts", "notes", tables.METRICS_TABLE)
    ]

    platform.execute(
        "DELETE FROM alerts WHERE metric_id = 'older'", "DELETE FROM notes WHERE \"of\" <> '7day'"
    )
    others = [platform.rows(name) for name in ("alerts", "notes")]
    platform.upgrade()
    assert others == [platform.rows(name) for name in ("alerts", "notes")]
    assert platform.kept().keys() == {"stays", "newer"}


def test_a_table_without_the_keys_of_a_metric_is_refused(platform: Platform) -> None:
    platform.execute("CREATE TABLE tutor_performance_metrics (metric_id text, score float)")

    with pytest.raises(SchemaError, match=r"lacks tutor_id, .* has metric_id, score; rename it"):
        upgrade(platform.engine, timezone="UTC")


def test_another_primary_key_is_refused(platform: Platform) -> None:
    platform.create_legacy_table("PRIMARY KEY (metric_id, tutor_id)", metric_id="varchar(50)")

    with pytest.raises(SchemaError, match=r"is \(metric_id, tutor_id\); expected \(metric_id\)"):
        upgrade(platform.engine, timezone="UTC")


def test_a_view_in_place_of_the_table_is_refused(platform: Platform) -> None:
    platform.execute("CREATE VIEW tutor_performance_metrics AS SELECT 1 AS one")

    with pytest.raises(SchemaError, match="not an ordinary table"):
        upgrade(platform.engine, timezone="UTC")


def test_a_failure_on_the_way_changes_nothing(platform: Platform) -> None:
    platform.create_legacy_table("""CONSTRAINT loud CHECK ("window" = upper("window"))""")
    platform.insert("a")
    platform.insert("b")
    before = platform.rows()

    with pytest.raises(SchemaError, match='violates check constraint "loud"'):
        upgrade(platform.engine, timezone="UTC")

    assert platform.rows() == before
    assert sa.inspect(platform.engine).get_table_names() == ["tutors", tables.METRICS_TABLE]


def test_the_table_is_found_on_the_search_path(platform: Platform) -> None:
    platform.execute(
        "CREATE SCHEMA app",
        "ALTER TABLE tutors SET SCHEMA app",
        f"ALTER DATABASE {platform.engine.url.database} SET search_path = own, app",
        "CREATE SCHEMA own",
    )
    platform.engine.dispose()
    platform.execute("SET search_path = app", LEGACY_TABLE_IN_APP)
    platform.insert("a")
    platform.insert("b")

    platform.upgrade()

    assert len(platform.rows("app.tutor_performance_metrics")) == 1
    assert platform.differences() == []


LEGACY_TABLE_IN_APP = "CREATE TABLE app.tutor_performance_metrics ({})".format(
    ", ".join(f"{name} {kind}" for name, kind in LEGACY_COLUMNS.items())
)
