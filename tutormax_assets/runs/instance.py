"""The Dagster instance: its home, and what processes that open it at the same time need."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from filelock import FileLock

from tutormax_assets.runs.private_dagster import engines
from tutormax_assets.settings import Settings

_NO_TIMEOUT = 0
_RECYCLE_SECONDS = 300
_MAX_OVERFLOW = 9
"""Connections that may be opened while the first one is in use; they are closed after use."""


@contextmanager
def dagster_instance(settings: Settings) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance whose UI shows the runs: that of DAGSTER_HOME, else under the home."""
    home = dagster_home(settings)
    # Dagster makes its tables when it first opens them, and two that do so at once collide.
    with FileLock(home / "opening.lock"):
        instance = _open(home)
    with instance:
        pool_connections(instance)
        try:
            yield instance
        finally:
            for engine in engines(instance):
                engine.dispose()


def _open(home: Path) -> dg.DagsterInstance:
    """The instance. What a first opening that was killed has left is made anew."""
    begun = home / "opening.begun"
    folders = [home / "history", home / "schedules"]
    if begun.exists():
        # Dagster takes tables that are there for whole.
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    if any(folder.exists() for folder in folders):
        return dg.DagsterInstance.from_config(str(home))
    begun.touch()
    instance = dg.DagsterInstance.from_config(str(home))
    begun.unlink()
    return instance


def dagster_home(settings: Settings) -> Path:
    """The Dagster home, made ready for use with this package's ``dagster.yaml`` if it has none."""
    home = settings.dagster_home_path
    home.mkdir(parents=True, exist_ok=True)
    config = home / "dagster.yaml"
    with FileLock(home / "opening.lock"):
        if not config.exists():
            config.unlink(missing_ok=True)
            with as_file(files("tutormax_assets") / "dagster.yaml") as packaged:
                config.symlink_to(packaged)
    return home


def pool_connections(instance: dg.DagsterInstance) -> None:
    """Keep the connections of an instance on PostgreSQL open between statements.

    By default dagster-postgres opens a connection for each statement, which makes hundreds in a
    run. A connection that the server or the network has closed is replaced before its next use.

    Args:
        instance: Left as it is if it is in SQLite or has a pool already.
    """
    if not any(isinstance(engine.pool, sa.NullPool) for engine in engines(instance)):
        return
    instance.optimize_for_webserver(
        statement_timeout=_NO_TIMEOUT,
        pool_recycle=_RECYCLE_SECONDS,
        max_overflow=_MAX_OVERFLOW,
    )
    for engine in engines(instance):
        sa.event.listen(engine, "checkout", _probe)


def _probe(connection: Any, _record: object, _proxy: object) -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except Exception as error:
        raise sa.exc.DisconnectionError from error


def make_pool(instance: dg.DagsterInstance, pool: str) -> None:
    """Put a pool on record with the instance's default limit, unless it has a limit of its own.

    A step that claims a place in its pool would do it as well. But where the pool is on record
    already, because another process was faster or because the default was another one, Dagster
    fails on PostgreSQL, and with it the run (dagster issue 33552).

    Args:
        instance: Where pools are on record.
        pool: Its name.
    """
    log = instance.event_log_storage
    if not log.supports_global_concurrency_limits:
        return
    default = instance.get_concurrency_config().pool_config.default_pool_limit
    limits = {known.name: known for known in log.get_pool_limits()}
    if pool in limits:
        if not limits[pool].from_default or limits[pool].limit == default:
            return
        log.delete_concurrency_limit(pool)
    try:
        log.initialize_concurrency_limit_to_default(pool)
    except sa.exc.DBAPIError:
        # Another process has made it meanwhile, or else the error is about something else.
        if pool not in log.get_concurrency_keys():
            raise
