"""Arguments that several commands take, checked the same way."""

from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.terminal import EXIT_USAGE, fail

if TYPE_CHECKING:
    from tutormax_assets.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def reference_date(option: str, text: str | None, environment: "Settings") -> date:
    """The reference date that an option names, today when it was left out; exit 2 if it is none."""
    from tutormax_assets.partitions import ReferenceDateError, checked_reference_date, today

    if text is None:
        return today(timezone=environment.timezone)
    try:
        return checked_reference_date(
            text, first=environment.first_date, timezone=environment.timezone
        )
    except ReferenceDateError as error:
        fail(f"{option} {error}", code=EXIT_USAGE)
