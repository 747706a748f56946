"""Small frames for the tests of this package: name what matters, the rest keeps the contract."""

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

import dataframely as dy
import polars as pl

from tutormax_assets.metrics.schemas import (
    SessionsSnapshot,
    SourceEvents,
    SourceSessions,
    SourceTutors,
    TutorEventsSnapshot,
    TutorRoster,
    WindowMetrics,
)

D = date(2025, 11, 7)
DAY_BEFORE = date(2025, 11, 6)
NOON_BEFORE = datetime(2025, 11, 6, 12, tzinfo=UTC)

Row = Mapping[str, Any]

_SESSION: Row = {
    "tutor_id": "t1",
    "session_number": 2,
    "started": True,
    "tutor_initiated_reschedule": False,
    "no_show": False,
    "late_start_minutes": 0,
}
_NO_FLAGS: Row = {"tutor_id": "t1", "window": "7day", "sessions_completed": 0, "no_show_count": 2}


def frame(schema: type[dy.Schema], rows: list[Row]) -> pl.LazyFrame:
    return pl.LazyFrame(rows, schema=pl.Schema(schema))


def source_tutors(**status_by_tutor: str | None) -> pl.LazyFrame:
    return frame(SourceTutors, [{"tutor_id": t, "status": s} for t, s in status_by_tutor.items()])


def source_sessions(*rows: Row) -> pl.LazyFrame:
    """Sessions s1, s2, …; one that is given a rating has feedback f1, f2, … of its own tutor."""
    return frame(SourceSessions, [_source_session(i, row) for i, row in enumerate(rows, 1)])


def source_events(*rows: Row) -> pl.LazyFrame:
    """Message responses e1, e2, …"""
    default = {
        "tutor_id": "t1",
        "event_type": "message_response",
        "event_timestamp": NOON_BEFORE,
    }
    return frame(
        SourceEvents, [{"event_id": f"e{i}"} | default | dict(r) for i, r in enumerate(rows, 1)]
    )


def roster(*tutor_ids: str) -> pl.LazyFrame:
    return frame(TutorRoster, [{"tutor_id": t, "status": "active"} for t in tutor_ids])


def sessions(*rows: Row) -> pl.LazyFrame:
    default = dict(_SESSION) | {"scheduled_date": DAY_BEFORE}
    return frame(SessionsSnapshot, [default | dict(row) for row in rows])


def events(*rows: Row) -> pl.LazyFrame:
    """Logins, and message responses where a time is given."""
    return frame(TutorEventsSnapshot, [_event(row) for row in rows])


def window_metrics_rows(*rows: Row) -> pl.LazyFrame:
    """Metrics that raise no flag unless a row says otherwise."""
    return frame(WindowMetrics, [dict(_NO_FLAGS) | dict(row) for row in rows])


def _source_session(number: int, row: Row) -> dict[str, Any]:
    default = dict(_SESSION) | {"session_id": f"s{number}", "scheduled_start": NOON_BEFORE}
    if "overall_rating" in row:
        default |= {
            "feedback_id": f"f{number}",
            "feedback_tutor_id": row.get("tutor_id", _SESSION["tutor_id"]),
        }
    return default | dict(row)


def _event(row: Row) -> dict[str, Any]:
    kind = "message_response" if "response_time_minutes" in row else "login"
    return {"tutor_id": "t1", "event_date": DAY_BEFORE, "event_type": kind} | dict(row)
