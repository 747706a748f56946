"""Runs whose shards are computed by two Dask workers, against runs in one process."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.writing import (
    WritingReport,
    WritingTask,
    sum_of_summaries,
    write_table,
)
from tutormax_assets.database.date_locks import DateLocks, is_held
from tutormax_assets.database.faults import retrying
from tutormax_assets.dates import midnight
from tutormax_assets.settings import load_settings
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.files import StorageError
from tutormax_assets.storage.partition import (
    list_partition,
    open_partition,
    partition_of,
    store_parts,
    stored_files,
)
from tutormax_assets.storage.shards import ALL_IN_ONE
from tutormax_assets_tests.compute.clusters import PATIENCE, ROOT, DaskCluster, until
from tutormax_assets_tests.conftest import (
    PARQUET_ASSETS,
    PASSWORD,
    Platform,
    captured_log,
    new_database,
    open_platform,
)

# One process runs them all, so that there is one cluster.
pytestmark = [pytest.mark.extended, pytest.mark.xdist_group("runs on a cluster")]

LOG = logging.getLogger("tutormax_assets.runs")
TIMES = ("created_at", "updated_at")
DAYS = ("2025-11-06", "2025-11-07")
SHARDS = 4

POISON = """
import os, signal
import tutormax_assets.compute.tasks.windows as windows

compute = windows.compute_windows_and_edges

def poisoned(roster, *arguments, **options):
    if {!r} in roster.collect()["tutor_id"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(roster, *arguments, **options)

windows.compute_windows_and_edges = poisoned
"""
"""Lets each worker die of a tutor."""

Stored = Mapping[tuple[str, str], pl.DataFrame]


@pytest.fixture(scope="module")
def platform(
    server_url: sa.URL, golden_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """The platform of the golden rows, computed by this process."""
    home = tmp_path_factory.mktemp("home")
    with (
        new_database(server_url, template=golden_template) as url,
        open_platform(url, home, TUTORMAX_SHARDS=str(SHARDS)) as opened,
    ):
        opened.run(*DAYS)
        yield opened


@pytest.fixture(scope="module")
def expected(platform: Platform) -> Stored:
    return stored(platform)


@pytest.fixture(scope="module")
def table(platform: Platform, expected: Stored) -> pl.DataFrame:
    return platform.metrics()


@pytest.fixture(scope="module")
def shared_cluster(
    platform: Platform, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaskCluster]:
    with closing(DaskCluster(tmp_path_factory.mktemp("dask"), allowed_failures=3)) as cluster:
        cluster.start_scheduler()
        yield cluster


@pytest.fixture
def cluster(
    shared_cluster: DaskCluster,
    platform: Platform,
    expected: Stored,
    table: pl.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> DaskCluster:
    """Two workers, nothing computed, and an environment that leads there."""
    url = platform.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", url)
    monkeypatch.setenv("TUTORMAX_HOME", str(platform.settings.home_path))
    monkeypatch.setenv("TUTORMAX_SHARDS", str(SHARDS))
    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", shared_cluster.address)
    shared_cluster.repair(2)
    platform.execute("DELETE FROM tutor_performance_metrics")
    return shared_cluster


def compute_of_environment() -> Compute:
    return Compute(load_settings(), PlatformDatabase(load_settings()))


def on_cluster(platform: Platform) -> Platform:
    """The platform, computed where the environment says."""
    return replace(platform, settings=load_settings())


def stored(platform: Platform) -> Stored:
    return {
        (asset, day): platform.partition(asset, day).sort(pl.all())
        for asset in PARQUET_ASSETS
        for day in DAYS
    }


def assert_as_expected(platform: Platform, expected: Stored, table: pl.DataFrame) -> None:
    for name, frame in stored(platform).items():
        assert_frame_equal(frame, expected[name], check_exact=True)
    assert_frame_equal(
        platform.metrics().drop(TIMES), table.drop(TIMES), check_row_order=False, check_exact=True
    )


def test_a_worker_that_is_killed_in_a_run_costs_time_and_nothing_else(
    cluster: DaskCluster, platform: Platform, expected: Stored, table: pl.DataFrame
) -> None:
    before = {path: path.stat().st_mtime_ns for path in platform.storage.glob("*/*.json")}
    path = UPath(platform.storage) / "sessions_snapshot" / f"{DAYS[1]}.parquet"
    files = set(stored_files(path))

    def kill_one() -> None:
        until(lambda: set(stored_files(path)) - files, what="the first shard")
        cluster.workers[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with captured_log() as log:
        summaries = on_cluster(platform).run(*DAYS)
    killer.join()

    assert cluster.workers[0].wait(PATIENCE) == -signal.SIGKILL
    assert all(summary.all_saved for summary in summaries)
    assert_as_expected(platform, expected, table)
    assert all(path.stat().st_mtime_ns > mtime for path, mtime in before.items())
    said = "\n".join(log)
    assert f"Dask scheduler {cluster.address}: 2 workers with 2 threads" in said
    assert f"{DAYS[1]} shard {SHARDS - 1}: Batch 1/1 of {DAYS[1]} committed" in said


def test_a_shard_that_kills_its_workers_is_named_and_the_others_are_saved(
    platform: Platform,
    cluster: DaskCluster,
    expected: Stored,
    table: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roster = open_partition(UPath(platform.storage) / "tutor_roster" / f"{DAYS[1]}.parquet")
    culprits = roster.rows(2).scan().collect()["tutor_id"].sort().to_list()
    (tmp_path / "sitecustomize.py").write_text(POISON.format(culprits[0]))
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with closing(DaskCluster(tmp_path, allowed_failures=0)) as mortal:
        mortal.start_scheduler()
        # One dies of the shard beside others, one of it alone, and one is left.
        for _ in range(3):
            mortal.start_worker(environment=environment)
        mortal.wait_for(3)
        monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", mortal.address)
        [summary] = on_cluster(platform).run(DAYS[1])

    assert [error["tutor_id"] for error in summary.errors] == culprits
    assert "1 worker that computed it died" in summary.errors[0]["error"]
    of_day = table.filter(pl.col("calculation_date").dt.date() == date.fromisoformat(DAYS[1]))
    assert_frame_equal(
        platform.metrics().drop(TIMES),
        of_day.filter(~pl.col("tutor_id").is_in(culprits)).drop(TIMES),
        check_row_order=False,
        check_exact=True,
    )

    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", cluster.address)
    assert all(again.all_saved for again in on_cluster(platform).run(*DAYS))
    assert_as_expected(platform, expected, table)


def test_two_dates_at_once_do_not_touch_each_other(
    cluster: DaskCluster, platform: Platform, expected: Stored, table: pl.DataFrame
) -> None:
    main = "import sys; from tutormax_assets.cli import main; main()"
    command = [sys.executable, "-c", main, "run", "--quiet", "--date"]
    runs = [
        subprocess.Popen([*command, day], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for day in DAYS
    ]
    said = [run.communicate(timeout=120)[0].decode() for run in runs]

    assert [run.returncode for run in runs] == [0, 0], said
    assert_as_expected(platform, expected, table)


def test_a_shard_that_is_computed_again_counts_once(
    cluster: DaskCluster, platform: Platform, expected: Stored, table: pl.DataFrame
) -> None:
    day = date.fromisoformat(DAYS[1])
    path = UPath(platform.storage) / "tutor_tiers" / f"{DAYS[1]}.parquet"
    again = {
        f"{attempt} of shard {number}": WritingTask(
            open_partition(path).rows(number),
            day,
            midnight(day, timezone="UTC"),
            batch_size=5,
            max_retries=0,
            retry_delay_seconds=0,
        )
        for attempt in ("first", "second")
        for number in range(SHARDS)
    }

    with closing(compute_of_environment()) as compute:
        reports = [report for _, report in compute.map(write_table, again, log=LOG)]

    of_day = table.filter(pl.col("calculation_date").dt.date() == day)
    total = sum_of_summaries(report.summary for report in reports)
    assert (total.inserted, total.unchanged) == (len(of_day), len(of_day))
    assert PASSWORD.encode() not in pickle.dumps(again)
    assert_frame_equal(
        platform.metrics().drop(TIMES), of_day.drop(TIMES), check_row_order=False, check_exact=True
    )


def test_a_shard_of_a_run_that_has_ended_is_not_written(
    cluster: DaskCluster, platform: Platform, table: pl.DataFrame
) -> None:
    day = date.fromisoformat(DAYS[1])
    path = UPath(platform.storage) / "tutor_tiers" / f"{DAYS[1]}.parquet"
    rows = open_partition(path).rows(0)
    once = retrying(max_retries=0, retry_delay_seconds=0, log=LOG)
    locks = DateLocks(platform.engine, [DAYS[1]], retrying=once, log=LOG)

    def written(holder: int | None) -> WritingReport:
        instant = midnight(day, timezone="UTC")
        task = WritingTask(rows, day, instant, 5, 0, 0, holder)
        with closing(compute_of_environment()) as compute:
            [(_, report)] = compute.map(write_table, {"shard": task}, log=LOG)
        return report

    locks.take()
    holder = locks.holder
    locks.release()
    until(lambda: not held(platform, holder), what="the server to notice")
    late = written(holder)

    assert holder is not None
    assert locks.holder is None
    assert str(late.failure).startswith("The run that these rows are of has ended")
    assert late.summary.successful == 0
    assert platform.metrics().is_empty()
    locks.take()
    in_time = written(locks.holder)
    locks.release()
    assert in_time.failure is None
    assert in_time.summary.inserted == len(platform.metrics()) == rows.count


def held(platform: Platform, holder: int | None) -> bool:
    assert holder is not None
    with platform.engine.connect() as connection:
        return bool(connection.scalar(is_held(holder)))


def test_a_storage_that_is_not_shared_is_told(
    tmp_path: Path,
) -> None:
    path = UPath(tmp_path) / "tutor_tiers" / f"{DAYS[1]}.parquet"
    rows = pl.LazyFrame({"tutor_id": ["a"]})
    partition = partition_of(path, ALL_IN_ONE, [store_parts(path, rows)])
    [part] = path.iterdir()
    part.unlink()

    with pytest.raises(StorageError, match=r"lacks 1 of 1 files .* TUTORMAX_STORAGE be one that"):
        list_partition(partition)
