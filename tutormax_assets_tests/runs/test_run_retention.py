"""Old runs leave Dagster's record, on SQLite and PostgreSQL; what readers need of it stays."""

import logging
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from tutormax_assets.api.explanation import explain
from tutormax_assets.api.retention import cleanup
from tutormax_assets.api.runs import aggregate
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.report.record import newest_record, read_record
from tutormax_assets.runs import run_retention
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.private_dagster import SqliteEventLogStorage
from tutormax_assets.runs.retention import RemovedRuns
from tutormax_assets.runs.run_retention import (
    compact_files,
    old_runless_events,
    old_runs,
    remove_runless_events,
    remove_runs,
)
from tutormax_assets.settings import LONGEST_RETENTION_DAYS, Settings
from tutormax_assets_tests.conftest import SMALL_PLATFORM_END, new_database, open_platform

DEPLOY = Path(__file__).parents[2] / "deploy"
LOG = logging.getLogger("tutormax_assets")
KEYS = ["2025-11-06", "2025-11-07"]
PARTITIONS = dg.StaticPartitionsDefinition(KEYS)
LARGE = "x" * 2_000_000
TABLES_OF_EVENTS = ("event_logs", "asset_check_executions")


@dg.asset(partitions_def=PARTITIONS)
def rows(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    return dg.MaterializeResult(metadata={"of_run": context.run.run_id})


@dg.asset_check(asset=rows, partitions_def=PARTITIONS)
def they_are_there() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@dg.op
def observe(context: dg.OpExecutionContext) -> None:
    context.log_event(dg.AssetObservation("rows", partition=KEYS[0]))


@dg.op
def talk(context: dg.OpExecutionContext) -> None:
    context.log_event(dg.AssetMaterialization("rows", partition=KEYS[0], metadata={"text": LARGE}))


@dg.op
def fail() -> None:
    raise RuntimeError("no room")


assets = dg.Definitions(
    assets=[rows], asset_checks=[they_are_there], jobs=[dg.define_asset_job("assets", [rows])]
).resolve_job_def("assets")
observing = dg.GraphDefinition("observing", node_defs=[observe]).to_job()
talking = dg.GraphDefinition("talking", node_defs=[talk]).to_job()
failing = dg.GraphDefinition("failing", node_defs=[fail]).to_job()


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def instance(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """An instance as ``tutormax`` makes it, or as the deployment does."""
    home = tmp_path / "dagster_home"
    home.mkdir()
    if request.param == "SQLite of Dagster's own class":
        (home / "dagster.yaml").write_text("telemetry: {enabled: false}")
    if request.param == "PostgreSQL":
        url = request.getfixturevalue("empty_database").set(drivername="postgresql+psycopg2")
        shutil.copy(DEPLOY / "dagster.yaml", home)
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", url.render_as_string(hide_password=False))
        monkeypatch.setenv("DAGSTER_COMPUTE_LOGS", str(tmp_path / "compute_logs"))
    with dagster_instance(Settings(dagster_home=home)) as instance:
        yield instance


def now() -> datetime:
    return datetime.now(UTC)


def run(instance: dg.DagsterInstance, key: str) -> str:
    return assets.execute_in_process(instance=instance, partition_key=key).run_id


def make_old(instance: dg.DagsterInstance, *run_ids: str, days: int = 100) -> None:
    """Put runs on record as having changed last that many days ago."""
    storage: Any = instance.run_storage
    statement = sa.text("UPDATE runs SET update_timestamp = :then WHERE run_id = :run_id")
    then = (now() - timedelta(days=days)).replace(tzinfo=None)
    with storage.connect() as connection:
        for run_id in run_ids:
            connection.execute(
                statement.bindparams(sa.bindparam("then", then, sa.DateTime())),
                {"run_id": run_id},
            )


def remove(instance: dg.DagsterInstance) -> tuple[list[str], list[str]]:
    """Remove the runs that are older than 90 days; gives those that went and were trimmed."""
    deleted: list[str] = []
    trimmed: list[str] = []
    for some in old_runs(instance, now() - timedelta(days=90)):
        remove_runs(instance, some)
        deleted += some.deleted
        trimmed += some.trimmed
    return deleted, trimmed


def read_by_users(instance: dg.DagsterInstance) -> dict[str, Any]:
    """What is read of the newest results, by the UI or by this package."""
    log, check = instance.event_log_storage, dg.AssetCheckKey(rows.key, "they_are_there")
    found: dict[str, Any] = {
        "partitions": instance.get_materialized_partitions(rows.key),
        "latest": instance.get_latest_materialization_event(rows.key),
        "check": log.get_latest_asset_check_execution_by_key([check]),
        "checks": sorted(
            log.get_asset_check_partition_info([check]), key=lambda info: str(info.partition_key)
        ),
        "observations": instance.fetch_observations(rows.key, limit=1).records,
    }
    for key in KEYS:
        wanted = dg.AssetRecordsFilter(asset_key=rows.key, asset_partitions=[key])
        [record] = instance.fetch_materializations(wanted, limit=1).records
        found[key] = record, read_record(instance, record.run_id)
        found[f"run of {key}"] = instance.get_run_by_id(record.run_id)
        found[f"time of {key}"] = instance.get_run_record_by_id(record.run_id).end_time  # type: ignore[union-attr]
    return found


def event_types(instance: dg.DagsterInstance, run_id: str) -> set[str]:
    return {
        entry.dagster_event.event_type_value if entry.dagster_event else "LOG"
        for entry in instance.all_logs(run_id)
    }


def runs_with_rows(instance: dg.DagsterInstance) -> set[str]:
    """Runs that any table, file or folder of logs knows of."""
    storage: Any = instance.event_log_storage
    runs: Any = instance.run_storage
    with storage.index_connection() as connection:
        found = {
            run_id
            for table in TABLES_OF_EVENTS
            for run_id in connection.scalars(sa.text(f"SELECT run_id FROM {table}"))
        }
    with runs.connect() as connection:
        for table in ("runs", "run_tags"):
            found |= set(connection.scalars(sa.text(f"SELECT run_id FROM {table}")))
    if isinstance(storage, SqliteEventLogStorage):
        found |= set(storage.get_all_run_ids()) - {""}
    return found - {""}


@pytest.fixture
def old(instance: dg.DagsterInstance) -> dict[str, str]:
    """Ids of runs, all of which but the last are old."""
    found = {"superseded": run(instance, KEYS[0])}
    found["observing"] = observing.execute_in_process(instance=instance).run_id
    found["failed"] = failing.execute_in_process(instance=instance, raise_on_error=False).run_id
    found["newest"] = run(instance, KEYS[0])
    found["of another partition"] = run(instance, KEYS[1])
    in_progress = instance.create_run_for_job(assets, status=dg.DagsterRunStatus.STARTED)
    instance.report_engine_event("It goes on", in_progress)
    found["in progress"] = in_progress.run_id
    make_old(instance, *found.values())
    found["recent"] = run(instance, KEYS[1])
    return found


def test_old_runs_go_and_the_newest_results_stay(
    instance: dg.DagsterInstance, old: dict[str, str], tmp_path: Path
) -> None:
    before = read_by_users(instance)
    logs = tmp_path / "compute_logs"

    deleted, trimmed = remove(instance)

    assert deleted == [old["superseded"], old["failed"], old["of another partition"]]
    assert trimmed == [old["observing"], old["newest"]]
    assert read_by_users(instance) == before
    assert runs_with_rows(instance) == set(old.values()) - set(deleted)
    assert not any(logs.joinpath(run_id).exists() for run_id in (*deleted, *trimmed))
    assert event_types(instance, old["newest"]) == {
        "ASSET_MATERIALIZATION",
        "ASSET_CHECK_EVALUATION",
        "PIPELINE_SUCCESS",
    }
    assert {"ENGINE_EVENT", "ASSET_MATERIALIZATION_PLANNED"} <= event_types(
        instance, old["in progress"]
    )
    assert "STEP_START" in event_types(instance, old["recent"])
    assert remove(instance) == ([], [])


@pytest.mark.parametrize("instance", ["SQLite of Dagster's own class"], indirect=True)
def test_results_stay_readable_with_dagsters_own_class(
    instance: dg.DagsterInstance, old: dict[str, str]
) -> None:
    before = read_by_users(instance)

    remove(instance)

    assert read_by_users(instance) == before
    assert remove(instance) == ([], [])


def test_a_run_that_is_superseded_later_goes_later(
    instance: dg.DagsterInstance, old: dict[str, str]
) -> None:
    remove(instance)
    run(instance, KEYS[0])

    assert remove(instance) == ([old["newest"]], [])


@pytest.mark.parametrize(
    ("step", "call"), [("_delete_events", 0), ("_delete_events", 1), ("delete_run", 1)]
)
def test_a_removal_that_was_killed_is_continued(
    instance: dg.DagsterInstance,
    old: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    call: int,
) -> None:
    before = read_by_users(instance)
    where: Any = instance.run_storage if step == "delete_run" else run_retention
    calls: list[object] = []
    original = getattr(where, step)

    def strike(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) > call:
            raise KeyboardInterrupt
        original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, step, strike)
        with pytest.raises(KeyboardInterrupt):
            remove(instance)
    assert read_by_users(instance) == before

    remove(instance)

    assert read_by_users(instance) == before
    gone = {old["superseded"], old["failed"], old["of another partition"]}
    assert runs_with_rows(instance) == set(old.values()) - gone
    assert "STEP_START" not in event_types(instance, old["newest"])


def test_pieces_are_bounded(
    instance: dg.DagsterInstance, old: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_retention, "RUNS_AT_ONCE", 2)

    pieces = list(old_runs(instance, now() - timedelta(days=90)))

    assert [(len(some.deleted), len(some.trimmed)) for some in pieces] == [(1, 1), (1, 1), (1, 0)]


def test_the_last_event_keeps_its_id(instance: dg.DagsterInstance) -> None:
    """Otherwise SQLite would give it to the next event, which cursors of sensors are past."""
    failed = failing.execute_in_process(instance=instance, raise_on_error=False).run_id
    last = instance.event_log_storage.get_maximum_record_id()
    make_old(instance, failed)

    assert remove(instance) == ([], [failed])
    assert instance.event_log_storage.get_maximum_record_id() == last
    assert remove(instance) == ([], [])


def test_old_events_without_a_run_go_but_for_the_newest(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_retention, "_EVENTS_AT_ONCE", 2)
    for key in (*KEYS, *KEYS, KEYS[0], KEYS[0]):
        instance.report_runless_asset_event(dg.AssetMaterialization("rows", partition=key))
    instance.report_runless_asset_event(dg.AssetObservation("rows", partition=KEYS[0]))
    newest = instance.fetch_materializations(rows.key, limit=1).records

    assert remove_runless_events(instance, now() - timedelta(days=1)) == 0
    assert old_runless_events(instance, now() + timedelta(days=1)) == 4
    assert remove_runless_events(instance, now() + timedelta(days=1)) == 4

    assert instance.get_materialized_partitions(rows.key) == set(KEYS)
    assert len(instance.fetch_materializations(rows.key, limit=10).records) == 2
    assert instance.fetch_materializations(rows.key, limit=1).records == newest
    assert len(instance.fetch_observations(rows.key, limit=10).records) == 1
    assert len(instance.all_logs("")) == 3


@pytest.mark.parametrize("instance", ["SQLite"], indirect=True)
def test_files_shrink(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    files = tmp_path / "dagster_home" / "history" / "runs"
    first = talking.execute_in_process(instance=instance).run_id
    run(instance, KEYS[0])
    make_old(instance, first)
    large = (files / "index.db").stat().st_size

    assert remove(instance) == ([first], [])
    compact_files(instance, log=LOG)

    assert (files / "index.db").stat().st_size < large - len(LARGE)
    assert not list(files.glob(f"{first}*"))


def test_a_stored_date_is_read_as_before(
    server_url: sa.URL, small_template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its newest run is enough for the report, an explanation and a refresh of changed tutors."""
    long = str(LONGEST_RETENTION_DAYS)
    names = ("RETENTION", "SNAPSHOT_RETENTION", "RUN_RETENTION")
    variables = {f"TUTORMAX_{name}_DAYS": long for name in names}
    day = str(SMALL_PLATFORM_END)

    def read(tutor: str) -> tuple[Any, ...]:
        with dagster_instance(platform.settings) as instance:
            record = newest_record(instance, METRICS_TABLE, day)
        return record, explain(platform.settings, tutor, SMALL_PLATFORM_END).to_dict()

    with (
        new_database(server_url, template=small_template) as url,
        open_platform(url, tmp_path / "home", using=monkeypatch, **variables) as platform,
    ):
        runs = [platform.run(day)[0] for _ in range(2)]
        tutor = platform.partition("tutor_roster", day)["tutor_id"][0]
        with dagster_instance(platform.settings) as instance:
            make_old(instance, *instance.get_run_ids(), days=LONGEST_RETENTION_DAYS + 1)
        before = read(tutor)
        asked = cleanup(platform.settings, dry_run=True)
        done = cleanup(platform.settings)

        assert done.runs == asked.runs == RemovedRuns(deleted=1, trimmed=1)
        assert read(tutor) == before
        options = RunOptions(max_retries=0, retry_delay_seconds=0)
        [again] = aggregate(platform.settings, [SMALL_PLATFORM_END], options, changed_only=True)
        assert again.read in ("nothing", "changed tutors")
        assert all(summary.all_saved for summary in runs)
