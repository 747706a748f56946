"""The tasks of the windows of several dates, and what is collected of them."""

from datetime import date
from pathlib import Path

import polars as pl
import pytest
from upath import UPath

from tutormax_assets.compute import ShardsError
from tutormax_assets.compute.tasks import dates
from tutormax_assets.compute.tasks.windows import (
    WindowsPlan,
    WindowsReport,
    collect_windows,
    plan_windows,
)
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import WindowMetrics
from tutormax_assets.storage.partition import Partition, partition_of, store_parts, store_slices
from tutormax_assets.storage.shards import ALL_IN_ONE, Shards

SMALL, LARGE = "2025-11-06", "2025-11-07"
BY_DATE = {SMALL: ALL_IN_ONE, LARGE: Shards(("b",))}


ASSETS = ("metrics_7day", "metrics_30day", "window_edges")


def partitions(tmp_path: Path, asset: str, dates: dict[str, Shards]) -> dict[str, Partition]:
    found = {}
    for key, shards in dates.items():
        path = UPath(tmp_path / asset / key)
        rows = pl.LazyFrame({"tutor_id": ["a", "b"]})
        found[key] = partition_of(path, shards, [store_parts(path, rows, shards=shards)])
    return found


def plan_of(tmp_path: Path, dates: dict[str, Shards]) -> WindowsPlan:
    return plan_windows(
        partitions(tmp_path, "roster", dates),
        partitions(tmp_path, "sessions", dates),
        partitions(tmp_path, "events", dates),
        paths={asset: {key: UPath(tmp_path / asset / key) for key in dates} for asset in ASSETS},
        policy=Policy(),
    )


def report_of(plan: WindowsPlan, name: str) -> WindowsReport:
    empty = WindowMetrics.create_empty().lazy()
    task = plan.tasks[name]
    return WindowsReport(
        {
            asset: {
                day: store_parts(path, empty, first=task.shard)
                for day, path in zip(task.reference_dates, paths, strict=True)
            }
            for asset, paths in task.paths.items()
        },
        compute_seconds=0.5,
    )


def test_dates_whose_rows_are_in_the_same_files_are_one_task_and_others_are_one_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [date(2025, 11, day) for day in range(1, 5)]
    together = {
        asset: stored_together(tmp_path, asset, days) for asset in ("roster", "sessions", "events")
    }
    apart = {
        asset: partitions(tmp_path, asset, {LARGE: BY_DATE[LARGE], SMALL: ALL_IN_ONE})
        for asset in together
    }
    monkeypatch.setattr(dates, "_TUTORS_AT_ONCE", 6)

    plan = plan_windows(
        *({**together[asset], **apart[asset]} for asset in together),
        paths={asset: dict.fromkeys(map(str, [*days, SMALL, LARGE]), UPath()) for asset in ASSETS},
        policy=Policy(),
    )

    assert {
        name: [str(day) for day in task.reference_dates] for name, task in plan.tasks.items()
    } == {
        "2025-11-01 to 2025-11-03": ["2025-11-01", "2025-11-02", "2025-11-03"],
        "2025-11-04": ["2025-11-04"],
        f"{LARGE} shard 0": [LARGE],
        f"{LARGE} shard 1": [LARGE],
        SMALL: [SMALL],
    }
    task = plan.tasks["2025-11-01 to 2025-11-03"]
    assert task.roster.scan().collect()["tutor_id"].to_list() == ["a", "b"]
    assert task.sessions.scan().collect()["tutor_id"].to_list() == list("abcde")


def stored_together(tmp_path: Path, asset: str, days: list[date]) -> dict[str, Partition]:
    """Partitions in one file, in which the rows of neighbouring dates overlap."""
    rows = pl.DataFrame({"tutor_id": list("abcdef")})
    paths = {day: UPath(tmp_path / asset / str(day)) for day in days}
    slices = {day: (0 if asset == "roster" else place, 2) for place, day in enumerate(days)}
    if asset == "sessions":
        slices = {day: (place, 3) for place, day in enumerate(days)}
    stored = store_slices(paths, rows, slices)
    return {str(day): partition_of(path, ALL_IN_ONE, [stored[day]]) for day, path in paths.items()}


def test_what_was_computed_is_a_partition_for_each_window_and_date(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, BY_DATE)

    found = collect_windows(plan, {name: report_of(plan, name) for name in plan.tasks}, {})

    assert {asset: list(of_asset) for asset, of_asset in found.partitions.items()} == {
        asset: [SMALL, LARGE] for asset in ASSETS
    }
    assert len(found.partitions["window_edges"][LARGE].parts) == 2
    assert found.partitions["metrics_7day"][LARGE].path == UPath(tmp_path / "metrics_7day" / LARGE)
    task = plan.tasks[SMALL]
    assert (task.windows, task.with_edges) == ([7, 30], True)
    assert found.compute_seconds == {SMALL: 0.5, LARGE: 1.0}


def test_a_shard_that_fails_is_named_in_its_date_and_a_date_that_fails_is_raised(
    tmp_path: Path,
) -> None:
    plan = plan_of(tmp_path, BY_DATE)
    lost = f"{LARGE} shard 1"
    reports = {name: report_of(plan, name) for name in plan.tasks if name != lost}

    found = collect_windows(plan, reports, {lost: ValueError("poisoned")})

    assert {key: of.failed for key, of in found.partitions["metrics_7day"].items()} == {
        SMALL: {},
        LARGE: {1: "poisoned"},
    }
    del reports[SMALL]
    with pytest.raises(ShardsError, match=f"{SMALL}: gone"):
        collect_windows(plan, reports, {SMALL: ValueError("gone")})
