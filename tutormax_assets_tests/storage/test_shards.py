"""Tutors divided into shards: all of them, each once, and the same results."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from tutormax_assets.compute import KilledShardError, tasks
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.faults import may_pass
from tutormax_assets.metrics import quality
from tutormax_assets.metrics.schemas import SourceEvents, SourceSessions
from tutormax_assets.settings import load_settings
from tutormax_assets.source.postgres import (
    PlatformRows,
    SharedView,
    SnapshotGoneError,
    Source,
    View,
    open_view,
)
from tutormax_assets.storage.partition import open_partition
from tutormax_assets.storage.shards import ALL_IN_ONE, TUTORS_OF_A_SHARD, Shards, TutorRange
from tutormax_assets.storage.store import partition_path
from tutormax_assets_tests.conftest import PARQUET_ASSETS, Platform, captured_log

DAY = "2025-11-07"
TIMES = ("created_at", "updated_at")
_WINDOWS = ("metrics_7day", "metrics_30day", "metrics_90day", "window_edges")
_TIERS = ("tutor_tiers", "tutor_tier_reasons")
_READ = tuple(asset for asset in PARQUET_ASSETS if asset.endswith(("_snapshot", "_set_aside")))
AFFECTED = {
    "platform_snapshot": (*_READ, *_WINDOWS, *_TIERS),
    "window_metrics": (*_WINDOWS, *_TIERS),
    "tutor_tiers": _TIERS,
}
"""The assets that lack a shard which fails in a step."""


@given(st.sets(st.text(max_size=3), max_size=30), st.integers(0, 40))
def test_every_tutor_is_in_the_range_of_one_shard(ids: set[str], count: int) -> None:
    tutor_ids = pl.Series(sorted(ids), dtype=pl.String)

    shards = Shards.of(tutor_ids, count=count)

    assert list(shards.bounds) == sorted(set(shards.bounds), key=str.encode)
    assert len(shards) == max(1, min(count or 1, len(ids)))
    numbers = pl.DataFrame({"tutor_id": tutor_ids}).select(shards.number()).to_series().to_list()
    for tutor_id, number in zip(tutor_ids, numbers, strict=True):
        lower, upper = shards.range_of([number])
        assert (lower or "").encode() <= tutor_id.encode()
        assert upper is None or tutor_id.encode() < upper.encode()
        assert shards.numbers_of([tutor_id]) == {number}
    sizes = [numbers.count(number) for number in range(len(shards))]
    assert max(sizes) - min(sizes) <= 1


def test_the_number_of_shards_follows_from_the_tutors() -> None:
    tutor_ids = pl.int_range(2 * TUTORS_OF_A_SHARD + 1, eager=True).cast(pl.String)

    assert len(Shards.of(tutor_ids)) == 3
    assert Shards.of(tutor_ids[:TUTORS_OF_A_SHARD]) == ALL_IN_ONE


def test_neighbouring_shards_have_one_range() -> None:
    shards = Shards(("b", "d", "x"))

    assert shards.range_of([1, 2]) == TutorRange("b", "x")
    assert shards.range_of(range(4)) == TutorRange()
    assert shards.of_numbers([1, 2]) == Shards(("d",))
    assert shards.of_numbers([3]) == shards.of_numbers([0]) == ALL_IN_ONE


def rows(view: View, folder: Path, tutor_range: TutorRange = TutorRange()) -> PlatformRows:  # noqa: B008
    start, end = datetime(2025, 8, 1, tzinfo=UTC), datetime(2025, 12, 1, tzinfo=UTC)
    return view.rows(folder, start=start, end=end, tutor_range=tutor_range)


def collected(parts: PlatformRows) -> Iterator[pl.DataFrame]:
    yield pl.concat(pl.collect_all(parts.sessions))
    yield pl.concat(pl.collect_all(parts.events))


def test_ranges_of_tutors_read_apart_are_what_is_read_at_once(
    small_platform: Platform, tmp_path: Path
) -> None:
    with open_view(Source(small_platform.url)) as view:
        whole = list(collected(rows(view, tmp_path)))
        shards = Shards.of(view.tutors()["tutor_id"], count=4)
        parts = [
            list(collected(rows(view, tmp_path, shards.range_of([number])))) for number in range(4)
        ]
    for of_table, schema, expected in zip(
        zip(*parts, strict=True), (SourceSessions, SourceEvents), whole, strict=True
    ):
        assert all(len(part) for part in of_table)
        assert_frame_equal(pl.concat(of_table), expected, check_row_order=False)
        assert expected.schema == pl.Schema(schema)


def test_who_is_sent_a_view_sees_the_same_instant_and_no_password(
    small_platform: Platform, tmp_path: Path
) -> None:
    url = small_platform.url.set(password="se/cret")
    with open_view(Source(url), tutor_ids=["t1"]) as view:
        sent = pickle.dumps(view.share())
        small_platform.execute("DELETE FROM student_feedback")
        small_platform.execute("DELETE FROM tutor_events")
        shared: SharedView = pickle.loads(sent)
        received = shared.open(Source(url))
        before, after = (list(collected(rows(one, tmp_path))) for one in (view, received))

    assert b"se/cret" not in sent
    assert b"se%2Fcret" not in sent
    assert (received.read_at, received.snapshot) == (view.read_at, view.snapshot)
    assert received.tutor_ids == ("t1",)
    for one, other in zip(before, after, strict=True):
        assert_frame_equal(one, other, check_row_order=False)


def test_a_view_that_was_sent_lasts_as_long_as_the_transaction_it_is_of(
    small_platform: Platform, tmp_path: Path
) -> None:
    timeouts = Timeouts(statement_seconds=5)
    idle = "SELECT current_setting('idle_in_transaction_session_timeout')"
    with open_view(Source(small_platform.url, timeouts)) as view:
        assert view._cursor is not None
        shared = view.share()
        assert shared is not None
        received = shared.open(view.source)
        view._cursor.execute(idle)
        assert pl.DataFrame(view._cursor.fetch_arrow()).item() == "0"

    with pytest.raises(SnapshotGoneError, match="The transaction of the run has ended") as error:
        rows(received, tmp_path)
    assert may_pass(error.value)


def test_what_may_pass_while_a_group_is_read_lets_the_run_read_all_again(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_SHARDS", "4")
    monkeypatch.setattr(Compute, "groups", lambda *_, **__: [[0, 1], [2, 3]])
    clean = quality.good_events
    calls: list[int] = []

    def gone_once(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 2:
            raise SnapshotGoneError("gone")
        return clean(*arguments, **options)

    monkeypatch.setattr(quality, "good_events", gone_once)
    with captured_log() as log:
        [summary] = Platform(load_settings(), small_platform.engine).run(DAY, max_retries=1)

    assert summary.all_saved
    assert len(calls) == 4
    assert any("gone; trying again" in line for line in log), log


def stored(platform: Platform) -> dict[str, pl.DataFrame]:
    found = {asset: platform.partition(asset, DAY) for asset in PARQUET_ASSETS}
    return {asset: frame.sort(pl.all()) for asset, frame in found.items()}


def test_shards_do_not_show_whatever_their_number_and_however_it_changes(
    computed_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, table = stored(computed_platform), computed_platform.metrics()
    ids = expected["tutor_roster"]["tutor_id"].to_list()
    # A filtered run keeps the shards that are there.
    for shards, tutor_ids, kept in ((7, None, 7), (3, ids[2:9], 7), (10_000, None, len(ids))):
        monkeypatch.setenv("TUTORMAX_SHARDS", str(shards))
        sharded = Platform(load_settings(), computed_platform.engine)

        [summary] = sharded.run(DAY, tutor_ids=tutor_ids)

        assert summary.all_saved
        for asset, frame in stored(sharded).items():
            assert_frame_equal(frame, expected[asset], check_exact=True)
            path = partition_path(str(sharded.storage), asset, DAY)
            # What moved is one file, however many shards there are.
            parts = 1 if asset == TUTOR_TIER_CHANGES else kept
            assert len(open_partition(path).parts) == parts
        assert_frame_equal(sharded.metrics(), table, check_row_order=False)


def poison(monkeypatch: pytest.MonkeyPatch, step: str, tutor_id: str) -> None:
    """Let a step fail wherever it meets the tutor."""

    def instead(of: Any, name: str, tasted: Callable[..., pl.LazyFrame]) -> None:
        function = getattr(of, name)

        def poisoned(*arguments: Any, **options: Any) -> Any:
            if tutor_id in tasted(*arguments).collect()["tutor_id"]:
                raise KilledShardError("poisoned")
            return function(*arguments, **options)

        monkeypatch.setattr(of, name, poisoned)

    if step == "platform_snapshot":
        instead(tasks.snapshots, "store_parts", lambda path, rows: rows)
    elif step == "window_metrics":
        instead(tasks.windows, "compute_windows_and_edges", lambda roster, *_: roster)
    else:
        instead(tasks.tiers, "performance_tiers", lambda metrics: metrics)


def test_a_shard_that_fails_in_any_step_is_named_and_the_others_are_saved(
    computed_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, table = stored(computed_platform), computed_platform.metrics()
    ids = expected["tutor_roster"]["tutor_id"].to_list()
    culprits = ids[len(ids) * 3 // 5 : len(ids) * 4 // 5]
    saved = ~pl.col("tutor_id").is_in(culprits)
    monkeypatch.setenv("TUTORMAX_SHARDS", "5")
    sharded = Platform(load_settings(), computed_platform.engine)
    for step, groups in (
        ("platform_snapshot", [[0, 1], [2, 3, 4]]),
        ("platform_snapshot", [[0, 1, 2, 3, 4]]),
        ("window_metrics", [[0, 1, 2, 3, 4]]),
        ("tutor_tiers", [[0, 1, 2, 3, 4]]),
    ):
        sharded.execute("DELETE FROM tutor_performance_metrics")
        with monkeypatch.context() as patch, captured_log() as log:
            patch.setattr(Compute, "groups", lambda *_, groups=groups, **__: groups)
            poison(patch, step, culprits[1])
            [summary] = sharded.run(DAY)

        assert [error["tutor_id"] for error in summary.errors] == culprits
        assert {error["error"] for error in summary.errors} == {f"{DAY} shard 3: poisoned"}
        assert (summary.total_tutors, summary.failed) == (len(ids), len(culprits))
        assert_frame_equal(
            sharded.metrics().drop(TIMES), table.filter(saved).drop(TIMES), check_row_order=False
        )
        for asset, frame in stored(sharded).items():
            of_step = asset in AFFECTED[step]
            path = partition_path(str(sharded.storage), asset, DAY)
            partition, rows = open_partition(path), expected[asset]
            assert partition.failed == ({3: "poisoned"} if of_step else {})
            left = rows.filter(partition.shards.number() != 3)
            assert_frame_equal(frame, left if of_step else rows, check_exact=True)
        said = f"{len(culprits)} tutors have no rows; shard 3: poisoned. Fix the cause"
        warned = [line for line in log if "check every_tutor_has_a_tier: 1 of 5 shards" in line]
        assert [said in line for line in warned] == [True]


def test_tutors_of_a_shard_that_failed_can_be_run_by_themselves(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_SHARDS", "5")
    sharded = Platform(load_settings(), small_platform.engine)
    active = sa.text("SELECT min(tutor_id) FROM tutors WHERE status = 'active'")
    with sharded.engine.connect() as connection:
        first = str(connection.scalar(active))
    with monkeypatch.context() as patch:
        poison(patch, "window_metrics", first)
        [summary] = sharded.run(DAY)
    culprits = [error["tutor_id"] for error in summary.errors]

    [summary] = sharded.run(DAY, tutor_ids=culprits[:2])

    assert (summary.total_tutors, summary.all_saved) == (2, True)
    path = partition_path(str(sharded.storage), "tutor_tiers", DAY)
    partition = open_partition(path)
    assert partition.failed == {0: "poisoned"}
    assert partition.rows(0).count == 3 * 2
    assert set(sharded.metrics()["tutor_id"]) & set(culprits) == set(culprits[:2])

    [summary] = sharded.run(DAY)
    assert (summary.all_saved, open_partition(path).failed) == (True, {})
    assert set(culprits) < set(sharded.metrics()["tutor_id"])


def test_what_is_done_with_a_shard_needs_no_dagster() -> None:
    modules = ("snapshots", "windows", "tiers", "writing")
    imports = "; ".join(f"import tutormax_assets.compute.tasks.{module}" for module in modules)
    look = f"import sys; {imports}; sys.exit('dagster' in sys.modules)"

    subprocess.run([sys.executable, "-c", look], check=True)
