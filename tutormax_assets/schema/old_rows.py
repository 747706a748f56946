"""What becomes of the rows that a predecessor, or another service, left in the table."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from tutormax_assets.database.tables import (
    is_a_date,
    tutor_performance_metrics,
    tutors,
)

SET_ASIDE_TABLE = "tutor_performance_metrics_set_aside"

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


REQUIRED_COLUMNS = [
    column.name for column in tutor_performance_metrics.columns if not column.nullable
]


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
            rows(sa.case((in_range, local_midnight(date, timezone) != date), else_=True)),
        )
    ).one()
    return RowsFound(*found)


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
    row = _normalised_rows(metrics, timezone=timezone)
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


def _normalised_rows(metrics: sa.FromClause, *, timezone: str) -> sa.Subquery:
    """Each row's names and date, as they are and as they become, and its first problem."""
    window_name = sa.cast(metrics.c.window, sa.Text)
    window = sa.case(
        *((_fold(window_name) == name, value) for name, value in WINDOW_NAMES.items()),
        # A policy may have windows of other lengths.
        (_fold(window_name).regexp_match(WINDOW_OF_A_POLICY), _fold(window_name)),
    )
    tier_name = sa.cast(metrics.c.get("performance_tier", sa.null()), sa.Text)
    tier = sa.case(TIER_NAMES, value=_fold(tier_name))
    tutor_id = sa.cast(metrics.c.tutor_id, sa.Text)
    # The platform's column may be of another type than the one that its contract says.
    roster_id = sa.cast(tutors.c.tutor_id, sa.Text)
    instant = _instant(metrics.c.calculation_date)
    problem = sa.case(
        *((metrics.c[name].is_(None), f"missing {name}") for name in REQUIRED_COLUMNS),
        *(
            (sa.func.length(sa.cast(metrics.c[name], sa.Text)) > _length(name), f"too long {name}")
            for name in ("metric_id", "tutor_id")
        ),
        (~is_a_date(instant), "calculation_date out of range"),
        (window.is_(None) | (sa.func.length(window_name) > _length("window")), "unknown window"),
        (tier.is_(None) & tier_name.is_not(None), "unknown tier"),
        (roster_id.is_(None), "unknown tutor"),
    )
    return (
        sa.select(
            metrics.c.metric_id,
            tutor_id.label("tutor_id"),
            instant.label("instant"),
            # Near the ends of PostgreSQL's range, arithmetic on instants fails.
            local_midnight(sa.case((is_a_date(instant), instant)), timezone).label(
                "calculation_date"
            ),
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


def _fold(name: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
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


def local_midnight(instant: sa.ColumnElement[Any], timezone: str) -> sa.ColumnElement[Any]:
    """The instant at which the local day of another instant begins."""
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


def move_statement(metrics: sa.TableClause, *, timezone: str) -> sa.Insert:
    """Moves the rows that cannot stay to the table of rows set aside."""
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


def convert_statement(*, timezone: str) -> sa.Update:
    """Gives the rows that stay the names and dates of this version."""
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
