"""``tutormax health``: a probe of everything that the night needs."""

import json

import typer

from tutormax_assets.cli.arguments import AsJson
from tutormax_assets.cli.terminal import EXIT_FAILED, sentences, settings, show, table


def health(as_json: AsJson = False) -> None:
    """Examine the daemon, schedules, sensors, last night, databases, files and disks.

    For cron, or the probe of a container: nothing inside of Dagster notices a daemon that stopped.

    Exit code: 0 all is well, 1 something is not, 2 wrong use.
    """
    environment = settings()
    with sentences():
        from tutormax_assets.api.health import examine_health

        found = examine_health(environment)
    is_well = all(one.is_well for one in found)
    if as_json:
        report = {"is_well": is_well, "findings": [one.to_dict() for one in found]}
        typer.echo(json.dumps(report))
    else:
        block = table("Health", "What", "State", "Says")
        for one in found:
            block.add_row(one.name, "well" if one.is_well else "NOT WELL", one.says)
        show(block)
    if not is_well:
        raise typer.Exit(EXIT_FAILED)
