"""Shards on the workers of a Dask cluster, through its interface of ``concurrent.futures``.

What the scheduler does about workers that die: https://distributed.dask.org/en/stable/killed.html.
"""

import asyncio
import hashlib
import importlib.metadata
import logging
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, TypeAlias, TypeVar
from uuid import uuid4

import distributed
from distributed.cfexecutor import ClientExecutor
from distributed.comm.core import connect
from distributed.scheduler import KilledWorker, NoValidWorkerError, NoWorkerError

from tutormax_assets.compute import DaskError, KilledShardError
from tutormax_assets.compute.context import TaskContext
from tutormax_assets.database.faults import reason
from tutormax_assets.errors import TutormaxError
from tutormax_assets.settings import Settings, load_settings
from tutormax_assets.source.platform import PlatformDatabase

ANSWER_SECONDS = 10
"""How long the scheduler, or a worker that is asked for its code, may take to answer."""

LOOK_SECONDS = 2.0
"""How often a run looks which workers there are."""

_PACKAGES = ("tutormax-assets", "polars", "distributed")
_NAMED = 3

Task = TypeVar("Task")
Report = TypeVar("Report")


_Computed: TypeAlias = tuple[Report, list[tuple[int, str]]]


class OtherCodeError(TutormaxError):
    """A worker was given a shard by a run that has other code."""


class _Submitted(NamedTuple):
    name: str
    workers: list[str] | None


@cache
def code() -> dict[str, str]:
    """What must be the same wherever a run computes: versions, and this package's source."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return {
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "source": digest.hexdigest()[:12],
    }


def environment() -> tuple[dict[str, str], bool]:
    """The ``code()`` of the process that is asked, and whether it limits the threads of Polars."""
    return code(), "POLARS_MAX_THREADS" in os.environ


class _Lines(logging.Handler):
    """Keeps what is logged, and tells it here too."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))
        logging.getLogger(__name__).handle(record)


def execute_task(expected: Mapping[str, str], sent: bytes) -> tuple[Any, list[tuple[int, str]]]:
    """Call the function of a shard, on a worker.

    Args:
        expected: The ``code()`` of the run.
        sent: Function and task, pickled once more, since the scheduler reads what it hands on: it
            has not the environment of a worker, and what a task leads to is none of its business.

    Returns:
        The report, and level and message of what was logged.

    Raises:
        OtherCodeError: The code here is not the expected one.
        SettingsError: The worker's environment does not make sense.
    """
    if (found := code()) != expected:
        raise OtherCodeError(_difference(found))
    function, task = pickle.loads(sent)  # noqa: S301 - as safe as what Dask itself unpickles
    log, kept = logging.Logger(__name__, logging.INFO), _Lines()
    log.addHandler(kept)
    settings, database = _of_this_worker()
    return function(task, TaskContext(database, settings.home_path, log)), kept.lines


@cache
def _of_this_worker() -> tuple[Settings, PlatformDatabase]:
    settings = load_settings()
    return settings, PlatformDatabase(settings)


class Cluster:
    """A connection to a Dask cluster whose scheduler and workers have the code of this process."""

    def __init__(self, settings: Settings, *, log: logging.Logger) -> None:
        """Connect, and compare the code there with that of this process.

        Raises:
            DaskError: The scheduler cannot be reached, or the code there is another one.
        """
        self._address = str(settings.dask_address)
        self._patience = settings.dask_no_workers_timeout_seconds
        self._look_seconds = min(LOOK_SECONDS, self._patience / 4)
        self._threads: dict[str, int] = {}
        self._asked: set[str] = set()
        self._refused: dict[str, str] = {}
        self._client = _connect(settings)
        # Another one would mean that the scheduler has forgotten what this run had there.
        self._connection = self._client.scheduler_comm
        try:
            self._ask_scheduler()
            # Connecting may have taken longer than a run waits for workers.
            self._seen_at = monotonic()
            self._look(log)
            if self._refused:
                raise DaskError(f"{self._refusal().lstrip()} {_SAME_VERSION}")
        except BaseException:
            self.close()
            raise
        log.info(
            "Dask scheduler %s: %d workers with %d threads",
            self._address,
            len(self._threads),
            self.threads,
        )

    @property
    def threads(self) -> int:
        """How many shards the workers computed at once when they were last looked at."""
        return sum(self._threads.values())

    @property
    def is_lost(self) -> bool:
        """Whether the connection is of no use any more."""
        return self._client.scheduler_comm is not self._connection

    def close(self) -> None:
        """Leave the cluster. What it still has of this run is cancelled."""
        with suppress(OSError, TimeoutError):
            self._client.close(timeout=ANSWER_SECONDS)

    def reports(
        self,
        function: Callable[[Task, TaskContext], Report],
        tasks: Mapping[str, Task],
        errors: dict[str, BaseException],
        *,
        log: logging.Logger,
    ) -> Generator[tuple[str, Report], None, None]:
        """Call the function for each task on a worker.

        No more tasks are submitted than there are threads: none waits on a worker that is busy or
        dies. Tasks that are blamed for dead workers are tried again alone, after all others.

        Args:
            function: A function of a module.
            tasks: What it is given, by the shard's name.
            errors: What failed is put in here, by name.
            log: Where it is told what becomes of workers.

        Yields:
            Name and report of each shard that succeeded, as they come.

        Raises:
            DaskError: The scheduler or all workers were lost.
        """
        executor = self._client.get_executor(pure=False)
        submit = partial(_submit, executor, function, tasks)
        running: dict[Future[_Computed[Report]], _Submitted] = {}
        suspects: deque[str] = deque()
        self._seen_at = self._next_look = monotonic()
        try:
            for queue, alone in ((deque(tasks), len(tasks) == 1), (suspects, True)):
                for future, (name, workers) in self._drain(queue, running, submit, alone, log):
                    error = self._error(future)
                    del running[future]
                    if error is None:
                        report, lines = future.result()
                        for level, line in lines:
                            log.log(level, "%s: %s", name, line)
                        yield name, report
                    elif isinstance(error, NoWorkerError):
                        # How long that is borne is for this process to say.
                        queue.appendleft(name)
                    elif isinstance(error, KilledShardError) and not alone:
                        log.warning("Shard %s is tried again alone: %s", name, error)
                        suspects.append(name)
                    elif workers is None and self._is_of_other_code(error, log):
                        queue.append(name)
                    else:
                        errors[name] = error
        except DaskError as error:
            raise _with_names(error, running.values(), queue) from error.__cause__
        finally:
            if self._client.status != "closed":
                executor.shutdown(wait=False)

    def _drain(
        self,
        queue: deque[str],
        running: dict[Future[_Computed[Report]], _Submitted],
        submit: Callable[[str, list[str] | None], Future[_Computed[Report]]],
        alone: bool,
        log: logging.Logger,
    ) -> Iterator[tuple[Future[_Computed[Report]], _Submitted]]:
        """Submit the queue as workers become free, until it is empty and nothing runs.

        Yields:
            Each future that is done, or that no worker that is left can compute. The caller
            removes it from the running ones.
        """
        while queue or running:
            if monotonic() >= self._next_look:
                self._look(log)
                self._next_look = monotonic() + self._look_seconds
            most = 1 if alone else max(1, self.threads)
            while queue and len(running) < most:
                name = queue.popleft()
                # Where some workers are to be kept away from, the others are named.
                workers = list(self._threads) if self._refused else None
                running[submit(name, workers)] = _Submitted(name, workers)
            wait(running, timeout=self._look_seconds, return_when=FIRST_COMPLETED)
            yield from [
                (future, submitted)
                for future, submitted in running.items()
                if future.done()
                or (submitted.workers and self._threads.keys().isdisjoint(submitted.workers))
            ]

    def _error(self, future: Future[Any]) -> BaseException | None:
        if not future.done():
            future.cancel()
            return KilledShardError(_error_of_killed("all workers that were left"))
        if future.cancelled():
            raise self._lost()
        error = future.exception()
        if isinstance(error, KilledWorker):
            died = error.allowed_failures + 1
            return KilledShardError(_error_of_killed(f"{died} worker{'s' if died > 1 else ''}"))
        if isinstance(error, NoValidWorkerError):
            return KilledShardError(_error_of_killed("all workers that were left"))
        return error

    def _is_of_other_code(self, error: BaseException, log: logging.Logger) -> bool:
        """Whether a worker is the reason, which joined since the last look; it is refused then."""
        if not isinstance(error, OtherCodeError | ImportError | AttributeError):
            return False
        self._look(log)
        return bool(self._refused)

    def _look(self, log: logging.Logger) -> None:
        """See which workers there are, and ask new ones for their code.

        Raises:
            DaskError: There have been none for too long, or the connection is lost.
        """
        scheduler = self._client.scheduler
        if scheduler is None or self.is_lost:
            raise self._lost()
        workers: Mapping[str, Any] | None = None
        with suppress(OSError, TimeoutError):
            workers = self._client.sync(
                scheduler.identity, n_workers=-1, callback_timeout=ANSWER_SECONDS
            )["workers"]
        if workers is not None:
            self._ask(workers, log)
            self._threads = {
                address: worker["nthreads"]
                for address, worker in workers.items()
                if address not in self._refused and _can_compute(worker)
            }
            if self._threads:
                self._seen_at = monotonic()
        if monotonic() - self._seen_at > self._patience:
            raise DaskError(
                f"The Dask cluster at {self._address} has had no worker for {self._patience} s"
                f" (TUTORMAX_DASK_NO_WORKERS_TIMEOUT_SECONDS).{self._refusal()} See that"
                " scheduler and workers run and have memory left, then run the date again."
            )

    def _ask_scheduler(self) -> None:
        """Compare the code of the scheduler, which imports functions to hand them on."""
        who = f"The scheduler {self._address}"
        try:
            found, _ = self._client.run_on_scheduler(environment, callback_timeout=ANSWER_SECONDS)
        except Exception as error:
            self._refused[who] = _unknown(error)
        else:
            if found != code():
                self._refused[who] = _difference(found)
        if self._refused:
            raise DaskError(f"{self._refusal().lstrip()} {_SAME_VERSION}")

    def _ask(self, workers: Mapping[str, Any], log: logging.Logger) -> None:
        """Compare the code of workers that are new; one that does not answer is not refused yet.

        Each shard that a worker is given compares it, too.
        """
        for address in self._refused.keys() - workers.keys():
            del self._refused[address]
        new = sorted(workers.keys() - self._asked)
        self._asked = set(workers)
        if not new:
            return
        answers: dict[str, Any] = {}
        with suppress(OSError, TimeoutError):
            answers = self._client.run(
                environment, workers=new, on_error="return", callback_timeout=ANSWER_SECONDS
            )
        unlimited = 0
        for address, answer in answers.items():
            if isinstance(answer, OSError):
                continue
            if isinstance(answer, Exception):
                self._refused[address] = _unknown(answer)
            elif answer[0] != code():
                self._refused[address] = _difference(answer[0])
            else:
                unlimited += workers[address]["nthreads"] > 1 and not answer[1]
            if address in self._refused:
                log.warning("Worker %s is given no shard: %s", address, self._refused[address])
        if unlimited:
            log.warning(
                "%d Dask workers have several threads, and each query of Polars uses all cores:"
                " start them with --nthreads 1, or set POLARS_MAX_THREADS there",
                unlimited,
            )

    def _refusal(self) -> str:
        """Whose code is another one, as sentences behind another sentence."""
        named = "".join(
            f" {who} has {difference}." for who, difference in islice(self._refused.items(), _NAMED)
        )
        more = len(self._refused) - _NAMED
        return f"{named} {more} more have other code, too." if more > 0 else named

    def _lost(self) -> DaskError:
        return DaskError(
            f"The connection to the Dask scheduler at {self._address} was lost, or the run was"
            " cancelled there. What was saved until then stays; see that the scheduler runs, then"
            " run the date again."
        )


def _submit(
    executor: ClientExecutor,
    function: Callable[[Task, TaskContext], Report],
    tasks: Mapping[str, Task],
    name: str,
    workers: list[str] | None,
) -> Future[_Computed[Report]]:
    sent = pickle.dumps((function, tasks[name]))
    key = f"{function.__name__}-{name}-{uuid4().hex}"
    future: Future[_Computed[Report]] = executor.submit(
        execute_task, code(), sent, key=key, workers=workers
    )
    return future


def _with_names(error: DaskError, running: Iterable[_Submitted], queue: Iterable[str]) -> DaskError:
    """The error with the first shards that run, or else wait, in its message."""
    names = [name for name, _ in islice(running, _NAMED)]
    state = "Under way" if names else "Waiting"
    names = names or list(islice(queue, _NAMED))
    return DaskError(f"{error} {state}: {', '.join(names)}.") if names else error


_SAME_VERSION = "Install the same version for the run, the scheduler and all workers."


def _connect(settings: Settings) -> distributed.Client:
    # What it says there, with tracebacks, is raised here as well.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    address = str(settings.dask_address)
    security = distributed.Security()
    if settings.dask_tls_ca_file is not None:
        security = distributed.Security(
            require_encryption=True,
            tls_ca_file=str(settings.dask_tls_ca_file),
            tls_client_cert=str(settings.dask_tls_cert),
            tls_client_key=str(settings.dask_tls_key),
        )
    try:
        # In a thread, since the caller's may have a loop of its own.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, _answers(address, security)).result()
        return distributed.Client(
            address, timeout=ANSWER_SECONDS, security=security, set_as_default=False
        )
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise DaskError(
            f"No connection to the Dask scheduler at {address}: {reason(error)}. See that it runs"
            " there, and that TUTORMAX_DASK_ADDRESS and TUTORMAX_DASK_TLS_* fit it."
        ) from error


async def _answers(address: str, security: distributed.Security) -> None:
    """Wait for a Dask server to say hello, which the client would do for ever."""
    arguments = security.get_connection_args("client")
    connecting = connect(address, timeout=ANSWER_SECONDS, **arguments)
    try:
        comm = await asyncio.wait_for(connecting, 1.5 * ANSWER_SECONDS)
    except TimeoutError:
        raise TimeoutError("what listens there does not answer as a Dask scheduler") from None
    comm.abort()


def _can_compute(worker: Mapping[str, Any]) -> bool:
    """Whether a worker takes tasks, or has not enough memory for another but computes one."""
    return bool(
        worker["status"] == "running" or worker["metrics"].get("task_counts", {}).get("executing")
    )


def _difference(found: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name} {found.get(name, 'none')}, expected {version}"
        for name, version in code().items()
        if found.get(name) != version
    )


def _unknown(error: Exception) -> str:
    return f"no such tutormax_assets ({type(error).__name__}: {reason(error)})"


def _error_of_killed(workers: str) -> str:
    return (
        f"{workers} that computed it died, as happens where memory runs out. Their logs say how;"
        " give workers more memory, or use more shards"
    )
