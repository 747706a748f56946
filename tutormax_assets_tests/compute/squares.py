"""A function that is mapped over shards, and goes wrong as it is told; workers import it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tutormax_assets.compute.context import TaskContext


@dataclass(frozen=True)
class Square:
    """A task. One with a ``gate`` begins a file beside it and waits until the gate is there."""

    root: int
    goes_wrong: Literal["", "raises", "unpicklable", "kills its worker"] = ""
    gate: Path | None = None


@dataclass(frozen=True)
class Squared:
    """A report."""

    area: int
    process: int


class UnpicklableError(Exception):
    def __init__(self, *, what: str) -> None:
        super().__init__(what)


def squared(task: Square, context: TaskContext) -> Squared:
    context.log.info("%d is squared", task.root)
    if task.gate is not None:
        begun(task).write_text(str(os.getpid()), encoding="utf-8")
        deadline = time.monotonic() + 60
        while not task.gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    match task.goes_wrong:
        case "raises":
            raise ValueError(f"no square of {task.root}\nsecond line")
        case "unpicklable":
            raise UnpicklableError(what="cannot travel")
        case "kills its worker":
            os.kill(os.getpid(), signal.SIGKILL)
    return Squared(task.root**2, os.getpid())


def begun(task: Square) -> Path:
    """The file that says which process has begun a task with a gate."""
    assert task.gate is not None
    return task.gate.with_name(f"{task.gate.name}.{task.root}")
