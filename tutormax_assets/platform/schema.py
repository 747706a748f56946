"""The platform's database as this project needs it: created for a demo, upgraded, looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory

from tutormax_assets.platform import adoption
from tutormax_assets.platform.adoption import SchemaError, UpgradeReport
from tutormax_assets.platform.migrations import VERSION_TABLE
from tutormax_assets.platform.tables import (
    METRICS_TABLE,
    source_metadata,
    tutor_performance_metrics,
    tutors,
)

__all__ = [
    "SchemaError",
    "SchemaStatus",
    "SourceTable",
    "UpgradeReport",
    "initialize",
    "status",
    "upgrade",
]

NEEDED_COLUMNS = {
    "tutors": ("tutor_id", "status"),
    "sessions": (
        "session_id",
        "tutor_id",
        "session_number",
        "scheduled_start",
        "actual_start",
        "tutor_initiated_reschedule",
        "no_show",
        "late_start_minutes",
        "engagement_score",
        "learning_objectives_met",
    ),
    "student_feedback": ("feedback_id", "session_id", "tutor_id", "overall_rating"),
    "tutor_events": ("event_id", "tutor_id", "event_type", "event_timestamp", "metadata"),
}
"""The columns that a snapshot reads, by table."""

ADOPTION_REVISION = "0001"


@dataclass(frozen=True)
class SourceTable:
    """A table of the platform that snapshots read."""

    name: str
    present: bool
    missing_columns: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether snapshots can read it."""
        return self.present and not self.missing_columns


@dataclass(frozen=True)
class SchemaStatus:
    """What the database holds of what this project reads and writes."""

    sources: tuple[SourceTable, ...]
    metrics: Literal["current", "behind", "ahead", "not managed", "missing"]
    """``not managed``: the table is there but was never upgraded; ``ahead``: by a newer version."""
    revision: str | None
    newest_revision: str
    rows: int
    newest_calculation_date: datetime | None
    rows_set_aside: int

    @property
    def ready(self) -> bool:
        """Whether a run can read its sources and write its result."""
        return self.metrics == "current" and all(source.usable for source in self.sources)

    def lines(self) -> list[str]:
        """The status for a person."""
        newest = self.newest_calculation_date
        return [
            *(_source_line(source) for source in self.sources),
            f"{METRICS_TABLE}: {self.metrics} "
            f"(revision {self.revision or 'none'}, newest {self.newest_revision})",
            f"  {self.rows} rows, newest calculation date {newest.isoformat() if newest else '-'}",
            f"{adoption.SET_ASIDE_TABLE}: {self.rows_set_aside} rows",
        ]


def initialize(engine: sa.Engine, *, timezone: str) -> None:
    """Create the platform's tables and this project's, in a database that has none of them.

    Args:
        engine: Where to.
        timezone: IANA timezone in which a reference date begins.

    Raises:
        SchemaError: Some of the tables exist already.
    """
    with engine.begin() as connection, _refusals():
        inspector = sa.inspect(connection)
        found = [
            name for name in (*source_metadata.tables, METRICS_TABLE) if inspector.has_table(name)
        ]
        if found:
            raise SchemaError(
                f"expected an empty database but found {', '.join(found)}; the platform's own "
                "database is not to be initialised: upgrade it"
            )
        source_metadata.create_all(connection)
        _apply(connection, timezone=timezone)


def upgrade(engine: sa.Engine, *, timezone: str, dry_run: bool = False) -> UpgradeReport:
    """Bring this project's tables to the newest revision; the platform's own stay untouched.

    Args:
        engine: Where to.
        timezone: IANA timezone in which a reference date begins.
        dry_run: Only read, and report what the upgrade would do.

    Returns:
        What was done, or would be.

    Raises:
        SchemaError: The database is not as needed, or PostgreSQL refuses; nothing has changed.
    """
    if dry_run:
        with engine.connect() as connection, _refusals():
            # One snapshot, and PostgreSQL itself refuses to write.
            connection = connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            return _preview(connection, timezone=timezone)
    with engine.begin() as connection, _refusals():
        return _apply(connection, timezone=timezone)


def status(engine: sa.Engine) -> SchemaStatus:
    """What the database holds; only reads.

    Args:
        engine: Which database.

    Returns:
        The source tables, the revision of this project's tables and what they hold.

    Raises:
        SchemaError: The metrics table is of another making.
    """
    with engine.connect() as connection, _refusals():
        inspector = sa.inspect(connection)
        revision = _revision(connection)
        present = inspector.has_table(METRICS_TABLE)
        rows, newest = (
            connection.execute(
                sa.select(
                    sa.func.count(), sa.func.max(tutor_performance_metrics.c.calculation_date)
                ).select_from(tutor_performance_metrics)
            ).one()
            if present
            else (0, None)
        )
        return SchemaStatus(
            sources=tuple(_sources(inspector)),
            metrics=_state(revision) if present else "missing",
            revision=revision,
            newest_revision=_newest_revision(),
            rows=rows,
            newest_calculation_date=newest,
            rows_set_aside=(
                connection.scalar(sa.select(sa.func.count()).select_from(adoption.set_aside)) or 0
                if inspector.has_table(adoption.SET_ASIDE_TABLE)
                else 0
            ),
        )


def _apply(connection: sa.Connection, *, timezone: str) -> UpgradeReport:
    # Two upgrades at once would both create the tables; the second finds them instead.
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{adoption.LOCK_TIMEOUT_SECONDS}s'")
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(VERSION_TABLE))))
    pending = _pending(connection)
    if not pending:
        return _up_to_date(connection)
    config = _config()
    config.attributes.update(connection=connection, timezone=timezone, report=None)
    command.upgrade(config, "head")
    return _with_later(config.attributes["report"] or _up_to_date(connection), pending)


def _preview(connection: sa.Connection, *, timezone: str) -> UpgradeReport:
    pending = _pending(connection)
    adopts = any(script.revision == ADOPTION_REVISION for script in pending)
    report = adoption.examine(connection, timezone=timezone) if adopts else _up_to_date(connection)
    return _with_later(report, pending)


def _pending(connection: sa.Connection) -> list[Script]:
    inspector = sa.inspect(connection)
    if not inspector.has_table(tutors.name):
        found = sorted(inspector.get_table_names())
        raise SchemaError(
            f"expected the platform's table {tutors.name!r} on the search path "
            f"({connection.scalar(sa.text('SHOW search_path'))}) but found "
            f"{', '.join(found) or 'no tables'}; connect to the tutoring platform's database, "
            "or initialise an empty one"
        )
    revision = _revision(connection)
    state = _state(revision)
    if state == "ahead":
        raise SchemaError(
            f"{VERSION_TABLE} is at revision {revision}, which this version does not know; "
            f"expected {_newest_revision()} or older: install the newer tutormax-assets"
        )
    if revision is not None and not inspector.has_table(METRICS_TABLE):
        raise SchemaError(
            f"{VERSION_TABLE} is at revision {revision} but {METRICS_TABLE} is not there; "
            f"restore it, or drop {VERSION_TABLE} and upgrade to have it created empty"
        )
    scripts = ScriptDirectory.from_config(_config())
    return list(reversed(list(scripts.iterate_revisions("head", revision or "base"))))


def _with_later(report: UpgradeReport, pending: list[Script]) -> UpgradeReport:
    later = (
        f"migration {script.revision}: {script.doc}"
        for script in pending
        if script.revision != ADOPTION_REVISION
    )
    return replace(report, changes=(*report.changes, *later))


def _up_to_date(connection: sa.Connection) -> UpgradeReport:
    rows = connection.scalar(sa.select(sa.func.count()).select_from(tutor_performance_metrics))
    return UpgradeReport(rows_before=rows or 0, rows_kept=rows or 0)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "tutormax_assets.platform:migrations")
    return config


def _revision(connection: sa.Connection) -> str | None:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def _newest_revision() -> str:
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def _state(revision: str | None) -> Literal["current", "behind", "ahead", "not managed"]:
    if revision is None:
        return "not managed"
    scripts = ScriptDirectory.from_config(_config())
    if revision == scripts.get_current_head():
        return "current"
    known = {script.revision for script in scripts.walk_revisions()}
    return "behind" if revision in known else "ahead"


def _sources(inspector: sa.Inspector) -> Iterator[SourceTable]:
    for name, needed in NEEDED_COLUMNS.items():
        if not inspector.has_table(name):
            yield SourceTable(name, present=False, missing_columns=needed)
            continue
        found = {column["name"] for column in inspector.get_columns(name)}
        yield SourceTable(
            name,
            present=True,
            missing_columns=tuple(column for column in needed if column not in found),
        )


def _source_line(source: SourceTable) -> str:
    if not source.present:
        return f"{source.name}: missing"
    if source.missing_columns:
        return f"{source.name}: lacks {', '.join(source.missing_columns)}"
    return f"{source.name}: present"


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            raise SchemaError(
                f"another session holds a lock on {METRICS_TABLE} or {tutors.name} and kept it "
                f"for {adoption.LOCK_TIMEOUT_SECONDS} s; nothing was changed: upgrade when no "
                "run and no report is using the table"
            ) from error
        if not isinstance(error.orig, psycopg.Error) or error.orig.diag.message_primary is None:
            raise
        facts = [error.orig.diag.message_primary, error.orig.diag.message_detail]
        raise SchemaError(
            f"PostgreSQL refused: {'; '.join(fact for fact in facts if fact)}. Nothing was changed"
        ) from error
