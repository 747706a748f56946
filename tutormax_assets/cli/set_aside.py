"""``tutormax set-aside``: the values that a reference date could not use, by row."""

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from tutormax_assets.cli.arguments import AsJson, reference_date
from tutormax_assets.cli.terminal import EXIT_FAILED, fail, output, settings

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
    from dagster import AssetKey

    from tutormax_assets.parts import scan_partition
    from tutormax_assets.storage import partition_path

    environment = settings()
    key = reference_date("--date", day, environment).isoformat()
    try:
        rows = pl.concat(
            scan_partition(partition_path(environment.storage_path, AssetKey(asset), key))
            for asset in _ASSETS
        ).collect()
    except FileNotFoundError as error:
        fail(str(error), code=EXIT_FAILED)
    shown = rows.sort("source_table", "row_key", "column").head(limit)
    if as_json:
        report = {"date": key, "values": len(rows), "rows": shown.to_dicts()}
        typer.echo(json.dumps(report, default=str))
        return
    table = Table(title=f"{len(rows)} values set aside for {key}", title_justify="left")
    for column in ("row_key", "tutor_id", "date", "value", "reason"):
        # A key that is cut off or broken in two is of no use.
        table.add_column(column, no_wrap=column in ("row_key", "tutor_id", "date"))
    for row in shown.iter_rows(named=True):
        cells = (row["row_key"], row["tutor_id"], row["date"])
        value = f"{row['source_table']} {row['column']}"
        table.add_row(*(Text(str(cell)) for cell in (*cells, value, row["reason"])))
    output.print(table)
    if len(shown) < len(rows):
        output.print(f"The first {len(shown)} are shown; --limit shows more.")
