"""What the metrics must be, in plain Python and exact fractions, straight from the source tables.

It shares no code with the product and follows the README, "The numbers", and the source contract.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from math import isfinite
from typing import Any

import sqlalchemy as sa

WINDOWS = (7, 30, 90)
SHARES = (
    "avg_rating",
    "first_session_success_rate",
    "reschedule_rate",
    "engagement_score",
    "learning_objectives_met_pct",
    "response_time_avg_minutes",
)
COUNTS = ("sessions_completed", "no_show_count")

_SESSIONS = """
    SELECT s.session_id, s.tutor_id, s.session_number, s.scheduled_start,
        s.actual_start IS NOT NULL AS started, s.tutor_initiated_reschedule, s.no_show,
        s.late_start_minutes, s.engagement_score, s.learning_objectives_met,
        f.feedback_id, f.tutor_id AS feedback_tutor_id, f.overall_rating
    FROM sessions AS s LEFT JOIN student_feedback AS f USING (session_id)
    WHERE s.scheduled_start >= :start AND s.scheduled_start < :end
"""
_EVENTS = """
    SELECT event_id, tutor_id, event_type, event_timestamp, metadata::text AS metadata
    FROM tutor_events
    WHERE event_timestamp >= :start AND event_timestamp < :end
        AND event_type IN ('login', 'message_response')
"""

Aside = tuple[str, str, str, str]
"""Table, key of the row, column and reason."""


@dataclass(frozen=True)
class Answer:
    """What a run must come to.

    Attributes:
        aside: The values that are set aside.
        metrics: By tutor and window, the exact numbers; null where there is nothing to compute.
    """

    aside: set[Aside]
    metrics: dict[tuple[str, str], dict[str, Fraction | int | None]]


def answer(engine: sa.Engine, day: date) -> Answer:
    """Compute a reference date from the tables as they are."""
    end = datetime.combine(day, time.min, UTC)
    bounds = {"start": end - timedelta(days=max(WINDOWS)), "end": end}
    with engine.connect() as connection:
        sessions = [dict(row) for row in connection.execute(sa.text(_SESSIONS), bounds).mappings()]
        events = [dict(row) for row in connection.execute(sa.text(_EVENTS), bounds).mappings()]
        active = connection.execute(sa.text("SELECT tutor_id, status FROM tutors")).all()
    aside = {item for row in sessions for item in _clean_session(row)}
    aside |= {item for row in events for item in _clean_event(row)}
    by_tutor: dict[str, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for row in sessions:
        by_tutor[row["tutor_id"]][0].append(row)
    for row in events:
        by_tutor[row["tutor_id"]][1].append(row)
    metrics = {}
    for tutor_id, status in active:
        if status.lower() != "active":
            continue
        for days in WINDOWS:
            start = end - timedelta(days=days)
            metrics[tutor_id, f"{days}day"] = _metrics(
                [row for row in by_tutor[tutor_id][0] if row["scheduled_start"] >= start],
                [row for row in by_tutor[tutor_id][1] if row["event_timestamp"] >= start],
            )
    return Answer(aside, metrics)


def tier(row: Mapping[str, Any]) -> str:
    """The tier that rounded metrics make."""
    green = red = 0
    for name, good, bad in (
        ("avg_rating", 4.5, 3.5),
        ("first_session_success_rate", 85, 70),
        ("engagement_score", 80, 60),
        ("learning_objectives_met_pct", 90, 80),
    ):
        if row[name] is not None:
            green += row[name] >= good
            red += row[name] < bad
    for name, good, bad in (("reschedule_rate", 10, 15), ("no_show_count", 0, 3)):
        if row[name] is not None:
            green += row[name] <= good
            red += row[name] > bad
    if green >= 5 and red == 0:
        return "Exemplary"
    if red:
        return "At Risk" if red >= 3 else "Needs Attention"
    return "Strong" if green >= 3 else "Developing"


def _clean_session(row: dict[str, Any]) -> Iterable[Aside]:
    """Make broken values null, and tell of them."""
    key = row["session_id"]
    score, late, number = (
        row[name] for name in ("engagement_score", "late_start_minutes", "session_number")
    )
    if score is not None and not 0 <= score <= 1:
        row["engagement_score"] = None
        yield "sessions", key, "engagement_score", "not within 0 and 1"
    if late is None or late < 0:
        row["late_start_minutes"] = None
        reason = "missing" if late is None else "negative"
        yield "sessions", key, "late_start_minutes", reason
    if number is None or number < 1:
        row["session_number"] = None
        yield "sessions", key, "session_number", "missing" if number is None else "below 1"
    for name in ("no_show", "tutor_initiated_reschedule"):
        if row[name] is None:
            yield "sessions", key, name, "missing"
    if row["feedback_id"] is None:
        return
    if row["feedback_tutor_id"] != row["tutor_id"]:
        row["overall_rating"] = None
        yield "student_feedback", row["feedback_id"], "tutor_id", "not the session's tutor"
    elif row["overall_rating"] not in (1, 2, 3, 4, 5):
        row["overall_rating"] = None
        yield "student_feedback", row["feedback_id"], "overall_rating", "not within 1 and 5"


def _clean_event(row: dict[str, Any]) -> Iterable[Aside]:
    metadata: Any = None
    if row["metadata"] is not None:
        metadata = json.loads(row["metadata"], parse_float=Decimal, parse_int=Decimal)
    row["minutes"] = None
    is_response = row["event_type"] == "message_response" and isinstance(metadata, dict)
    minutes = metadata.get("response_time_minutes") if is_response else None
    if minutes is None:
        return
    column = "metadata.response_time_minutes"
    if not isinstance(minutes, Decimal) or not isfinite(float(minutes)):
        yield "tutor_events", row["event_id"], column, "not a finite number"
    elif minutes < 0:
        yield "tutor_events", row["event_id"], column, "negative"
    else:
        row["minutes"] = minutes


def _metrics(sessions: list[Any], events: list[Any]) -> dict[str, Fraction | int | None]:
    logins = sum(event["event_type"] == "login" for event in events)
    scores = [Fraction(repr(s["engagement_score"])) for s in _known(sessions, "engagement_score")]
    lateness = [s["late_start_minutes"] <= 10 for s in _known(sessions, "late_start_minutes")]
    rated = _known(sessions, "overall_rating")
    firsts = [s["overall_rating"] >= 4 for s in rated if s["session_number"] == 1]
    minutes = [Fraction(event["minutes"]) for event in _known(events, "minutes")]
    engagement = None
    punctual = _percent(lateness)
    if sessions and punctual is not None:
        mean = _mean(scores)
        engagement = (
            Fraction(2, 5) * min(Fraction(100), Fraction(100 * logins, len(sessions)))
            + Fraction(2, 5) * (Fraction(50) if mean is None else 100 * mean)
            + Fraction(1, 5) * punctual
        )
    return {
        "sessions_completed": sum(s["started"] and s["no_show"] is False for s in sessions),
        "avg_rating": _mean([Fraction(s["overall_rating"]) for s in rated]),
        "first_session_success_rate": _percent(firsts),
        "reschedule_rate": _percent(_values(sessions, "tutor_initiated_reschedule")),
        "no_show_count": sum(s["no_show"] is True for s in sessions),
        "engagement_score": engagement,
        "learning_objectives_met_pct": _percent(_values(sessions, "learning_objectives_met")),
        "response_time_avg_minutes": _mean(minutes),
    }


def _known(rows: list[Any], name: str) -> list[Any]:
    return [row for row in rows if row[name] is not None]


def _values(rows: list[Any], name: str) -> list[bool]:
    return [row[name] for row in _known(rows, name)]


def _mean(values: list[Fraction]) -> Fraction | None:
    return sum(values, Fraction(0)) / len(values) if values else None


def _percent(values: list[bool]) -> Fraction | None:
    return Fraction(100 * sum(values), len(values)) if values else None
