"""pandas the way most would write it: frames from queries, one ``groupby`` per window."""

import io
from time import perf_counter
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import sql

from benchmarks.answers import TWIN, VALUES
from benchmarks.peers import ROSTER, WINDOWS, Task
from benchmarks.peers.statements import upsert

_SESSIONS = sa.text(
    """
    SELECT s.tutor_id, s.session_number, s.scheduled_start, s.actual_start,
        s.tutor_initiated_reschedule, s.no_show, s.late_start_minutes, s.engagement_score,
        s.learning_objectives_met, f.overall_rating, f.tutor_id AS feedback_tutor_id
    FROM sessions AS s
    LEFT JOIN student_feedback AS f ON f.session_id = s.session_id
    WHERE s.scheduled_start >= :start AND s.scheduled_start < :end
    """
)
_EVENTS = sa.text(
    """
    SELECT tutor_id, event_type, event_timestamp,
        (metadata -> 'response_time_minutes')::text AS minutes
    FROM tutor_events
    WHERE event_type IN ('login', 'message_response')
        AND event_timestamp >= :start AND event_timestamp < :end
    """
)


def measure(task: Task) -> dict[str, float]:
    """Read the frames, compute the windows one after the other, write the twin."""
    import pandas as pd

    engine = sa.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(task.conninfo)
    )
    bounds = {"start": task.start(90), "end": task.end}
    with engine.connect() as connection:
        connection.execute(sa.select(1))
        connection.rollback()
        started = perf_counter()
        roster = pd.read_sql(sa.text(ROSTER), connection)
        sessions = pd.read_sql(_SESSIONS, connection, params=bounds)
        events = pd.read_sql(_EVENTS, connection, params=bounds)
        read = perf_counter()
        sessions, events = _cleaned(sessions, events)
        rows = pd.concat(
            [
                _window(
                    roster,
                    sessions[sessions["scheduled_start"] >= task.start(days)],
                    events[events["event_timestamp"] >= task.start(days)],
                ).assign(window=window)
                for window, days in WINDOWS.items()
            ]
        )
        rows["performance_tier"] = _tiers(rows)
        computed = perf_counter()
        _write(connection, rows, task)
        ended = perf_counter()
    engine.dispose()
    return {"read": read - started, "compute": computed - read, "persist": ended - computed}


def _cleaned(sessions: Any, events: Any) -> tuple[Any, Any]:
    import numpy as np
    import pandas as pd

    good_rating = sessions["overall_rating"].between(1, 5) & (
        sessions["feedback_tutor_id"] == sessions["tutor_id"]
    )
    late = sessions["late_start_minutes"]
    rating = sessions["overall_rating"].where(good_rating)
    first = (sessions["session_number"] == 1) & good_rating
    sessions = sessions.assign(
        completed=sessions["actual_start"].notna() & ~sessions["no_show"],
        rating=rating,
        first_success=(100.0 * (rating >= 4)).where(first),
        reschedule=100.0 * sessions["tutor_initiated_reschedule"],
        punctual=(100.0 * (late <= 10)).where(late >= 0),
        score=sessions["engagement_score"].where(sessions["engagement_score"].between(0, 1)),
        objectives=100.0 * sessions["learning_objectives_met"].astype(float),
    )
    minutes = pd.to_numeric(events["minutes"], errors="coerce")
    is_response = events["event_type"] == "message_response"
    events = events.assign(
        login=~is_response,
        minutes=minutes.where(is_response & (minutes >= 0) & np.isfinite(minutes)),
    )
    return sessions, events


def _window(roster: Any, sessions: Any, events: Any) -> Any:
    import numpy as np

    of_sessions = sessions.groupby("tutor_id").agg(
        sessions=("rating", "size"),
        sessions_completed=("completed", "sum"),
        avg_rating=("rating", "mean"),
        first_session_success_rate=("first_success", "mean"),
        reschedule_rate=("reschedule", "mean"),
        no_show_count=("no_show", "sum"),
        punctual=("punctual", "mean"),
        score=("score", "mean"),
        learning_objectives_met_pct=("objectives", "mean"),
    )
    of_events = events.groupby("tutor_id").agg(
        logins=("login", "sum"), response_time_avg_minutes=("minutes", "mean")
    )
    rows = roster.merge(of_sessions, on="tutor_id", how="left")
    rows = rows.merge(of_events, on="tutor_id", how="left")
    counts = ["sessions", "sessions_completed", "no_show_count", "logins"]
    rows[counts] = rows[counts].fillna(0).astype(int)
    login = np.minimum(100, 100 * rows["logins"] / rows["sessions"].where(rows["sessions"] > 0))
    score = (100 * rows["score"]).fillna(50)
    rows["engagement_score"] = 0.4 * login + 0.4 * score + 0.2 * rows["punctual"]
    return rows.round(2)


def _tiers(rows: Any) -> Any:
    import numpy as np

    green, red = 0, 0
    for name, good, bad in (
        ("avg_rating", 4.5, 3.5),
        ("first_session_success_rate", 85, 70),
        ("engagement_score", 80, 60),
        ("learning_objectives_met_pct", 90, 80),
    ):
        green = green + (rows[name] >= good).astype(int)
        red = red + (rows[name] < bad).astype(int)
    for name, good, bad in (("reschedule_rate", 10, 15), ("no_show_count", 0, 3)):
        green = green + (rows[name] <= good).astype(int)
        red = red + (rows[name] > bad).astype(int)
    return np.select(
        [(green >= 5) & (red == 0), red >= 3, red >= 1, green >= 3],
        ["Exemplary", "At Risk", "Needs Attention", "Strong"],
        "Developing",
    )


def _write(connection: sa.Connection, rows: Any, task: Task) -> None:
    columns = ["tutor_id", "window", *VALUES]
    text = io.StringIO()
    rows.sort_values(["tutor_id", "window"])[columns].to_csv(text, header=False, index=False)
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    cursor: Any = connection.connection.cursor()
    cursor.execute(
        sql.SQL(
            "CREATE TEMPORARY TABLE staged ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA"
        ).format(names, TWIN)
    )
    with cursor.copy(sql.SQL("COPY staged ({}) FROM STDIN (FORMAT csv)").format(names)) as copy:
        copy.write(text.getvalue())
    cursor.execute(upsert(sql.Identifier("staged"), instant=task.end))
    connection.commit()
