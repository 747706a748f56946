"""The production instance of ``deploy/dagster.yaml`` on a real PostgreSQL."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from tutormax_assets.api.health import examine_health
from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.defs.assets import PLATFORM_POOL
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.runs.instance import dagster_instance, make_pool
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.settings import Settings
from tutormax_assets_tests import next_minute
from tutormax_assets_tests.conftest import Platform, new_database, open_platform

DEPLOY = Path(__file__).parents[2] / "deploy"
DAY = "2025-11-07"
ASSETS = {"tutor_roster", "sessions_snapshot", "tutor_tiers", "tutor_performance_metrics"}


@pytest.fixture
def instance_url(empty_database: sa.URL) -> str:
    """A database for Dagster, as ``DAGSTER_POSTGRES_URL`` names it."""
    url = empty_database.set(drivername="postgresql+psycopg2")
    return url.render_as_string(hide_password=False)


@pytest.fixture
def production(
    server_url: sa.URL, small_template: str, instance_url: str, tmp_path: Path
) -> Iterator[Platform]:
    """A generated platform whose runs are kept by the production instance."""
    home = tmp_path / "dagster_home"
    home.mkdir()
    shutil.copy(DEPLOY / "dagster.yaml", home)
    variables = {
        "DAGSTER_HOME": str(home),
        "DAGSTER_POSTGRES_URL": instance_url,
        "DAGSTER_COMPUTE_LOGS": str(tmp_path / "compute_logs"),
    }
    with (
        new_database(server_url, template=small_template) as url,
        open_platform(url, tmp_path / "home", using=None, **variables) as opened,
    ):
        yield opened


@contextmanager
def process(*command: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is stopped, with whatever it has started, when the block ends."""
    with log.open("wb") as stream:
        started = subprocess.Popen(
            [sys.executable, *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield started
        finally:
            started.terminate()
            with suppress(subprocess.TimeoutExpired):
                started.wait(timeout=15)
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def wait_until(condition: Callable[[], object], *, seconds: float, logs: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            said = "\n".join(
                f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}"
                for log in sorted(logs.glob("*.log"))
            )
            pytest.fail(f"This has not come about in {seconds:.0f} s.\n{said}")
        time.sleep(0.5)


@contextmanager
def closing_idle_connections(url: str, *, before: str) -> Iterator[list[int]]:
    """The server closes what is idle whenever the run logs a line that begins like this.

    Yields:
        Number of connections that were closed, each time.
    """
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    close = sa.text(
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND state = 'idle' AND pid <> pg_backend_pid()"
    )
    closed: list[int] = []

    class Closer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(before):
                with engine.connect() as connection:
                    closed.append(connection.execute(close).scalar_one())

    logger, closer = logging.getLogger("tutormax_assets"), Closer()
    logger.addHandler(closer)
    try:
        yield closed
    finally:
        logger.removeHandler(closer)


def test_a_run_succeeds_and_its_events_are_in_postgresql(
    production: Platform, instance_url: str, tmp_path: Path
) -> None:
    # Dagster makes its tables.
    with dagster_instance(production.settings):
        pass
    before = connections_opened(instance_url)
    with closing_idle_connections(instance_url, before="Found ") as closed:
        [summary] = production.run(DAY)
    opened = connections_opened(instance_url) - before

    # Runs and events have a connection each. Without a pool it would be more than 400.
    assert closed == [2]
    assert opened < 40
    assert summary.total_metrics_saved == len(production.metrics()) > 0
    engine = sa.create_engine(instance_url)
    with engine.connect() as connection:
        runs = connection.execute(sa.text("SELECT pipeline_name, status FROM runs")).all()
        materialized = connection.scalars(
            sa.text(
                "SELECT asset_key FROM event_logs "
                "WHERE dagster_event_type = 'ASSET_MATERIALIZATION' AND partition = :day"
            ),
            {"day": DAY},
        ).all()
    engine.dispose()
    assert runs == [(JOB_NAME, "SUCCESS")]
    assert {f'["{asset}"]' for asset in ASSETS} <= set(materialized)
    assert not list((tmp_path / "dagster_home").rglob("*.db"))


def connections_opened(url: str) -> int:
    """How many connections the database has seen so far, but for those of this function."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT pg_stat_force_next_flush()"))
        sessions = sa.text(
            "SELECT sessions FROM pg_stat_database WHERE datname = current_database()"
        )
        return int(connection.scalar(sessions) or 0)


def test_a_worker_that_dagster_started_keeps_its_connections(
    production: Platform, instance_url: str, tmp_path: Path
) -> None:
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster_home")) as instance:
        resources = {
            **(build_definitions(production.settings).resources or {}),
            "run_options": RunOptions(),
        }
        wanted = {name: resources[name] for name in ("run_options", "database", "date_locks")}
        with dg.build_resources(wanted, instance=instance):
            pass
        before = connections_opened(instance_url)
        for _ in range(20):
            instance.get_runs()
            instance.fetch_materializations(dg.AssetKey("tutor_roster"), limit=1)
        assert connections_opened(instance_url) - before < 10


def test_the_instance_limits_runs_and_pools(production: Platform) -> None:
    with dagster_instance(production.settings) as instance:
        settings = instance.get_concurrency_config()
        retries = instance.run_retries_max_retries

    assert settings.run_queue_config is not None
    assert settings.run_queue_config.max_concurrent_runs == 4
    assert settings.run_queue_config.tag_concurrency_limits == [
        {"key": "dagster/backfill", "limit": 2}
    ]
    assert settings.pool_config.default_pool_limit == 1
    # Fewer, and the nightly run waits in the queue for as long as any backfill goes on.
    assert settings.pool_config.op_granularity_run_buffer == 3 * 4
    assert retries == 2


def steps_of(settings: Settings, job: str) -> dict[str, dg.OpDefinition]:
    nodes = build_definitions(settings).resolve_job_def(job).nodes
    return {
        node.name: node.definition for node in nodes if isinstance(node.definition, dg.OpDefinition)
    }


def test_whatever_uses_the_platforms_database_is_in_the_pool(production: Platform) -> None:
    for job in build_definitions(production.settings).jobs or []:
        steps = steps_of(production.settings, job.name)
        pooled = {name for name, step in steps.items() if step.pool == PLATFORM_POOL}
        assert pooled == {
            name for name, step in steps.items() if "database" in step.required_resource_keys
        }
        assert pooled


def pooled_events(
    instance: dg.DagsterInstance, pooled: set[str]
) -> list[tuple[float, str, str, str]]:
    """Instant, run, step and kind of what the steps of the pool did, in order of time."""
    kinds = {dg.DagsterEventType.STEP_START, dg.DagsterEventType.STEP_SUCCESS}
    return sorted(
        (entry.timestamp, entry.run_id, entry.step_key, event.event_type_value)
        for run in instance.get_runs()
        for entry in instance.all_logs(run.run_id, of_type=kinds)
        if (event := entry.dagster_event) and entry.step_key in pooled
    )


def blocked_runs(instance: dg.DagsterInstance) -> set[str]:
    return {
        run.run_id
        for run in instance.get_runs()
        for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        if f"Step blocked by limit for pool {PLATFORM_POOL}" in entry.message
    }


def test_a_pool_that_another_process_makes_at_the_same_time_is_no_failure(
    production: Platform, instance_url: str, tmp_path: Path
) -> None:
    insert = sa.text(
        'INSERT INTO concurrency_limits (concurrency_key, "limit", using_default_limit) '
        "VALUES (:pool, 1, true)"
    )
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock' AND query LIKE 'INSERT INTO concurrency_limits%'"
    )
    engine = sa.create_engine(instance_url)
    with (
        dagster_instance(production.settings) as instance,
        engine.connect() as other,
        engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watch,
        ThreadPoolExecutor(1) as executor,
    ):
        other.execute(insert, {"pool": PLATFORM_POOL})
        made = executor.submit(make_pool, instance, PLATFORM_POOL)
        wait_until(lambda: watch.scalar(waiting) == 1, seconds=30, logs=tmp_path)
        other.commit()
        made.result(timeout=30)
        [pool] = instance.event_log_storage.get_pool_limits()
    engine.dispose()
    assert (pool.name, pool.limit) == (PLATFORM_POOL, 1)


def test_another_default_limit_counts_from_the_next_run_on(
    production: Platform, tmp_path: Path
) -> None:
    production.run(DAY)
    config = tmp_path / "dagster_home" / "dagster.yaml"
    config.write_text(config.read_text().replace("default_limit: 1", "default_limit: 2"))

    [summary] = production.run(DAY)

    assert summary.total_metrics_saved == len(production.metrics()) > 0
    with dagster_instance(production.settings) as instance:
        [pool] = instance.event_log_storage.get_pool_limits()
    assert (pool.name, pool.limit) == (PLATFORM_POOL, 2)


def test_a_limit_of_the_pools_own_stays(production: Platform) -> None:
    with dagster_instance(production.settings) as instance:
        instance.event_log_storage.set_concurrency_slots(PLATFORM_POOL, 3)
        make_pool(instance, PLATFORM_POOL)
        [pool] = instance.event_log_storage.get_pool_limits()
    assert (pool.name, pool.limit) == (PLATFORM_POOL, 3)


def test_two_runs_at_once_take_turns_at_the_platforms_database(
    production: Platform, tmp_path: Path
) -> None:
    """The first run is made to wait inside its step, by a lock, until the second one is there."""
    code = "from tutormax_assets.cli import app; app(prog_name='tutormax')"
    steps = steps_of(production.settings, JOB_NAME)
    pooled = {name for name, step in steps.items() if step.pool == PLATFORM_POOL}
    with dagster_instance(production.settings) as instance, ExitStack() as stack:
        # Dagster makes its tables once, not by two runs at the same time.
        assert instance.get_runs_count() == 0
        lock = stack.enter_context(production.engine.connect())
        lock.execute(sa.text("LOCK TABLE tutors, sessions, tutor_events"))
        runs = [
            stack.enter_context(
                process("-c", code, "run", "--date", day, log=tmp_path / f"{day}.log")
            )
            for day in ("2025-11-06", DAY)
        ]
        wait_until(lambda: blocked_runs(instance), seconds=60, logs=tmp_path)
        inside, waiting = pooled_events(instance, pooled), blocked_runs(instance)
        lock.rollback()
        wait_until(lambda: all(run.poll() is not None for run in runs), seconds=60, logs=tmp_path)
        events = pooled_events(instance, pooled)

    [(_, run_inside, _, kind)] = inside
    assert kind == "STEP_START"
    assert waiting.isdisjoint({run_inside})
    assert [run.returncode for run in runs] == [0, 0]
    assert len({run_id for _, run_id, _, _ in events}) == 2
    starts, ends = events[::2], events[1::2]
    assert len(starts) == 2 * len(pooled)
    # Each step ends before the next one begins.
    for start, end in zip(starts, ends, strict=True):
        assert (start[3], end[3]) == ("STEP_START", "STEP_SUCCESS")
        assert start[1:3] == end[1:3]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.waits
def test_the_daemon_fires_a_schedule_that_is_due_in_the_next_minute(
    production: Platform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Code location and daemon are processes, as in production; the clock is the real one."""
    port = free_port()
    due = (datetime.now(UTC) + timedelta(seconds=75)).replace(second=0, microsecond=0)
    production.execute("TRUNCATE tutors, students CASCADE")
    # The platform goes on until today: a stale one stops the run.
    sample_platform.generate(
        production.engine, tutors=30, sessions_per_tutor=40, days=100, end=due.date(), seed=3
    )
    monkeypatch.setenv(next_minute.HOUR_AND_MINUTE, f"{due:%H:%M}")
    monkeypatch.setenv("DAGSTER_CODE_LOCATION_HOST", "127.0.0.1")
    monkeypatch.setenv("DAGSTER_CODE_LOCATION_PORT", str(port))
    monkeypatch.setenv("PYTHONPATH", str(DEPLOY.parent))
    location = ["api", "grpc", "-m", next_minute.__name__, "-h", "127.0.0.1", "-p", str(port)]
    daemon = ["run", "-w", str(DEPLOY / "workspace.yaml")]

    with dagster_instance(production.settings) as instance, ExitStack() as stack:

        def run_of_schedule() -> dg.DagsterRun | None:
            tags = {"dagster/schedule_name": next_minute.SCHEDULE_NAME}
            return next(iter(instance.get_runs(dg.RunsFilter(tags=tags))), None)

        def finished() -> bool:
            run = run_of_schedule()
            return run is not None and run.is_finished

        log = tmp_path / "code_location.log"
        stack.enter_context(process("-m", "dagster", *location, log=log))
        # A schedule counts from when the daemon first sees it, and it looks once a minute.
        wait_until(lambda: listens(port), seconds=15, logs=tmp_path)
        stack.enter_context(process("-m", "dagster._daemon", *daemon, log=tmp_path / "daemon.log"))
        left = (due - datetime.now(UTC)).total_seconds()
        wait_until(run_of_schedule, seconds=left + 15, logs=tmp_path)
        fired = datetime.now(UTC)
        wait_until(finished, seconds=30, logs=tmp_path)
        run = run_of_schedule()
        assert run is not None
        failed = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
        automated = production.settings.model_copy(update={"automation": True})
        health = {one.name: one for one in examine_health(automated)}

    assert fired >= due
    assert failed == []
    assert "parts of the daemon have a heartbeat" in health["daemon"].says
    assert health["automation"].is_well, health["automation"].says
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert run.job_name == JOB_NAME
    # The reference date is that of the tick.
    assert run.tags["dagster/partition"] == f"{due:%Y-%m-%d}"
    assert production.metrics()["calculation_date"].unique().to_list() == [
        due.replace(hour=0, minute=0)
    ]
