"""The health of everything that the night needs, for a probe that runs outside of Dagster."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
import sqlalchemy as sa
from upath import UPath

from tutormax_assets.database.connection import Timeouts, describe, engine_of, limit_transaction
from tutormax_assets.database.faults import reason
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.definitions import build_definitions
from tutormax_assets.defs.automation.nights import last_nights
from tutormax_assets.defs.automation.silence import find_silent, periods_of
from tutormax_assets.errors import TutormaxError
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.schema import obstacles
from tutormax_assets.settings import Settings
from tutormax_assets.source.view import open_view, source_of

LEAST_FREE_SHARE = 0.05
"""Share of a disk that has to be free."""

HEARTBEAT_SECONDS = 120
"""A daemon records a heartbeat every 30 seconds."""

_IS_THERE = sa.text("SELECT to_regclass(CAST(:name AS text)) IS NOT NULL")


@dataclass(frozen=True)
class Finding:
    """The state of one thing.

    Attributes:
        name: What was examined.
        is_well: Whether it is as expected.
        says: A sentence.
    """

    name: str
    is_well: bool
    says: str

    def to_dict(self) -> dict[str, Any]:
        """The finding in JSON's types."""
        return asdict(self)


def examine_health(settings: Settings, *, now: datetime | None = None) -> list[Finding]:
    """Examine the instance, its daemon, the last night, the databases, files and disks.

    Writes nothing but a file that it deletes at once, to see that storage and archive take files.

    Args:
        settings: Where everything is. ``automation`` says whether a daemon is expected.
        now: The time; the clock's if left out.
    """
    now = now or datetime.now(UTC)
    examined: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("instance", lambda: _instance(settings, now)),
        ("database", lambda: _database(settings)),
        ("source", lambda: _source(settings)),
        ("storage", lambda: _files("storage", settings.storage_path)),
        ("archive", lambda: _files("archive", settings.archive_path)),
        ("disk", lambda: _disks(settings)),
    ]
    found: list[Finding] = []
    for name, examine in examined:
        with _sentence(name, found):
            found += examine()
    return found


@contextmanager
def _sentence(name: str, found: list[Finding]) -> Iterator[None]:
    """Turn a failure into a finding."""
    try:
        yield
    except TutormaxError as error:
        found.append(Finding(name, False, str(error)))
    # A probe says what is wrong, whatever it is, and examines the rest.
    except Exception as error:
        found.append(Finding(name, False, f"It cannot be used: {reason(error).rstrip('.')}."))


def _instance(settings: Settings, now: datetime) -> Iterator[Finding]:
    home = settings.dagster_home_path
    if not (home / "dagster.yaml").exists():
        yield Finding(
            "instance",
            False,
            f"There is no Dagster home at {home}. `tutormax run` makes it; TUTORMAX_HOME and"
            " DAGSTER_HOME say where it is.",
        )
        return
    with dagster_instance(settings) as instance:
        yield Finding("instance", True, f"Dagster's record at {home} can be read.")
        yield from _automation(instance, settings, now)
        nights = last_nights(instance, settings, days=1, now=now)
        what = "failed" if nights.failed else "is not saved"
        yield Finding(
            "last night",
            nights.is_well,
            f"{nights.last} is saved."
            if nights.is_well
            else f"{nights.last} {what}. `tutormax run --date {nights.last}` computes it.",
        )


def _automation(
    instance: dg.DagsterInstance, settings: Settings, now: datetime
) -> Iterator[Finding]:
    """Examine the daemon, and the schedules and sensors that it runs."""
    states = instance.all_instigator_state()
    is_on = settings.automation or any(one.status.value == "RUNNING" for one in states)
    if not is_on:
        yield Finding("daemon", True, "Not expected: TUTORMAX_AUTOMATION is off.")
        return
    beats = instance.get_daemon_heartbeats()
    late = [
        name
        for name, beat in sorted(beats.items())
        if now.timestamp() - beat.timestamp > HEARTBEAT_SECONDS
    ]
    if not beats or late:
        newest = max((beat.timestamp for beat in beats.values()), default=None)
        since = (
            "ever" if newest is None else f"since {datetime.fromtimestamp(newest, UTC):%F %R} UTC"
        )
        what = f" of {', '.join(late)}" if late and len(late) < len(beats) else ""
        yield Finding(
            "daemon",
            False,
            f"No heartbeat{what} {since}, expected one every 30 seconds. Start the daemon, or see"
            " its log.",
        )
    else:
        yield Finding("daemon", True, f"{len(beats)} parts of the daemon have a heartbeat.")
    repository = build_definitions(settings).get_repository_def()
    periods = periods_of(
        [one.name for one in repository.schedule_defs],
        [one.name for one in repository.sensor_defs],
    )
    silent = dict(find_silent(instance, periods, now=now))
    for says in silent.values():
        yield Finding("automation", False, says)
    stopped = [
        one.instigator_name
        for one in states
        if one.instigator_name in periods and one.status.value == "STOPPED"
    ]
    if stopped:
        names = ", ".join(sorted(stopped))
        yield Finding("automation", False, f"Turned off in the UI: {names}.")
    if not silent and not stopped:
        yield Finding("automation", True, f"{len(states)} schedules and sensors are on and tick.")


def _database(settings: Settings) -> Iterator[Finding]:
    with engine_of(settings) as engine, engine.begin() as connection:
        limit_transaction(connection, Timeouts.of(settings))
        where = describe(engine.url)
        problems = [f"{clause}." for clause in obstacles.of_server(connection)]
        if not connection.scalar(_IS_THERE, {"name": METRICS_TABLE}):
            problems.append(
                f"Table {METRICS_TABLE} is not there; `tutormax db upgrade` creates it."
            )
        yield Finding("database", not problems, " ".join(problems) or f"{where} takes the metrics.")


def _source(settings: Settings) -> Iterator[Finding]:
    with open_view(source_of(settings)) as view:
        yield Finding("source", True, f"The platform can be read, at {view.read_at:%F %R} UTC.")


def _files(name: str, base_path: str) -> Iterator[Finding]:
    probe = UPath(base_path) / f".health-{uuid4().hex}"
    if not UPath(base_path).exists() and _is_local(base_path):
        yield Finding(name, True, f"{base_path} is made by the first run that needs it.")
        return
    try:
        probe.write_bytes(b"")
        probe.unlink()
    # What a filesystem raises depends on which one it is.
    except Exception as error:
        yield Finding(name, False, f"{base_path} takes no files: {reason(error).rstrip('.')}.")
        return
    yield Finding(name, True, f"{base_path} takes files.")


def _disks(settings: Settings) -> Iterator[Finding]:
    paths = {
        "home": str(settings.home_path),
        "Dagster's home": str(settings.dagster_home_path),
        "storage": settings.storage_path,
        "archive": settings.archive_path,
    }
    disks: dict[int, tuple[Path, list[str]]] = {}
    for name, path in paths.items():
        if _is_local(path):
            there = _nearest(Path(path))
            disks.setdefault(os.stat(there).st_dev, (there, []))[1].append(name)
    for folder, names in disks.values():
        usage = shutil.disk_usage(folder)
        share = usage.free / max(usage.total, 1)
        yield Finding(
            "disk",
            share >= LEAST_FREE_SHARE,
            f"{share:.0%} of the disk of {', '.join(names)} is free"
            f" ({usage.free / (1 << 30):.1f} GiB), expected {LEAST_FREE_SHARE:.0%}"
            f" or more{'' if share >= LEAST_FREE_SHARE else ': free space on it'}.",
        )


def _is_local(path: str) -> bool:
    return "://" not in path


def _nearest(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(one for one in (path, *path.parents) if one.exists())
