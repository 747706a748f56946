"""``tutormax status``: how the last nights went, and whether the next one is due."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.arguments import AsJson, dates_in_words
from tutormax_assets.cli.terminal import EXIT_FAILED, fail, sentences, settings, show, table

if TYPE_CHECKING:
    from rich.table import Table

    from tutormax_assets.defs.automation.nights import Nights
    from tutormax_assets.settings import Settings


def status(
    days: Annotated[
        int, typer.Option("--days", min=1, max=366, help="Number of last dates to examine.")
    ] = 7,
    as_json: AsJson = False,
) -> None:
    """Show the last good date, missing and failed dates, warnings, and when the next run is due.

    Exit code: 0 the last night's date is saved, 1 it is missing or failed, 2 wrong use.
    """
    environment = settings()
    home = environment.dagster_home_path
    if not (home / "dagster.yaml").exists():
        fail(
            f"Nothing has been computed: there is no Dagster home at {home}. `tutormax run` makes"
            " it; TUTORMAX_HOME and DAGSTER_HOME say where it is.",
            code=EXIT_FAILED,
        )
    with sentences():
        from tutormax_assets.defs.automation.nights import last_nights
        from tutormax_assets.runs.instance import dagster_instance

        with dagster_instance(environment) as instance:
            nights = last_nights(instance, environment, days=days, now=datetime.now(UTC))
        where = {"dagster_home": str(home), "database": _database(environment)}
    if as_json:
        typer.echo(json.dumps(where | nights.to_dict()))
    else:
        show(_block(nights, where))
    if not nights.is_well:
        raise typer.Exit(EXIT_FAILED)


def _database(environment: "Settings") -> str:
    from tutormax_assets.database.connection import database_url, describe

    if environment.database_source == "embedded":
        # It is not started to be described.
        return f"{environment.home_path / 'postgres'} ({environment.whence})"
    return f"{describe(database_url(environment))} ({environment.whence})"


def _block(nights: "Nights", where: dict[str, str]) -> "Table":
    block = table(f"{nights.first} to {nights.last}", unnamed=2)
    block.add_row("Last good date", str(nights.last_good or "none"))
    block.add_row("Missing", dates_in_words(nights.missing) or "none")
    block.add_row("Failed", dates_in_words(nights.failed) or "none")
    for warning in nights.warnings:
        block.add_row("Warning", warning)
    due = f"{nights.next_tick:%Y-%m-%d %H:%M %Z}"
    if not nights.is_scheduled:
        due = "none, the schedule is off"
    elif not nights.has_daemon:
        due += ", but no Dagster daemon runs"
    block.add_row("Next run", due)
    block.add_row("Alerts", ", ".join(nights.receivers) or "log only, TUTORMAX_ALERTS is not set")
    block.add_row("Dagster home", where["dagster_home"])
    block.add_row("Database", where["database"])
    return block
