"""``tutormax generate``: fill the source tables, or a lake, with a synthetic platform."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tutormax_assets.cli.arguments import reference_date
from tutormax_assets.cli.terminal import EXIT_USAGE, fail, messages, sentences, settings, show

if TYPE_CHECKING:
    from tutormax_assets.settings import Settings


def generate(
    tutors: Annotated[int, typer.Option("--tutors", min=1, help="Number of tutors.")] = 300,
    sessions_per_tutor: Annotated[
        int, typer.Option("--sessions-per-tutor", min=1, help="Sessions of a tutor, on average.")
    ] = 50,
    days: Annotated[
        int, typer.Option("--days", min=1, help="Days before --end that rows lie in.")
    ] = 120,
    end: Annotated[
        str | None,
        typer.Option("--end", help="Day after the last one, YYYY-MM-DD; today when left out."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same rows.")] = 1,
    bad_rows: Annotated[
        float,
        typer.Option("--bad-rows", min=0, max=1, help="Share of rows that break the contract."),
    ] = 0.0,
    append: Annotated[
        bool, typer.Option("--append", help="Add to the tutors that are there.")
    ] = False,
    lake: Annotated[
        str | None,
        typer.Option(
            "--lake",
            help="Write Parquet datasets below this path, and nothing into the database.",
            metavar="PATH",
        ),
    ] = None,
) -> None:
    """Fill the source tables with a synthetic platform. Never for a database that customers use.

    The same arguments give the same rows, in the database and in a lake.
    """
    if append and lake is not None:
        fail("--append and --lake exclude each other: a lake is written once.", code=EXIT_USAGE)
    with _progress_bar(tutors) as progress, sentences():
        environment = settings()
        last = reference_date("--end", end, environment)
        with _writer(environment, lake, append=append) as write:
            rows = write(
                tutors=tutors,
                sessions_per_tutor=sessions_per_tutor,
                days=days,
                end=last,
                seed=seed,
                bad_rows=bad_rows,
                progress=progress,
            )
    for table, count in rows.items():
        show(f"{table}: {count:,} rows")


@contextmanager
def _progress_bar(tutors: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar, on a terminal only; yield the function that reports tutors written and all."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    is_hidden = not messages.is_terminal
    with Progress(*columns, console=messages, transient=True, disable=is_hidden) as bar:
        # The first tutors take seconds on a large platform: until then the bar only moves.
        task = bar.add_task(f"generating {tutors:,} tutors", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _writer(
    environment: "Settings", lake: str | None, *, append: bool
) -> Iterator[Callable[..., dict[str, int]]]:
    """Yield the function that writes a platform: into the lake if given, else the database."""
    from tutormax_assets.database.connection import engine_of
    from tutormax_assets.sample import lake as sample_lake
    from tutormax_assets.sample import platform as sample_platform

    if lake is not None:
        yield partial(sample_lake.generate_lake, lake)
    else:
        with engine_of(environment) as engine:
            yield partial(sample_platform.generate, engine, append=append)
