"""``tutormax set-aside``: the values that a reference date could not use, by row."""

import json
from typing import Annotated

import typer

from tutormax_assets.cli.arguments import AsJson, reference_date
from tutormax_assets.cli.terminal import EXIT_FAILED, fail, sentences, settings, show, table

_ASSETS = ("sessions_set_aside", "tutor_events_set_aside")


def set_aside(
    day: Annotated[
        str | None,
        typer.Option("--date", help="Reference date, YYYY-MM-DD; today when left out."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows to show at most.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the values that a run set aside because they break the source contract.

    Exit code: 0 shown, 1 the date has not been computed, 2 wrong use.
    """
    import polars as pl

    from tutormax_assets.storage.partition import scan_partition
    from tutormax_assets.storage.store import partition_path

    environment = settings()
    key = reference_date("--date", day, environment).isoformat()
    try:
        with sentences():
            rows = pl.concat(
                scan_partition(partition_path(environment.storage_path, asset, key))
                for asset in _ASSETS
            ).collect()
    except FileNotFoundError as error:
        fail(str(error), code=EXIT_FAILED)
    shown = rows.sort("source_table", "row_key", "column").head(limit)
    if as_json:
        report = {"date": key, "values": len(rows), "rows": shown.to_dicts()}
        typer.echo(json.dumps(report, default=str))
        return
    columns = ("row_key", "tutor_id", "date", "value", "reason")
    block = table(f"{len(rows)} values set aside for {key}", *columns)
    for row in shown.iter_rows(named=True):
        value = f"{row['source_table']} {row['column']}"
        block.add_row(row["row_key"], str(row["tutor_id"]), str(row["date"]), value, row["reason"])
    show(block)
    if len(shown) < len(rows):
        show(f"The first {len(shown)} are shown; --limit shows more.")
