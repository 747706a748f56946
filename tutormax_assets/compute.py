"""Where shards are computed."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import dagster as dg

Task = TypeVar("Task")
Report = TypeVar("Report")


class Compute(dg.ConfigurableResource[None]):
    """Maps a function over shards."""

    def groups(self, numbers: Sequence[int]) -> list[list[int]]:
        """Neighbouring shards that are read at once."""
        return [list(numbers)]

    def map(
        self,
        function: Callable[[Task, logging.Logger], Report],
        tasks: Mapping[str, Task],
        *,
        log: logging.Logger,
    ) -> Iterator[tuple[str, Report]]:
        """The report of each task."""
        for name, task in tasks.items():
            yield name, function(task, log)
