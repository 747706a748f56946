"""One statement inside PostgreSQL that computes a reference date, on all cores."""

from time import perf_counter

import psycopg
from psycopg import sql

from benchmarks.peers import ROSTER, Task
from benchmarks.peers.statements import SESSION_AGGREGATES, age, answer, upsert

_OF_SESSIONS = f"""
    SELECT s.tutor_id, {age("s.scheduled_start")}, {SESSION_AGGREGATES}
    FROM sessions AS s
    LEFT JOIN student_feedback AS f
        ON f.session_id = s.session_id AND f.tutor_id = s.tutor_id
            AND f.overall_rating BETWEEN 1 AND 5
    WHERE s.scheduled_start >= %(start_90)s AND s.scheduled_start < %(end)s
    GROUP BY 1, 2
"""

_OF_EVENTS = f"""
    SELECT
        tutor_id,
        age,
        count(*) FILTER (WHERE event_type = 'login') AS logins,
        count(minutes) AS responses,
        sum(minutes) AS minutes_sum
    FROM (
        SELECT tutor_id, event_type, {age("event_timestamp")}, CASE
            WHEN event_type = 'message_response'
                AND jsonb_typeof(metadata -> 'response_time_minutes') = 'number'
                AND (metadata -> 'response_time_minutes')::numeric BETWEEN 0 AND 1e290
            THEN (metadata -> 'response_time_minutes')::double precision
        END AS minutes
        FROM tutor_events
        WHERE event_type IN ('login', 'message_response')
            AND event_timestamp >= %(start_90)s AND event_timestamp < %(end)s
    ) AS events
    GROUP BY 1, 2
"""

_ANSWER = answer(
    roster=ROSTER,
    of_sessions=_OF_SESSIONS,
    of_events=_OF_EVENTS,
    rounded="round({} * 100) / 100",
)

# JIT compiles longer than it gains, and a scan is worth its workers at any size.
_SETTINGS = {
    "work_mem": "1GB",
    "jit": "off",
    "parallel_setup_cost": "0",
    "parallel_tuple_cost": "0",
    "min_parallel_table_scan_size": "0",
}


def measure(task: Task) -> dict[str, float]:
    """Compute the date and write the twin.

    ``INSERT … SELECT`` runs on one core: PostgreSQL plans parallel workers for no statement that
    writes, ``CREATE TABLE AS`` excepted. So the rows come into a temporary table first.
    """
    settings = {**_SETTINGS, "max_parallel_workers_per_gather": str(task.cores)}
    staged = sql.Identifier("staged")
    # The parameters are bound by the client: a statement that creates a table takes none.
    with psycopg.ClientCursor(psycopg.connect(task.conninfo)) as cursor, cursor.connection:
        for name, value in settings.items():
            cursor.execute("SELECT set_config(%s, %s, false)", [name, value])
        cursor.connection.commit()
        started = perf_counter()
        cursor.execute(f"CREATE TEMPORARY TABLE staged AS {_ANSWER}", task.bounds())
        computed = perf_counter()
        cursor.execute(upsert(staged, instant=task.end))
        cursor.connection.commit()
        ended = perf_counter()
    return {"compute": computed - started, "persist": ended - computed}
