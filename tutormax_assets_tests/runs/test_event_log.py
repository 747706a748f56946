"""Dagster's event log stays open while runs are executed, and holds what it would hold anyway."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from tutormax_assets.runs.event_log import event_log_kept_open

KEYS = ["2025-11-06", "2025-11-07"]


@dg.asset(partitions_def=dg.StaticPartitionsDefinition(KEYS))
def rows() -> int:
    return 1


@dg.asset_check(asset=rows, blocking=True)
def they_are_there() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


job = dg.Definitions(
    assets=[rows], asset_checks=[they_are_there], jobs=[dg.define_asset_job("job", [rows])]
).resolve_job_def("job")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}")
    with dg.DagsterInstance.from_config(str(tmp_path)) as opened:
        yield opened


def run(instance: dg.DagsterInstance, key: str = KEYS[0]) -> str:
    return job.execute_in_process(instance=instance, partition_key=key).run_id


def recorded(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    return [
        entry.dagster_event.event_type_value
        for entry in instance.all_logs(run_id)
        if entry.dagster_event is not None
    ]


@contextmanager
def connections() -> Iterator[list[str]]:
    """The SQLite files that are connected to within the block, once for each time."""
    opened: list[str] = []

    def note(connection: Any, _: object) -> None:
        opened.append(Path(connection.execute("PRAGMA database_list").fetchone()[2]).stem)

    sa.event.listen(sa.Engine, "connect", note)
    try:
        yield opened
    finally:
        sa.event.remove(sa.Engine, "connect", note)


def test_the_same_events_are_recorded(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    closed = run(instance)
    with event_log_kept_open(instance):
        kept_open = run(instance)

    with dg.DagsterInstance.from_config(str(tmp_path)) as another:
        assert recorded(another, kept_open) == recorded(another, closed)


def test_an_event_needs_no_new_connection(instance: dg.DagsterInstance) -> None:
    with event_log_kept_open(instance):
        dagster_run = instance.get_run_by_id(run(instance))
        assert dagster_run is not None
        with connections() as opened:
            for _ in range(3):
                instance.report_engine_event("Something new", dagster_run)
                assert instance.fetch_materializations(rows.key, limit=1).records

    assert opened == []


def test_runs_one_after_the_other_and_readers_see_everything(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    with event_log_kept_open(instance), dg.DagsterInstance.from_config(str(tmp_path)) as reader:
        first, second = run(instance, KEYS[0]), run(instance, KEYS[1])
        again = recorded(instance, first)

        assert recorded(reader, first) == again == recorded(reader, second)
        assert set(reader.get_materialized_partitions(rows.key)) == set(KEYS)
        events = reader.get_records_for_run(
            second, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
        ).records
        assert len(events) == 1


def test_afterwards_it_is_as_before(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    with event_log_kept_open(instance):
        run(instance)

    assert not list(tmp_path.rglob("*.db-wal"))
    assert "ASSET_MATERIALIZATION" in recorded(instance, run(instance))


def test_who_watches_a_run_is_told_of_its_events(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    with event_log_kept_open(instance), dg.DagsterInstance.from_config(str(tmp_path)) as ui:
        dagster_run = instance.get_run_by_id(run(instance))
        assert dagster_run is not None
        cursor = ui.get_records_for_run(dagster_run.run_id).cursor
        told = threading.Event()
        ui.watch_event_logs(dagster_run.run_id, cursor, lambda *_: told.set())

        instance.report_engine_event("Something new", dagster_run)

        assert told.wait(timeout=30)


def test_a_log_that_is_no_file_is_left_alone() -> None:
    with dg.DagsterInstance.ephemeral() as instance, event_log_kept_open(instance):
        assert "ASSET_MATERIALIZATION" in recorded(instance, run(instance))
