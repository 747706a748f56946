"""Runs whose process is gone: put on record as failed, so that none counts as running for ever.

Dagster watches over the workers that it starts, and over nothing else. A process that executes
runs by itself locks a file of its own in the Dagster home, whose name its runs bear. The kernel
frees the lock however the process ends, so no other process is mistaken for it, whether it has the
same id by now or is in another container. The runs of a machine with another home have no file here
and are left alone.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import dagster as dg
from filelock import FileLock, Timeout

PROCESS_TAG = "tutormax/process"
"""On a run that its own process attends to: host, process id and a part that tells it apart."""

_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@contextmanager
def this_process(home: Path) -> Iterator[str]:
    """The value of the tag for the runs that are executed within the block.

    Args:
        home: The Dagster home.
    """
    folder = _folder(home)
    folder.mkdir(exist_ok=True)
    path = folder / f"{process_prefix(os.getpid())}{uuid4().hex[:8]}.lock"
    with FileLock(path):
        yield path.stem
        path.unlink()


def process_prefix(pid: int) -> str:
    """What the tag's value begins with for a process of this host."""
    return f"{socket.gethostname()}-{pid}-"


def end_killed_runs(
    instance: dg.DagsterInstance,
    home: Path,
    log: logging.Logger,
    *,
    pid: int | None = None,
    reason: str = "",
) -> list[str]:
    """Put the runs whose process is gone on record as failed, and free their places in pools.

    Args:
        instance: Where the runs are on record.
        home: The Dagster home.
        log: Where each run is reported.
        pid: A process that is known to be gone.
        reason: Why that one is gone.

    Returns:
        Ids of the runs, the oldest first.
    """
    ended = []
    for path in sorted(_folder(home).glob("*.lock")):
        try:
            with FileLock(path, blocking=False):
                known = pid is not None and path.stem.startswith(process_prefix(pid))
                of_process = dg.RunsFilter(tags={PROCESS_TAG: path.stem}, statuses=_UNFINISHED)
                for run in reversed(instance.get_runs(of_process)):
                    if run.parent_run_id is not None:
                        continue  # A re-execution has the tag, but not the process.
                    _end(instance, run, reason if known else _general_reason(path.stem), log)
                    ended.append(run.run_id)
                path.unlink(missing_ok=True)
        except Timeout:  # It is alive, or another process is doing this.
            continue
    return ended


def _end(
    instance: dg.DagsterInstance, run: dg.DagsterRun, reason: str, log: logging.Logger
) -> None:
    log.warning("Run %s of an earlier process did not end: %s", run.run_id, reason)
    instance.report_run_failed(run, reason)
    if instance.event_log_storage.supports_global_concurrency_limits:
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _general_reason(process: str) -> str:
    host, pid, _ = process.rsplit("-", 2)
    return (
        f"The process {pid} on {host} that executed it was killed or the machine was switched off."
        " A partition is as it was before or whole; run the dates again."
    )


def _folder(home: Path) -> Path:
    return home / "processes"
