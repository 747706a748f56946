"""Mapping a function over shards: in the process of the run, or on a Dask cluster."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING, TypeVar

from tutormax_assets.compute import DaskError, ShardsError
from tutormax_assets.compute.context import TaskContext
from tutormax_assets.database.faults import reason
from tutormax_assets.settings import Settings
from tutormax_assets.source.platform import PlatformDatabase

if TYPE_CHECKING:
    from tutormax_assets.compute.dask import Cluster

Task = TypeVar("Task")
Report = TypeVar("Report")


class Compute:
    """Computes shards where the settings say: here, or on a Dask cluster."""

    def __init__(self, settings: Settings, database: PlatformDatabase) -> None:
        """Say where.

        Args:
            settings: Name the cluster, if there is one.
            database: What tasks use that are computed here; workers have their own settings.
        """
        self._settings = settings
        self._database = database
        self._cluster: Cluster | None = None
        self._over = Event()

    @property
    def is_elsewhere(self) -> bool:
        """Whether other processes compute, which may outlive the run."""
        return self._settings.dask_address is not None

    def here(self) -> "Compute":
        """The same without a cluster."""
        return Compute(self._settings.model_copy(update={"dask_address": None}), self._database)

    def groups(self, numbers: Sequence[int], *, log: logging.Logger) -> list[Sequence[int]]:
        """Neighbouring shards that are read from the platform at once.

        To read a group, a database goes through its tables once. So there are as many groups as
        shards can be computed at once: one here, and one for each thread of a cluster's workers.

        Raises:
            DaskError: The cluster cannot be reached or has other code.
        """
        cluster = self._connect(log)
        count = 1 if cluster is None else max(1, min(cluster.threads, len(numbers)))
        starts = [len(numbers) * group // count for group in range(count + 1)]
        return [numbers[start:end] for start, end in pairwise(starts)]

    def map(
        self,
        function: Callable[[Task, TaskContext], Report],
        tasks: Mapping[str, Task],
        *,
        log: logging.Logger,
    ) -> Generator[tuple[str, Report], None, None]:
        """Call a function for each shard, and give its reports in the order of the tasks.

        A shard may be computed more than once, also at the same time, so the function must bear
        repetition. What it raises does not keep other shards from being computed. An iterator that
        is closed early cancels what is queued; a worker ends what it has begun.

        Args:
            function: A function of a module; that module is imported by the workers. What it tells
                the log of its context comes out in ours.
            tasks: What the function is given, by the shard's name. Function, tasks and reports are
                pickled and pass through the scheduler: they are small and hold no secret.
            log: Where failures and the state of the cluster are told.

        Yields:
            Name and report of each shard that succeeded.

        Raises:
            ShardsError: Some shards failed; a single task raises what it raised by itself.
            DaskError: The cluster cannot be reached, has other code, or has lost all workers.
            KilledShardError: The workers that computed the single task died of it.
        """
        if not tasks:
            return
        errors: dict[str, BaseException] = {}
        reports: dict[str, Report] = {}
        waiting = deque(tasks)
        lost = None
        with closing(self._reports(function, tasks, errors, log)) as found:
            try:
                for name, report in found:
                    reports[name] = report
                    while waiting and (waiting[0] in reports or waiting[0] in errors):
                        if (name := waiting.popleft()) in reports:
                            yield name, reports.pop(name)
            except DaskError as error:
                lost = error
        yield from ((name, reports[name]) for name in waiting if name in reports)
        if lost is not None:
            raise lost
        if not errors:
            return
        if len(tasks) == 1:
            raise next(iter(errors.values()))
        errors = {name: errors[name] for name in tasks if name in errors}
        for name, failure in errors.items():
            log.error("Shard %s failed: %s", name, reason(failure))
        raise ShardsError(errors, of=len(tasks)) from next(iter(errors.values()))

    def gather(
        self,
        function: Callable[[Task, TaskContext], Report],
        tasks: Mapping[str, Task],
        *,
        log: logging.Logger,
    ) -> tuple[dict[str, Report], dict[str, BaseException]]:
        """Call a function for each shard as ``map`` does, and keep what failed.

        Returns:
            The reports, and what other shards raised, each by the name of the task.

        Raises:
            DaskError: The cluster cannot be reached, has other code, or has lost all workers.
            KilledShardError: The workers that computed the single task died of it.
            Exception: What a single task raised.
        """
        reports: dict[str, Report] = {}
        try:
            for name, report in self.map(function, tasks, log=log):
                reports[name] = report
        except ShardsError as error:
            return reports, error.errors
        return reports, {}

    def stop(self) -> None:
        """Have tasks that are under way in this process not tried again, and no batch begun."""
        self._over.set()

    def close(self) -> None:
        """Leave the cluster, if there is one; what it has queued for this run is cancelled."""
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def _reports(
        self,
        function: Callable[[Task, TaskContext], Report],
        tasks: Mapping[str, Task],
        errors: dict[str, BaseException],
        log: logging.Logger,
    ) -> Generator[tuple[str, Report], None, None]:
        """Reports as they come; what failed is put into ``errors``."""
        cluster = self._connect(log)
        if cluster is None:
            context = TaskContext(self._database, self._settings.home_path, log, self._over)
            return _locally(lambda task: function(task, context), tasks, errors)
        return cluster.reports(function, tasks, errors, log=log)

    def _connect(self, log: logging.Logger) -> "Cluster | None":
        """The cluster that the settings name, if they name one."""
        if self._settings.dask_address is None:
            return None
        if self._cluster is None or self._cluster.is_lost:
            self.close()
            try:
                from tutormax_assets.compute.dask import Cluster
            except ModuleNotFoundError as error:
                if error.name not in ("dask", "distributed"):
                    raise
                raise DaskError(
                    "TUTORMAX_DASK_ADDRESS is set, but Dask is not installed:"
                    " pip install 'tutormax-assets[dask]'"
                ) from error
            self._cluster = Cluster(self._settings, log=log)
        return self._cluster


def _locally(
    function: Callable[[Task], Report],
    tasks: Mapping[str, Task],
    errors: dict[str, BaseException],
) -> Generator[tuple[str, Report], None, None]:
    # One after the other: each query of Polars uses all cores, and threads gained nothing.
    for name, task in tasks.items():
        try:
            report = function(task)
        except Exception as error:
            errors[name] = error
        else:
            yield name, report
