"""The step that computes the windows: which of them, from which partitions, and what it records."""

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks import dates
from tutormax_assets.defs.assets.window_metrics import window_metrics_assets
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.settings import Settings
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.partition import delete_files, scan_partition
from tutormax_assets.storage.store import PartitionStore, partition_path
from tutormax_assets_tests.conftest import Platform, store
from tutormax_assets_tests.metrics.rows import events, roster, sessions

WINDOWS = (7, 30, 90)
SNAPSHOTS = ("tutor_roster", "sessions_snapshot", "tutor_events_snapshot")
DAYS = [date(2025, 11, day) for day in (5, 6, 7)]


@pytest.fixture
def base_path(platform: Platform, tmp_path: Path) -> str:
    """Snapshots of three dates, each of them read when the sessions had other ratings."""
    base_path = str(tmp_path / "storage")
    for rating, day in enumerate(DAYS, 3):
        frames = {
            "tutor_roster": roster("t1", "t2"),
            "sessions_snapshot": sessions(
                *(
                    {"scheduled_date": day - timedelta(days=ago), "overall_rating": rating}
                    for ago in (1, 2, 7, 8, 31)
                )
            ),
            "tutor_events_snapshot": events({"event_date": day - timedelta(days=30)}),
        }
        for asset, rows in frames.items():
            path = partition_path(base_path, asset, day.isoformat())
            store(path, rows.collect())
    return base_path


def materialize(
    base_path: str, days: Sequence[date], *, windows: Sequence[int] = WINDOWS
) -> dict[tuple[str, str], dict[str, Any]]:
    """Compute windows of a range of dates; the metadata by asset and date."""
    daily = dg.DailyPartitionsDefinition("2025-11-01")
    result = dg.materialize(
        [
            *(dg.AssetSpec(asset, partitions_def=daily) for asset in SNAPSHOTS),
            window_metrics_assets(daily, dg.BackfillPolicy.single_run(), windows=WINDOWS),
        ],
        selection=[f"metrics_{window}day" for window in windows],
        resources={
            "compute": Compute(Settings(), PlatformDatabase(Settings())),
            "metrics_policy": MetricsPolicy(base=Policy()),
            "partition_store": PartitionStore(base_path),
        },
        tags={
            "dagster/asset_partition_range_start": days[0].isoformat(),
            "dagster/asset_partition_range_end": days[-1].isoformat(),
        },
    )
    return {
        (event.asset_key.to_user_string(), str(event.partition)): {
            name: value.value
            for name, value in event.step_materialization_data.materialization.metadata.items()
        }
        for event in result.get_asset_materialization_events()
        if event.asset_key
    }


def stored(base_path: str, window: int, day: date) -> pl.DataFrame:
    path = partition_path(base_path, f"metrics_{window}day", day.isoformat())
    return scan_partition(path).collect()


def test_each_date_is_computed_from_its_own_partitions(base_path: str) -> None:
    materialize(base_path, DAYS)

    columns = ["tutor_id", "window", "sessions_completed", "avg_rating"]
    for rating, day in enumerate(DAYS, 3):
        for window, count in zip(WINDOWS, [3, 4, 5], strict=True):
            assert stored(base_path, window, day).select(columns).rows() == [
                ("t1", f"{window}day", count, rating),
                ("t2", f"{window}day", 0, None),
            ]


def test_only_selected_windows_are_computed_and_come_out_the_same(base_path: str) -> None:
    materialize(base_path, DAYS)
    together = stored(base_path, 30, DAYS[1])
    path = partition_path(base_path, "metrics_30day", DAYS[1].isoformat())
    delete_files(path)

    found = materialize(base_path, [DAYS[1]], windows=[30])

    assert set(found) == {("metrics_30day", DAYS[1].isoformat())}
    assert_frame_equal(stored(base_path, 30, DAYS[1]), together, check_exact=True)


@pytest.mark.parametrize("tutors_at_once", [0, 4, 1000])
def test_how_many_dates_are_computed_at_once_does_not_show(
    base_path: str, monkeypatch: pytest.MonkeyPatch, tutors_at_once: int
) -> None:
    materialize(base_path, [DAYS[0]])
    alone = stored(base_path, 90, DAYS[0])
    monkeypatch.setattr(dates, "_TUTORS_AT_ONCE", tutors_at_once)

    materialize(base_path, DAYS)

    assert_frame_equal(stored(base_path, 90, DAYS[0]), alone, check_exact=True)
    assert stored(base_path, 90, DAYS[2])["avg_rating"].to_list() == [5, None]


def test_the_computing_of_a_date_is_counted_once(base_path: str) -> None:
    found = materialize(base_path, DAYS, windows=[30, 90])

    assert len(found) == 2 * len(DAYS)
    for (asset, _), metadata in found.items():
        assert ("all_windows_compute_seconds" in metadata) == (asset == "metrics_30day")


def test_a_materialization_says_what_its_partition_holds(base_path: str) -> None:
    found = materialize(base_path, DAYS, windows=[7])

    for day in DAYS:
        path = partition_path(base_path, "metrics_7day", day.isoformat())
        metadata = found["metrics_7day", day.isoformat()]
        timeless = {name: metadata[name] for name in metadata if not name.endswith("_seconds")}
        assert timeless == {
            "path": str(path),
            "shards": 1,
            "size_bytes": sum(part.stat().st_size for part in path.iterdir()),
            "dagster/partition_row_count": 2,
        }
        assert metadata["write_seconds"] > 0
