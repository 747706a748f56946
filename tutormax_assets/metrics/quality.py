"""The source contract: which values are good, and which rows are set aside and why.

Only the broken value is dropped: it becomes null, and the metric that needed it is computed
without it. A session with a broken engagement score still counts as a session.
"""

from dataclasses import dataclass

import polars as pl

from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import (
    LOGIN,
    MESSAGE_RESPONSE,
    SessionsSnapshot,
    SetAside,
    SourceTutors,
    TutorEventsSnapshot,
)


@dataclass(frozen=True)
class Rule:
    """What the contract asks of one column, as the expression that is true where it is broken."""

    source_table: str
    key: str
    column: str
    reason: str
    broken: pl.Expr


def session_rules(policy: Policy) -> list[Rule]:
    """The contract of ``sessions`` and ``student_feedback``, on rows of ``SourceSessions``."""
    has_feedback = pl.col("feedback_id").is_not_null()
    another_tutors = pl.col("feedback_tutor_id").ne_missing(pl.col("tutor_id"))
    several = pl.col("session_id").is_duplicated()
    outside = ~pl.col("overall_rating").is_between(1, 5).fill_null(False)

    def session(column: str, reason: str, broken: pl.Expr) -> Rule:
        return Rule("sessions", "session_id", column, reason, broken)

    def feedback(column: str, reason: str, broken: pl.Expr) -> Rule:
        return Rule("student_feedback", "feedback_id", column, reason, has_feedback & broken)

    return [
        session("session_id", "duplicate", ~pl.col("session_id").is_first_distinct()),
        session(
            "engagement_score",
            f"not within 0 and {policy.session_score_scale}",
            ~pl.col("engagement_score").is_between(0, policy.session_score_scale),
        ),
        session("late_start_minutes", "negative", pl.col("late_start_minutes") < 0),
        session("late_start_minutes", "missing", pl.col("late_start_minutes").is_null()),
        session("session_number", "below 1", pl.col("session_number") < 1),
        session("session_number", "missing", pl.col("session_number").is_null()),
        session("no_show", "missing", pl.col("no_show").is_null()),
        session(
            "tutor_initiated_reschedule",
            "missing",
            pl.col("tutor_initiated_reschedule").is_null(),
        ),
        feedback("session_id", "several for one session", several),
        feedback("tutor_id", "not the session's tutor", ~several & another_tutors),
        feedback("overall_rating", "not within 1 and 5", ~several & ~another_tutors & outside),
    ]


def event_rules() -> list[Rule]:
    """The contract of ``tutor_events``, on rows of ``SourceEvents``."""
    minutes = _response_time()
    return [
        Rule("tutor_events", "event_id", "metadata.response_time_minutes", reason, broken)
        for reason, broken in (
            ("not a finite number", _carries_response_time() & minutes.is_null()),
            ("negative", _carries_response_time() & (minutes < 0)),
        )
    ]


def good_tutors(tutors: pl.LazyFrame, /, *, include_inactive: bool) -> pl.LazyFrame:
    """The roster: active tutors, or all of them, sorted by id. Status is compared without case.

    Args:
        tutors: ``SourceTutors``.
        include_inactive: Whether tutors of any status are in the roster.

    Returns:
        ``TutorRoster``.
    """
    roster = tutors.select(SourceTutors.column_names()).with_columns(
        pl.col("status").str.to_lowercase()
    )
    if not include_inactive:
        roster = roster.filter(pl.col("status") == "active")
    return roster.sort("tutor_id")


def good_sessions(
    rows: pl.LazyFrame, /, *, policy: Policy, timezone: str
) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Sessions with broken values made null, and what was set aside.

    Args:
        rows: ``SourceSessions``.
        policy: Says on which scale sessions are scored.
        timezone: IANA name; a session belongs to the date that it is scheduled on there.

    Returns:
        ``SessionsSnapshot`` sorted by tutor and date, and ``SetAside``.
    """
    rules = session_rules(policy)
    rating_is_broken = pl.any_horizontal(
        r.broken for r in rules if r.source_table == "student_feedback"
    )
    good = (
        rows.with_columns(
            _local_date("scheduled_start", timezone).alias("scheduled_date"),
            pl.when(~rating_is_broken).then("overall_rating").alias("overall_rating"),
            *_without_broken(rules, "sessions"),
        )
        .filter(pl.col("session_id").is_first_distinct())
        .select(SessionsSnapshot.column_names())
        .sort("tutor_id", "scheduled_date")
    )
    return good, _set_aside(rows, rules, date=_local_date("scheduled_start", timezone))


def good_events(rows: pl.LazyFrame, /, *, timezone: str) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Logins and message responses with broken response times made null, and what was set aside.

    Args:
        rows: ``SourceEvents``; events of other types are left out.
        timezone: IANA name; an event belongs to the date that it happened on there.

    Returns:
        ``TutorEventsSnapshot`` sorted by tutor and date, and ``SetAside``.
    """
    used = rows.filter(pl.col("event_type").is_in([LOGIN, MESSAGE_RESPONSE]))
    rules = event_rules()
    broken = pl.any_horizontal(r.broken for r in rules)
    good = (
        used.with_columns(
            _local_date("event_timestamp", timezone).alias("event_date"),
            pl.col("event_type").cast(pl.Enum([LOGIN, MESSAGE_RESPONSE])),
            pl.when(_carries_response_time() & ~broken)
            .then(_response_time())
            .alias("response_time_minutes"),
        )
        .select(TutorEventsSnapshot.column_names())
        .sort("tutor_id", "event_date")
    )
    return good, _set_aside(used, rules, date=_local_date("event_timestamp", timezone))


def _carries_response_time() -> pl.Expr:
    # A JSON null says as little as a missing key.
    return (pl.col("event_type") == MESSAGE_RESPONSE) & (
        pl.col("response_time_minutes").ne("null").fill_null(False)
    )


def _response_time() -> pl.Expr:
    # Of 1e300 minutes no two can be added up, so they are as good as infinite.
    minutes = pl.col("response_time_minutes").cast(pl.Float64, strict=False)
    return pl.when(minutes.abs() < 1e300).then(minutes)


def _local_date(column: str, timezone: str) -> pl.Expr:
    return pl.col(column).dt.convert_time_zone(timezone).dt.date()


def _without_broken(rules: list[Rule], source_table: str) -> list[pl.Expr]:
    broken_by_column: dict[str, list[pl.Expr]] = {}
    for rule in rules:
        if rule.source_table == source_table and rule.column != rule.key:
            broken_by_column.setdefault(rule.column, []).append(rule.broken.fill_null(False))
    return [
        pl.when(~pl.any_horizontal(broken)).then(column).alias(column)
        for column, broken in broken_by_column.items()
    ]


def _set_aside(rows: pl.LazyFrame, rules: list[Rule], *, date: pl.Expr) -> pl.LazyFrame:
    return pl.concat(
        rows.filter(rule.broken).select(
            pl.lit(rule.source_table).alias("source_table"),
            pl.col(rule.key).alias("row_key"),
            "tutor_id",
            date.alias("date"),
            pl.lit(rule.column).alias("column"),
            pl.lit(rule.reason).alias("reason"),
        )
        for rule in rules
    ).select(SetAside.column_names())
