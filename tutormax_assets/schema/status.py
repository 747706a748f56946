"""The platform's database as this project needs it: created for a demo, upgraded, looked at."""

from collections.abc import Callable, Iterator, Mapping
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

from tutormax_assets.database.tables import (
    METRICS_TABLE,
    OWN_TABLES,
    is_a_date,
    source_metadata,
    tutor_performance_metrics,
    tutors,
)
from tutormax_assets.schema import adoption, obstacles, old_rows, other_tables
from tutormax_assets.schema.adoption import UpgradeReport
from tutormax_assets.schema.changes import SchemaError
from tutormax_assets.schema.migrations import VERSION_TABLE
from tutormax_assets.schema.roles import WRITER_RIGHTS
from tutormax_assets.source import contract
from tutormax_assets.source.lake import breaches, open_view
from tutormax_assets.source.lake_files import Lake

__all__ = [
    "SchemaError",
    "SchemaStatus",
    "SourceTable",
    "UpgradeReport",
    "initialize",
    "status",
    "upgrade",
]

ADOPTION_REVISION = "0001"

MetricsState = Literal["current", "behind", "ahead", "not managed", "missing", "unknown"]


@dataclass(frozen=True)
class SourceTable:
    """A table of the platform that snapshots read, and what keeps them from it."""

    name: str
    present: bool
    breaches: tuple[str, ...] = ()


@dataclass(frozen=True)
class SchemaStatus:
    """What the database holds of what this project reads and writes."""

    sources: tuple[SourceTable, ...]
    metrics: MetricsState
    """``not managed``: the table is there but was never upgraded; ``ahead``: by a newer version;
    ``unknown``: the user may not look at the revision."""
    revision: str | None
    newest_revision: str
    rows: int | None
    """Rows of the metrics table; null where the user may not look, as of the rows set aside."""
    newest_calculation_date: datetime | None
    rows_set_aside: int | None
    missing_rights: tuple[str, ...] = ()
    """Clauses that name what the user lacks to write."""
    missing_tutors: tuple[str, ...] = ()
    """A clause where the metrics of some of a lake's tutors would refer to nobody."""
    deviations: tuple[str, ...] = ()
    """A clause for what an upgrade of a table that was upgraded before has to change again."""

    @property
    def ready(self) -> bool:
        """Whether a run can read its sources and write its result, and a cleanup move it."""
        readable = not any(source.breaches for source in self.sources)
        return self.metrics == "current" and readable and not self.unmet

    @property
    def unmet(self) -> tuple[str, ...]:
        """Clauses that say what keeps a run from writing."""
        return (*self.deviations, *self.missing_rights, *self.missing_tutors)

    def lines(self) -> list[str]:
        """The status for a person."""
        newest = self.newest_calculation_date
        last = newest.isoformat() if newest else "-"
        return [
            *(line for source in self.sources for line in _source_lines(source)),
            f"{METRICS_TABLE}: {self.metrics} "
            f"(revision {self.revision or 'none'}, newest {self.newest_revision})",
            f"  {_rows(self.rows)}, newest calculation date {last}",
            f"{old_rows.SET_ASIDE_TABLE}: {_rows(self.rows_set_aside)}",
            *self.unmet,
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
            name for name in (*source_metadata.tables, *OWN_TABLES) if inspector.has_table(name)
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
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            return _preview(connection, timezone=timezone)
    with engine.begin() as connection, _refusals():
        return _apply(connection, timezone=timezone)


def status(
    engine: sa.Engine,
    *,
    timezone: str,
    source: sa.Engine | None = None,
    lake: Lake | None = None,
) -> SchemaStatus:
    """What the database holds; only reads.

    Args:
        engine: The database that holds the metrics table.
        timezone: IANA timezone in which a reference date begins.
        source: The one that holds the source tables; the same unless given.
        lake: Holds the source tables instead.

    Returns:
        The source tables, the revision of this project's tables, what they hold, and the rights
        that are missing.

    Raises:
        SchemaError: The metrics table is of another making.
        SourceError: The lake cannot be read.
    """
    sources = _source_tables(source or engine, lake)
    with engine.connect() as connection, _refusals():
        present = sa.inspect(connection).has_table(METRICS_TABLE)
        missing = {table: _missing_rights(connection, table) for table in WRITER_RIGHTS}
        unreadable = {table for table, rights in missing.items() if "SELECT" in rights}
        revision = None if VERSION_TABLE in unreadable else _revision(connection)
        is_readable = METRICS_TABLE not in unreadable
        rows, newest, deviations = (
            _contents(connection, revision, is_readable=is_readable, timezone=timezone)
            if present or not is_readable
            else (0, None, ())
        )
        return SchemaStatus(
            sources=sources,
            metrics=_metrics_state(
                revision, present=present, is_readable=VERSION_TABLE not in unreadable
            ),
            revision=revision,
            newest_revision=_newest_revision(),
            rows=rows,
            newest_calculation_date=newest,
            rows_set_aside=_rows_set_aside(
                connection, is_readable=old_rows.SET_ASIDE_TABLE not in unreadable
            ),
            missing_rights=(*obstacles.of_server(connection), *_rights_lines(connection, missing)),
            missing_tutors=(
                tuple(_missing_tutors(connection, lake))
                if lake is not None and present and not any(source.breaches for source in sources)
                else ()
            ),
            deviations=deviations,
        )


def _source_tables(engine: sa.Engine, lake: Lake | None) -> tuple[SourceTable, ...]:
    """The source tables of the lake, or of the database without one."""
    if lake is not None:
        of_lake = breaches(lake).items()
        return tuple(SourceTable(name, not clauses, clauses) for name, clauses in of_lake)
    with engine.connect() as connection, _refusals():
        rows = connection.execute(sa.text(contract.FOUND_COLUMNS)).all()
    columns = [contract.FoundColumn(*row) for row in rows]
    present = {column.table_name for column in columns}
    clauses = list(contract.breaches(columns))
    return tuple(
        SourceTable(name, name in present, tuple(text for table, text in clauses if table == name))
        for name in contract.NEEDED_COLUMNS
    )


def _contents(
    connection: sa.Connection, revision: str | None, *, is_readable: bool, timezone: str
) -> tuple[int | None, datetime | None, tuple[str, ...]]:
    """Rows of the metrics table, its newest calculation date, and what is not as expected."""
    if not is_readable:
        return None, None, ()
    if revision is None:
        date = tutor_performance_metrics.c.calculation_date
        newest = sa.func.max(date).filter(is_a_date(date))
        rows, newest_date = connection.execute(sa.select(sa.func.count(), newest)).one()
        return rows, newest_date, ()
    found = old_rows.find_rows(connection, timezone=timezone)
    return found.rows, found.newest, tuple(_deviations(connection, found))


def _rows_set_aside(connection: sa.Connection, *, is_readable: bool) -> int | None:
    """Number of rows set aside; none if it cannot be known."""
    if not is_readable:
        return None
    if not sa.inspect(connection).has_table(old_rows.SET_ASIDE_TABLE):
        return 0
    return connection.scalar(sa.select(sa.func.count()).select_from(old_rows.set_aside))


def _deviations(connection: sa.Connection, found: old_rows.RowsFound) -> Iterator[str]:
    if found.deviations:
        yield (
            f"table {METRICS_TABLE}: found {', '.join(found.deviations)}, expected none: stop what"
            " writes them, such as the replaced service, then run `tutormax db upgrade`"
        )
    if names := other_tables.missing(connection):
        yield (f"{', '.join(names)}: found none, expected what `tutormax db upgrade` creates")
    changes = adoption.missing_changes(connection)
    if changes:
        yield (
            f"table {METRICS_TABLE}: found another form than the migration left, expected what"
            f" `tutormax db upgrade` brings back: {'; '.join(changes)}"
        )


def _apply(connection: sa.Connection, *, timezone: str) -> UpgradeReport:
    # Two upgrades at once would both create the tables; the second finds them instead.
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{adoption.LOCK_TIMEOUT_SECONDS}s'")
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(VERSION_TABLE))))
    pending = _pending(connection)
    config = _config()
    config.attributes.update(connection=connection, timezone=timezone, report=None)
    if pending:
        # Before Alembic creates a table of its own.
        adoption.check(connection)
        if found := _obstacles_of_creation(connection):
            raise SchemaError(
                f"{METRICS_TABLE} cannot be upgraded: {'; '.join(found)}. Nothing was changed"
            )
        command.upgrade(config, "head")
    report = config.attributes["report"] or _adopt_again(
        connection, adoption.adopt, timezone=timezone
    )
    report = _with_created(connection, report, pending)
    other_tables.create(connection)
    return _with_later(report, pending)


def _preview(connection: sa.Connection, *, timezone: str) -> UpgradeReport:
    pending = _pending(connection)
    adopts = any(script.revision == ADOPTION_REVISION for script in pending)
    report = (
        adoption.examine(connection, timezone=timezone)
        if adopts
        else _adopt_again(connection, adoption.examine, timezone=timezone)
    )
    found = (*report.obstacles, *_obstacles_of_creation(connection))
    report = replace(report, obstacles=tuple(dict.fromkeys(found)))
    return _with_later(_with_created(connection, report, pending), pending)


def _obstacles_of_creation(connection: sa.Connection) -> list[str]:
    """What keeps the user from creating the tables of reasons and changes, or their trigger."""
    creates = other_tables.missing(connection)
    if not creates:
        return []
    clauses = obstacles.of_upgrade(
        connection,
        creates=creates,
        # The trigger is on the metrics table.
        alters=True,
        indexes=False,
        refers=True,
        fills=old_rows.SET_ASIDE_TABLE,
    )
    return list(clauses)


def _with_created(
    connection: sa.Connection, report: UpgradeReport, pending: list[Script]
) -> UpgradeReport:
    """The report with what was dropped since its migration and is created again."""
    names = [] if pending else other_tables.missing(connection)
    return replace(report, changes=(*report.changes, *(f"{name} is created" for name in names)))


def _adopt_again(
    connection: sa.Connection, adopt: Callable[..., UpgradeReport], *, timezone: str
) -> UpgradeReport:
    """Adopt a table that was adopted before, if something else has changed it since."""
    found = old_rows.find_rows(connection, timezone=timezone)
    if found.deviations or adoption.missing_changes(connection):
        return adopt(connection, timezone=timezone)
    return UpgradeReport(rows_before=found.rows, rows_kept=found.rows)


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


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "tutormax_assets.schema:migrations")
    return config


def _revision(connection: sa.Connection) -> str | None:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def _newest_revision() -> str:
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def _metrics_state(revision: str | None, *, present: bool, is_readable: bool) -> MetricsState:
    if not present:
        return "missing"
    return _state(revision) if is_readable else "unknown"


def _state(revision: str | None) -> Literal["current", "behind", "ahead", "not managed"]:
    if revision is None:
        return "not managed"
    scripts = ScriptDirectory.from_config(_config())
    if revision == scripts.get_current_head():
        return "current"
    known = {script.revision for script in scripts.walk_revisions()}
    return "behind" if revision in known else "ahead"


def _source_lines(source: SourceTable) -> list[str]:
    return list(source.breaches) or [f"{source.name}: as expected"]


def _rows(count: int | None) -> str:
    return "no right to count the rows" if count is None else f"{count} rows"


def _missing_rights(connection: sa.Connection, table: str) -> tuple[str, ...]:
    """The rights to a table that the user lacks; none where there is no such table."""

    def lacks(right: str) -> bool:
        held = sa.func.has_table_privilege(sa.func.to_regclass(table), right)
        return connection.scalar(sa.select(held)) is False

    return tuple(right for right in WRITER_RIGHTS[table] if lacks(right))


def _rights_lines(
    connection: sa.Connection, missing: Mapping[str, tuple[str, ...]]
) -> Iterator[str]:
    for table, rights in missing.items():
        if rights:
            expected = ", ".join(WRITER_RIGHTS[table])
            yield f"table {table}: found no right to {', '.join(rights)}, expected {expected}"
    database = sa.func.current_database()
    if not connection.scalar(sa.select(sa.func.has_database_privilege(database, "TEMPORARY"))):
        yield (
            f"database {connection.scalar(sa.select(database))}: found no right to create temporary"
            " tables, expected TEMPORARY"
        )


def _missing_tutors(connection: sa.Connection, lake: Lake) -> Iterator[str]:
    referred = open_view(lake).tutors()["tutor_id"]
    held = set(connection.scalars(sa.select(tutors.c.tutor_id)))
    missing = sorted(set(referred) - held)
    if missing:
        yield (
            f"table {tutors.name}: found no row of {len(missing)} of the lake's {len(referred)}"
            f" tutors, such as {missing[0]}; expected all of them, for {METRICS_TABLE} refers to"
            " them: load them into this database"
        )


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
