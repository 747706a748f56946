"""The source contract: which values are good, and which rows are set aside and why.

Only the broken value is dropped: it becomes null, and the metric that needed it is computed
without it. A session with a broken engagement score still counts as a session.
"""

from collections.abc import Iterator
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

DUPLICATE = "duplicate"
"""Reason of a session that is there already."""

NOT_THE_SESSIONS_TUTOR = "not the session's tutor"
"""Reason of feedback that names another tutor than its session."""


@dataclass(frozen=True)
class Rule:
    """What the contract asks of one column, as the expression that is true where it is broken."""

    source_table: str
    key: str
    column: str
    reason: str
    broken: pl.Expr


def session_rules(policy: Policy) -> list[Rule]:
    """The contract of ``sessions`` and ``student_feedback``, on rows of ``with_repetitions``."""
    has_feedback = pl.col("feedback_id").is_not_null()
    first_of_session = ~pl.col("session_repeats")
    # Which rating would be the right one is not guessed at.
    comes_again = pl.col("session_comes_again")
    first_of_feedback = has_feedback & ~pl.col("feedback_repeats")
    another_tutors = pl.col("feedback_tutor_id").ne_missing(pl.col("tutor_id"))
    outside = ~pl.col("overall_rating").is_between(1, 5).fill_null(False)

    def session(column: str, reason: str, broken: pl.Expr) -> Rule:
        return Rule("sessions", "session_id", column, reason, first_of_session & broken)

    def feedback(column: str, reason: str, broken: pl.Expr) -> Rule:
        return Rule("student_feedback", "feedback_id", column, reason, first_of_feedback & broken)

    return [
        Rule(
            "sessions",
            "session_id",
            "session_id",
            DUPLICATE,
            ~first_of_session & ~first_of_feedback,
        ),
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
        feedback("session_id", "of a session that comes more than once", comes_again),
        feedback("tutor_id", NOT_THE_SESSIONS_TUTOR, ~comes_again & another_tutors),
        feedback("overall_rating", "not within 1 and 5", ~comes_again & ~another_tutors & outside),
    ]


def with_repetitions(rows: pl.LazyFrame, /) -> pl.LazyFrame:
    """``SourceSessions`` with whether a row repeats its session, or the feedback of its session.

    A session with several feedback rows comes once for each of them. Feedback of another session is
    no repetition, even under the same id: each of the ratings is looked at.
    """
    session, both = pl.col("session_id"), pl.struct("session_id", "feedback_id")
    marked = rows.with_columns(
        (~session.is_first_distinct()).alias("session_repeats"),
        (~both.is_first_distinct()).alias("feedback_repeats"),
        session.is_duplicated().alias("session_comes_again"),
    )
    # What is good and what is set aside would each look for them.
    return marked.cache()


def without_repetitions(rows: pl.LazyFrame, /) -> pl.LazyFrame:
    """``SourceSessions`` of which each session and each feedback is there once, likewise."""
    return rows.with_columns(
        pl.lit(False).alias(name)
        for name in ("session_repeats", "feedback_repeats", "session_comes_again")
    )


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

    Rows without an id are left out, and an id that is repeated is in the roster once.

    Args:
        tutors: ``SourceTutors``, without ``contradictory_tutors``.
        include_inactive: Whether tutors of any status are in the roster.

    Returns:
        ``TutorRoster``.
    """
    roster = (
        tutors.select(SourceTutors.column_names())
        .with_columns(pl.col("status").str.to_lowercase())
        .filter(_has_id())
        .unique("tutor_id")
    )
    if not include_inactive:
        roster = roster.filter(pl.col("status") == "active")
    return roster.sort("tutor_id")


def contradictory_tutors(tutors: pl.DataFrame, /) -> list[str]:
    """The ids, sorted, that are repeated with another status. Case makes no other status.

    Args:
        tutors: ``SourceTutors``.
    """
    statuses = tutors.filter(_has_id()).select("tutor_id", pl.col("status").str.to_lowercase())
    return sorted(statuses.unique().filter(pl.col("tutor_id").is_duplicated())["tutor_id"].unique())


def tutor_problems(tutors: pl.DataFrame, /) -> Iterator[str]:
    """A sentence for each way in which the rows of tutors break the contract.

    Args:
        tutors: ``SourceTutors``.
    """
    named = tutors.filter(_has_id())["tutor_id"]
    if without_id := len(tutors) - len(named):
        yield f"Table tutors: left out {without_id} rows without a tutor_id"
    repeated = named.filter(named.is_duplicated()).unique().sort()
    if len(repeated):
        yield (
            f"Table tutors: {len(repeated)} ids are repeated, such as {repeated[0]}; each tutor is"
            " computed once"
        )


def _has_id() -> pl.Expr:
    # Sessions and events without a tutor are read with an empty id, which is nobody's.
    return pl.col("tutor_id").ne_missing("") & pl.col("tutor_id").is_not_null()


def good_sessions(
    rows: pl.LazyFrame,
    /,
    *,
    policy: Policy,
    timezone: str,
    ids_are_unique: bool = False,
    with_ids: bool = False,
) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Sessions with broken values made null, and what was set aside.

    Args:
        rows: ``SourceSessions``, all rows of a session.
        policy: Says on which scale sessions are scored.
        timezone: IANA name; a session belongs to the date that it is scheduled on there.
        ids_are_unique: Whether no session and no feedback can be there twice. To look for them
            costs more than all other rules.
        with_ids: Whether the good rows have their ``session_id``, too.

    Returns:
        ``SessionsSnapshot`` and ``SetAside``.
    """
    rules = session_rules(policy)
    repetitions = without_repetitions if ids_are_unique else with_repetitions
    marked = _mark_broken(repetitions(rows), rules).with_columns(
        _local_date("scheduled_start", timezone).alias("scheduled_date")
    )
    snapshot = SessionsSnapshot.column_names()
    good = (
        marked.filter(~pl.col("session_repeats"))
        .with_columns(
            *(
                _unless_broken(rules, "sessions", column)
                for column in dict.fromkeys(
                    rule.column
                    for rule in rules
                    if rule.source_table == "sessions" and rule.column in snapshot
                )
            ),
            # Whatever is wrong with a feedback row, its rating is what is not used.
            _unless_broken(rules, "student_feedback", "overall_rating", by_any_column=True),
        )
        .select(*(["session_id"] if with_ids else []), *snapshot)
    )
    return good, _set_aside(marked, rules, date="scheduled_date")


def good_events(rows: pl.LazyFrame, /, *, timezone: str) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Logins and message responses with broken response times made null, and what was set aside.

    Args:
        rows: ``SourceEvents``; events of other types are left out.
        timezone: IANA name; an event belongs to the date that it happened on there.

    Returns:
        ``TutorEventsSnapshot`` and ``SetAside``.
    """
    rules = event_rules()
    used = rows.filter(pl.col("event_type").is_in([LOGIN, MESSAGE_RESPONSE]))
    marked = _mark_broken(used, rules).with_columns(
        _local_date("event_timestamp", timezone).alias("event_date")
    )
    broken = pl.any_horizontal(_mark(number) for number in range(len(rules)))
    good = marked.with_columns(
        pl.col("event_type").cast(pl.Enum([LOGIN, MESSAGE_RESPONSE])),
        pl.when(_carries_response_time() & ~broken)
        .then(_response_time())
        .alias("response_time_minutes"),
    ).select(TutorEventsSnapshot.column_names())
    return good, _set_aside(marked, rules, date="event_date")


def _carries_response_time() -> pl.Expr:
    # A JSON null says as little as a missing key.
    return (pl.col("event_type") == MESSAGE_RESPONSE) & (
        pl.col("response_time_minutes").ne("null").fill_null(False)
    )


def _response_time() -> pl.Expr:
    # Of more than that no sum can be taken, so it is as good as infinite.
    minutes = pl.col("response_time_minutes").cast(pl.Float64, strict=False)
    return pl.when(minutes.is_finite() & (minutes < 1e290)).then(minutes)


def _local_date(column: str, timezone: str) -> pl.Expr:
    return pl.col(column).dt.convert_time_zone(timezone).dt.date()


def _mark(number: int) -> pl.Expr:
    return pl.col(f"breaks_rule_{number}")


def _mark_broken(rows: pl.LazyFrame, rules: list[Rule]) -> pl.LazyFrame:
    # One pass over all rows; what follows looks at the marks.
    return rows.with_columns(
        rule.broken.fill_null(False).alias(_mark(number).meta.output_name())
        for number, rule in enumerate(rules)
    )


def _unless_broken(
    rules: list[Rule], source_table: str, column: str, *, by_any_column: bool = False
) -> pl.Expr:
    marks = [
        _mark(number)
        for number, rule in enumerate(rules)
        if rule.source_table == source_table and (by_any_column or rule.column == column)
    ]
    return pl.when(~pl.any_horizontal(marks)).then(column).alias(column)


def _set_aside(marked: pl.LazyFrame, rules: list[Rule], *, date: str) -> pl.LazyFrame:
    broken = marked.filter(pl.any_horizontal(_mark(number) for number in range(len(rules))))
    return pl.concat(
        broken.filter(_mark(number)).select(
            pl.lit(rule.source_table).alias("source_table"),
            pl.col(rule.key).alias("row_key"),
            "tutor_id",
            pl.col(date).alias("date"),
            pl.lit(rule.column).alias("column"),
            pl.lit(rule.reason).alias("reason"),
        )
        for number, rule in enumerate(rules)
    ).select(SetAside.column_names())
