"""``tutormax demo``: a generated platform, a run, and what it left in the table."""

import os
import shutil
import sys
from datetime import date, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.bar import Bar
from rich.table import Table

from tutormax_assets.cli.run import summary_block, with_progress
from tutormax_assets.cli.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    fail,
    log_to_stderr,
    output,
    sentences,
    settings,
    show,
    table,
)

if TYPE_CHECKING:
    import sqlalchemy as sa

_TUTORS = 300
_DAYS = 120
_SESSIONS_PER_TUTOR = 50
_BAD_ROWS = 0.001
_TIER_COLORS = {
    "Exemplary": "green",
    "Strong": "cyan",
    "Developing": "blue",
    "Needs Attention": "yellow",
    "At Risk": "red",
}


def demo(
    tutors: Annotated[
        int | None,
        typer.Option("--tutors", min=1, help="Tutors of the platform; 300 when left out."),
    ] = None,
) -> None:
    """Run the whole job on a synthetic platform in the embedded PostgreSQL and show the result.

    A second call keeps the platform and runs again, which changes nothing that did not change.
    """
    log_to_stderr()
    environment = settings()
    if environment.database_source != "embedded":
        fail(
            f"{environment.database_source} is set, and the demo writes synthetic rows; it runs "
            "on the embedded database only. Unset the variable, or comment it out in .env.",
            code=EXIT_USAGE,
        )
    if environment.source == "parquet":
        fail(
            "TUTORMAX_SOURCE is parquet, and the demo reads the platform that it generates in the "
            "embedded database. Unset the variable, or comment it out in .env.",
            code=EXIT_USAGE,
        )
    with sentences():
        from tutormax_assets.database.connection import engine_of
        from tutormax_assets.dates import today
        from tutormax_assets.defs.resources import RunOptions

        day = today(timezone=environment.timezone)
        _heading("1. A platform in an embedded PostgreSQL")
        with engine_of(environment) as engine:
            _platform(engine, tutors=tutors, day=day, timezone=environment.timezone)
            _heading("2. The table before the run")
            _table_state(engine)
            _heading("3. The run")
            # What is wrong with generated rows is nobody's alert.
            unheard = environment.model_copy(update={"alerts": None})
            [summary] = with_progress(unheard, [day], RunOptions(), source="tutormax demo")
            show(summary_block(summary))
            _heading("4. The table after the run")
            _table_state(engine)
            _sample(engine, summary.run_date)
            _tier_distribution(engine, summary.run_date)
    if not summary.all_saved:
        raise typer.Exit(EXIT_FAILED)
    _what_next(day)


def _platform(engine: "sa.Engine", *, tutors: int | None, day: date, timezone: str) -> None:
    from tutormax_assets.sample import platform as sample_platform
    from tutormax_assets.schema.status import initialize, status

    state = status(engine, timezone=timezone)
    if not any(source.present for source in state.sources):
        initialize(engine, timezone=timezone)
    try:
        rows = sample_platform.generate(
            engine,
            tutors=_TUTORS if tutors is None else tutors,
            sessions_per_tutor=_SESSIONS_PER_TUTOR,
            days=_DAYS,
            end=day,
            seed=1,
            bad_rows=_BAD_ROWS,
        )
    except sample_platform.PlatformNotEmptyError:
        held = _tutors(engine)
        if tutors not in (None, held):
            fail(
                f"--tutors is {tutors}, but the platform of an earlier call has {held:,} tutors and"
                " is kept. Leave --tutors out to use it, or set TUTORMAX_HOME to a new folder.",
                code=EXIT_USAGE,
            )
        show(f"The platform of an earlier call is used again: {held:,} tutors.")
    else:
        show("\n".join(f"{count:>9,} {table}" for table, count in rows.items()))


def _tutors(engine: "sa.Engine") -> int:
    import sqlalchemy as sa

    from tutormax_assets.database import tables

    with engine.connect() as connection:
        count = sa.select(sa.func.count()).select_from(tables.tutors)
        return int(connection.execute(count).scalar_one())


def _table_state(engine: "sa.Engine") -> None:
    import sqlalchemy as sa

    from tutormax_assets.database.tables import tutor_performance_metrics as metrics

    query = sa.select(
        sa.func.count(),
        sa.func.count(metrics.c.tutor_id.distinct()),
        sa.func.count(metrics.c.calculation_date.distinct()),
        sa.func.max(metrics.c.updated_at),
    )
    with engine.connect() as connection:
        rows, tutors, dates, updated_at = connection.execute(query).one()
    show(f"{metrics.name}: {rows:,} rows of {tutors:,} tutors and {dates} dates")
    if updated_at is not None:
        show(f"Newest change of a row: {updated_at:%Y-%m-%d %H:%M:%S %Z}")


def _sample(engine: "sa.Engine", calculation_date: object) -> None:
    import sqlalchemy as sa

    from tutormax_assets.database.tables import tutor_performance_metrics as metrics

    shown = ("tutor_id", "window", "avg_rating", "reschedule_rate", "performance_tier")
    query = (
        sa.select(*(metrics.c[name] for name in shown))
        .where(metrics.c.calculation_date == calculation_date)
        .order_by(metrics.c.tutor_id, sa.func.length(metrics.c.window), metrics.c.window)
        .limit(6)
    )
    block = table("The first two tutors", *shown)
    with engine.connect() as connection:
        for row in connection.execute(query):
            block.add_row(*("" if value is None else str(value) for value in row))
    show(block)


def _tier_distribution(engine: "sa.Engine", calculation_date: object) -> None:
    import sqlalchemy as sa

    from tutormax_assets.database.tables import tutor_performance_metrics as metrics

    query = (
        sa.select(metrics.c.performance_tier, sa.func.count())
        .where(metrics.c.calculation_date == calculation_date, metrics.c.window == "30day")
        .group_by(metrics.c.performance_tier)
    )
    with engine.connect() as connection:
        counts = {tier: count for tier, count in connection.execute(query)}
    bars = Table(title="Tiers over 30 days", title_justify="left", show_header=False, box=None)
    for tier, color in _TIER_COLORS.items():
        count = counts.get(tier, 0)
        bar = Bar(max(counts.values(), default=1), 0, count, width=40, color=color)
        bars.add_row(tier, bar, str(count))
    show(bars)


def _heading(text: str) -> None:
    output.print(f"\n{text}", style="bold")


def _what_next(day: date) -> None:
    _heading("What next")
    called = "tutormax" if shutil.which("tutormax") else os.path.relpath(sys.argv[0])
    for command, purpose in (
        ("dev", "see the run and the assets in the Dagster UI"),
        ("run", "run today again: nothing changes"),
        (f"set-aside --date {day}", "the values that the run could not use"),
        (f"backfill --from {day - timedelta(days=6)}", "compute the last week"),
        ("db status", "see where the database is"),
        ("db stop", "stop the embedded server"),
    ):
        output.print(f"{called} {command}", style="bold", soft_wrap=True)
        show(f"    {purpose}")
