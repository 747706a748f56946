"""A Dask scheduler and workers as processes on loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import distributed

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0

Process = subprocess.Popen[bytes]


def until(condition: Callable[[], object], *, what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s for {what}"
        time.sleep(0.02)


@dataclass
class DaskCluster:
    """Processes that end with the cluster.

    Attributes:
        folder: Where they write.
        tls: Options of certificates for scheduler and workers.
        allowed_failures: Workers that may die of a shard before it is blamed.
    """

    folder: Path
    tls: Sequence[str] = ()
    allowed_failures: int = 0
    port: int = 0
    scheduler: Process | None = None
    workers: list[Process] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{'tls' if self.tls else 'tcp'}://127.0.0.1:{self.port}"

    def start_scheduler(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        failures = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(self.allowed_failures)}
        command = ["dask_scheduler", "--host", self.address.rpartition(":")[0]]
        self.scheduler = self._process([*command, "--port", str(self.port)], failures)

        def listens() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", self.port)) == 0

        until(listens, what="the scheduler")

    def start_worker(
        self, *, source: Path = ROOT, environment: Mapping[str, str] | None = None, threads: int = 1
    ) -> Process:
        command = ["dask_worker", self.address, "--no-nanny", "--nthreads", str(threads)]
        command += ["--host", "127.0.0.1", "--local-directory", str(self.folder)]
        worker = self._process(command, environment or {}, source=source)
        self.workers.append(worker)
        return worker

    def wait_for(self, workers: int) -> None:
        """Wait until the scheduler has so many workers."""
        assert self.scheduler is not None
        assert self.scheduler.poll() is None, f"the scheduler ended: {self.scheduler.returncode}"
        with distributed.Client(self.address, set_as_default=False, timeout=PATIENCE) as client:
            until(
                lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == workers,
                what=f"{workers} workers",
            )

    def repair(self, workers: int) -> None:
        """Have so many workers again."""
        for worker in [worker for worker in self.workers if worker.poll() is not None]:
            self.workers.remove(worker)
        while len(self.workers) > workers:
            self.stop(self.workers.pop())
        while len(self.workers) < workers:
            self.start_worker()
        self.wait_for(workers)

    def close(self) -> None:
        for process in [*self.workers, *([self.scheduler] if self.scheduler else [])]:
            self.stop(process)

    @staticmethod
    def stop(process: Process) -> None:
        process.kill()
        process.wait()

    def _process(
        self, command: Sequence[str], environment: Mapping[str, str], *, source: Path = ROOT
    ) -> Process:
        module, *options = command
        options += ["--no-dashboard", "--dashboard-address", "127.0.0.1:0", *self.tls]
        with (self.folder / f"{module}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *options],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{ROOT}", **environment},
                stdout=log,
                stderr=log,
            )
