"""Reading the platform: only the columns that are needed, as Arrow, in one read-only snapshot.

A statement with bound parameters makes the driver leave the binary COPY protocol, which doubles
its time. So the bounds are bound to transaction-local settings first, and the query reads those.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Literal

import dataframely as dy
import polars as pl
import sqlalchemy as sa
from adbc_driver_postgresql import dbapi

from tutormax_assets.metrics.schemas import SourceEvents, SourceSessions, SourceTutors
from tutormax_assets.platform.connection import conninfo, describe
from tutormax_assets.platform.metrics_table import reason

_TUTORS = """
SELECT tutor_id, status
FROM tutors AS t
WHERE true
"""

_SESSIONS = """
SELECT
    t.session_id,
    t.tutor_id,
    t.session_number::integer,
    t.scheduled_start,
    t.actual_start IS NOT NULL AS started,
    t.tutor_initiated_reschedule,
    t.no_show,
    t.late_start_minutes::integer,
    t.engagement_score::double precision,
    t.learning_objectives_met,
    f.feedback_id,
    f.tutor_id AS feedback_tutor_id,
    f.overall_rating::integer
FROM sessions AS t
LEFT JOIN student_feedback AS f ON f.session_id = t.session_id
WHERE t.scheduled_start >= current_setting('tutormax.start')::timestamptz
    AND t.scheduled_start < current_setting('tutormax.end')::timestamptz
"""

_EVENTS = """
SELECT
    t.event_id,
    t.tutor_id,
    t.event_type,
    t.event_timestamp,
    CASE
        WHEN t.event_type = 'message_response'
        THEN (t.metadata -> 'response_time_minutes')::text
    END AS response_time_minutes
FROM tutor_events AS t
WHERE t.event_timestamp >= current_setting('tutormax.start')::timestamptz
    AND t.event_timestamp < current_setting('tutormax.end')::timestamptz
    AND t.event_type IN ('login', 'message_response')
"""

_NEWEST = {
    "sessions": """
SELECT max(scheduled_start) AS newest
FROM sessions
WHERE scheduled_start < current_setting('tutormax.end')::timestamptz
""",
    "tutor_events": """
SELECT max(event_timestamp) AS newest
FROM tutor_events
WHERE event_timestamp < current_setting('tutormax.end')::timestamptz
    AND event_type IN ('login', 'message_response')
""",
}

_UNKNOWN_TUTORS = sa.text("""
SELECT unnest(CAST(:tutor_ids AS text[])) AS tutor_id
EXCEPT
SELECT tutor_id FROM tutors
ORDER BY tutor_id
""")

_ONLY_TUTORS = """
    AND t.tutor_id IN (
        SELECT jsonb_array_elements_text(current_setting('tutormax.tutor_ids')::jsonb)
    )
"""


class SourceError(Exception):
    """The platform cannot be read, or a table is not as the contract has it."""


def read_tutors(url: sa.URL, *, tutor_ids: Sequence[str] = ()) -> pl.DataFrame:
    """The platform's tutors, or those of the given ids.

    Returns:
        ``SourceTutors``.

    Raises:
        SourceError: The platform cannot be read.
    """
    with _snapshot(url, tutor_ids=tutor_ids) as cursor:
        return _fetch(cursor, _TUTORS, SourceTutors, tutor_ids=tutor_ids)


def read_sessions(
    url: sa.URL, *, start: datetime, end: datetime, tutor_ids: Sequence[str] = ()
) -> pl.DataFrame:
    """Sessions scheduled in ``[start, end)`` with their feedback, of all tutors or the given ones.

    Returns:
        ``SourceSessions``.

    Raises:
        SourceError: The platform cannot be read.
    """
    with _snapshot(url, start=start, end=end, tutor_ids=tutor_ids) as cursor:
        return _fetch(cursor, _SESSIONS, SourceSessions, tutor_ids=tutor_ids)


def read_events(
    url: sa.URL, *, start: datetime, end: datetime, tutor_ids: Sequence[str] = ()
) -> pl.DataFrame:
    """Logins and message responses in ``[start, end)``, of all tutors or the given ones.

    Returns:
        ``SourceEvents``.

    Raises:
        SourceError: The platform cannot be read.
    """
    with _snapshot(url, start=start, end=end, tutor_ids=tutor_ids) as cursor:
        return _fetch(cursor, _EVENTS, SourceEvents, tutor_ids=tutor_ids)


def newest(
    url: sa.URL, table: Literal["sessions", "tutor_events"], *, before: datetime
) -> datetime | None:
    """The instant of the newest session, login or message response before another instant.

    Returns:
        The instant in UTC, or none where there is no such row.

    Raises:
        SourceError: The platform cannot be read.
    """
    with _snapshot(url, end=before, tutor_ids=()) as cursor:
        found: datetime | None = _fetch(cursor, _NEWEST[table], _Newest, tutor_ids=()).item()
        return found


def unknown_tutors(engine: sa.Engine, tutor_ids: Sequence[str]) -> list[str]:
    """Those of the ids that are not in the platform's tutors, sorted.

    Raises:
        SourceError: The platform cannot be read.
    """
    try:
        with engine.connect() as connection:
            return list(connection.scalars(_UNKNOWN_TUTORS, {"tutor_ids": list(tutor_ids)}))
    except sa.exc.SQLAlchemyError as error:
        raise SourceError(
            f"The platform at {describe(engine.url)} cannot be read: {reason(error)}."
            " `tutormax db status` shows what is there."
        ) from error


class _Newest(dy.Schema):
    newest = dy.Datetime(time_zone="UTC", nullable=True)


@contextmanager
def _snapshot(
    url: sa.URL,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    tutor_ids: Sequence[str],
) -> Iterator[dbapi.Cursor]:
    try:
        with dbapi.connect(conninfo(url)) as connection, connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            cursor.execute(
                "SELECT set_config('tutormax.start', $1, true),"
                " set_config('tutormax.end', $2, true),"
                " set_config('tutormax.tutor_ids', $3, true)",
                (
                    start.isoformat() if start else "",
                    end.isoformat() if end else "",
                    json.dumps(list(tutor_ids)),
                ),
            )
            yield cursor
    except dbapi.Error as error:
        raise SourceError(
            f"The platform at {describe(url)} cannot be read: {_said(error)}."
            " `tutormax db status` shows what is there."
        ) from error


def _said(error: dbapi.Error) -> str:
    # The driver puts its own status and step before what PostgreSQL or libpq says.
    said = re.search(r"(?:(?:ERROR|FATAL): +|\[libpq\] )(?!.*(?:ERROR|FATAL): )(.+)", str(error))
    return said[1].strip() if said else str(error).splitlines()[0]


def _fetch(
    cursor: dbapi.Cursor, query: str, schema: type[dy.Schema], *, tutor_ids: Sequence[str]
) -> pl.DataFrame:
    cursor.execute(query + _ONLY_TUTORS if tutor_ids else query)
    rows = pl.DataFrame(cursor.fetch_arrow())
    for name, expected in pl.Schema(schema).items():
        if rows.schema[name] != expected:
            raise SourceError(f"column {name} was read as {rows.schema[name]}; expected {expected}")
    return rows
