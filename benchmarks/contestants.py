"""One measurement of a contestant: the product as a command, a peer in a process of its own."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.answers import ROUNDING, differences
from benchmarks.peers import Task
from benchmarks.platforms import TUTORMAX, Platform, midnight
from benchmarks.stages import stages

ORACLE = "oracle"
"""The loop over a sample of tutors, whose answers must be ours to the last hundredth."""

TUTORS_OF_ORACLE = 200

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measured:
    """What a contestant took.

    Attributes:
        seconds: By stage.
        peak_rss_bytes: Memory of its processes, the server's not included.
        output: What a command said, read from its JSON.
    """

    seconds: dict[str, float]
    peak_rss_bytes: int
    output: dict[str, Any]


def product(
    platform: Platform, *arguments: str, variables: Mapping[str, str] | None = None
) -> Measured:
    """Run ``tutormax`` with these arguments; its output is JSON.

    Args:
        platform: Where.
        arguments: Those of the command.
        variables: What else the environment says.

    Returns:
        Seconds as ``stages`` has them, and ``whole_process``.
    """
    since = datetime.now(UTC)
    done = processes.run(
        [TUTORMAX, *arguments, "--json", "--quiet"],
        environment={**platform.environment(), **(variables or {})},
        folder=platform.home,
    )
    output = json.loads(done.output)
    seconds = {**stages(platform.home, since=since), "whole_process": done.seconds}
    for stage in ("read", "read_to_persisted"):
        # Who has changed is looked for before the run begins.
        seconds[stage] += output.get("search_seconds", 0)
    return Measured(seconds, done.peak_rss_bytes, output)


def peer(platform: Platform, name: str, day: date, *, tutors: int | None = None) -> Measured:
    """Let a peer compute a reference date and write it to the twin.

    Args:
        platform: Where.
        name: The peer.
        day: The reference date.
        tutors: Only so many tutors, if the peer can be asked for fewer than all.

    Returns:
        Seconds by the peer's own stages, and ``total``, their sum.
    """
    cores = os.cpu_count() or 1
    return _in_its_process(platform, Task(platform.conninfo, day.isoformat(), cores, tutors), name)


def _in_its_process(platform: Platform, task: Task, name: str) -> Measured:
    done = processes.run(
        [sys.executable, "-m", "benchmarks.peers", name],
        environment={**platform.environment(), "PYTHONPATH": _path()},
        folder=platform.home,
        stdin=json.dumps(task.to_dict()),
    )
    said = json.loads(done.output)
    seconds = {**said["seconds"], "total": sum(said["seconds"].values())}
    return Measured(seconds, said["peak_rss_bytes"], {})


def _path() -> str:
    """Where Python finds the benchmark in whatever folder it starts."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def differing(platform: Platform, day: date, *, exact: bool = False, sample: bool = False) -> int:
    """Number of rows of a reference date in which the twin differs from the table.

    Args:
        platform: Where.
        day: The reference date.
        exact: Whether a rounding difference of a hundredth counts.
        sample: Whether only the tutors of the twin are looked at.
    """
    with platform.connect() as connection:
        found = differences(
            connection, date=midnight(day), rounding=0 if exact else ROUNDING, sample=sample
        )
    return len(found)


def differing_from_oracle(platform: Platform, day: date) -> int:
    """Number of rows in which the table is not what the loop comes to, of a sample of tutors.

    The twin is made anew for it.
    """
    platform.renew_twin()
    peer(platform, "loop", day, tutors=TUTORS_OF_ORACLE)
    return differing(platform, day, exact=True, sample=True)
