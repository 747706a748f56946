"""What the commands share of the terminal: two consoles, the log, and how errors end a command."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from tutormax_assets.settings import Settings

EXIT_FAILED = 1
EXIT_USAGE = 2

output = Console(highlight=False)
"""Standard output: results."""

messages = Console(stderr=True, highlight=False)
"""Standard error: log, progress and errors."""


def fail(message: str, *, code: int) -> NoReturn:
    """End the command with a sentence on standard error."""
    messages.print(f"[bold red]Error:[/] {_escaped(message)}", soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def sentences() -> Iterator[None]:
    """Turn what a user can mend into a sentence: exit 2 for the input, 1 for the surroundings."""
    import psycopg
    import sqlalchemy as sa

    from tutormax_assets.compute import DaskError, KilledShardError, ShardsError
    from tutormax_assets.metrics.policy import PolicyError
    from tutormax_assets.parquet import StorageError
    from tutormax_assets.platform.archive import ArchiveError
    from tutormax_assets.platform.embedded import EmbeddedServerError
    from tutormax_assets.platform.faults import reason
    from tutormax_assets.platform.metrics_table import MetricsTableError
    from tutormax_assets.platform.schema import SchemaError
    from tutormax_assets.platform.snapshot import SourceError
    from tutormax_assets.platform.sources import UnknownTutorsError
    from tutormax_assets.settings import OptionsError, SettingsError

    try:
        yield
    except KeyboardInterrupt:
        fail("It was interrupted. What was saved until then stays.", code=EXIT_FAILED)
    except (SettingsError, PolicyError, OptionsError, UnknownTutorsError) as error:
        fail(str(error), code=EXIT_USAGE)
    except (
        SchemaError,
        EmbeddedServerError,
        MetricsTableError,
        ArchiveError,
        SourceError,
        StorageError,
        DaskError,
        KilledShardError,
        ShardsError,
    ) as error:
        fail(str(error), code=EXIT_FAILED)
    except sa.exc.DBAPIError as error:
        who = "PostgreSQL" if isinstance(error.orig, psycopg.Error) else "Dagster's storage"
        fail(f"{who} says: {reason(error)}", code=EXIT_FAILED)


def settings() -> "Settings":
    """The environment, or exit 2 with what is wrong with it."""
    from tutormax_assets.settings import SettingsError, load_settings

    try:
        return load_settings()
    except SettingsError as error:
        fail(str(error), code=EXIT_USAGE)


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
        messages.print(self.format(record), markup=False, soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
