"""The daily job on a lake: as it is on PostgreSQL, to the last digit."""

from itertools import product
from pathlib import Path

import polars as pl
import sqlalchemy as sa
from polars.testing import assert_frame_equal

from tutormax_assets.database.connection import Timeouts
from tutormax_assets.sample.frames import sample_frames
from tutormax_assets.sample.lake import write_lake
from tutormax_assets.source.contract import NEEDED_COLUMNS
from tutormax_assets.source.lake_files import Lake
from tutormax_assets.source.postgres import Source
from tutormax_assets.source.view import where_to_look
from tutormax_assets_tests.conftest import (
    GOLDEN,
    PARQUET_ASSETS,
    SMALL_PLATFORM,
    Platform,
    open_platform,
)

DAY = "2025-11-07"


def assert_as_postgresql_has_it(of_postgres: Platform, lake: Path, *days: str) -> None:
    """Run days on the platform, then on a lake of the same rows and into the same table."""
    expected = [of_postgres.run(day, include_inactive=True) for day in days]
    metrics = of_postgres.metrics()
    home = lake.with_name("home of the lake")
    with open_platform(
        of_postgres.url, home, TUTORMAX_SOURCE="parquet", TUTORMAX_LAKE=str(lake)
    ) as of_lake:
        found = [of_lake.run(day, include_inactive=True) for day in days]
        # A row whose values moved would have another updated_at.
        assert_frame_equal(of_lake.metrics(), metrics, check_exact=True)
        for asset, day in product(PARQUET_ASSETS, days):
            rows = of_lake.partition(asset, day).sort(pl.all())
            same = of_postgres.partition(asset, day).sort(pl.all())
            assert_frame_equal(rows, same, check_exact=True)
    for [ours], [theirs] in zip(found, expected, strict=True):
        assert (ours.successful, ours.failed, ours.errors) == (theirs.successful, 0, [])
        assert ours.set_aside == theirs.set_aside


def test_the_golden_rows_have_the_same_answers(golden_platform: Platform, tmp_path: Path) -> None:
    rows = {table: pl.read_parquet(GOLDEN / f"{table}.parquet") for table in NEEDED_COLUMNS}
    write_lake(str(tmp_path / "lake"), rows, file_name="0.parquet")

    assert_as_postgresql_has_it(golden_platform, tmp_path / "lake", "2025-11-07", "2025-10-01")


def test_broken_rows_are_set_aside_alike(small_platform: Platform, tmp_path: Path) -> None:
    frames = sample_frames(**SMALL_PLATFORM)
    rows = {table: frames[table] for table in NEEDED_COLUMNS}
    write_lake(str(tmp_path / "lake"), rows, file_name="0.parquet")

    assert_as_postgresql_has_it(small_platform, tmp_path / "lake", DAY)
    set_aside = small_platform.partition("sessions_set_aside", DAY)
    assert set(set_aside["source_table"]) == {"sessions", "student_feedback"}


def test_a_person_is_sent_to_where_the_rows_are() -> None:
    source = Source(sa.make_url("postgresql://reader@db/platform"), Timeouts())

    assert where_to_look(source, "sessions", instant="scheduled_start") == (
        "SELECT max(scheduled_start) FROM sessions"
    )
    assert where_to_look(Lake("s3://lake/tutoring"), "sessions", instant="scheduled_start") == (
        "the newest day=YYYY-MM-DD of s3://lake/tutoring/sessions"
    )
