"""Running a command to its end, and what it took: seconds, and memory of its process tree."""

import os
import resource
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil

_SAMPLE_SECONDS = 0.02
_SAMPLES_OF_A_TREE = 10


class CommandError(Exception):
    """A command of the benchmark failed; the message has what it said."""


@dataclass(frozen=True)
class Done:
    """A command that ended well.

    Attributes:
        output: Its standard output.
        seconds: From its start to its end.
        peak_rss_bytes: The most memory that its processes were seen to have resident at once, pages
            that they share counted for each; or that one of them had, if that is more.
    """

    output: str
    seconds: float
    peak_rss_bytes: int


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    stdin: str = "",
) -> Done:
    """Run a command to its end.

    Raises:
        CommandError: Its exit code is not 0.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as out:
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode())
            given.seek(0)
            started = perf_counter()
            process = subprocess.Popen(
                command, env=dict(environment), cwd=folder, stdin=given, stdout=out, stderr=said
            )
        peaks: list[int] = []
        ended = threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, ended, peaks))
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = perf_counter() - started
        finally:
            ended.set()
            sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read().decode()
        if process.returncode:
            said.seek(0)
            raise CommandError(
                f"{' '.join(command)} ended with exit code {process.returncode}:"
                f" {said.read().decode().strip() or output.strip()}"
            )
    # Linux lets a process begin with the peak of the one that started it, and counts in KiB.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    of_one = usage.ru_maxrss if usage.ru_maxrss > own else 0
    return Done(output, seconds, max([of_one * 1024, *peaks]))


def _sample(pid: int, ended: threading.Event, peaks: list[int]) -> None:
    tree: list[psutil.Process] = []
    number = 0
    while True:
        try:
            if number % _SAMPLES_OF_A_TREE == 0:
                # Looking for children reads the state of every process of the machine.
                root = psutil.Process(pid)
                tree = [root, *root.children(recursive=True)]
            number += 1
        except psutil.NoSuchProcess:
            return
        total = 0
        for process in tree:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                number = 0
        peaks[:] = [max([total, *peaks])]
        if ended.wait(_SAMPLE_SECONDS):
            return
