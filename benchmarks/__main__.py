"""``python -m benchmarks CASE``: measure the product against its peers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import again, backfill, daily, report, start_up
from benchmarks.platforms import Platform, PlatformError, Size, generated, opened
from benchmarks.processes import CommandError
from benchmarks.report import Result
from benchmarks.stages import StagesError

CASES = ("daily", "backfill", "again", "start-up")
PEERS = ("sql", "pandas", "duckdb", "loop", "floor")

LONGEST_WINDOW = 90
"""Days before a reference date that its rows lie in."""

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
README = ROOT / "README.md"

console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Wish:
    """What is to be measured; see the options of ``main``."""

    tutors: Sequence[int]
    sessions_per_tutor: int
    repeats: int | None
    peers: Sequence[str]
    loop_tutors: int
    dates: int
    folder: Path
    home: Path | None
    end: date

    def platforms(self, *sizes: int, dates: int = 1) -> Iterator[AbstractContextManager[Platform]]:
        """The platform in the home that is named, else generated ones of these sizes."""
        if self.home is not None:
            yield opened(self.home.absolute())
            return
        days = LONGEST_WINDOW + dates - 1
        sessions = round(self.sessions_per_tutor * days / LONGEST_WINDOW)
        for tutors in self.tutors or sizes:
            yield generated(self.folder.absolute(), Size(tutors, sessions, days), end=self.end)


def main(
    case: Annotated[str, typer.Argument(help=f"{', '.join(CASES)}, or all.")],
    tutors: Annotated[
        list[int] | None,
        typer.Option(min=10, help="Tutors of the platform; may be repeated. The case's own."),
    ] = None,
    sessions_per_tutor: Annotated[
        int, typer.Option(min=1, help="Sessions of a tutor in 90 days, on average.")
    ] = 50,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds, of which the median counts. The case's own.")
    ] = None,
    peers: Annotated[str, typer.Option(help="Peers of one date, separated by commas.")] = (
        ",".join(PEERS)
    ),
    loop_tutors: Annotated[
        int, typer.Option(min=1, help="Tutors that the loop computes; its time is scaled.")
    ] = 500,
    dates: Annotated[int, typer.Option(min=1, help="Reference dates of the backfill.")] = 365,
    folder: Annotated[Path, typer.Option(help="Where platforms are made and kept.")] = Path(
        ".tutormax/benchmarks"
    ),
    home: Annotated[
        Path | None, typer.Option(help="A home with a platform, in place of a generated one.")
    ] = None,
    end: Annotated[
        str | None, typer.Option(help="Reference date of a new platform; today when left out.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File that the results are written to.")
    ] = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="Keep the results, and renew the README's table.")
    ] = False,
) -> None:
    """Measure the product and its peers on the same PostgreSQL, in turn, and compare the answers.

    Exit code: 0 all answers are equal, 1 some are not or something failed, 2 wrong use.
    """
    wanted = [name.strip() for name in peers.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in PEERS]:
        _refuse(f"--peers names {', '.join(unknown)}; known: {', '.join(PEERS)}")
    if case not in (*CASES, "all"):
        _refuse(f"there is no case {case}; known: {', '.join(CASES)}, all")
    try:
        last = date.fromisoformat(end) if end else datetime.now(UTC).date()
    except ValueError:
        _refuse(f"--end is {end!r}; expected YYYY-MM-DD")
    wish = Wish(
        tutors or (), sessions_per_tutor, repeats, wanted, loop_tutors, dates, folder, home, last
    )
    results: list[Result] = []
    try:
        for name in CASES if case == "all" else [case]:
            for result in measured(name, wish):
                console.print(report.table(result))
                results.append(result)
    except (CommandError, PlatformError, StagesError) as error:
        messages.print(f"Error: {error}", markup=False)
        raise typer.Exit(1) from None
    if json_file is not None:
        _write(json_file, results[0] if len(results) == 1 else results)
    if not all(result["answers_equal"]["all"] for result in results):
        raise typer.Exit(1)
    if readme:
        keep(results)


def measured(case: str, wish: Wish) -> Iterator[Result]:
    """The results of a case, one for each size."""
    if case == "daily":
        for chosen in wish.platforms(5_000, 50_000):
            with chosen as platform:
                yield daily.measure(
                    platform,
                    peers=wish.peers,
                    repeats=wish.repeats or 3,
                    loop_tutors=wish.loop_tutors,
                )
    elif case == "backfill":
        for chosen in wish.platforms(5_000, dates=wish.dates):
            with chosen as platform:
                yield backfill.measure(platform, dates=wish.dates, repeats=wish.repeats or 1)
    elif case == "again":
        for chosen in wish.platforms(5_000):
            with chosen as platform:
                yield again.measure(platform, repeats=wish.repeats or 3)
    else:
        for chosen in wish.platforms(10):
            with chosen as platform:
                yield start_up.measure(platform, repeats=wish.repeats or 5)


def keep(results: Sequence[Result], *, file: Path = RESULTS, readme: Path = README) -> None:
    """Put results in the place of those of the same case and size, and renew the README's table."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    by_size = {(result["case"], result["tutors"]): result for result in [*kept, *results]}
    ordered = [by_size[key] for key in sorted(by_size)]
    _write(file, ordered)
    text = readme.read_text(encoding="utf-8")
    readme.write_text(report.in_readme(text, ordered), encoding="utf-8")


def _write(file: Path, results: Result | Sequence[Result]) -> None:
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _refuse(what: str) -> None:
    messages.print(f"Error: {what}.", markup=False)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
