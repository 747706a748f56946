"""Live numbers: those of a date that begins now, kept apart, and never older than before."""

from datetime import UTC, datetime, timedelta
from itertools import islice

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tutormax_assets.api.live import compute_live_metrics, watch_live_metrics
from tutormax_assets.compute.tasks.live import LiveReport
from tutormax_assets.compute.tasks.tiers import TUTOR_TIERS
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.live_metrics import replace_live_metrics
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.tables import tutor_live_metrics
from tutormax_assets.definitions import LIVE_JOB_NAME, build_definitions
from tutormax_assets.defs.assets.live_metrics import LIVE_METRICS
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets_tests.conftest import SMALL_PLATFORM_END, Platform, captured_log

KEY = ["tutor_id", "window"]
END = datetime(2025, 11, 7, tzinfo=UTC)


def move(platform: Platform, by: timedelta) -> None:
    """Move sessions and events in time, to the microsecond."""
    for table, column in (("sessions", "scheduled_start"), ("tutor_events", "event_timestamp")):
        platform.execute(
            f"UPDATE {table} SET {column} = {column}"
            f" + interval '{by.days} days {by.seconds} seconds {by.microseconds} microseconds'"
        )


@pytest.fixture
def recent_platform(small_platform: Platform) -> Platform:
    """The generated platform, whose rows end now."""
    move(small_platform, datetime.now(UTC) - END)
    return small_platform


def live_rows(platform: Platform) -> pl.DataFrame:
    columns = ", ".join(f'"{column.name}"' for column in tutor_live_metrics.columns)
    query = f"SELECT {columns} FROM tutor_live_metrics"
    with platform.engine.connect() as connection:
        return pl.read_database(query, connection, infer_schema_length=None).sort(KEY)


def as_written(report: LiveReport) -> pl.DataFrame:
    columns = [column.name for column in tutor_live_metrics.columns]
    at = pl.lit(report.calculated_at).alias("calculated_at")
    return report.tiers.with_columns(at, pl.col("performance_tier").cast(str)).select(columns)


def test_they_are_the_numbers_of_a_date_that_begins_now(recent_platform: Platform) -> None:
    report = compute_live_metrics(recent_platform.settings)

    assert_frame_equal(
        live_rows(recent_platform),
        as_written(report).sort(KEY),
        check_exact=True,
        check_dtypes=False,
    )
    assert report.rows_changed == len(report.tiers) > 60
    assert report.tiers.filter(window="7day")["sessions_completed"].sum() > 0
    assert recent_platform.metrics().is_empty()
    move(recent_platform, END - report.calculated_at)
    recent_platform.run(str(SMALL_PLATFORM_END))
    daily = recent_platform.partition(TUTOR_TIERS, str(SMALL_PLATFORM_END))
    assert_frame_equal(report.tiers.sort(KEY), daily.sort(KEY), check_exact=True)


def test_rows_of_some_tutors_are_replaced_and_those_of_others_stay(
    recent_platform: Platform,
) -> None:
    first = compute_live_metrics(recent_platform.settings)
    one, *others = first.tiers["tutor_id"].unique().sort()
    recent_platform.execute(f"DELETE FROM sessions WHERE tutor_id IN ('{one}', '{others[0]}')")

    second = compute_live_metrics(recent_platform.settings, tutor_ids=[one])

    rows = live_rows(recent_platform)
    is_one = pl.col("tutor_id") == one
    assert set(rows.filter(is_one)["calculated_at"]) == {second.calculated_at}
    assert set(rows.filter(is_one)["sessions_completed"]) == {0}
    assert set(rows.filter(~is_one)["calculated_at"]) == {first.calculated_at}


def test_rows_of_those_who_leave_go(recent_platform: Platform) -> None:
    first = compute_live_metrics(recent_platform.settings)
    leaves, is_deleted, *others = first.tiers["tutor_id"].unique().sort()
    recent_platform.execute(f"UPDATE tutors SET status = 'churned' WHERE tutor_id = '{leaves}'")
    recent_platform.execute(f"DELETE FROM tutors WHERE tutor_id = '{is_deleted}'")

    compute_live_metrics(recent_platform.settings)

    assert set(live_rows(recent_platform)["tutor_id"]) == set(others)


def test_older_numbers_do_not_replace_newer_ones(recent_platform: Platform) -> None:
    report = compute_live_metrics(recent_platform.settings)
    before = live_rows(recent_platform)
    [tutor_id, *_] = report.tiers["tutor_id"]

    changed = replace_live_metrics(
        recent_platform.engine,
        report.tiers.filter(tutor_id=tutor_id).with_columns(sessions_completed=999),
        calculated_at=report.calculated_at - timedelta(seconds=1),
        of_all_tutors=True,
        timeouts=Timeouts(),
    )

    assert changed == 0
    assert live_rows(recent_platform).equals(before)


def test_the_asset_says_what_it_wrote(recent_platform: Platform) -> None:
    job = build_definitions(recent_platform.settings).resolve_job_def(LIVE_JOB_NAME)

    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance)

    [event] = result.get_asset_materialization_events()
    found = event.step_materialization_data.materialization.metadata
    rows = live_rows(recent_platform)
    assert found["rows_changed"].value == len(rows)
    assert found["tutors"].value == rows["tutor_id"].n_unique()
    assert found["calculated_at"].value == rows["calculated_at"][0].timestamp()


def test_watching_goes_on_after_a_failure_that_may_pass(
    recent_platform: Platform,
) -> None:
    recent_platform.execute("CREATE SEQUENCE refreshes")
    recent_platform.execute(
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('refreshes') = 2 THEN
            RAISE EXCEPTION 'a conflict' USING ERRCODE = '40001';
        END IF; RETURN NULL; END $$"""
    )
    recent_platform.execute(
        "CREATE TRIGGER refuses BEFORE INSERT ON tutor_live_metrics"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
    )
    settings = recent_platform.settings.model_copy(update={"live_seconds": 0})

    with captured_log() as log:
        first, second = islice(watch_live_metrics(settings), 2)

    assert "WARNING a conflict" in log
    assert first.calculated_at < second.calculated_at == live_rows(recent_platform)[0, -1]
    with dagster_instance(settings) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(LIVE_METRICS))
    assert event is not None
    assert event.asset_materialization is not None
    at = event.asset_materialization.metadata["calculated_at"].value
    assert at == first.calculated_at.timestamp()


def test_watching_ends_where_trying_again_does_not_help(recent_platform: Platform) -> None:
    recent_platform.execute("DROP TABLE tutor_live_metrics")

    with pytest.raises(MetricsTableError, match="`tutormax db upgrade` creates it"):
        next(watch_live_metrics(recent_platform.settings))
