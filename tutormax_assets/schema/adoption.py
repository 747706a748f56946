"""The metrics table that a predecessor left, made into the one that this project writes.

What becomes of each row is one SELECT, `verdicts`. A report aggregates it; the adoption applies it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from tutormax_assets.database.references import references
from tutormax_assets.database.tables import (
    METRICS_TABLE,
    tutor_performance_metrics,
    tutors,
)
from tutormax_assets.schema import obstacles
from tutormax_assets.schema.changes import (
    RELATION_KIND,
    TRIGGERS,
    SchemaError,
    TablePlan,
    ddl,
    plan_changes,
    quote,
)
from tutormax_assets.schema.old_rows import (
    SET_ASIDE_TABLE,
    convert_statement,
    move_statement,
    set_aside,
    verdicts,
)

LOCK_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class UpgradeReport:
    """What an upgrade does to the metrics table; a dry run and the real run give the same."""

    rows_before: int
    rows_kept: int
    rows_moved: Mapping[str, int] = field(default_factory=dict)
    """Rows moved to `SET_ASIDE_TABLE`, by reason."""
    windows_renamed: int = 0
    tiers_renamed: int = 0
    dates_moved: int = 0
    """Kept rows whose calculation date becomes midnight."""
    days_moved: int = 0
    """Those of them whose day in the configured timezone is not their day in UTC."""
    changes: tuple[str, ...] = ()
    """What changes in tables, columns, constraints and indexes, a sentence each."""
    obstacles: tuple[str, ...] = ()
    """Clauses that say why it cannot be done; a real run never gets that far."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        converted = self.windows_renamed or self.tiers_renamed or self.dates_moved
        return not (self.changes or self.rows_moved or converted)

    def lines(self) -> list[str]:
        """The report for a person."""
        if self.is_empty:
            return [f"{METRICS_TABLE} is up to date ({self.rows_before} rows); nothing to do"]
        moved = sum(self.rows_moved.values())
        return [
            f"{METRICS_TABLE}: {self.rows_before} rows found, {self.rows_kept} stay, "
            f"{moved} move to {SET_ASIDE_TABLE}",
            *(f"  {count} {reason}" for reason, count in self.rows_moved.items()),
            f"window names changed in {self.windows_renamed} rows, "
            f"tier names in {self.tiers_renamed}, "
            f"dates moved to midnight in {self.dates_moved}",
            *(
                [
                    f"  {self.days_moved} of these dates move to another day: at their time, the"
                    " date in the configured timezone (TUTORMAX_TIMEZONE) is not the date in UTC"
                ]
                if self.days_moved
                else []
            ),
            *self.changes,
            *(f"cannot be done: {clause}" for clause in self.obstacles),
        ]


def missing_changes(connection: sa.Connection) -> tuple[str, ...]:
    """What an upgrade would change in the table that exists, rows aside; reads the catalog only.

    Raises:
        SchemaError: The table cannot be adopted as it is.
    """
    return (
        *_sentences_of_creation(connection, SET_ASIDE_TABLE),
        *plan_changes(connection).sentences,
    )


def examine(connection: sa.Connection, *, timezone: str) -> UpgradeReport:
    """What `adopt` would do; only reads.

    Args:
        connection: A connection to the platform's database.
        timezone: IANA timezone whose midnight a calculation date becomes.

    Returns:
        Counts and changes.

    Raises:
        SchemaError: The table cannot be adopted as it is.
    """
    if not _exists(connection):
        return UpgradeReport(
            0,
            0,
            changes=(*_sentences_of_creation(connection, METRICS_TABLE, SET_ASIDE_TABLE),),
            obstacles=_obstacles(connection, None),
        )
    plan = plan_changes(connection)
    report = _report(connection, plan, timezone=timezone)
    return replace(report, obstacles=_obstacles(connection, plan))


def check(connection: sa.Connection) -> None:
    """Raise if something keeps this user from adopting the table; reads the catalog only.

    Raises:
        SchemaError: It names every obstacle.
    """
    found = _obstacles(connection, plan_changes(connection) if _exists(connection) else None)
    if found:
        raise SchemaError(
            f"{METRICS_TABLE} cannot be upgraded: {'; '.join(found)}. Nothing was changed"
        )


def adopt(connection: sa.Connection, *, timezone: str) -> UpgradeReport:
    """Create the metrics table, or make the one that exists into it, in the caller's transaction.

    Rows that cannot stay move to `SET_ASIDE_TABLE`. Adopting an adopted table changes nothing.

    Args:
        connection: A connection in a transaction, which the caller rolls back on any exception.
        timezone: IANA timezone whose midnight a calculation date becomes.

    Returns:
        Counts and changes, as `examine` gives them.

    Raises:
        SchemaError: The table cannot be adopted as it is.
        sqlalchemy.exc.DBAPIError: PostgreSQL refuses, or the lock is not had in time.
    """
    check(connection)
    if not _exists(connection):
        report = examine(connection, timezone=timezone)
        tutor_performance_metrics.create(connection)
        set_aside.create(connection, checkfirst=True)
        return report
    # Whoever waits for this lock makes every later reader wait too, so the wait is short.
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
    connection.exec_driver_sql(f"LOCK TABLE {quote(METRICS_TABLE)} IN ACCESS EXCLUSIVE MODE")
    # Floats reach JSON and text with all their digits whatever the role's settings are.
    connection.exec_driver_sql("SET LOCAL extra_float_digits = 1")

    plan = plan_changes(connection)
    report = _report(connection, plan, timezone=timezone)
    set_aside.create(connection, checkfirst=True)
    if report.rows_moved:
        moved = connection.execute(
            move_statement(plan.found, timezone=timezone),
            execution_options={"preserve_rowcount": True},
        )
        if moved.rowcount != sum(report.rows_moved.values()):
            raise SchemaError(
                f"{tutors.name} changed while {METRICS_TABLE} was adopted; run it again"
            )
    if plan.alterations:
        connection.execute(ddl(f"ALTER TABLE {quote(METRICS_TABLE)} {', '.join(plan.alterations)}"))
    if report.windows_renamed or report.tiers_renamed or report.dates_moved:
        _convert(connection, timezone=timezone)
    for statement in plan.additions:
        connection.execute(statement)
    return report


def _convert(connection: sa.Connection, *, timezone: str) -> None:
    # A trigger that stamps `updated_at` would take every row for one that was computed anew.
    triggers = connection.scalars(TRIGGERS, {"metrics": METRICS_TABLE}).all()
    alter = f"ALTER TABLE {quote(METRICS_TABLE)}"
    for trigger in triggers:
        connection.execute(ddl(f"{alter} DISABLE TRIGGER {quote(trigger)}"))
    connection.execute(convert_statement(timezone=timezone))
    for trigger in triggers:
        connection.execute(ddl(f"{alter} ENABLE TRIGGER {quote(trigger)}"))


def _exists(connection: sa.Connection) -> bool:
    kind = connection.scalar(RELATION_KIND, {"name": METRICS_TABLE})
    if kind not in (None, "r"):
        raise SchemaError(
            f"{METRICS_TABLE} is not an ordinary table (it is of PostgreSQL's kind {kind!r}); "
            "rename it, so that the table can be created"
        )
    return kind is not None


def _obstacles(connection: sa.Connection, plan: TablePlan | None) -> tuple[str, ...]:
    has_table = sa.inspect(connection).has_table
    names = METRICS_TABLE, SET_ASIDE_TABLE
    return tuple(
        obstacles.of_upgrade(
            connection,
            creates=[name for name in names if not has_table(name)],
            alters=plan is not None and bool(plan.sentences),
            indexes=plan is not None and plan.indexes,
            refers=plan is None or plan.refers,
            fills=SET_ASIDE_TABLE,
        )
    )


def _sentences_of_creation(connection: sa.Connection, *names: str) -> Iterator[str]:
    inspector = sa.inspect(connection)
    for name in names:
        if not inspector.has_table(name):
            yield f"table {name} is created"


def _report(connection: sa.Connection, plan: TablePlan, *, timezone: str) -> UpgradeReport:
    _check_referred(connection, plan.found, timezone=timezone)
    verdict = verdicts(plan.found, timezone=timezone)
    counts = connection.execute(
        sa.select(
            verdict.c.reason,
            sa.func.count(),
            *(
                sa.func.count().filter(changed)
                for changed in (
                    verdict.c.window_renamed,
                    verdict.c.tier_renamed,
                    verdict.c.date_moved,
                    verdict.c.day_moved,
                )
            ),
        )
        .group_by(verdict.c.reason)
        .order_by(sa.func.count().desc(), verdict.c.reason)
    ).all()
    kept, windows, tiers, dates, days = next(
        (row[1:] for row in counts if row[0] is None), (0, 0, 0, 0, 0)
    )
    return UpgradeReport(
        rows_before=sum(row[1] for row in counts),
        rows_kept=kept,
        rows_moved={row[0]: row[1] for row in counts if row[0] is not None},
        windows_renamed=windows,
        tiers_renamed=tiers,
        dates_moved=dates,
        days_moved=days,
        changes=(*_sentences_of_creation(connection, SET_ASIDE_TABLE), *plan.sentences),
    )


def _check_referred(connection: sa.Connection, metrics: sa.TableClause, *, timezone: str) -> None:
    """Refuse where a row that another table refers to has to go, or to change what it refers to.

    The foreign key would delete or change the other table's rows, or end the upgrade.
    """
    verdict = verdicts(metrics, timezone=timezone)
    renamed = {
        "window": verdict.c.window_renamed,
        "performance_tier": verdict.c.tier_renamed,
        "calculation_date": verdict.c.date_moved,
    }
    problems = []
    for reference in references(connection):
        changes = sa.or_(
            verdict.c.reason.is_not(None),
            *(changed for name, changed in renamed.items() if name in reference.referred),
        )
        affected = (
            sa.select(sa.func.count())
            .select_from(metrics.join(verdict, verdict.c.metric_id == metrics.c.metric_id))
            .where(changes)
        )
        if not reference.is_readable:
            if connection.scalar(affected):
                problems.append(reference.missing_right)
        elif count := connection.scalar(affected.where(reference.refers_to(metrics))):
            columns = ", ".join(reference.columns)
            problems.append(f"table {reference.shown} refers to {count} of them by {columns}")
    if problems:
        raise SchemaError(
            f"rows of {METRICS_TABLE} have to move to {SET_ASIDE_TABLE} or to change their key, and"
            f" {'; '.join(problems)}. Nothing was changed, since the rows of other tables are not"
            " this project's: let them refer to rows that stay, or drop their foreign key, and"
            " upgrade again"
        )
