"""Rows by day and by tutor, counted once for dates whose snapshots are in one file."""

from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.defs.checks.volumes import (
    events_by_day,
    read_volumes,
    sessions_by_day,
    unknown_tutors,
)
from tutormax_assets.storage.partition import (
    list_partition,
    partition_of,
    scan_partition,
    slices_of,
    store_slices,
)
from tutormax_assets.storage.shards import ALL_IN_ONE
from tutormax_assets.storage.store import PartitionStore
from tutormax_assets_tests.conftest import store
from tutormax_assets_tests.metrics.rows import D, events, roster, sessions

DATES = [D - timedelta(days=ago) for ago in (2, 1, 0)]
DAYS = 4
AGO = (9, 5, 4, 4, 3, 2, 2, 1)


def store_together(folder: Path, asset: str, rows: pl.DataFrame, column: str) -> None:
    rows = rows.sort(column)
    paths = {day: UPath(folder / asset / f"{day}.parquet") for day in DATES}
    spans = {day: (day - timedelta(days=DAYS), day) for day in DATES}
    for day, parts in store_slices(paths, rows, slices_of(rows[column], spans)).items():
        list_partition(partition_of(paths[day], ALL_IN_ONE, [parts]))


@pytest.fixture
def partitions(tmp_path: Path) -> PartitionStore:
    of_sessions = sessions(
        *(
            {"scheduled_date": D - timedelta(days=ago), "tutor_id": f"t{ago}", "overall_rating": 4}
            for ago in AGO
        )
    )
    of_events = events(
        *({"event_date": D - timedelta(days=ago)} for ago in AGO),
        {"event_date": D - timedelta(days=3), "response_time_minutes": 1.0},
    )
    store_together(tmp_path, "sessions_snapshot", of_sessions.collect(), "scheduled_date")
    store_together(tmp_path, "tutor_events_snapshot", of_events.collect(), "event_date")
    return PartitionStore(str(tmp_path))


# A snapshot that was stored with other windows holds other days than are asked for.
@pytest.mark.parametrize("days", [DAYS, DAYS - 1, DAYS + 9])
def test_rows_by_day_are_those_of_each_snapshot(partitions: PartitionStore, days: int) -> None:
    keys = [str(day) for day in DATES]

    found = read_volumes(partitions, keys, days=days)

    for key in keys:
        for asset, count, by_day in (
            ("sessions_snapshot", sessions_by_day, found.sessions),
            ("tutor_events_snapshot", events_by_day, found.events),
        ):
            rows = scan_partition(partitions.path(asset, key))
            assert_frame_equal(by_day[key], count(rows).collect())
    logins = found.by_day("logins", str(D))
    assert logins.filter(date=D - timedelta(days=3))["rows"].to_list() == [1]


def test_without_a_snapshot_there_are_no_rows(tmp_path: Path) -> None:
    found = read_volumes(PartitionStore(str(tmp_path)), [str(D)], days=DAYS)

    assert found.by_day("sessions", str(D)).is_empty()
    assert found.by_day("logins", str(D)).is_empty()


def test_unknown_tutors_are_those_of_each_snapshot(partitions: PartitionStore) -> None:
    def with_tutors(day: date, *tutors: str) -> None:
        known = roster(*tutors).collect()
        store(partitions.path("tutor_roster", str(day)), known.head(1))
        store(partitions.path("tutors_left_out", str(day)), known.tail(-1))

    with_tutors(DATES[0], "t5", "t4")
    with_tutors(DATES[1], "t5", "t4", "t3", "t2", "t1")

    found = unknown_tutors(partitions, [str(day) for day in DATES])

    of_first, of_second, of_third = (found[str(day)] for day in DATES)
    assert of_first is not None
    assert sorted(of_first.rows()) == [("t3", 1)]
    assert of_second is not None
    assert of_second.is_empty()
    assert of_third is None
