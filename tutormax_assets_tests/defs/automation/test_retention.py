"""Retention: what is too old goes, the rest stays, and Dagster's record says so."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.api.retention import cleanup
from tutormax_assets.database import tables
from tutormax_assets.database.archived_table import ArchiveError, archive_file
from tutormax_assets.database.date_locks import date_lock
from tutormax_assets.database.restore import keep_month, restore_date, restored_months
from tutormax_assets.dates import midnight, today
from tutormax_assets.defs.automation.retention import JOB_NAME, retention_job, retention_sensor
from tutormax_assets.defs.resources import platform_database_resource
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.retention import CleanupReport, RemovedRuns, Retention, clean_up
from tutormax_assets.settings import load_settings
from tutormax_assets.storage.files import StorageError, read_parquet
from tutormax_assets.storage.store import partition_path
from tutormax_assets_tests.conftest import PARQUET_ASSETS, Platform, captured_log, store

ASSETS = [dg.AssetKey("sessions_snapshot"), dg.AssetKey("tutor_tiers")]
KEY = ["tutor_id", "calculation_date", "window"]
LOG = logging.getLogger("tutormax_assets")


def ago(days: int) -> date:
    return today(timezone="UTC") - timedelta(days=days)


def add_metrics(platform: Platform, *days: date) -> pl.DataFrame:
    """Rows of two tutors for each date; gives what the table holds then."""
    platform.add(
        tables.tutor_performance_metrics,
        *(
            {
                "metric_id": f"{tutor_id} {day}",
                "tutor_id": tutor_id,
                "calculation_date": midnight(day, timezone="UTC"),
                "window": "7day",
            }
            for day in days
            for tutor_id in ("t1", "t2")
        ),
    )
    return platform.metrics()


def add_partitions(platform: Platform, *days: date) -> None:
    for asset_key in ASSETS:
        for day in days:
            path = partition_path(
                platform.settings.storage_path, asset_key.to_user_string(), str(day)
            )
            store(path, pl.DataFrame({"tutor_id": ["t1"]}))


def partitions(platform: Platform) -> set[str]:
    stored = platform.storage.glob("*/*.parquet")
    return {str(path.relative_to(platform.storage)) for path in stored}


def archived_rows(platform: Platform) -> pl.DataFrame:
    folder = Path(platform.settings.archive_path) / "tutor_performance_metrics"
    files = sorted(folder.rglob("*.parquet"))
    frames = [rows for file in files if (rows := read_parquet(UPath(file))) is not None]
    return pl.concat(frames).sort(KEY)


def retention(platform: Platform, **options: Any) -> Retention:
    return Retention.as_of_today(platform.settings, ASSETS, **options)


def clean(platform: Platform, instance: dg.DagsterInstance, **options: Any) -> CleanupReport:
    return clean_up(retention(platform), platform.engine, instance, log=LOG, **options)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def observations(
    instance: dg.DagsterInstance, asset: str
) -> list[tuple[str | None, dict[str, Any]]]:
    """Partition and metadata of each observation of an asset, oldest first."""
    records = instance.fetch_observations(dg.AssetKey(asset), limit=1000).records
    found = [record.asset_observation for record in reversed(records)]
    return [
        (seen.partition, {name: value.value for name, value in seen.metadata.items()})
        for seen in found
        if seen is not None
    ]


def test_what_is_too_old_goes_and_the_rest_stays(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    rows = add_metrics(platform, ago(200), ago(91), ago(90), ago(0))
    add_partitions(platform, ago(91), ago(31), ago(30), ago(0))
    foreign = platform.storage / "sessions_snapshot" / "notes.parquet"
    foreign.write_bytes(b"")

    with captured_log() as log:
        report = clean(platform, instance)

    is_old = pl.col("calculation_date").dt.date() < ago(90)
    assert_frame_equal(platform.metrics(), rows.filter(~is_old))
    assert_frame_equal(archived_rows(platform), rows.filter(is_old))
    assert partitions(platform) == {
        *(f"{asset.path[0]}/{ago(days)}.parquet" for asset in ASSETS for days in (30, 0)),
        "sessions_snapshot/notes.parquet",
    }
    assert report.rows_by_date == {ago(200): 2, ago(91): 2}
    assert [(p.asset_key, p.partition_key) for p in report.partitions] == [
        (asset, str(ago(days))) for days in (91, 31) for asset in ASSETS
    ]
    path = archive_file(platform.settings.archive_path, ago(200))
    assert f"INFO Archived 2 metrics of {ago(200)} in {path} and deleted 2" in log
    assert f"INFO Deleted 4 Parquet partitions before {ago(30)}" in log

    again = clean(platform, instance)
    assert (again.rows, again.months, again.partitions) == (0, [], [])
    assert len(observations(instance, "tutor_performance_metrics")) == 2


def test_the_settings_say_how_long(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTORMAX_RETENTION_DAYS", "400")
    monkeypatch.setenv("TUTORMAX_SNAPSHOT_RETENTION_DAYS", "7")
    monkeypatch.setattr("tutormax_assets.settings.find_spec", lambda module: object())
    monkeypatch.setenv("TUTORMAX_ARCHIVE", "s3://bucket/archive")
    rule = Retention.as_of_today(load_settings(), ASSETS)

    assert (rule.metrics_from, rule.partitions_from) == (ago(400), ago(7))
    assert rule.archive_path == "s3://bucket/archive"
    other = Retention.as_of_today(load_settings(), ASSETS, retention_days=1)
    assert (other.metrics_from, other.partitions_from) == (ago(1), ago(7))


def test_a_dry_run_changes_nothing_and_says_what_the_real_one_does(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    rows = add_metrics(platform, ago(200), ago(199), ago(91), ago(90))
    add_partitions(platform, ago(40), ago(30))
    stored = partitions(platform)

    asked = clean(platform, instance, dry_run=True)
    assert_frame_equal(platform.metrics(), rows)
    assert partitions(platform) == stored
    assert not Path(platform.settings.archive_path).exists()
    assert observations(instance, "tutor_performance_metrics") == []
    done = clean(platform, instance)

    assert (asked.dry_run, done.dry_run) == (True, False)
    assert {**asked.to_dict(), "dry_run": False} == done.to_dict()
    assert done.rows == 6
    assert len(done.partitions) == 2


def test_observations_say_what_became_of_each_partition(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    add_metrics(platform, ago(100), ago(99))
    add_partitions(platform, ago(40))
    sizes = {}
    for asset_key in ASSETS:
        [part] = (platform.storage / asset_key.path[0] / f"{ago(40)}.parquet").iterdir()
        sizes[asset_key.path[0]] = part.stat().st_size

    clean(platform, instance)

    assert observations(instance, "tutor_performance_metrics") == [
        (
            str(ago(days)),
            {
                "rows_archived": 2,
                "rows_deleted": 2,
                "archive": str(archive_file(platform.settings.archive_path, ago(days))),
            },
        )
        for days in (100, 99)
    ]
    for asset, size in sizes.items():
        path = str(platform.storage / asset / f"{ago(40)}.parquet")
        assert observations(instance, asset) == [
            (str(ago(40)), {"deleted_path": path, "size_bytes": size})
        ]


RunTags = Callable[[date], dict[str, str]]


@pytest.mark.parametrize(
    "tags",
    [
        lambda day: {"dagster/partition": str(day)},
        lambda day: {
            "dagster/asset_partition_range_start": str(day - timedelta(days=3)),
            "dagster/asset_partition_range_end": str(day),
        },
    ],
    ids=["one date", "a range"],
)
def test_nothing_is_taken_from_under_a_run(
    platform: Platform, instance: dg.DagsterInstance, tags: RunTags
) -> None:
    add_metrics(platform, ago(100), ago(99))
    add_partitions(platform, ago(100), ago(99))

    @dg.job
    def some_job() -> None:
        pass

    run = instance.create_run_for_job(
        some_job, tags=tags(ago(100)), status=dg.DagsterRunStatus.STARTED
    )

    assert clean(platform, instance, dry_run=True).rows == 2
    report = clean(platform, instance)
    assert report.rows_by_date == {ago(99): 2}
    assert {p.partition_key for p in report.partitions} == {str(ago(99))}

    instance.report_run_failed(run)
    assert clean(platform, instance).rows_by_date == {ago(100): 2}


def test_a_date_that_another_home_computes_stays(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    add_metrics(platform, ago(100), ago(99))

    with date_lock(platform.engine, str(ago(100))), captured_log() as log:
        report = clean(platform, instance)

    assert report.rows_by_date == {ago(99): 2}
    assert (
        f"WARNING 2 metrics of {ago(100)} stay until the run or the cleanup of that date has ended"
        in log
    )


def test_parquet_of_a_window_that_left_the_policy_goes_and_what_is_foreign_stays(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    for name in ("metrics_14day", "metrics_of_mine"):
        for day in (31, 30):
            path = UPath(platform.storage) / name / f"{ago(day)}.parquet"
            store(path, pl.DataFrame({"tutor_id": ["t1"]}))
    foreign = platform.storage / "metrics_9day" / f"{ago(31)}.parquet"
    foreign.mkdir(parents=True)
    (foreign / "kept.parquet").write_bytes(b"")

    assert isinstance(evaluate(platform)[0], dg.RunRequest)
    report = clean(platform, instance)

    assert [(p.asset_key, p.partition_key) for p in report.partitions] == [
        (dg.AssetKey("metrics_14day"), str(ago(31)))
    ]
    assert partitions(platform) == {
        f"metrics_14day/{ago(30)}.parquet",
        f"metrics_of_mine/{ago(31)}.parquet",
        f"metrics_of_mine/{ago(30)}.parquet",
        f"metrics_9day/{ago(31)}.parquet",
    }
    assert (foreign / "kept.parquet").exists()


def test_a_restored_month_stays_until_its_day(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    rows = add_metrics(platform, date(2025, 8, 14), date(2025, 9, 14))
    archive_path = platform.settings.archive_path
    clean(platform, instance)
    for day in (date(2025, 8, 14), date(2025, 9, 14)):
        keep_month(archive_path, f"{day:%Y-%m}", ago(-1))
        restore_date(platform.engine, archive_path, day)

    report = clean(platform, instance)
    assert (report.rows, report.due.months_restored) == (
        0,
        {"2025-08": ago(-1), "2025-09": ago(-1)},
    )
    assert isinstance(evaluate(platform)[0], dg.SkipReason)
    assert run_job(platform, instance).success
    assert_frame_equal(platform.metrics(), rows)

    # Its day comes.
    keep_month(archive_path, "2025-09", ago(0))
    assert isinstance(evaluate(platform)[0], dg.RunRequest)
    assert clean(platform, instance).rows_by_date == {date(2025, 9, 14): 2}
    released = clean(platform, instance, released_months=["2025-08"])
    assert released.rows_by_date == {date(2025, 8, 14): 2}
    assert "2025-08" not in restored_months(archive_path)

    UPath(archive_path).joinpath("tutor_performance_metrics/restored/2025-08.json").write_text("x")
    with pytest.raises(ArchiveError, match="does not say until which day its month stays"):
        restored_months(archive_path)


def test_the_sensor_does_not_launch_for_rows_that_must_stay(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    add_metrics(platform, ago(100))
    platform.execute("CREATE TABLE alerts (id varchar(50) REFERENCES tutor_performance_metrics)")
    platform.execute("INSERT INTO alerts SELECT metric_id FROM tutor_performance_metrics")

    assert isinstance(evaluate(platform)[0], dg.SkipReason)
    report = clean(platform, instance, dry_run=True)
    assert (report.rows, report.due.rows_referred) == (0, {"alerts": 2})


def test_much_that_went_is_vacuumed(
    platform: Platform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    vacuumed = "INFO Vacuumed and analyzed tutor_performance_metrics"
    add_metrics(platform, ago(100), ago(99))
    with captured_log() as log:
        clean(platform, instance)
    assert vacuumed not in log

    monkeypatch.setattr("tutormax_assets.database.archive.VACUUM_FROM_ROWS", 4)
    add_metrics(platform, ago(98), ago(97))
    with captured_log() as log:
        clean(platform, instance)
    assert vacuumed in log

    add_metrics(platform, ago(96), ago(95))
    monkeypatch.setattr("tutormax_assets.database.archive.vacuum", lambda _: "permission denied")
    with captured_log() as log:
        clean(platform, instance)
    assert (
        "WARNING tutor_performance_metrics was not vacuumed, autovacuum will: permission denied"
        in log
    )


def test_an_archive_out_of_reach_keeps_the_rows(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    rows = add_metrics(platform, ago(100), ago(99))
    Path(platform.settings.archive_path).write_text("a file where a folder is needed")

    with pytest.raises(ArchiveError, match="The table keeps its rows"):
        clean(platform, instance)

    assert_frame_equal(platform.metrics(), rows)


def test_a_storage_that_cannot_be_deleted_from_is_an_error_in_a_sentence(
    platform: Platform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_partitions(platform, ago(40))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(UPath(platform.storage)), "unlink", refuse)
    with pytest.raises(StorageError, match=r"cannot be deleted: .*Permission denied.* Check the"):
        clean(platform, instance)
    monkeypatch.setattr(type(UPath(platform.storage)), "iterdir", refuse)
    with pytest.raises(StorageError, match=r"cannot be listed: .*TUTORMAX_STORAGE says where"):
        clean(platform, instance)


def test_archive_and_storage_may_be_object_stores(
    platform: Platform, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    bucket = f"memory://{tmp_path.name}"
    paths = {"storage": f"{bucket}/storage", "archive": f"{bucket}/archive"}
    platform = Platform(platform.settings.model_copy(update=paths), platform.engine)
    rows = add_metrics(platform, ago(91))
    add_partitions(platform, ago(31), ago(30))

    report = clean(platform, instance)

    assert (report.rows, len(report.partitions)) == (2, 2)
    stored = read_parquet(archive_file(f"{bucket}/archive", ago(91)))
    assert stored is not None
    assert_frame_equal(stored, rows)
    left = {path.name for path in UPath(bucket).rglob("*") if path.name[:4] == str(ago(30))[:4]}
    assert left == {f"{ago(91)}.parquet", f"{ago(30)}.parquet", f"{ago(30)}.json"}
    UPath(bucket).fs.rm(UPath(bucket).path, recursive=True)


_KILLED_RUN = """
import os, signal
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.definitions import build_definitions
from tutormax_assets.database import archive
from tutormax_assets.settings import load_settings

delete, calls = archive._delete_unchanged, []

def strike(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return delete(*arguments)

archive._delete_unchanged = strike
settings = load_settings()
with dagster_instance(settings) as instance:
    job = build_definitions(settings).resolve_job_def("retention")
    job.execute_in_process(instance=instance)
"""


def test_a_run_that_is_killed_is_finished_by_the_next_one(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies between the export and the deletion of the third of five dates."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    days = [ago(days) for days in range(120, 115, -1)]
    rows = add_metrics(platform, *days)
    add_partitions(platform, *days)

    killed = subprocess.run(
        [sys.executable, "-c", _KILLED_RUN], env=dict(os.environ), capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert_frame_equal(platform.metrics(), _of(rows, days[2:]))
    assert_frame_equal(archived_rows(platform), _of(rows, days[:3]))

    with dagster_instance(load_settings()) as instance:
        [run] = instance.get_runs()
        assert run.status is dg.DagsterRunStatus.STARTED
        assert run_job(platform, instance).success
        seen = observations(instance, "tutor_performance_metrics")
    assert [partition for partition, _ in seen] == [str(day) for day in days]
    assert platform.metrics().is_empty()
    assert_frame_equal(archived_rows(platform), rows)
    assert partitions(platform) == set()


def _of(rows: pl.DataFrame, days: list[date]) -> pl.DataFrame:
    return rows.filter(pl.col("calculation_date").dt.date().is_in(days))


def run_job(
    platform: Platform, instance: dg.DagsterInstance, **options: Any
) -> dg.ExecuteInProcessResult:
    job = retention_job(platform.settings, ASSETS)
    ops = {name: {"config": options} for name in ("archive_metrics", "delete_parquet")}
    return job.execute_in_process(
        run_config={"ops": ops},
        resources={"database": platform_database_resource(platform.settings)},
        instance=instance,
        raise_on_error=False,
    )


def test_the_job_archives_deletes_and_observes(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    rows = add_metrics(platform, ago(92), ago(91))
    add_partitions(platform, ago(31))

    result = run_job(platform, instance)

    assert result.success
    assert platform.metrics().is_empty()
    assert_frame_equal(archived_rows(platform), rows)
    assert partitions(platform) == set()
    seen = [
        (observation.asset_key.to_user_string(), observation.partition)
        for event in result.all_events
        if event.event_type is dg.DagsterEventType.ASSET_OBSERVATION
        for observation in [event.asset_observation_data.asset_observation]
    ]
    assert sorted(seen) == [
        ("sessions_snapshot", str(ago(31))),
        ("tutor_performance_metrics", str(ago(92))),
        ("tutor_performance_metrics", str(ago(91))),
        ("tutor_tiers", str(ago(31))),
    ]
    assert len(observations(instance, "tutor_performance_metrics")) == 2


def test_a_run_of_the_job_is_bounded_and_the_next_one_goes_on(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    add_metrics(platform, *(ago(days) for days in range(95, 90, -1)))
    add_partitions(platform, *(ago(days) for days in range(95, 90, -1)))

    assert run_job(platform, instance, max_dates=2).success
    assert len(platform.metrics()) == 6
    assert len(partitions(platform)) == 6
    assert run_job(platform, instance, max_dates=3).success
    assert platform.metrics().is_empty()
    assert partitions(platform) == set()


def test_parquet_goes_even_if_the_archive_is_out_of_reach(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    rows = add_metrics(platform, ago(91))
    add_partitions(platform, ago(31))
    Path(platform.settings.archive_path).write_text("a file where a folder is needed")

    result = run_job(platform, instance)

    assert not result.success
    [failure] = result.get_step_failure_events()
    assert failure.step_key == "archive_metrics"
    assert failure.step_failure_data.error is not None
    assert "The table keeps its rows." in str(failure.step_failure_data.error)
    assert_frame_equal(platform.metrics(), rows)
    assert partitions(platform) == set()


def evaluate(
    platform: Platform, *, cursor: str | None = None, instance: dg.DagsterInstance | None = None
) -> tuple[dg.RunRequest | dg.SkipReason, str | None]:
    """What the sensor answers, and its cursor afterwards."""
    sensor = retention_sensor(platform.settings, ASSETS, running=True)
    with dg.build_sensor_context(
        instance=instance,
        cursor=cursor,
        resources={"database": platform_database_resource(platform.settings)},
    ) as context:
        answer = sensor(context)
        assert isinstance(answer, dg.RunRequest | dg.SkipReason)
        return answer, context.cursor


def test_the_sensor_launches_once_a_day_when_something_is_too_old(platform: Platform) -> None:
    now = str(ago(0))
    add_metrics(platform, ago(90))
    add_partitions(platform, ago(30))
    answer, cursor = evaluate(platform)
    assert isinstance(answer, dg.SkipReason)
    assert answer.skip_message == (
        f"There are no metrics before {ago(90)} and no Parquet partitions before {ago(30)}."
    )
    assert cursor is None

    add_metrics(platform, ago(91))
    answer, cursor = evaluate(platform)
    assert isinstance(answer, dg.RunRequest)
    assert (answer.run_key, cursor) == (f"retention:{now}", now)

    answer, cursor = evaluate(platform, cursor=now)
    assert isinstance(answer, dg.SkipReason)
    assert (answer.skip_message, cursor) == (f"It was launched for {now} already.", now)

    answer, cursor = evaluate(platform, cursor=str(ago(1)))
    assert isinstance(answer, dg.RunRequest)
    assert (answer.run_key, cursor) == (f"retention:{now}", now)


def test_the_sensor_sees_old_parquet_alone(platform: Platform) -> None:
    add_partitions(platform, ago(31))

    answer, _ = evaluate(platform)

    assert isinstance(answer, dg.RunRequest)


def old_run(instance: dg.DagsterInstance) -> str:
    """Id of a run that ended years ago, before another one."""

    @dg.op
    def nothing() -> None:
        pass

    job = dg.GraphDefinition("job", node_defs=[nothing]).to_job()
    first, _ = (job.execute_in_process(instance=instance).run_id for _ in range(2))
    storage: Any = instance.run_storage
    change = "UPDATE runs SET update_timestamp = '2020-01-01 00:00:00' WHERE run_id = :run_id"
    with storage.connect() as connection:
        connection.execute(sa.text(change), {"run_id": first})
    return first


def test_runs_stay_unless_the_settings_say_how_long(
    platform: Platform, instance: dg.DagsterInstance
) -> None:
    run_id = old_run(instance)

    assert clean(platform, instance).runs == RemovedRuns()
    assert run_job(platform, instance).success
    assert instance.get_run_by_id(run_id) is not None
    definition = retention_job(platform.settings, ASSETS)
    assert {node.name for node in definition.nodes} == {"archive_metrics", "delete_parquet"}


def test_the_sensor_launches_the_job_for_old_runs_alone(
    platform: Platform, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_RUN_RETENTION_DAYS", "90")
    platform = replace(platform, settings=load_settings())
    answer, _ = evaluate(platform, instance=instance)
    assert isinstance(answer, dg.SkipReason)
    assert str(answer.skip_message).endswith(f" and no runs before {ago(90)}.")
    run_id = old_run(instance)

    answer, _ = evaluate(platform, instance=instance)

    assert isinstance(answer, dg.RunRequest)
    assert run_job(platform, instance).success
    assert instance.get_run_by_id(run_id) is None
    old_run(instance)
    with captured_log() as log:
        assert clean(platform, instance).runs == RemovedRuns(deleted=1)
    assert any(f"Deleted 1 runs that ended before {ago(90)}" in line for line in log)


def test_the_sensor_waits_for_the_table(platform: Platform) -> None:
    platform.execute("DROP TABLE tutor_performance_metrics CASCADE")

    answer, cursor = evaluate(platform)

    assert isinstance(answer, dg.SkipReason)
    assert "does not exist" in str(answer.skip_message)
    assert cursor is None


@pytest.mark.parametrize("automation", ["true", "false"])
def test_the_code_location_has_the_job_and_the_sensor(
    monkeypatch: pytest.MonkeyPatch, automation: str
) -> None:
    from tutormax_assets.definitions import build_definitions

    monkeypatch.setenv("TUTORMAX_AUTOMATION", automation)
    definitions = build_definitions(load_settings())

    assert definitions.resolve_job_def(JOB_NAME).name == "retention"
    sensor = definitions.resolve_sensor_def("retention_when_due")
    assert sensor.job_name == "retention"
    running, stopped = dg.DefaultSensorStatus.RUNNING, dg.DefaultSensorStatus.STOPPED
    assert sensor.default_status is (running if automation == "true" else stopped)


def test_all_assets_that_are_parquet_are_cleaned_up(
    computed_platform: Platform, tmp_path: Path
) -> None:
    """A date that was computed long ago goes as a whole, and can be computed again."""
    day = "2025-11-07"
    rows = computed_platform.metrics()
    stored = partitions(computed_platform)
    assert len(stored) == len(PARQUET_ASSETS)

    report = cleanup(computed_platform.settings)

    assert report.rows_by_date == {date(2025, 11, 7): len(rows)}
    # The page of the report is deleted with them.
    assert len(report.partitions) == len(PARQUET_ASSETS) + 1
    assert list(computed_platform.storage.glob("daily_report/*")) == []
    assert computed_platform.metrics().is_empty()
    assert_frame_equal(archived_rows(computed_platform), rows)
    with dagster_instance(computed_platform.settings) as instance:
        [*_, (partition, metadata)] = observations(instance, "tutor_performance_metrics")
    assert (partition, metadata["rows_deleted"]) == (day, len(rows))

    [summary] = computed_platform.run(day)
    assert summary.all_saved
    again = computed_platform.metrics().drop("created_at", "updated_at")
    assert_frame_equal(again, rows.drop("created_at", "updated_at"))
    cleanup(computed_platform.settings)
    merged = archived_rows(computed_platform)
    assert len(merged) == len(rows)
    newest: Any = merged["updated_at"].min()
    oldest: Any = rows["updated_at"].max()
    assert isinstance(newest, datetime)
    assert newest > oldest
