"""Arguments that several commands take, checked the same way."""

import shlex
from collections.abc import Collection
from datetime import date, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.terminal import EXIT_USAGE, fail

if TYPE_CHECKING:
    from tutormax_assets.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def reference_date(option: str, text: str | None, environment: "Settings") -> date:
    """The reference date that an option names, today when it was left out; exit 2 if it is none."""
    from tutormax_assets.dates import ReferenceDateError, parse_reference_date, today

    if text is None:
        return today(timezone=environment.timezone)
    try:
        return parse_reference_date(
            text, first=environment.first_date, timezone=environment.timezone
        )
    except ReferenceDateError as error:
        fail(f"{option} {error}", code=EXIT_USAGE)


def command_again(context: typer.Context, **changed: str) -> str:
    """The command line of a command, with other values for some of its options.

    Args:
        context: That of the command.
        changed: The options by the names of their parameters.
    """
    words = [context.command_path]
    for option in context.command.params:
        value = changed.get(str(option.name), context.params.get(str(option.name)))
        if value is None or value is False or value == option.get_default(context):
            continue
        name = option.opts[0]
        if value is True:
            words.append(name)
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [word for one in values for word in (name, shlex.quote(str(one)))]
    return " ".join(words)


def dates_in_words(days: Collection[date]) -> str:
    """Dates as a person reads them: those that follow one another as a range."""
    parts: list[list[date]] = []
    for day in sorted(days):
        if parts and parts[-1][-1] + timedelta(days=1) == day:
            parts[-1].append(day)
        else:
            parts.append([day])
    return ", ".join(
        str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts
    )
