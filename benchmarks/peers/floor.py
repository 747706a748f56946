"""What reading the needed columns and writing the rows takes at least: nothing is computed."""

from time import perf_counter
from typing import Any

import psycopg
from psycopg import pq, sql

from benchmarks.answers import TWIN
from benchmarks.peers import ROSTER, Task
from benchmarks.peers.upsert_floor import rows_of

_SESSIONS = (
    "s.session_id, s.tutor_id, s.session_number, s.scheduled_start,"
    " s.actual_start IS NOT NULL, s.tutor_initiated_reschedule, s.no_show,"
    " s.late_start_minutes, s.engagement_score, s.learning_objectives_met"
)
_FEEDBACK = "f.feedback_id, f.tutor_id, f.overall_rating"
_IN_WINDOW = "s.scheduled_start >= {start} AND s.scheduled_start < {end}"
_EVENTS = """
    SELECT event_id, tutor_id, event_type, event_timestamp,
        CASE WHEN event_type = 'message_response'
            THEN (metadata -> 'response_time_minutes')::text END
    FROM tutor_events
    WHERE event_type IN ('login', 'message_response')
        AND event_timestamp >= {start} AND event_timestamp < {end}
"""
# Feedback has no column that tells the date of its session.
_WAYS = {
    "joined": [
        f"SELECT {_SESSIONS}, {_FEEDBACK} FROM sessions AS s"
        f" LEFT JOIN student_feedback AS f USING (session_id) WHERE {_IN_WINDOW}"
    ],
    "apart": [
        f"SELECT {_SESSIONS} FROM sessions AS s WHERE {_IN_WINDOW}",
        f"SELECT f.session_id, {_FEEDBACK} FROM student_feedback AS f",
    ],
}


def measure(task: Task) -> dict[str, float]:
    """Read the columns, sessions and feedback joined or apart, and write the product's rows.

    Of the two ways to read the quicker one counts.
    """
    with psycopg.connect(task.conninfo) as connection:
        rows = rows_of(connection, task.end)
        read = {}
        for way, queries in _WAYS.items():
            started = perf_counter()
            for query in [ROSTER, *queries, _EVENTS]:
                bounds = {"start": task.start(90), "end": task.end}
                _discard(connection, query, bounds)
            read[way] = perf_counter() - started
        started = perf_counter()
        with connection.cursor().copy(
            sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(TWIN)
        ) as copy:
            copy.write(rows)
        connection.commit()
        persisted = perf_counter() - started
    return {"read": min(read.values()), "persist": persisted}


def _discard(connection: psycopg.Connection[Any], query: str, bounds: dict[str, Any]) -> None:
    literals = {name: sql.Literal(value) for name, value in bounds.items()}
    text = sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(sql.SQL(query).format(**literals))
    pgconn = connection.pgconn
    result = pgconn.exec_(text.as_bytes(connection))
    if result.status != pq.ExecStatus.COPY_OUT:
        raise psycopg.OperationalError(result.error_message.decode())
    # As psql does it: what is fetched row by row through the cursor is slower than the server.
    while pgconn.get_copy_data(0)[0] > 0:
        pass
    while pgconn.get_result() is not None:
        pass
