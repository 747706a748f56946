"""DuckDB over the same rows, fetched as Arrow."""

import re
from time import perf_counter

import psycopg
from psycopg import sql

from benchmarks.peers import ROSTER, Task
from benchmarks.peers.statements import SESSION_AGGREGATES, age, answer, upsert

_READ = {
    "roster": ROSTER,
    "sessions": """
        SELECT session_id, tutor_id, session_number, scheduled_start, actual_start,
            tutor_initiated_reschedule, no_show, late_start_minutes, engagement_score,
            learning_objectives_met
        FROM sessions
        WHERE scheduled_start >= {start} AND scheduled_start < {end}
    """,
    "feedback": "SELECT session_id, tutor_id, overall_rating FROM student_feedback",
    "events": """
        SELECT tutor_id, event_type, event_timestamp,
            CASE WHEN event_type = 'message_response'
                THEN (metadata -> 'response_time_minutes')::text END AS minutes
        FROM tutor_events
        WHERE event_type IN ('login', 'message_response')
            AND event_timestamp >= {start} AND event_timestamp < {end}
    """,
}

_OF_SESSIONS = f"""
    SELECT s.tutor_id, {age("s.scheduled_start")}, {SESSION_AGGREGATES}
    FROM sessions AS s
    LEFT JOIN feedback AS f
        ON f.session_id = s.session_id AND f.tutor_id = s.tutor_id
            AND f.overall_rating BETWEEN 1 AND 5
    GROUP BY 1, 2
"""

_OF_EVENTS = f"""
    SELECT
        tutor_id,
        {age("event_timestamp")},
        count(*) FILTER (WHERE event_type = 'login') AS logins,
        count(*) FILTER (WHERE try_cast(minutes AS double) BETWEEN 0 AND 1e290) AS responses,
        sum(try_cast(minutes AS double))
            FILTER (WHERE try_cast(minutes AS double) BETWEEN 0 AND 1e290) AS minutes_sum
    FROM events
    GROUP BY 1, 2
"""

_ANSWER = answer(
    roster="SELECT tutor_id FROM roster",
    of_sessions=_OF_SESSIONS,
    of_events=_OF_EVENTS,
    rounded="round_even({}, 2)",
)


def measure(task: Task) -> dict[str, float]:
    """Fetch the rows, sessions and feedback apart, join and compute them here, write the twin."""
    import duckdb
    import pyarrow  # noqa: F401 - ADBC hands over what it reads through it
    from adbc_driver_postgresql import dbapi

    bounds = {"start": sql.Literal(task.start(90)), "end": sql.Literal(task.end)}
    with psycopg.connect(task.conninfo) as connection:
        queries = {
            name: sql.SQL(query).format(**bounds).as_string(connection)
            for name, query in _READ.items()
        }
        into_twin = upsert(sql.Identifier("staged"), instant=task.end).as_string(connection)
    with (
        duckdb.connect() as engine,
        dbapi.connect(task.conninfo) as connection,
        connection.cursor() as cursor,
    ):
        engine.execute("SELECT 1").fetchall()
        started = perf_counter()
        for name, query in queries.items():
            cursor.execute(query)
            engine.register(name, cursor.fetch_arrow_table())
        read = perf_counter()
        # DuckDB writes its parameters in another way.
        answer_here = re.sub(r"%\((\w+)\)s", r"$\1", _ANSWER)
        bounds_of_ages = {n: v for n, v in task.bounds().items() if n in ("start_7", "start_30")}
        rows = engine.sql(answer_here, params=bounds_of_ages).to_arrow_table()
        computed = perf_counter()
        cursor.adbc_ingest("staged", rows, mode="create", temporary=True)
        cursor.execute(into_twin)
        connection.commit()
        ended = perf_counter()
    return {"read": read - started, "compute": computed - read, "persist": ended - computed}
