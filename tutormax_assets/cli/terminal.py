"""What the commands share of the terminal: two consoles, the log, and how errors end a command."""

import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console, ConsoleDimensions
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

if TYPE_CHECKING:
    from tutormax_assets.settings import Settings

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_UNBOUNDED = 1_000_000


class _Results(Console):
    """In a pipe or file, lines are as long as what they hold."""

    # Nobody sets it.
    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        found = super().size
        return found if self.is_terminal else ConsoleDimensions(_UNBOUNDED, found.height)


output = _Results(highlight=False, markup=False, emoji=False)
"""Standard output: results."""

messages = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Standard error: log, progress and errors."""


class Failed(typer.Exit):
    """The command ends, and its sentence is on standard error.

    Attributes:
        report: The sentence as ``error``, and details, as ``--json`` shows them.
    """

    def __init__(self, code: int, **report: Any) -> None:
        super().__init__(code)
        self.report = report


class Commands(TyperGroup):
    """The commands, each of which prints one JSON object with ``--json`` when it fails as well."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        if "--json" not in ctx.args:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if (report := _report(error)) is not None:
                typer.echo(json.dumps(report))
            raise


def _report(error: BaseException) -> dict[str, Any] | None:
    """What is said of an error as JSON; none if the command has printed its result."""
    if isinstance(error, Failed):
        return error.report
    if isinstance(error, typer.Exit | SystemExit):
        return None
    if isinstance(error, KeyboardInterrupt):
        return {"error": "It was interrupted."}
    if isinstance(error, typer.TyperException):
        return {"error": error.format_message()}
    return {"error": f"Unexpected {type(error).__name__}; standard error shows its traceback."}


def fail(message: str, *, code: int, **details: Any) -> NoReturn:
    """End the command with a sentence on standard error; with ``--json`` on standard output, too.

    Args:
        message: The sentence.
        code: Exit code.
        details: What the JSON object holds besides the sentence.
    """
    messages.print(Text.assemble(("Error:", "bold red"), " ", message), soft_wrap=True)
    raise Failed(code, error=message, **details)


def show(result: str | Table) -> None:
    """Print a result. Nothing of it is cut: a terminal wraps it, and in a pipe it is unwrapped."""
    output.print(result, soft_wrap=isinstance(result, str))


def table(title: str, *columns: str, right: Collection[str] = (), unnamed: int = 0) -> Table:
    """An empty table whose cells wrap where they do not fit.

    Args:
        title: Its title.
        columns: Names of the columns.
        right: Those that hold numbers.
        unnamed: Number of columns, if they have no names.
    """
    made = Table(title=Text(title), title_justify="left", show_header=bool(columns))
    for name in columns or [""] * unnamed:
        justify = "right" if name in right else "left"
        made.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return made


@contextmanager
def sentences() -> Iterator[None]:
    """Turn what a user can fix into a sentence: exit 2 for the input, 1 for the surroundings."""
    import psycopg
    import sqlalchemy as sa

    from tutormax_assets.database.faults import reason
    from tutormax_assets.errors import TutormaxError

    try:
        yield
    except KeyboardInterrupt:
        fail("It was interrupted. What was saved until then stays.", code=EXIT_INTERRUPTED)
    except TutormaxError as error:
        fail(str(error), code=error.exit_code)
    except sa.exc.DBAPIError as error:
        who = "PostgreSQL" if isinstance(error.orig, psycopg.Error) else "Dagster's storage"
        fail(f"{who} says: {reason(error)}", code=EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}", code=EXIT_FAILED)


def settings() -> "Settings":
    """The environment, or exit 2 with what is wrong with it."""
    from tutormax_assets.errors import TutormaxError
    from tutormax_assets.settings import load_settings

    try:
        return load_settings()
    except TutormaxError as error:
        fail(str(error), code=error.exit_code)


def log_to_stderr(*, verbose: bool = False, quiet: bool = False) -> None:
    """Show the log: information and warnings, everything if verbose, errors only if quiet."""
    level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
    handler = _ConsoleHandler(level)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("tutormax_assets")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    logger.propagate = False


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.print(self.format(record), soft_wrap=True)
