"""``tutormax report``: the page about a reference date."""

from pathlib import Path
from typing import Annotated

import typer

from tutormax_assets.cli.arguments import reference_date
from tutormax_assets.cli.terminal import sentences, settings, show


def report(
    day: Annotated[
        str | None,
        typer.Option("--date", help="Reference date, YYYY-MM-DD; today when left out."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="File to write; one in the folder reports of the home when left out.",
            metavar="FILE",
        ),
    ] = None,
    names: Annotated[
        bool, typer.Option("--names", help="Show the names of tutors beside their ids.")
    ] = False,
    is_opened: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
) -> None:
    """Write a page about a date: movers, who is At Risk, what is unusual, and data quality.

    Exit code: 0 written, 1 it cannot be written or opened, 2 wrong use, or the date is not there.
    """
    environment = settings()
    with sentences():
        from tutormax_assets.api.daily_report import collect_report
        from tutormax_assets.report.page import daily_report_page
        from tutormax_assets.storage.files import open_private_file

        date = reference_date("--date", day, environment)
        page = daily_report_page(collect_report(environment, date, with_names=names))
        file = output or environment.home_path / "reports" / f"{date}.html"
        if output is None:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_private_file(file) as opened:
            opened.write(page.encode())
    show(f"Written: {file}")
    if is_opened and typer.launch(str(file.resolve())) != 0:
        show("No browser could be opened.")
        raise typer.Exit(1)
