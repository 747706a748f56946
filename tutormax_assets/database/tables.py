"""The source tables, which the platform owns, and the tables that this project owns."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import dataframely as dy
import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from tutormax_assets.metrics.schemas import TierChanges, TierReasons, WindowMetrics

METRICS_TABLE = "tutor_performance_metrics"

METRICS_KEY = ("tutor_id", "calculation_date", "window")
"""What a row of the metrics table is unique by."""


source_metadata = sa.MetaData()
"""The tutoring platform's tables. Only demos and tests create them."""

metrics_metadata = sa.MetaData()
"""The tables that this project owns; Alembic migrates them."""


def _id(name: str, *, primary_key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(50), primary_key=primary_key)


def _references(name: str, target: str | sa.Column[str], **options: bool) -> sa.Column[str]:
    return sa.Column(
        name,
        sa.String(50),
        sa.ForeignKey(target, ondelete="CASCADE"),
        nullable=False,
        **options,  # type: ignore[arg-type]
    )


def _instant(name: str, *, default_now: bool = False, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(
        name,
        sa.DateTime(timezone=True),
        nullable=nullable,
        server_default=sa.func.now() if default_now else None,
    )


def _metric_columns() -> Iterator[sa.Column[Any]]:
    for name, column in WindowMetrics.columns().items():
        if not column.primary_key:
            kind = sa.Integer if column.dtype.is_integer() else sa.Float
            yield sa.Column(name, kind, nullable=column.nullable)


tutors = sa.Table(
    "tutors",
    source_metadata,
    _id("tutor_id", primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("email", sa.String(255), unique=True, nullable=False),
    _instant("onboarding_date"),
    sa.Column("status", sa.String(50), nullable=False),
    sa.Column("subjects", ARRAY(sa.String), nullable=False),
    sa.Column("education_level", sa.String(100)),
    sa.Column("location", sa.String(200)),
    sa.Column("baseline_sessions_per_week", sa.Float),
    sa.Column("behavioral_archetype", sa.String(50)),
    _instant("created_at", default_now=True),
    _instant("updated_at", default_now=True),
    sa.Index("ix_tutors_status", "status"),
)

students = sa.Table(
    "students",
    source_metadata,
    _id("student_id", primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("age", sa.Integer),
    sa.Column("grade_level", sa.String(50)),
    sa.Column("subjects_interested", ARRAY(sa.String)),
    _instant("created_at", default_now=True),
    _instant("updated_at", default_now=True),
)

sessions = sa.Table(
    "sessions",
    source_metadata,
    _id("session_id", primary_key=True),
    _references("tutor_id", "tutors.tutor_id"),
    _references("student_id", "students.student_id"),
    sa.Column("session_number", sa.Integer, nullable=False),
    _instant("scheduled_start"),
    _instant("actual_start", nullable=True),
    sa.Column("duration_minutes", sa.Integer, nullable=False),
    sa.Column("subject", sa.String(100), nullable=False),
    sa.Column("session_type", sa.String(50), nullable=False),
    sa.Column("tutor_initiated_reschedule", sa.Boolean, nullable=False),
    sa.Column("no_show", sa.Boolean, nullable=False),
    sa.Column("late_start_minutes", sa.Integer, nullable=False),
    sa.Column("engagement_score", sa.Float),
    sa.Column("learning_objectives_met", sa.Boolean),
    sa.Column("technical_issues", sa.Boolean, nullable=False),
    _instant("created_at", default_now=True),
    _instant("updated_at", default_now=True),
    sa.Index("ix_sessions_tutor_id", "tutor_id"),
    sa.Index("ix_sessions_student_id", "student_id"),
    sa.Index("ix_sessions_scheduled_start", "scheduled_start"),
    sa.Index("ix_sessions_subject", "subject"),
)

student_feedback = sa.Table(
    "student_feedback",
    source_metadata,
    _id("feedback_id", primary_key=True),
    _references("session_id", "sessions.session_id", unique=True),
    _references("student_id", "students.student_id"),
    _references("tutor_id", "tutors.tutor_id"),
    sa.Column("overall_rating", sa.Integer, nullable=False),
    sa.Column("is_first_session", sa.Boolean, nullable=False),
    sa.Column("subject_knowledge_rating", sa.Integer),
    sa.Column("communication_rating", sa.Integer),
    sa.Column("patience_rating", sa.Integer),
    sa.Column("engagement_rating", sa.Integer),
    sa.Column("helpfulness_rating", sa.Integer),
    sa.Column("would_recommend", sa.Boolean),
    sa.Column("improvement_areas", ARRAY(sa.String)),
    sa.Column("free_text_feedback", sa.Text),
    _instant("submitted_at"),
    _instant("created_at", default_now=True),
    sa.Index("ix_student_feedback_student_id", "student_id"),
    sa.Index("ix_student_feedback_tutor_id", "tutor_id"),
)

tutor_events = sa.Table(
    "tutor_events",
    source_metadata,
    _id("event_id", primary_key=True),
    _references("tutor_id", "tutors.tutor_id"),
    sa.Column("event_type", sa.String(100), nullable=False),
    _instant("event_timestamp"),
    sa.Column("metadata", JSONB),
    _instant("created_at", default_now=True),
    sa.Index("ix_tutor_events_tutor_id", "tutor_id"),
    sa.Index("ix_tutor_events_event_type", "event_type"),
    sa.Index("ix_tutor_events_event_timestamp", "event_timestamp"),
)

tutor_performance_metrics = sa.Table(
    METRICS_TABLE,
    metrics_metadata,
    _id("metric_id", primary_key=True),
    sa.Column("tutor_id", sa.String(50), nullable=False),
    _instant("calculation_date"),
    sa.Column("window", sa.String(20), nullable=False),
    *_metric_columns(),
    sa.Column("performance_tier", sa.String(50)),
    _instant("created_at", default_now=True),
    _instant("updated_at", default_now=True),
    sa.ForeignKeyConstraint(
        ["tutor_id"],
        [tutors.c.tutor_id],
        name="fk_tutor_performance_metrics_tutor_id",
        ondelete="CASCADE",
    ),
    # One index serves look-ups by tutor and, being unique, the upsert.
    sa.UniqueConstraint(
        *METRICS_KEY,
        name="uq_tutor_performance_metrics_tutor_date_window",
    ),
    sa.Index("ix_tutor_performance_metrics_calculation_date", "calculation_date"),
    sa.Index("ix_tutor_performance_metrics_window", "window", "calculation_date"),
)

tutor_live_metrics = sa.Table(
    "tutor_live_metrics",
    metrics_metadata,
    _references("tutor_id", tutors.c.tutor_id),
    sa.Column("window", sa.String(20), nullable=False),
    *_metric_columns(),
    sa.Column("performance_tier", sa.String(50), nullable=False),
    _instant("calculated_at"),
    sa.PrimaryKeyConstraint("tutor_id", "window", name="pk_tutor_live_metrics"),
    # Each refresh updates every row, of which no index changes: the new version stays in its page.
    postgresql_with={"fillfactor": 40},
)
"""The newest metrics of each tutor and window; the window ends at ``calculated_at``."""

_TYPES: Mapping[type[pl.DataType], type[sa.types.TypeEngine[Any]]] = {
    pl.UInt8: sa.SmallInteger,
    pl.UInt16: sa.SmallInteger,
    pl.Int32: sa.Integer,
    pl.UInt32: sa.Integer,
    pl.Int64: sa.BigInteger,
    pl.Float64: sa.Float,
}


def _table_of(name: str, schema: type[dy.Schema], *key: str) -> sa.Table:
    """The table of an asset: its columns, and the instant that the reference date stands for."""
    columns = [
        sa.Column(
            column_name,
            _TYPES.get(type(column.dtype), sa.String(50)),
            nullable=column.nullable,
            autoincrement=False,
        )
        for column_name, column in schema.columns().items()
        if column_name not in METRICS_KEY
    ]
    return sa.Table(
        name,
        metrics_metadata,
        sa.Column("tutor_id", sa.String(50)),
        _instant("calculation_date"),
        sa.Column("window", sa.String(20)),
        *columns,
        # A trigger deletes the rows of a deleted tutor: a foreign key took more than half of the
        # time of writing. The trigger looks them up by tutor, which is why that comes first.
        sa.PrimaryKeyConstraint(*METRICS_KEY, *key, name=f"pk_{name}"),
        sa.Index(f"ix_{name}_calculation_date", "calculation_date"),
    )


tutor_tier_reasons = _table_of("tutor_tier_reasons", TierReasons)

tutor_tier_changes = _table_of("tutor_tier_changes", TierChanges, "days", "position")

tutor_tier_since = sa.table(
    "tutor_tier_since",
    sa.column("tutor_id", sa.String()),
    sa.column("calculation_date", sa.DateTime(timezone=True)),
    sa.column("window", sa.String()),
    sa.column("performance_tier", sa.String()),
    sa.column("tier_since", sa.DateTime(timezone=True)),
    sa.column("held_days", sa.Integer()),
    sa.column("dates_missing", sa.Integer()),
    sa.column("previous_tier", sa.String()),
)
"""A view: since when each row of the metrics table has had its tier, and which one came before."""

# Since a view is computed when it is read, it is right in whatever order dates are computed.
_TIER_SINCE = """
CREATE OR REPLACE VIEW tutor_tier_since AS
SELECT
    held.tutor_id,
    held.calculation_date,
    held."window",
    held.performance_tier,
    unbroken.tier_since,
    unbroken.held_days,
    greatest(unbroken.held_days - unbroken.dates, 0)::integer AS dates_missing,
    previous.performance_tier AS previous_tier
FROM tutor_performance_metrics AS held
LEFT JOIN LATERAL (
    SELECT other.calculation_date, other.performance_tier
    FROM tutor_performance_metrics AS other
    WHERE other.tutor_id = held.tutor_id
        AND other."window" = held."window"
        AND other.calculation_date < held.calculation_date
        AND other.performance_tier <> held.performance_tier
        AND isfinite(other.calculation_date)
    ORDER BY other.calculation_date DESC
    LIMIT 1
) AS previous ON true
CROSS JOIN LATERAL (
    SELECT
        min(same.calculation_date) AS tier_since,
        -- A day is an hour longer or shorter when the clocks change.
        round(
            extract(epoch FROM held.calculation_date - min(same.calculation_date)) / 86400
        )::integer + 1 AS held_days,
        count(*) AS dates
    FROM tutor_performance_metrics AS same
    WHERE same.tutor_id = held.tutor_id
        AND same."window" = held."window"
        AND same.performance_tier = held.performance_tier
        AND isfinite(same.calculation_date)
        AND same.calculation_date <= held.calculation_date
        AND same.calculation_date > coalesce(previous.calculation_date, '-infinity')
) AS unbroken
WHERE held.performance_tier IS NOT NULL AND isfinite(held.calculation_date)
"""

sa.event.listen(
    metrics_metadata,
    "after_create",
    sa.DDL(_TIER_SINCE),  # type: ignore[no-untyped-call]
)

TRIGGER_OF_DELETED_TUTORS = "delete_rows_of_deleted_tutors"

# It runs with its owner's rights, whoever deletes the tutor. When retention deletes metrics, the
# tutors still exist, and nothing else is deleted. Where row security would hide tutors from the
# owner, PostgreSQL is to refuse and not to take them for deleted.
_DELETED_TUTORS = """
DO $do$
DECLARE
    name text := 'delete_rows_of_deleted_tutors';
    place text := (
        SELECT format('%I', nspname)
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE pg_class.oid = 'tutor_performance_metrics'::regclass
    );
    full_names text[] := ARRAY(
        SELECT format('%I.%I', nspname, relname)
        FROM unnest(ARRAY['tutors', 'tutor_tier_reasons', 'tutor_tier_changes'])
            WITH ORDINALITY AS found (name, number)
        JOIN pg_class ON pg_class.oid = found.name::regclass
        JOIN pg_namespace ON pg_namespace.oid = relnamespace
        ORDER BY number
    );
BEGIN
    EXECUTE format($format$
        CREATE OR REPLACE FUNCTION %1$s.%2$I() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp SET row_security = off
        AS $function$
        DECLARE
            gone text[] := ARRAY(
                SELECT DISTINCT deleted.tutor_id
                FROM deleted
                WHERE NOT EXISTS (
                    SELECT tutor.tutor_id FROM %3$s AS tutor
                    WHERE tutor.tutor_id = deleted.tutor_id
                )
            );
        BEGIN
            IF gone <> '{}' THEN
                DELETE FROM %4$s WHERE tutor_id = ANY (gone);
                DELETE FROM %5$s WHERE tutor_id = ANY (gone);
            END IF;
            RETURN NULL;
        END
        $function$
    $format$, place, name, full_names[1], full_names[2], full_names[3]);
    EXECUTE format('DROP TRIGGER IF EXISTS %1$I ON %2$s.tutor_performance_metrics', name, place);
    EXECUTE format($format$
        CREATE TRIGGER %1$I AFTER DELETE ON %2$s.tutor_performance_metrics
        REFERENCING OLD TABLE AS deleted
        FOR EACH STATEMENT EXECUTE FUNCTION %2$s.%1$I()
    $format$, name, place);
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %2$s.%1$I() FROM PUBLIC', name, place);
END
$do$
"""


@sa.event.listens_for(metrics_metadata, "after_create")
def _follow_deleted_tutors(
    _metadata: sa.MetaData, connection: sa.Connection, **_options: Any
) -> None:
    connection.execute(sa.text(_DELETED_TUTORS))


TABLES_OF_DATES = tuple(
    name for name, table in metrics_metadata.tables.items() if "calculation_date" in table.c
)
"""Those of the tables whose rows are of a reference date."""

OWN_TABLES = tuple(metrics_metadata.tables)
"""Names of the tables that this project writes."""

# Python has a day more at both ends, so that these exist in every timezone.
_FIRST_INSTANT = datetime(1, 1, 2, tzinfo=UTC)
_LAST_INSTANT = datetime(9999, 12, 30, tzinfo=UTC)


def is_a_date(instant: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Whether an instant lies in the years 1 to 9999 in every timezone; infinity does not."""
    return instant.between(_FIRST_INSTANT, _LAST_INSTANT)
