"""The tables of reasons and changes follow their assets, in whatever order dates are computed."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.database import tables
from tutormax_assets.database.archive import archive_date
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.metrics_reading import TierSince, read_tiers_since
from tutormax_assets.database.restore import restore_date
from tutormax_assets.database.rows_of_date import of_held_tutors
from tutormax_assets.schema import other_tables
from tutormax_assets.schema.status import status, upgrade
from tutormax_assets.settings import load_settings
from tutormax_assets.storage.partition import delete_files
from tutormax_assets_tests.conftest import Platform, add, captured_log

DAY_BEFORE, DAY = "2025-11-06", "2025-11-07"
WEEK_BEFORE = "2025-10-31"
MANY_NO_SHOWS = "UPDATE sessions SET no_show = true WHERE scheduled_start >= '2025-11-01'"
TABLES = (tables.tutor_tier_reasons, tables.tutor_tier_changes)


def rows_of(platform: Platform, table: sa.Table, day: str) -> pl.DataFrame:
    """The rows that the table holds of a date, but for the date."""
    instant = datetime.fromisoformat(day).replace(tzinfo=UTC)
    key = [column for column in table.primary_key if column.name != "calculation_date"]
    columns = [column for column in table.c if column.name != "calculation_date"]
    query = sa.select(*columns).where(table.c.calculation_date == instant).order_by(*key)
    with platform.engine.connect() as connection:
        rows = connection.execute(query).all()
    names = [column.name for column in columns]
    return pl.DataFrame(rows, schema=names, orient="row", infer_schema_length=None)


def stored_rows(platform: Platform, table: sa.Table, day: str) -> pl.DataFrame:
    """The rows of the asset of the same name."""
    key = [name for name in (column.name for column in table.primary_key)]
    key.remove("calculation_date")
    rows = platform.partition(table.name, day).with_columns(pl.col(pl.Enum).cast(pl.String))
    return rows.sort(key)


def assert_tables_follow_assets(platform: Platform, days: Iterable[str]) -> None:
    for table in TABLES:
        for day in days:
            stored = stored_rows(platform, table, day)
            found = rows_of(platform, table, day).select(stored.columns)
            assert_frame_equal(found, stored, check_dtypes=False)


def test_tables_follow_assets_in_whole_filtered_and_repeated_runs(
    small_platform: Platform,
) -> None:
    def written() -> list[object]:
        with small_platform.engine.connect() as connection:
            return [
                connection.execute(sa.text(f'SELECT xmin, ctid FROM "{table}"')).all()
                for table in ("tutor_tier_reasons", "tutor_tier_changes")
            ]

    small_platform.run(DAY_BEFORE, DAY)
    assert_tables_follow_assets(small_platform, [DAY_BEFORE, DAY])
    assert rows_of(small_platform, tables.tutor_tier_changes, DAY).height > 0
    before = written()

    small_platform.run(DAY)
    assert written() == before

    small_platform.execute(MANY_NO_SHOWS)
    # A correction of an earlier date reaches what a later one is compared with.
    small_platform.run(DAY_BEFORE)
    assert_tables_follow_assets(small_platform, [DAY_BEFORE, DAY])
    changes = rows_of(small_platform, tables.tutor_tier_changes, DAY)
    assert (changes.filter(metric="no_show_count")["numerator_corrected"] < 0).any()

    two = small_platform.metrics()["tutor_id"].unique().sort()[:2].to_list()
    small_platform.run(DAY, tutor_ids=two)
    assert_tables_follow_assets(small_platform, [DAY_BEFORE, DAY])
    assert written() != before

    engine, archive_path = small_platform.engine, small_platform.settings.archive_path
    held = [rows_of(small_platform, table, DAY) for table in TABLES]
    archive_date(engine, archive_path, date.fromisoformat(DAY), timezone="UTC")
    assert [len(rows_of(small_platform, table, DAY)) for table in TABLES] == [0, 0]
    restore_date(engine, archive_path, date.fromisoformat(DAY))
    for table, rows in zip(TABLES, held, strict=True):
        assert_frame_equal(rows_of(small_platform, table, DAY), rows)

    small_platform.execute(f"DELETE FROM tutors WHERE tutor_id = '{two[0]}'")
    for table in TABLES:
        assert two[0] not in rows_of(small_platform, table, DAY)["tutor_id"]


def test_the_order_in_which_dates_are_computed_does_not_matter(small_platform: Platform) -> None:
    days = [WEEK_BEFORE, DAY_BEFORE, DAY]
    small_platform.run(WEEK_BEFORE)
    small_platform.run(DAY_BEFORE, DAY)
    expected = {day: rows_of(small_platform, tables.tutor_tier_changes, day) for day in days}
    assert set(expected[DAY]["days"]) == {1, 7}
    small_platform.execute("DELETE FROM tutor_tier_changes")
    for asset in small_platform.storage.iterdir():
        for listing in asset.glob("*.json"):
            listing.unlink()

    for day in (DAY, WEEK_BEFORE, DAY_BEFORE):
        small_platform.run(day)

    for day in days:
        assert_frame_equal(rows_of(small_platform, tables.tutor_tier_changes, day), expected[day])
    assert_tables_follow_assets(small_platform, days)


def test_a_database_of_an_earlier_version_is_told_what_to_do(small_platform: Platform) -> None:
    small_platform.execute("DROP TABLE tutor_tier_reasons")

    [summary] = small_platform.run(DAY)

    assert not summary.all_saved
    [error] = summary.errors[:1]
    assert "tutor_tier_reasons" in error["error"]
    assert "`tutormax db upgrade`" in error["error"]


A, B = "Strong", "At Risk"


@pytest.mark.parametrize(
    ("tiers", "expected"),
    [
        ({5: A, 6: A, 7: A}, (5, 3, 0, None)),
        ({4: B, 5: A, 6: A, 7: A}, (5, 3, 0, B)),
        # A gap does not break the run.
        ({3: A, 7: A}, (3, 5, 3, None)),
        ({3: A, 5: B, 7: A}, (7, 1, 0, B)),
        ({3: A, 4: B, 6: A, 7: A, 8: B}, (6, 2, 0, B)),
        ({7: A}, (7, 1, 0, None)),
    ],
)
def test_since_when_a_tier_is_held(
    engine: sa.Engine, tiers: dict[int, str], expected: tuple[int, int, int, str | None]
) -> None:
    add(engine, tables.tutors, {"tutor_id": "t"}, {"tutor_id": "other"})
    # The order in which rows come does not matter.
    for number, (day, tier) in enumerate(sorted(tiers.items(), key=lambda one: -one[0] % 5)):
        for tutor, window, of_row in (("t", "7day", tier), ("t", "30day", B), ("other", "7day", B)):
            add(
                engine,
                tables.tutor_performance_metrics,
                {
                    "metric_id": f"{number}{tutor}{window}",
                    "tutor_id": tutor,
                    "window": window,
                    "calculation_date": datetime(2025, 11, day, tzinfo=UTC),
                    "performance_tier": of_row,
                    "sessions_completed": 0,
                    "no_show_count": 0,
                },
            )

    found = read_tiers_since(
        engine,
        ["t"],
        calculation_date=datetime(2025, 11, 7, tzinfo=UTC),
        timeouts=Timeouts(),
    )

    day, held, missing, previous = expected
    since = datetime(2025, 11, day, tzinfo=UTC)
    assert found["t", "7day"] == TierSince(A, since, held, missing, previous)
    assert set(found) == {("t", "7day"), ("t", "30day")}


def test_a_day_that_is_an_hour_longer_is_one_day(engine: sa.Engine) -> None:
    add(engine, tables.tutors, {"tutor_id": "t"})
    # Midnights in Berlin, where the clocks change on the 26th.
    for hour, day in ((22, date(2025, 10, 24)), (22, date(2025, 10, 25)), (23, date(2025, 10, 26))):
        add(
            engine,
            tables.tutor_performance_metrics,
            {
                "metric_id": str(day),
                "tutor_id": "t",
                "window": "7day",
                "calculation_date": datetime(day.year, day.month, day.day, hour, tzinfo=UTC),
                "performance_tier": A,
                "sessions_completed": 0,
                "no_show_count": 0,
            },
        )

    found = read_tiers_since(
        engine,
        ["t"],
        calculation_date=datetime(2025, 10, 26, 23, tzinfo=UTC),
        timeouts=Timeouts(),
    )

    assert (found["t", "7day"].held_days, found["t", "7day"].dates_missing) == (3, 0)


def test_a_filtered_run_of_a_date_in_shards_keeps_all_reasons(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_SHARDS", "3")
    platform = replace(small_platform, settings=load_settings())
    platform.run(DAY)
    before = rows_of(platform, tables.tutor_tier_reasons, DAY)

    platform.run(DAY, tutor_ids=before["tutor_id"].unique().sort()[:2].to_list())

    assert_frame_equal(rows_of(platform, tables.tutor_tier_reasons, DAY), before)


def test_a_tutor_whose_rows_are_locked_is_named_and_all_others_are_written(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_LOCK_TIMEOUT_SECONDS", "1")
    platform = replace(small_platform, settings=load_settings())
    platform.run(DAY_BEFORE, DAY)
    one = platform.metrics()["tutor_id"].unique().sort()[3]
    before = rows_of(platform, tables.tutor_tier_reasons, DAY)
    platform.execute(MANY_NO_SHOWS)

    with platform.engine.connect() as other:
        rows = tables.tutor_tier_reasons.c
        other.execute(sa.select(rows.window).where(rows.tutor_id == one).with_for_update())
        [summary] = platform.run(DAY)

    assert [error["tutor_id"] for error in summary.errors if error["tutor_id"] != "SYSTEM"] == [one]
    assert "tutor_tier_reasons keeps its rows" in summary.errors[0]["error"]
    now, stored = (
        rows_of(platform, tables.tutor_tier_reasons, DAY),
        stored_rows(platform, tables.tutor_tier_reasons, DAY),
    )
    is_locked = pl.col("tutor_id") == one
    assert_frame_equal(now.filter(is_locked), before.filter(is_locked))
    assert_frame_equal(
        now.filter(~is_locked).select(stored.columns), stored.filter(~is_locked), check_dtypes=False
    )
    assert not now.equals(before)


def test_a_tutor_is_deleted_before_rows_are_written_or_with_them(
    small_platform: Platform,
) -> None:
    small_platform.run(DAY)
    engine, instant = small_platform.engine, datetime.fromisoformat(DAY).replace(tzinfo=UTC)
    reasons = rows_of(small_platform, tables.tutor_tier_reasons, DAY)
    gone, staying = reasons["tutor_id"].unique().sort()[:2]
    delete = sa.text("DELETE FROM tutors WHERE tutor_id = :tutor_id")
    with engine.begin() as writer:
        assert of_held_tutors(writer, reasons, [instant]).equals(reasons)
        with engine.connect() as other:
            other.execute(sa.text("SET LOCAL lock_timeout = '1ms'"))
            with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
                other.execute(delete, {"tutor_id": gone})
    with engine.begin() as other:
        other.execute(delete, {"tutor_id": gone})
    with engine.begin() as writer:
        held = of_held_tutors(writer, reasons, [instant])
        unknown = of_held_tutors(writer, reasons, [instant - timedelta(days=1)])
    left = reasons.filter(pl.col("tutor_id") != gone)
    assert held.equals(left)
    assert unknown.equals(left)
    assert rows_of(small_platform, tables.tutor_tier_reasons, DAY).equals(left)

    small_platform.execute("DELETE FROM tutor_performance_metrics")
    assert staying in rows_of(small_platform, tables.tutor_tier_reasons, DAY)["tutor_id"]


def test_a_trigger_takes_the_place_of_the_foreign_keys_of_0002(small_platform: Platform) -> None:
    engine = small_platform.engine
    upgrade(engine, timezone="UTC")
    for table in TABLES:
        small_platform.execute(
            f"ALTER TABLE {table.name} ADD CONSTRAINT fk_{table.name}_tutor_id"
            " FOREIGN KEY (tutor_id) REFERENCES tutors ON DELETE CASCADE"
        )
    small_platform.execute(
        "DROP TRIGGER delete_rows_of_deleted_tutors ON tutor_performance_metrics"
    )
    small_platform.execute("UPDATE tutormax_assets_alembic_version SET version_num = '0002'")
    assert status(engine, timezone="UTC").metrics == "behind"

    upgrade(engine, timezone="UTC")

    found = status(engine, timezone="UTC")
    assert (found.metrics, found.deviations) == ("current", ())
    assert [sa.inspect(engine).get_foreign_keys(table.name) for table in TABLES] == [[], []]
    # The function names the schemas that the tables were in.
    small_platform.execute("CREATE SCHEMA moved")
    small_platform.execute("ALTER TABLE tutor_tier_reasons SET SCHEMA moved")
    small_platform.execute("ALTER TABLE tutor_tier_changes SET SCHEMA moved")
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL search_path = public, moved")
        assert other_tables.missing(connection) == [
            "trigger delete_rows_of_deleted_tutors of tutor_performance_metrics"
        ]
        other_tables.create(connection)
        assert other_tables.missing(connection) == []
    small_platform.execute("ALTER TABLE moved.tutor_tier_reasons SET SCHEMA public")
    small_platform.execute("ALTER TABLE moved.tutor_tier_changes SET SCHEMA public")
    upgrade(engine, timezone="UTC")
    small_platform.run(DAY)
    tutor = rows_of(small_platform, tables.tutor_tier_reasons, DAY)["tutor_id"][0]
    small_platform.execute(f"DELETE FROM tutors WHERE tutor_id = '{tutor}'")
    assert tutor not in rows_of(small_platform, tables.tutor_tier_reasons, DAY)["tutor_id"]


def test_a_later_date_that_cannot_be_opened_does_not_fail_a_run(small_platform: Platform) -> None:
    small_platform.run(DAY)
    delete_files(UPath(small_platform.storage / "metrics_30day" / f"{DAY}.parquet"))

    with captured_log() as log:
        [summary] = small_platform.run(DAY_BEFORE)

    assert summary.all_saved
    assert any(line.startswith(f"WARNING {DAY} is not compared anew: ") for line in log)


def test_archived_rows_of_an_earlier_version_do_not_come_back(small_platform: Platform) -> None:
    engine, archive_path = small_platform.engine, small_platform.settings.archive_path
    day = date.fromisoformat(DAY)
    small_platform.run(DAY_BEFORE, DAY)
    archive_date(engine, archive_path, day, timezone="UTC")
    small_platform.execute(MANY_NO_SHOWS)
    small_platform.run(DAY)
    expected = [rows_of(small_platform, table, DAY) for table in TABLES]

    restore_date(engine, archive_path, day)
    archive_date(engine, archive_path, day, timezone="UTC")
    restore_date(engine, archive_path, day)

    for table, rows in zip(TABLES, expected, strict=True):
        assert_frame_equal(rows_of(small_platform, table, DAY), rows)


def test_a_row_without_a_date_does_not_break_the_view(engine: sa.Engine) -> None:
    row = {"tutor_id": "t", "window": "7day", "performance_tier": A}
    add(
        engine,
        tables.tutor_performance_metrics,
        {**row, "metric_id": "a", "calculation_date": datetime(2025, 11, 7, tzinfo=UTC)},
        {**row, "metric_id": "b", "calculation_date": datetime(2025, 11, 6, tzinfo=UTC)},
    )
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE tutor_performance_metrics SET calculation_date = '-infinity'"
                " WHERE metric_id = 'b'"
            )
        )
        found = connection.execute(sa.text("SELECT held_days FROM tutor_tier_since")).all()

    assert [row[0] for row in found] == [1]
