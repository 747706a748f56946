"""The metrics table that a predecessor left, made into the one that this project writes.

What becomes of each row is one SELECT, `verdicts`. A report aggregates it; the adoption applies it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB

from tutormax_assets.database.references import references
from tutormax_assets.database.tables import (
    METRICS_TABLE,
    is_a_date,
    tutor_performance_metrics,
    tutors,
)
from tutormax_assets.errors import TutormaxError
from tutormax_assets.schema import obstacles

SET_ASIDE_TABLE = "tutor_performance_metrics_set_aside"
LOCK_TIMEOUT_SECONDS = 5

WINDOW_NAMES = {
    "7day": "7day",
    "30day": "30day",
    "90day": "90day",
    "seven_day": "7day",
    "thirty_day": "30day",
    "ninety_day": "90day",
}
"""Window names that may be stored, in lower case, and what they become."""

TIER_NAMES = {
    "exemplary": "Exemplary",
    "strong": "Strong",
    "developing": "Developing",
    "needs attention": "Needs Attention",
    "needs_attention": "Needs Attention",
    "at risk": "At Risk",
    "at_risk": "At Risk",
}
"""Tier names that may be stored, in lower case, and what they become."""

WINDOW_OF_A_POLICY = "^[1-9][0-9]*day$"
"""Matches the window names that a policy can have."""

_TIERS = sorted(set(TIER_NAMES.values()))

set_aside_metadata = sa.MetaData()

set_aside = sa.Table(
    SET_ASIDE_TABLE,
    set_aside_metadata,
    sa.Column("set_aside_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("metric_id", sa.Text),
    sa.Column("tutor_id", sa.Text),
    sa.Column("calculation_date", sa.DateTime(timezone=True)),
    sa.Column("window", sa.Text),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("original", JSONB, nullable=False, comment="The whole row as it was"),
    sa.Column(
        "set_aside_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
    ),
)
"""Rows that could not stay in the metrics table: the keys and the row as they were, and why."""

_REQUIRED = [column.name for column in tutor_performance_metrics.columns if not column.nullable]
_UNIQUE = next(
    c for c in tutor_performance_metrics.constraints if isinstance(c, sa.UniqueConstraint)
)
_FOREIGN_KEY = next(
    c for c in tutor_performance_metrics.constraints if isinstance(c, sa.ForeignKeyConstraint)
)

_RELATION_KIND = sa.text(
    "SELECT relkind::text FROM pg_class WHERE oid = to_regclass(CAST(:name AS text))"
)

_CONSTRAINTS = sa.text("""
    SELECT conname AS name,
           contype::text AS kind,
           ARRAY(
               SELECT attname::text
               FROM unnest(conkey) WITH ORDINALITY AS key (number, place)
               JOIN pg_attribute ON attrelid = conrelid AND attnum = number
               ORDER BY place
           ) AS columns,
           pg_get_constraintdef(oid) AS definition,
           condeferrable AS deferrable,
           COALESCE(confrelid = to_regclass(CAST(:tutors AS text)), false) AS to_tutors,
           confdeltype = 'c' AND convalidated AS cascades
    FROM pg_constraint
    WHERE conrelid = to_regclass(CAST(:metrics AS text))
    ORDER BY conname
""")

_LITERALS = sa.text("""
    SELECT DISTINCT replace(found[1], '''''', '''')
    FROM regexp_matches(CAST(:definition AS text), '''((?:[^'']|'''')*)''', 'g') AS found
""")

_DEPENDENT_VIEWS = sa.text("""
    SELECT DISTINCT CAST(CAST(view.oid AS regclass) AS text)
    FROM pg_depend AS dependency
    JOIN pg_rewrite AS rule ON rule.oid = dependency.objid
    JOIN pg_class AS view ON view.oid = rule.ev_class
    JOIN pg_attribute AS attribute
        ON attribute.attrelid = dependency.refobjid AND attribute.attnum = dependency.refobjsubid
    WHERE dependency.classid = CAST('pg_rewrite' AS regclass)
      AND dependency.refclassid = CAST('pg_class' AS regclass)
      AND dependency.refobjid = to_regclass(CAST(:metrics AS text))
      AND attribute.attname = ANY (CAST(:columns AS text[]))
    ORDER BY 1
""")

_TRIGGERS = sa.text("""
    SELECT tgname
    FROM pg_trigger
    WHERE tgrelid = to_regclass(CAST(:metrics AS text)) AND tgenabled = 'O' AND NOT tgisinternal
""")

_dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
# Doubles a percent sign in a name, which `sa.DDL` makes single again.
_quote = _dialect.identifier_preparer.quote


class SchemaError(TutormaxError):
    """The database is not as needed; the message says what was found and what to do."""


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


@dataclass
class _Plan:
    """How the table that was found is changed, in the order in which it is done."""

    found: sa.TableClause
    sentences: list[str] = field(default_factory=list)
    alterations: list[str] = field(default_factory=list)
    """Clauses of one ALTER TABLE, so that the rows are rewritten at most once."""
    additions: list[sa.Executable] = field(default_factory=list)
    """Statements that need the rows in their final form."""
    refers: bool = False
    """Whether the foreign key to ``tutors`` is added."""
    indexes: bool = False
    """Whether an index is added."""

    def alter(self, sentence: str, clause: str) -> None:
        self.sentences.append(sentence)
        self.alterations.append(clause)

    def add(self, sentence: str, *statements: sa.Executable) -> None:
        self.sentences.append(sentence)
        self.additions.extend(statements)


@dataclass(frozen=True)
class RowsFound:
    """What the rows of an adopted table are, as a read of three columns shows it."""

    rows: int
    newest: datetime | None
    """Newest calculation date that is a date."""
    windows: int
    """Rows with a window that no policy writes, such as ``SEVEN_DAY``."""
    tiers: int
    """Rows with a tier that no run writes, such as ``AT_RISK``."""
    dates: int
    """Rows whose calculation date is not midnight in the configured timezone."""

    @property
    def deviations(self) -> tuple[str, ...]:
        """Phrases that name the rows which this project did not write."""
        return tuple(
            f"{count} rows with {what}"
            for count, what in (
                (self.windows, "another name in window"),
                (self.tiers, "another name in performance_tier"),
                (
                    self.dates,
                    "a calculation_date other than midnight in the configured timezone"
                    " (TUTORMAX_TIMEZONE)",
                ),
            )
            if count
        )


def find_rows(connection: sa.Connection, *, timezone: str) -> RowsFound:
    """Count the rows of an adopted table, and those that something else wrote there.

    One pass; each combination of date, window and tier is examined once.

    Args:
        connection: A connection to the platform's database.
        timezone: IANA timezone whose midnight a calculation date is.
    """
    metrics = tutor_performance_metrics.c
    columns = metrics.calculation_date, metrics.window, metrics.performance_tier
    group = sa.select(*columns, sa.func.count().label("rows")).group_by(*columns).subquery()
    date = group.c.calculation_date
    in_range = is_a_date(date)

    def rows(*conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        total = sa.func.sum(group.c.rows)
        return sa.cast(
            sa.func.coalesce(total.filter(*conditions) if conditions else total, 0), sa.BigInteger
        )

    found = connection.execute(
        sa.select(
            rows(),
            sa.func.max(date).filter(in_range),
            rows(~group.c.window.regexp_match(WINDOW_OF_A_POLICY)),
            rows(group.c.performance_tier.not_in(_TIERS)),
            rows(sa.case((in_range, _midnight(date, timezone) != date), else_=True)),
        )
    ).one()
    return RowsFound(*found)


def missing_changes(connection: sa.Connection) -> tuple[str, ...]:
    """What an upgrade would change in the table that exists, rows aside; reads the catalog only.

    Raises:
        SchemaError: The table cannot be adopted as it is.
    """
    return (*_created(connection, SET_ASIDE_TABLE), *_plan(connection).sentences)


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
            changes=(*_created(connection, METRICS_TABLE, SET_ASIDE_TABLE),),
            obstacles=_obstacles(connection, None),
        )
    plan = _plan(connection)
    report = _report(connection, plan, timezone=timezone)
    return replace(report, obstacles=_obstacles(connection, plan))


def check(connection: sa.Connection) -> None:
    """Raise if something keeps this user from adopting the table; reads the catalog only.

    Raises:
        SchemaError: It names every obstacle.
    """
    found = _obstacles(connection, _plan(connection) if _exists(connection) else None)
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
    connection.exec_driver_sql(f"LOCK TABLE {_quote(METRICS_TABLE)} IN ACCESS EXCLUSIVE MODE")
    # Floats reach JSON and text with all their digits whatever the role's settings are.
    connection.exec_driver_sql("SET LOCAL extra_float_digits = 1")

    plan = _plan(connection)
    report = _report(connection, plan, timezone=timezone)
    set_aside.create(connection, checkfirst=True)
    if report.rows_moved:
        moved = connection.execute(
            _move_statement(plan.found, timezone=timezone),
            execution_options={"preserve_rowcount": True},
        )
        if moved.rowcount != sum(report.rows_moved.values()):
            raise SchemaError(
                f"{tutors.name} changed while {METRICS_TABLE} was adopted; run it again"
            )
    if plan.alterations:
        connection.execute(
            _ddl(f"ALTER TABLE {_quote(METRICS_TABLE)} {', '.join(plan.alterations)}")
        )
    if report.windows_renamed or report.tiers_renamed or report.dates_moved:
        _convert(connection, timezone=timezone)
    for statement in plan.additions:
        connection.execute(statement)
    return report


def verdicts(metrics: sa.FromClause, *, timezone: str) -> sa.Subquery:
    """What each row of the metrics table becomes.

    Args:
        metrics: The table, with the column types that it has in the database.
        timezone: IANA timezone whose midnight a calculation date becomes.

    Returns:
        A row for each row: ``metric_id``; ``instant`` (the calculation date as it is) and
        ``calculation_date`` (as it becomes); ``window`` and ``performance_tier`` as they become,
        null when unknown; ``reason`` why the row cannot stay, null when it stays; and
        ``window_renamed``, ``tier_renamed``, ``date_moved``, ``day_moved``.
    """
    window_name = sa.cast(metrics.c.window, sa.Text)
    window = sa.case(
        *((_folded(window_name) == name, value) for name, value in WINDOW_NAMES.items()),
        # A policy may have windows of other lengths.
        (_folded(window_name).regexp_match(WINDOW_OF_A_POLICY), _folded(window_name)),
    )
    tier_name = (
        sa.cast(metrics.c.performance_tier, sa.Text)
        if "performance_tier" in metrics.c
        else sa.cast(sa.null(), sa.Text)
    )
    tier = sa.case(TIER_NAMES, value=_folded(tier_name))
    tutor_id = sa.cast(metrics.c.tutor_id, sa.Text)
    # The platform's column may be of another type than the one that its contract says.
    roster_id = sa.cast(tutors.c.tutor_id, sa.Text)
    instant = _instant(metrics.c.calculation_date)
    problem = sa.case(
        *((metrics.c[name].is_(None), f"missing {name}") for name in _REQUIRED),
        *(
            (sa.func.length(sa.cast(metrics.c[name], sa.Text)) > _length(name), f"too long {name}")
            for name in ("metric_id", "tutor_id")
        ),
        (~is_a_date(instant), "calculation_date out of range"),
        (
            window.is_(None) | (sa.func.length(window_name) > _length("window")),
            "unknown window",
        ),
        (tier.is_(None) & tier_name.is_not(None), "unknown tier"),
        (roster_id.is_(None), "unknown tutor"),
    )
    row = (
        sa.select(
            metrics.c.metric_id,
            tutor_id.label("tutor_id"),
            instant.label("instant"),
            # Near the ends of PostgreSQL's range, arithmetic on instants fails.
            _midnight(sa.case((is_a_date(instant), instant)), timezone).label("calculation_date"),
            window_name.label("window_name"),
            window.label("window"),
            tier_name.label("tier_name"),
            tier.label("performance_tier"),
            metrics.c.created_at,
            metrics.c.updated_at,
            problem.label("problem"),
        )
        .select_from(metrics.outerjoin(tutors, roster_id == tutor_id))
        .subquery("normalised")
    )
    window_renamed = row.c.window.is_distinct_from(row.c.window_name)
    tier_renamed = row.c.performance_tier.is_distinct_from(row.c.tier_name)
    date_moved = row.c.calculation_date.is_distinct_from(row.c.instant)
    place = sa.func.row_number().over(
        # A row that cannot stay must not push out an older one that can.
        partition_by=[row.c.tutor_id, row.c.calculation_date, row.c.window, row.c.problem],
        order_by=[
            # What this project wrote is what its Parquet and its record say as well.
            window_renamed | tier_renamed | date_moved,
            row.c.updated_at.desc(),
            row.c.created_at.desc(),
            row.c.metric_id.desc(),
        ],
    )
    return sa.select(
        row.c.metric_id,
        row.c.instant,
        row.c.calculation_date,
        row.c.window,
        row.c.performance_tier,
        sa.func.coalesce(row.c.problem, sa.case((place > 1, "duplicate"))).label("reason"),
        window_renamed.label("window_renamed"),
        tier_renamed.label("tier_renamed"),
        date_moved.label("date_moved"),
        (date_moved & (_day(row.c.calculation_date, timezone) != _day(row.c.instant, "UTC"))).label(
            "day_moved"
        ),
    ).subquery("verdicts")


def _folded(name: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    # In the C collation, since a Turkish one makes another letter of I.
    return sa.func.lower(sa.collate(name, "C"))


def _length(name: str) -> int:
    kind = tutor_performance_metrics.c[name].type
    assert isinstance(kind, sa.String)  # noqa: S101
    assert kind.length is not None  # noqa: S101
    return kind.length


def _instant(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    if isinstance(column.type, sa.DateTime) and column.type.timezone:
        return column
    return sa.func.timezone("UTC", column, type_=sa.DateTime(timezone=True))


def _midnight(instant: sa.ColumnElement[Any], timezone: str) -> sa.ColumnElement[Any]:
    instant_type = sa.DateTime(timezone=True)
    local = sa.func.date_trunc("day", sa.func.timezone(timezone, instant, type_=sa.DateTime()))
    midnight = sa.func.timezone(timezone, local, type_=instant_type)
    # Where clocks go back across midnight it comes twice and PostgreSQL takes the later one;
    # the day begins at the earlier.
    earlier = midnight - sa.literal(timedelta(hours=1), sa.Interval)
    return sa.case(
        (sa.func.timezone(timezone, earlier, type_=sa.DateTime()) == local, earlier),
        else_=midnight,
    )


def _day(instant: sa.ColumnElement[Any], timezone: str) -> sa.ColumnElement[Any]:
    return sa.cast(sa.func.timezone(timezone, instant, type_=sa.DateTime()), sa.Date)


def _move_statement(metrics: sa.TableClause, *, timezone: str) -> sa.Insert:
    verdict = verdicts(metrics, timezone=timezone)
    moved = (
        sa.delete(metrics)
        .where(metrics.c.metric_id == verdict.c.metric_id, verdict.c.reason.is_not(None))
        .returning(
            sa.cast(metrics.c.metric_id, sa.Text).label("metric_id"),
            sa.cast(metrics.c.tutor_id, sa.Text).label("tutor_id"),
            # What no client can read is in the original only.
            sa.case((is_a_date(verdict.c.instant), verdict.c.instant)).label("calculation_date"),
            sa.cast(metrics.c.window, sa.Text).label("window"),
            verdict.c.reason.label("reason"),
            sa.func.to_jsonb(metrics.table_valued()).label("original"),
        )
        .cte("moved")
    )
    # One statement, so that no row is deleted that is not inserted.
    return sa.insert(set_aside).from_select([c.name for c in moved.c], sa.select(moved))


def _convert(connection: sa.Connection, *, timezone: str) -> None:
    # A trigger that stamps `updated_at` would take every row for one that was computed anew.
    triggers = connection.scalars(_TRIGGERS, {"metrics": METRICS_TABLE}).all()
    alter = f"ALTER TABLE {_quote(METRICS_TABLE)}"
    for trigger in triggers:
        connection.execute(_ddl(f"{alter} DISABLE TRIGGER {_quote(trigger)}"))
    connection.execute(_convert_statement(timezone=timezone))
    for trigger in triggers:
        connection.execute(_ddl(f"{alter} ENABLE TRIGGER {_quote(trigger)}"))


def _ddl(statement: str) -> sa.Executable:
    return sa.DDL(statement)  # type: ignore[no-untyped-call]


def _convert_statement(*, timezone: str) -> sa.Update:
    metrics = tutor_performance_metrics
    verdict = verdicts(metrics, timezone=timezone)
    return (
        sa.update(metrics)
        .where(
            metrics.c.metric_id == verdict.c.metric_id,
            verdict.c.window_renamed | verdict.c.tier_renamed | verdict.c.date_moved,
        )
        .values(
            window=verdict.c.window,
            performance_tier=verdict.c.performance_tier,
            calculation_date=verdict.c.calculation_date,
        )
    )


def _exists(connection: sa.Connection) -> bool:
    kind = connection.scalar(_RELATION_KIND, {"name": METRICS_TABLE})
    if kind not in (None, "r"):
        raise SchemaError(
            f"{METRICS_TABLE} is not an ordinary table (it is of PostgreSQL's kind {kind!r}); "
            "rename it, so that the table can be created"
        )
    return kind is not None


def _obstacles(connection: sa.Connection, plan: _Plan | None) -> tuple[str, ...]:
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


def _created(connection: sa.Connection, *names: str) -> Iterator[str]:
    inspector = sa.inspect(connection)
    for name in names:
        if not inspector.has_table(name):
            yield f"table {name} is created"


def _report(connection: sa.Connection, plan: _Plan, *, timezone: str) -> UpgradeReport:
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
        changes=(*_created(connection, SET_ASIDE_TABLE), *plan.sentences),
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


def _plan(connection: sa.Connection) -> _Plan:
    found = {column["name"]: column for column in sa.inspect(connection).get_columns(METRICS_TABLE)}
    missing = [name for name in _REQUIRED if name not in found]
    if missing:
        raise SchemaError(
            f"{METRICS_TABLE} lacks {', '.join(missing)} and has {', '.join(found)}; "
            "rename it, so that the table can be created"
        )
    if not isinstance(found["calculation_date"]["type"], sa.DateTime):
        raise SchemaError(
            f"{METRICS_TABLE}.calculation_date is of type {found['calculation_date']['type']}; "
            "expected timestamp with time zone, or without one and in UTC"
        )
    plan = _Plan(
        sa.table(METRICS_TABLE, *(sa.column(name, c["type"]) for name, c in found.items()))
    )
    constraints = list(
        connection.execute(_CONSTRAINTS, {"metrics": METRICS_TABLE, "tutors": tutors.name})
    )
    _plan_columns(connection, plan, found)
    _plan_checks(connection, plan, [c for c in constraints if c.kind == "c"])
    _plan_keys(plan, constraints)
    _plan_indexes(connection, plan)
    return plan


def _plan_columns(connection: sa.Connection, plan: _Plan, found: Mapping[str, Any]) -> None:
    retyped = []
    for column in tutor_performance_metrics.columns:
        name, quoted = column.name, _quote(column.name)
        if name not in found:
            definition = sa.schema.CreateColumn(column).compile(dialect=_dialect)
            plan.alter(f"column {name} is added", f"ADD COLUMN {definition}")
            continue
        old, new = _type(found[name]["type"]), _type(column.type)
        default = found[name]["default"]
        if name in ("window", "performance_tier") and default is not None:
            plan.alter(
                f"column {name}: default {default} is dropped", f"ALTER {quoted} DROP DEFAULT"
            )
        if old != new:
            retyped.append(name)
            # By way of text, since an enum has no other way and float4 gains no false digits.
            # The cast is the assignment's: an explicit one would cut off a value that is too long.
            using = (
                f"timezone('UTC', {quoted})"
                if isinstance(column.type, sa.DateTime)
                else f"CAST({quoted} AS text)"
                if isinstance(column.type, sa.String)
                else f"CAST(CAST({quoted} AS text) AS {new})"
            )
            plan.alter(
                f"column {name}: type {old} becomes {new}",
                f"ALTER {quoted} TYPE {new} USING {using}",
            )
        if column.server_default is not None and default not in ("now()", "CURRENT_TIMESTAMP"):
            plan.alter(f"column {name}: default now() is set", f"ALTER {quoted} SET DEFAULT now()")
        if column.nullable != found[name]["nullable"]:
            plan.alter(
                f"column {name}: NOT NULL is {'dropped' if column.nullable else 'set'}",
                f"ALTER {quoted} {'DROP' if column.nullable else 'SET'} NOT NULL",
            )
    for name, column in found.items():
        if name not in tutor_performance_metrics.c and _must_be_given(column):
            plan.alter(
                f"column {name}: NOT NULL is dropped, since this project does not fill it",
                f"ALTER {_quote(name)} DROP NOT NULL",
            )
    views = connection.scalars(
        _DEPENDENT_VIEWS, {"metrics": METRICS_TABLE, "columns": retyped}
    ).all()
    if views:
        raise SchemaError(
            f"the type of {', '.join(retyped)} in {METRICS_TABLE} has to change, which "
            f"PostgreSQL does not do under a view; drop {', '.join(views)}, upgrade, "
            "and create what was dropped again"
        )


def _must_be_given(column: Mapping[str, Any]) -> bool:
    filled = column["default"] is not None or "identity" in column or "computed" in column
    return not column["nullable"] and not filled


def _type(kind: sa.types.TypeEngine[Any]) -> str:
    # PostgreSQL's name for what the generic type becomes.
    return (sa.Double() if type(kind) is sa.Float else kind).compile(dialect=_dialect)


def _plan_checks(connection: sa.Connection, plan: _Plan, checks: list[sa.Row[Any]]) -> None:
    for check in checks:
        literals = set(connection.scalars(_LITERALS, {"definition": check.definition}))
        for name, names in (("window", WINDOW_NAMES), ("performance_tier", TIER_NAMES)):
            wanted = set(names.values())
            old = {text for text in literals if text.lower() in names and text not in wanted}
            if name in check.columns and old and not wanted <= literals:
                plan.alter(
                    f"check {check.name} is dropped: it admits only old names of {name}",
                    f"DROP CONSTRAINT {_quote(check.name)}",
                )
                break


def _plan_keys(plan: _Plan, constraints: list[sa.Row[Any]]) -> None:
    primary = next((list(c.columns) for c in constraints if c.kind == "p"), [])
    if primary != ["metric_id"]:
        raise SchemaError(
            f"the primary key of {METRICS_TABLE} is ({', '.join(primary)}); expected (metric_id)"
        )
    unique = [
        c.name
        for c in constraints
        if c.kind == "u" and not c.deferrable and list(c.columns) == _UNIQUE.columns.keys()
    ]
    references = [
        c
        for c in constraints
        if c.kind == "f" and c.to_tutors and list(c.columns) == _FOREIGN_KEY.columns.keys()
    ]
    for reference in references:
        if not reference.cascades:
            plan.alter(
                f"foreign key {reference.name} is dropped: it does not cascade",
                f"DROP CONSTRAINT {_quote(reference.name)}",
            )
    cascading = [c.name for c in references if c.cascades]
    plan.refers, plan.indexes = not cascading, not unique
    for constraint, equivalents in ((_UNIQUE, unique), (_FOREIGN_KEY, cascading)):
        if not equivalents:
            # Isolated, the constraint would vanish from every later CREATE TABLE.
            plan.add(
                f"constraint {constraint.name} is added",
                sa.schema.AddConstraint(constraint, isolate_from_table=False),
            )
    # A run knows the foreign key by its name; an index, also one of a constraint, keeps its own.
    if cascading and _FOREIGN_KEY.name not in cascading:
        plan.add(
            f"constraint {cascading[0]} is renamed to {_FOREIGN_KEY.name}",
            _ddl(
                f"ALTER TABLE {_quote(METRICS_TABLE)} RENAME CONSTRAINT "
                f"{_quote(cascading[0])} TO {_quote(str(_FOREIGN_KEY.name))}"
            ),
        )


def _plan_indexes(connection: sa.Connection, plan: _Plan) -> None:
    found = {
        str(index["name"]): index
        for index in sa.inspect(connection).get_indexes(METRICS_TABLE)
        if "duplicates_constraint" not in index
    }
    for index in sorted(tutor_performance_metrics.indexes, key=lambda index: str(index.name)):
        name, columns = str(index.name), index.columns.keys()
        # One under another name is not ours to rename.
        if any(_serves(facts, columns) for facts in found.values()):
            continue
        if name in found:
            old = found[name]["column_names"]
            if not _serves(found[name], columns[: len(old)]):
                raise SchemaError(
                    f"index {name} is taken by another index than one on ({', '.join(columns)}); "
                    "rename it, so that the index can be created"
                )
            on = ", ".join(map(str, old))
            plan.add(
                f"index {name} on ({on}) is dropped: the new one serves it too",
                sa.schema.DropIndex(index),
            )
        plan.indexes = True
        plan.add(f"index {name} is added", sa.schema.CreateIndex(index))


def _serves(index: Mapping[str, Any], columns: list[str]) -> bool:
    options = index.get("dialect_options", {})
    return (
        index["column_names"] == columns
        and not index["unique"]
        and "column_sorting" not in index
        and not options.get("postgresql_where")
        and options.get("postgresql_using", "btree") == "btree"
    )
