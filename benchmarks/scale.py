"""``python -m benchmarks.scale``: a date in one process and on Dask workers, at growing sizes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import psutil
import typer
from psycopg import sql
from rich.console import Console
from rich.table import Table

from benchmarks.answers import TABLE, TWIN
from benchmarks.contestants import Measured, differing, product
from benchmarks.platforms import Platform, PlatformError, Size, generated, midnight, opened
from benchmarks.processes import CommandError
from benchmarks.stages import StagesError
from tutormax_assets.storage.shards import TUTORS_OF_A_SHARD
from tutormax_assets_tests.compute.clusters import DaskCluster

DAYS = 90
SESSIONS_PER_TUTOR = 50
FEWEST_SHARDS = 8
"""Shards of a date on workers; as many as a date of its size has anyway, if that is more."""
WORKERS = (0, 1, 2)

console = Console(highlight=False)


class Cost(NamedTuple):
    """What a run of a date took.

    Attributes:
        measured: The run, in the process that it was started in.
        worker_cpu_seconds: CPU time of the workers.
        worker_rss_bytes: The most memory that a worker had resident.
        rows_differing: Rows that are not as one process has them.
    """

    measured: Measured
    worker_cpu_seconds: float
    worker_rss_bytes: int
    rows_differing: int


def main(
    tutors: Annotated[
        list[int] | None,
        typer.Option(min=10, help="Tutors of the platform; may be repeated."),
    ] = None,
    home: Annotated[
        list[Path] | None,
        typer.Option(help="A home with a platform, in place of generated ones; may be repeated."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where platforms are made and kept.")] = Path(
        ".tutormax/benchmarks"
    ),
) -> None:
    """Compute the last date of each platform in one process, with one and with two workers.

    Exit code: 0 all rows are equal, 1 some are not or something failed.
    """
    are_equal = True
    try:
        for chosen in _platforms(tutors or [50_000, 200_000], home or [], folder):
            with chosen as platform:
                costs = dict(_costs(platform))
                console.print(_table(platform, costs))
                are_equal &= not any(cost.rows_differing for cost in costs.values())
    except (CommandError, PlatformError, StagesError) as error:
        Console(stderr=True, highlight=False).print(f"Error: {error}", markup=False)
        raise typer.Exit(1) from None
    if not are_equal:
        raise typer.Exit(1)


def _platforms(
    tutors: Sequence[int], homes: Sequence[Path], folder: Path
) -> list[AbstractContextManager[Platform]]:
    if homes:
        return [opened(home.absolute()) for home in homes]
    end = datetime.now(UTC).date()
    return [
        generated(folder.absolute(), Size(number, SESSIONS_PER_TUTOR, DAYS), end=end)
        for number in tutors
    ]


def _costs(platform: Platform) -> Iterator[tuple[int, Cost]]:
    """The cost by number of workers; none is the process of the run."""
    shards = max(FEWEST_SHARDS, -(-platform.tutors // TUTORS_OF_A_SHARD))
    for workers in WORKERS:
        if workers:
            platform.clear(platform.end, platform.end)
        else:
            platform.forget(platform.end, platform.end)
        with _cluster(platform, workers) as (variables, processes):
            measured = product(
                platform,
                "run",
                "--date",
                platform.end.isoformat(),
                variables={"TUTORMAX_SHARDS": str(shards), **variables},
            )
            cpu_seconds = sum(sum(process.cpu_times()[:2]) for process in processes)
            rss_bytes = max((_peak_rss_bytes(process) for process in processes), default=0)
        if workers == 0:
            _keep(platform)
        rows = differing(platform, platform.end, exact=True)
        yield workers, Cost(measured, cpu_seconds, rss_bytes, rows)
    platform.forget(platform.end, platform.end)


@contextmanager
def _cluster(
    platform: Platform, workers: int
) -> Iterator[tuple[Mapping[str, str], list[psutil.Process]]]:
    """Workers with the environment of the platform, and the variables that lead a run to them."""
    if not workers:
        yield {}, []
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        cluster = stack.enter_context(closing(DaskCluster(folder, allowed_failures=3)))
        cluster.start_scheduler()
        started = [cluster.start_worker(environment=platform.environment()) for _ in range(workers)]
        cluster.wait_for(workers)
        processes = [psutil.Process(process.pid) for process in started]
        yield {"TUTORMAX_DASK_ADDRESS": cluster.address}, processes


def _peak_rss_bytes(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return int(process.memory_info().rss)
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _keep(platform: Platform) -> None:
    """Let the twin hold what one process computed."""
    with platform.connect() as connection:
        connection.execute(
            sql.SQL("INSERT INTO {} SELECT * FROM {} WHERE calculation_date = %s").format(
                TWIN, TABLE
            ),
            [midnight(platform.end)],
        )


def _table(platform: Platform, costs: Mapping[int, Cost]) -> Table:
    table = Table(title=f"{platform.tutors:,} tutors, {platform.sessions:,} sessions")
    for column in (
        "workers",
        "run, s",
        "whole process, s",
        "s a million sessions",
        "CPU of workers, s",
        "memory of a worker, MiB",
        "rows that differ",
    ):
        table.add_column(column, justify="right")
    for workers, (measured, cpu_seconds, rss_bytes, rows) in costs.items():
        seconds = measured.seconds["run"]
        memory = rss_bytes or measured.peak_rss_bytes
        table.add_row(
            str(workers or "none"),
            f"{seconds:.1f}",
            f"{measured.seconds['whole_process']:.1f}",
            f"{seconds / platform.sessions * 1e6:.2f}",
            f"{cpu_seconds:.1f}",
            f"{memory / 2**20:,.0f}",
            f"{rows:,}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
