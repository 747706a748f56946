"""``python -m chaos``: break the product on purpose and show what was lost."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chaos import bad_input, culprits, faults, kills, late, late_servers, live, load
from chaos.ground import ground
from chaos.report import Report

TIMES_WITHOUT_CULPRIT = 2
"""How often as long as without a culprit a write with one may take."""

console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


def main(
    cases: Annotated[
        list[str] | None, typer.Argument(help="Cases to run; all of them when left out.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="How long all cases together take at most, about.")
    ] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of whatever is chosen at random.")] = 1,
    wanted_kills: Annotated[int, typer.Option("--kills", min=1, help="Kills of runs.")] = 200,
    wanted_faults: Annotated[
        int, typer.Option("--faults", min=1, help="Faults of the database that pass.")
    ] = 70,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the case late.")] = 100,
    inputs: Annotated[int, typer.Option(min=1, help="Platforms with broken rows.")] = 35,
    report_file: Annotated[
        Path | None, typer.Option("--json", help="File that the figures are written to.")
    ] = None,
) -> None:
    """Break the product on purpose, on servers of its own, and count what is lost.

    Exit code: 0 nothing was lost or wrong, 1 something was, 2 wrong use.
    """
    known: Mapping[str, tuple[float, Callable[[float], Report]]] = {
        "kills": (0.35, lambda s: kills.run(kills=wanted_kills, seconds=s, seed=seed)),
        "load": (0.15, lambda s: load.run(seconds=s, seed=seed)),
        "faults": (0.1, lambda s: faults.run(faults=wanted_faults, seconds=s, seed=seed)),
        "bad_input": (0.1, lambda s: bad_input.run(inputs=inputs, seconds=s, seed=seed)),
        "late": (0.15, lambda s: _late(s, steps=steps, seed=seed)),
        "live": (0.1, lambda s: live.run(seconds=s, seed=seed)),
        "culprits": (0.05, lambda s: _culprits()),
    }
    if unknown := set(cases or []) - known.keys():
        messages.print(f"Error: no case {', '.join(sorted(unknown))}; known: {', '.join(known)}.")
        raise typer.Exit(2)
    began = time.monotonic()
    reports = []
    for name in cases or known:
        share, run = known[name]
        share = 1 if cases == [name] else share
        messages.print(f"{name}: about {share * minutes:.1f} minutes at most")
        reports.append(run(60 * minutes * share))
        _show(reports[-1])
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes on {_machine()}")
    if report_file is not None:
        report_file.write_text(json.dumps(_as_json(reports, seed=seed), indent=2) + "\n")
    if any(report.wrong for report in reports):
        raise typer.Exit(1)


def _late(seconds: float, *, steps: int, seed: int) -> Report:
    """On other servers in two thirds of the time, and on one server in the rest."""
    began = time.monotonic()
    report = late_servers.run(seconds=2 / 3 * seconds, seed=seed)
    rest = seconds - (time.monotonic() - began)
    report.add(late.run(steps=steps, seconds=rest, seed=seed))
    return report


def _culprits() -> Report:
    with ground() as here:
        figures = culprits.measure(here.engine)
    report = Report("culprits", {name: round(value, 3) for name, value in figures.items()})
    for name, value in report.figures.items():
        if not name.endswith("_seconds") and float(value) > TIMES_WITHOUT_CULPRIT:
            report.wrong.append(
                f"{name}: a write with a culprit took {value} times as long as without,"
                f" expected at most {TIMES_WITHOUT_CULPRIT}"
            )
    return report


def _show(report: Report) -> None:
    table = Table(title=report.case, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in report.figures.items():
        table.add_row(Text(name), f"{value:,}" if isinstance(value, int | float) else Text(value))
    console.print(table)
    for sentence in report.wrong:
        console.print(Text(f"WRONG {sentence}", style="red"), soft_wrap=True)


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def _as_json(reports: list[Report], *, seed: int) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "seed": seed,
        "cases": {r.case: {"figures": r.figures, "wrong": r.wrong} for r in reports},
    }


if __name__ == "__main__":
    typer.run(main)
