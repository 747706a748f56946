"""What has to change in the table before this version can use it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from tutormax_assets.database.tables import (
    METRICS_TABLE,
    tutor_performance_metrics,
    tutors,
)
from tutormax_assets.errors import TutormaxError
from tutormax_assets.schema.old_rows import REQUIRED_COLUMNS, TIER_NAMES, WINDOW_NAMES

_UNIQUE = next(
    c for c in tutor_performance_metrics.constraints if isinstance(c, sa.UniqueConstraint)
)

_FOREIGN_KEY = next(
    c for c in tutor_performance_metrics.constraints if isinstance(c, sa.ForeignKeyConstraint)
)

RELATION_KIND = sa.text(
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

TRIGGERS = sa.text("""
    SELECT tgname
    FROM pg_trigger
    WHERE tgrelid = to_regclass(CAST(:metrics AS text)) AND tgenabled = 'O' AND NOT tgisinternal
""")

_dialect = postgresql.dialect()  # type: ignore[no-untyped-call]

# Doubles a percent sign in a name, which `sa.DDL` makes single again.
quote = _dialect.identifier_preparer.quote


class SchemaError(TutormaxError):
    """The database is not as needed; the message says what was found and what to do."""


@dataclass
class TablePlan:
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
        """Plan a clause of the one ALTER TABLE."""
        self.sentences.append(sentence)
        self.alterations.append(clause)

    def add(self, sentence: str, *statements: sa.Executable) -> None:
        """Plan statements that follow the ALTER TABLE."""
        self.sentences.append(sentence)
        self.additions.extend(statements)


def ddl(statement: str) -> sa.Executable:
    """A statement as it is, without parameters."""
    return sa.DDL(statement)  # type: ignore[no-untyped-call]


def plan_changes(connection: sa.Connection) -> TablePlan:
    """What has to change in the table that is there.

    Raises:
        SchemaError: It cannot be made into the expected one.
    """
    found = {column["name"]: column for column in sa.inspect(connection).get_columns(METRICS_TABLE)}
    missing = [name for name in REQUIRED_COLUMNS if name not in found]
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
    plan = TablePlan(
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


def _plan_columns(connection: sa.Connection, plan: TablePlan, found: Mapping[str, Any]) -> None:
    retyped = []
    for column in tutor_performance_metrics.columns:
        name, quoted = column.name, quote(column.name)
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
                f"ALTER {quote(name)} DROP NOT NULL",
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


def _plan_checks(connection: sa.Connection, plan: TablePlan, checks: list[sa.Row[Any]]) -> None:
    for check in checks:
        literals = set(connection.scalars(_LITERALS, {"definition": check.definition}))
        for name, names in (("window", WINDOW_NAMES), ("performance_tier", TIER_NAMES)):
            wanted = set(names.values())
            old = {text for text in literals if text.lower() in names and text not in wanted}
            if name in check.columns and old and not wanted <= literals:
                plan.alter(
                    f"check {check.name} is dropped: it admits only old names of {name}",
                    f"DROP CONSTRAINT {quote(check.name)}",
                )
                break


def _plan_keys(plan: TablePlan, constraints: list[sa.Row[Any]]) -> None:
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
                f"DROP CONSTRAINT {quote(reference.name)}",
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
            ddl(
                f"ALTER TABLE {quote(METRICS_TABLE)} RENAME CONSTRAINT "
                f"{quote(cascading[0])} TO {quote(str(_FOREIGN_KEY.name))}"
            ),
        )


def _plan_indexes(connection: sa.Connection, plan: TablePlan) -> None:
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
