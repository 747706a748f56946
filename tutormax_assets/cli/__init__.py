"""The command line, ``tutormax``.

Only Typer and Rich are imported here and at the top of the command modules, so that ``--help``
answers at once.
"""

import os
import sys
from functools import partial
from typing import Annotated

import typer

from tutormax_assets.cli import (
    alert,
    db,
    demo,
    dev,
    drift,
    explain,
    generate,
    health,
    history,
    live,
    quality,
    report,
    retention,
    run,
    set_aside,
    status,
    what_if,
)
from tutormax_assets.cli.terminal import Commands

app = typer.Typer(
    name="tutormax",
    cls=Commands,
    help="Nightly tutor performance metrics: computed with Polars, kept in PostgreSQL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        typer.echo(f"tutormax {version('tutormax-assets')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None: ...


app.command("run")(run.run)
app.command("backfill")(run.backfill)
app.command("explain")(explain.explain)
app.command("what-if")(what_if.what_if)
app.command("drift")(drift.drift)
app.command("live")(live.live)
app.command("report")(report.report)
app.command("quality")(quality.quality)
app.command("history")(history.history)
app.command("table")(history.table)
app.command("set-aside")(set_aside.set_aside)
app.command("cleanup")(retention.cleanup)
app.command("restore")(retention.restore)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("dev")(dev.dev)
app.command("status")(status.status)
app.command("health")(health.health)
app.command("alert")(alert.alert)
app.add_typer(db.app, name="db")


def main() -> None:
    """What the program ``tutormax`` does: the command that its arguments name."""
    # NumPy starts a thread for each core when it is imported, and nothing here needs them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if sys.argv[1:2] in (["run"], ["backfill"]):
        # Ctypes, too, is imported for these only.
        from tutormax_assets.cli.supervision import in_a_child

        in_a_child(partial(app, prog_name="tutormax"))
    app(prog_name="tutormax")
