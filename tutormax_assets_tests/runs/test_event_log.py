"""The event log whose connections stay open holds what Dagster's own would hold."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from tutormax_assets.runs import event_log
from tutormax_assets.runs.event_log import PooledSqliteEventLogStorage
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.private_dagster import SqliteEventLogStorage
from tutormax_assets.settings import Settings

ASSETS = {
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_OBSERVATION,
}
KEYS = ["2025-11-06", "2025-11-07"]
WRITTEN_AT = {"create_timestamp", "created_timestamp", "migration_completed"}


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
    with opened(tmp_path) as instance:
        yield instance


@contextmanager
def opened(home: Path) -> Iterator[dg.DagsterInstance]:
    """An instance with the package's configuration."""
    with dagster_instance(Settings(dagster_home=home)) as instance:
        yield instance


@contextmanager
def of_dagster(home: Path) -> Iterator[dg.DagsterInstance]:
    """An instance with Dagster's own event log, in the same files."""
    home.mkdir(exist_ok=True)
    (home / "dagster.yaml").unlink(missing_ok=True)
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield instance


def run(instance: dg.DagsterInstance, key: str = KEYS[0]) -> str:
    return job.execute_in_process(instance=instance, partition_key=key).run_id


def recorded(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    return [
        entry.dagster_event.event_type_value
        for entry in instance.all_logs(run_id)
        if entry.dagster_event is not None
    ]


def stored(home: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of all tables of the log, without the times at which they were written."""
    rows = {}
    for path in (home / "history" / "runs").glob("*.db"):
        engine = sa.create_engine(f"sqlite:///{path}")
        tables = sa.MetaData()
        tables.reflect(engine)
        with engine.connect() as connection:
            for table in tables.tables.values():
                found = connection.execute(table.select()).mappings()
                rows[f"{path.name} {table}"] = [
                    {name: value for name, value in row.items() if name not in WRITTEN_AT}
                    for row in found
                ]
        engine.dispose()
    return rows


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


def test_the_same_rows_are_stored(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    run_id = run(instance)
    events = instance.all_logs(run_id)
    ways: list[tuple[Any, str]] = [
        (opened, "alone"),
        (opened, "in a batch"),
        (of_dagster, "by Dagster"),
    ]
    for open_instance, name in ways:
        with open_instance(tmp_path / name) as another:
            log = another.event_log_storage
            if name == "in a batch":
                log.store_event_batch(events[:5])
                log.store_event_batch(events[5:])
            else:
                for event in events:
                    log.store_event(event)

    pooled, batched, dagster = (stored(tmp_path / name) for _, name in ways)
    assert pooled == batched == dagster
    assert {name for name, found in pooled.items() if found} >= {
        f"{run_id}.db event_logs",
        "index.db event_logs",
        "index.db asset_keys",
        "index.db asset_check_executions",
    }


@dg.op
def tell(context: dg.OpExecutionContext) -> None:
    for asset in ("rows", "others"):
        for key in (*KEYS, KEYS[0]):
            tags = {"dagster/data_version": key}
            context.log_event(dg.AssetMaterialization(asset, partition=key, tags=tags))
    context.log_event(dg.AssetObservation("rows", partition=KEYS[1]))


@pytest.mark.parametrize("most", [1_000, 3])
def test_a_batch_of_assets_is_what_its_events_would_be_alone(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(event_log, "_MOST_IN_A_STATEMENT", most)
    of_rows = instance.all_logs(run(instance))
    of_others = instance.all_logs(
        dg.GraphDefinition("told", node_defs=[tell]).execute_in_process(instance=instance).run_id
    )
    planned, told = (
        [event for event in events if event.dagster_event_type in ASSETS]
        for events in (of_rows, of_others)
    )
    assert (len(planned), len(told)) == (2, 7)

    for open_instance, name in ((opened, "in a batch"), (of_dagster, "by Dagster")):
        with open_instance(tmp_path / name) as another:
            log = another.event_log_storage
            for batch in (planned, told, told[:1]):
                if name == "in a batch":
                    log.store_event_batch(batch)
                    continue
                for event in batch:
                    log.store_event(event)

    batched, alone = (stored(tmp_path / name) for name in ("in a batch", "by Dagster"))
    assert batched == alone
    assert len(batched["index.db asset_event_tags"]) == 8


def test_a_batch_is_recorded_in_one_transaction_or_not_at_all(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    store = PooledSqliteEventLogStorage.store_event_batch

    def count(self: PooledSqliteEventLogStorage, events: Sequence[dg.EventLogEntry]) -> None:
        batches.append(len(events))
        store(self, events)

    monkeypatch.setattr(PooledSqliteEventLogStorage, "store_event_batch", count)
    events = instance.all_logs(run(instance))
    # Dagster hands over what a run is going to do.
    assert batches == [2]

    def fail(*_: object) -> None:
        raise RuntimeError("no room")

    with opened(tmp_path / "another") as another:
        another.event_log_storage.store_event(events[0])
        before = stored(tmp_path / "another")
        with monkeypatch.context() as patch:
            patch.setattr(SqliteEventLogStorage, "store_asset_check_event", fail)
            with pytest.raises(RuntimeError, match="no room"):
                another.event_log_storage.store_event_batch(events[1:])
        assert stored(tmp_path / "another") == before
        another.event_log_storage.store_event_batch(events[1:])
        assert len(another.all_logs(events[0].run_id)) == len(events)


def test_either_class_reads_what_the_other_has_recorded(tmp_path: Path) -> None:
    with opened(tmp_path) as instance:
        first = run(instance)
    with of_dagster(tmp_path) as instance:
        assert "ASSET_MATERIALIZATION" in recorded(instance, first)
        second = run(instance, KEYS[1])
    (tmp_path / "dagster.yaml").unlink()
    with opened(tmp_path) as instance:
        assert recorded(instance, first) == recorded(instance, second)
        assert set(instance.get_materialized_partitions(rows.key)) == set(KEYS)


def test_an_event_needs_no_new_connection(instance: dg.DagsterInstance) -> None:
    dagster_run = instance.get_run_by_id(run(instance))
    assert dagster_run is not None
    with connections() as made:
        for _ in range(3):
            instance.report_engine_event("Something new", dagster_run)
            assert instance.fetch_materializations(rows.key, limit=1).records

    assert [file for file in made if file in ("index", dagster_run.run_id)] == []


def test_runs_one_after_the_other_and_readers_see_everything(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    with opened(tmp_path) as reader:
        first, second = run(instance, KEYS[0]), run(instance, KEYS[1])
        again = recorded(instance, first)

        assert recorded(reader, first) == again == recorded(reader, second)
        assert set(reader.get_materialized_partitions(rows.key)) == set(KEYS)
        events = reader.get_records_for_run(
            second, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
        ).records
        assert len(events) == 1


def test_nothing_stays_open_after_the_instance(tmp_path: Path) -> None:
    with opened(tmp_path) as instance:
        run_id = run(instance)

    assert not list(tmp_path.rglob("*.db-wal"))
    with opened(tmp_path) as instance:
        assert "ASSET_MATERIALIZATION" in recorded(instance, run_id)


def test_threads_record_and_read_at_the_same_time(instance: dg.DagsterInstance) -> None:
    of_runs = [run(instance, key) for key in KEYS]
    runs = [instance.get_run_by_id(run_id) for run_id in of_runs]

    def record(dagster_run: dg.DagsterRun) -> list[str]:
        for _ in range(10):
            instance.report_engine_event("Something new", dagster_run)
            instance.fetch_materializations(rows.key, limit=1)
        return recorded(instance, dagster_run.run_id)

    with ThreadPoolExecutor(len(runs)) as pool:
        of_threads = list(pool.map(record, runs))

    assert [events.count("ENGINE_EVENT") for events in of_threads] == [
        recorded(instance, run_id).count("ENGINE_EVENT") for run_id in of_runs
    ]
    assert all(events.count("ENGINE_EVENT") >= 10 for events in of_threads)


def test_who_watches_a_run_is_told_of_its_events(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    with opened(tmp_path) as ui:
        dagster_run = instance.get_run_by_id(run(instance))
        assert dagster_run is not None
        cursor = ui.get_records_for_run(dagster_run.run_id).cursor
        told = threading.Event()
        ui.watch_event_logs(dagster_run.run_id, cursor, lambda *_: told.set())

        instance.report_engine_event("Something new", dagster_run)

        assert told.wait(timeout=30)


def test_deleted_runs_are_gone_and_new_ones_recorded(instance: dg.DagsterInstance) -> None:
    run_id = run(instance)
    instance.event_log_storage.wipe()

    assert recorded(instance, run_id) == []
    assert "ASSET_MATERIALIZATION" in recorded(instance, run(instance))


def test_a_run_whose_file_could_not_be_made_is_recorded_once_it_can(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = instance.event_log_storage
    [first, *_] = instance.all_logs(run(instance))
    event = first._replace(run_id="another")
    with monkeypatch.context() as patch:
        patch.setattr(SqliteEventLogStorage, "_initdb", failing)
        with pytest.raises(OSError, match="disk is full"):
            log.store_event(event)

    log.store_event(event)

    assert len(log.get_logs_for_run("another")) == 1


def failing(*_: Any, **__: Any) -> None:
    raise OSError("disk is full")


def test_events_of_a_run_that_another_process_deleted_are_recorded_anew(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    dagster_run = instance.get_run_by_id(run(instance))
    assert dagster_run is not None
    with opened(tmp_path) as another:
        another.event_log_storage.delete_events(dagster_run.run_id)
    for file in (tmp_path / "history" / "runs").glob(f"{dagster_run.run_id}.db*"):
        file.unlink()

    instance.report_engine_event("Something new", dagster_run)

    with opened(tmp_path) as another:
        assert recorded(another, dagster_run.run_id) == ["ENGINE_EVENT"]


def test_another_folder_can_be_named(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    named = f"config: {{base_dir: {folder}}}"
    packaged = Path("tutormax_assets/dagster.yaml")
    text = (Path(__file__).parents[2] / packaged).read_text(encoding="utf-8")
    line = "  class: PooledSqliteEventLogStorage\n"
    (home / "dagster.yaml").write_text(text.replace(line, f"{line}  {named}\n"))
    with opened(home) as instance:
        run_id = run(instance)

    assert (folder / f"{run_id}.db").exists()
    assert not (home / "history" / "runs").exists()
