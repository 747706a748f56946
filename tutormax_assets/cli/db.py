"""``tutormax db``: create, upgrade, look at and stop the database."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tutormax_assets.cli.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    fail,
    log_to_stderr,
    messages,
    sentences,
    settings,
    show,
)

if TYPE_CHECKING:
    import sqlalchemy as sa

    from tutormax_assets.settings import Settings

app = typer.Typer(help="Create, upgrade, look at and stop the database.", no_args_is_help=True)

_LONGEST_NAME_BYTES = 63


def _name(value: str) -> str:
    # PostgreSQL cuts a longer one off, and a line end would end a comment of the script.
    if value.isprintable() and 0 < len(value.encode()) <= _LONGEST_NAME_BYTES:
        return value
    raise typer.BadParameter(
        f"found {value!r}, expected 1 to {_LONGEST_NAME_BYTES} bytes of printable characters"
    )


@app.command()
def init() -> None:
    """Create all tables in an empty database, source tables included: for demos and tests."""
    from tutormax_assets.schema.status import initialize

    log_to_stderr()
    environment = settings()
    with _engine(environment) as engine:
        initialize(engine, timezone=environment.timezone)
    show("All tables are there, empty. `tutormax generate` fills them with sample rows.")


@app.command()
def upgrade(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change and change nothing.")
    ] = False,
) -> None:
    """Bring tutor_performance_metrics to this version's form; no table of the platform is changed.

    A table that the replaced service filled is adopted: names become values, dates become midnight,
    duplicates are set aside, keys and indexes are added.
    """
    from tutormax_assets.schema.status import upgrade

    log_to_stderr()
    environment = settings()
    with _engine(environment) as engine:
        report = upgrade(engine, timezone=environment.timezone, dry_run=dry_run)
    for line in report.lines():
        show(line)
    if report.obstacles:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def status() -> None:
    """Show where the database is, its tables and the state of the migration."""
    from tutormax_assets.database import embedded
    from tutormax_assets.database.connection import create_engine, describe, source_url
    from tutormax_assets.schema.status import status
    from tutormax_assets.source.lake_files import Lake

    environment = settings()
    if environment.database_source == "embedded" and not embedded.is_running(environment.home_path):
        show(
            f"The embedded PostgreSQL under {environment.home_path} is not running"
            f" ({environment.whence})."
        )
        show("`tutormax run` and `tutormax db init` start it.")
        raise typer.Exit(EXIT_FAILED)
    with ExitStack() as opened:
        opened.enter_context(sentences())
        engine = opened.enter_context(_engine(environment))
        show(f"Database: {describe(engine.url)} ({environment.whence})")
        source = None
        lake = None if environment.lake_path is None else Lake(environment.lake_path)
        if lake is not None:
            show(f"Source tables: {lake} (from TUTORMAX_LAKE)")
        elif environment.source_url is not None:
            source = create_engine(source_url(environment))
            opened.callback(source.dispose)
            show(f"Source tables: {describe(source.url)} (from TUTORMAX_SOURCE_URL)")
        found = status(engine, timezone=environment.timezone, source=source, lake=lake)
    for line in found.lines():
        show(line)
    if not found.ready:
        of_lake = " docs/lake.md says what is expected of the lake." if lake is not None else ""
        show(
            "Not ready: `tutormax db upgrade` brings tutor_performance_metrics to the expected"
            f" form, `tutormax db roles` prints the rights that are needed.{of_lake}"
        )
        raise typer.Exit(EXIT_FAILED)


@app.command()
def roles(
    reader: Annotated[
        str, typer.Option("--reader", help="Role that reads the source tables.", callback=_name)
    ] = "tutormax_reader",
    writer: Annotated[
        str, typer.Option("--writer", help="Role that writes the metrics.", callback=_name)
    ] = "tutormax_writer",
    schema: Annotated[
        str | None,
        typer.Option(
            "--schema",
            help="Schema that holds the tables; by default where `tutormax db status` finds them,"
            " or public where the database cannot be reached.",
            show_default=False,
            callback=lambda value: None if value is None else _name(value),
        ),
    ] = None,
) -> None:
    """Print SQL for two roles with the rights that a run needs and no other; nothing is executed.

    The owner of the tables gives it to psql, after `tutormax db upgrade`; where both roles exist,
    no other right is needed.
    """
    from tutormax_assets.database.tables import METRICS_TABLE
    from tutormax_assets.schema.roles import grants

    if reader == writer:
        fail(f"--reader and --writer are both {reader!r}; expected two names.", code=EXIT_USAGE)
    schemas = {} if schema is not None else _schemas()
    # A table that is not there yet will be beside the metrics table.
    schema = schema or schemas.get(METRICS_TABLE) or schemas.get("tutors", "public")
    typer.echo(grants(reader=reader, writer=writer, schema=schema, schemas=schemas))


def _schemas() -> dict[str, str]:
    """Where the database has its tables; nowhere if it cannot be reached."""
    import sqlalchemy as sa

    from tutormax_assets.database import embedded
    from tutormax_assets.database.faults import reason
    from tutormax_assets.schema.roles import find_schemas

    environment = settings()
    if environment.database_source == "embedded" and not embedded.is_running(environment.home_path):
        return {}
    with _engine(environment) as engine:
        try:
            with engine.connect() as connection:
                return find_schemas(connection)
        except sa.exc.OperationalError as error:
            messages.print(
                f"The script names schema public, since the database cannot be reached to see which"
                f" one holds the tables; --schema names another. {reason(error)}",
                markup=False,
                soft_wrap=True,
            )
            return {}


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context) -> None:
    """Open psql on the database; what follows -- is passed to it, such as: psql -- -c 'SELECT 1'.

    It is the one of the PATH, else that of the embedded server.
    """
    from tutormax_assets.database import embedded
    from tutormax_assets.database.connection import database_url, psql_environment

    environment = settings()
    with sentences():
        url = database_url(environment)
        program = shutil.which("psql") or str(embedded.psql())
    # A password among the arguments would show to every user of the machine.
    os.execve(  # noqa: S606 - no shell
        program, ["psql", *context.args], {**os.environ, **psql_environment(url)}
    )


@app.command()
def stop() -> None:
    """Stop the embedded server."""
    from tutormax_assets.database import embedded

    environment = settings()
    if environment.database_source != "embedded":
        fail(
            f"The database comes from {environment.database_source}; only the embedded one is "
            "stopped from here.",
            code=EXIT_USAGE,
        )
    with sentences():
        stopped = embedded.stop(environment.home_path)
    show("Stopped." if stopped else "It was not running.")


@contextmanager
def _engine(environment: "Settings") -> "Iterator[sa.Engine]":
    from tutormax_assets.database.connection import engine_of

    with sentences(), engine_of(environment) as engine:
        yield engine
