"""``tutormax status``: how the last nights went, and whether the next one is due."""

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tutormax_assets.cli.arguments import AsJson, dates_in_words
from tutormax_assets.cli.terminal import EXIT_FAILED, fail, sentences, settings, show, table

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from rich.table import Table

    from tutormax_assets.defs.automation.nights import Nights
    from tutormax_assets.settings import Settings


_EXAMINED_DATES = 90


def status(
    days: Annotated[
        int, typer.Option("--days", min=1, max=366, help="Number of last dates to examine.")
    ] = 7,
    changed: Annotated[
        bool,
        typer.Option(
            "--changed",
            help=f"Ask the platform which of the last {_EXAMINED_DATES} dates it has changed.",
        ),
    ] = False,
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
            found = _changed_dates(environment, instance) if changed else None
        where = {"dagster_home": str(home), "database": _database(environment)}
    if as_json:
        typer.echo(
            json.dumps(where | nights.to_dict() | ({} if found is None else found.to_dict()))
        )
    else:
        show(_block(nights, where, found))
    if not nights.is_well:
        raise typer.Exit(EXIT_FAILED)


def _database(environment: "Settings") -> str:
    from tutormax_assets.database.connection import database_url, describe

    if environment.database_source == "embedded":
        # It is not started to be described.
        return f"{environment.home_path / 'postgres'} ({environment.whence})"
    return f"{describe(database_url(environment))} ({environment.whence})"


class _Changed(NamedTuple):
    """Which stored dates have changed in the platform, and since when as far as it was observed."""

    dates: "dict[date, bool | str]"
    since: dict[date, datetime]

    @property
    def stale(self) -> list[date]:
        return [day for day, is_changed in self.dates.items() if is_changed is True]

    def to_dict(self) -> dict[str, object]:
        return {
            "changed_dates": [str(day) for day in self.stale],
            "stale_since": {str(day): at.isoformat() for day, at in self.since.items()},
            "unchanged_dates": [str(day) for day, one in self.dates.items() if one is False],
            "unknown_dates": {
                str(day): why for day, why in self.dates.items() if isinstance(why, str)
            },
        }


def _changed_dates(environment: "Settings", instance: "DagsterInstance") -> _Changed:
    from tutormax_assets.defs.automation.stale_dates import last_dates, observed_stale_since
    from tutormax_assets.defs.refresh import find_stale_dates

    dates = find_stale_dates(environment, last_dates(environment))
    stale = [day for day, is_changed in dates.items() if is_changed is True]
    return _Changed(dates, observed_stale_since(environment, instance, stale))


def _block(nights: "Nights", where: dict[str, str], found: _Changed | None) -> "Table":
    block = table(f"{nights.first} to {nights.last}", unnamed=2)
    block.add_row("Last good date", str(nights.last_good or "none"))
    block.add_row("Missing", dates_in_words(nights.missing) or "none")
    block.add_row("Failed", dates_in_words(nights.failed) or "none")
    for warning in nights.warnings:
        block.add_row("Warning", warning)
    if found is not None:
        block.add_row("Changed since read", "\n".join(_stale_dates(found)) or "none")
        unknown: dict[str, list[date]] = {}
        for day, why in found.dates.items():
            if isinstance(why, str):
                unknown.setdefault(why, []).append(day)
        for why, days in unknown.items():
            block.add_row("Not known", f"{dates_in_words(days)}: {why}")
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


def _stale_dates(found: _Changed) -> Iterator[str]:
    days_since: dict[datetime | None, list[date]] = {}
    for day in found.stale:
        days_since.setdefault(found.since.get(day), []).append(day)
    for since, days in days_since.items():
        words = dates_in_words(days)
        yield words if since is None else f"{words}, stale since {since:%Y-%m-%d %H:%M} UTC"
