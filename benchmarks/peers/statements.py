"""SQL that the peers share: metrics and tiers from sums, and the upsert into the twin.

What a tutor's rows add up to comes by ``age``: 0 for the last 7 days, 1 for the rest of the last
30, 2 for the rest of the last 90. A window is a running total of these.
"""

from datetime import datetime

from psycopg import sql

from benchmarks.answers import TWIN, VALUES
from chaos.oracle import COUNTS as _COUNTS_OF_ROWS
from chaos.oracle import SHARES

COUNTS = (
    "sessions",
    "completed",
    "no_shows",
    "reschedules",
    "ratings",
    "rating_sum",
    "first_rated",
    "first_successes",
    "lateness_known",
    "punctual",
    "scores",
    "objectives_known",
    "objectives_met",
    "logins",
    "responses",
)
SUMS = ("score_sum", "minutes_sum")

SESSION_AGGREGATES = """
    count(*) AS sessions,
    count(s.actual_start) FILTER (WHERE NOT s.no_show) AS completed,
    count(*) FILTER (WHERE s.no_show) AS no_shows,
    count(*) FILTER (WHERE s.tutor_initiated_reschedule) AS reschedules,
    count(f.overall_rating) AS ratings,
    sum(f.overall_rating) AS rating_sum,
    count(f.overall_rating) FILTER (WHERE s.session_number = 1) AS first_rated,
    count(*) FILTER (WHERE s.session_number = 1 AND f.overall_rating >= 4) AS first_successes,
    count(*) FILTER (WHERE s.late_start_minutes >= 0) AS lateness_known,
    count(*) FILTER (WHERE s.late_start_minutes BETWEEN 0 AND 10) AS punctual,
    count(*) FILTER (WHERE s.engagement_score BETWEEN 0 AND 1) AS scores,
    sum(s.engagement_score) FILTER (WHERE s.engagement_score BETWEEN 0 AND 1) AS score_sum,
    count(s.learning_objectives_met) AS objectives_known,
    count(*) FILTER (WHERE s.learning_objectives_met) AS objectives_met
"""
"""Over sessions ``s``, each with its good rating of ``f`` or none."""

_METRICS = """
    SELECT
        tutor_id,
        "window",
        coalesce(completed, 0) AS sessions_completed,
        1.0::double precision * rating_sum / nullif(ratings, 0) AS avg_rating,
        100.0::double precision * first_successes / nullif(first_rated, 0)
            AS first_session_success_rate,
        100.0::double precision * reschedules / nullif(sessions, 0) AS reschedule_rate,
        coalesce(no_shows, 0) AS no_show_count,
        0.4::double precision * least(
            100.0::double precision,
            100.0::double precision * coalesce(logins, 0) / nullif(sessions, 0)
        )
            + 0.4::double precision * coalesce(100 * score_sum / nullif(scores, 0), 50)
            + 20.0::double precision * punctual / nullif(lateness_known, 0) AS engagement_score,
        100.0::double precision * objectives_met / nullif(objectives_known, 0)
            AS learning_objectives_met_pct,
        minutes_sum / nullif(responses, 0) AS response_time_avg_minutes
    FROM totals
"""

_TIERS = """
    SELECT
        tutor_id,
        "window",
        sessions_completed,
        avg_rating,
        first_session_success_rate,
        reschedule_rate,
        no_show_count,
        engagement_score,
        learning_objectives_met_pct,
        response_time_avg_minutes,
        CASE
            WHEN green >= 5 AND red = 0 THEN 'Exemplary'
            WHEN red >= 3 THEN 'At Risk'
            WHEN red >= 1 THEN 'Needs Attention'
            WHEN green >= 3 THEN 'Strong'
            ELSE 'Developing'
        END AS performance_tier
    FROM (
        SELECT
            *,
            coalesce((avg_rating >= 4.5)::integer, 0)
                + coalesce((first_session_success_rate >= 85)::integer, 0)
                + coalesce((reschedule_rate <= 10)::integer, 0)
                + (no_show_count = 0)::integer
                + coalesce((engagement_score >= 80)::integer, 0)
                + coalesce((learning_objectives_met_pct >= 90)::integer, 0) AS green,
            coalesce((avg_rating < 3.5)::integer, 0)
                + coalesce((first_session_success_rate < 70)::integer, 0)
                + coalesce((reschedule_rate > 15)::integer, 0)
                + (no_show_count > 3)::integer
                + coalesce((engagement_score < 60)::integer, 0)
                + coalesce((learning_objectives_met_pct < 80)::integer, 0) AS red
        FROM metrics
    ) AS flagged
    ORDER BY tutor_id, "window"
"""


def age(column: str) -> str:
    """The age of an instant, as a column."""
    return (
        f"CASE WHEN {column} >= %(start_7)s THEN 0 WHEN {column} >= %(start_30)s THEN 1"
        " ELSE 2 END AS age"
    )


def answer(*, roster: str, of_sessions: str, of_events: str, rounded: str) -> str:
    """The query of all rows of a reference date.

    Args:
        roster: Query of ``tutor_id``.
        of_sessions: Query of ``tutor_id``, ``age`` and what sessions add up to.
        of_events: Query of ``tutor_id``, ``age`` and what events add up to.
        rounded: How the engine rounds ``{}`` to two decimals, half to even.
    """
    totals = [f"sum({name}::integer) OVER so_far AS {name}" for name in COUNTS]
    totals += [f"sum({name}) OVER so_far AS {name}" for name in SUMS]
    metrics = [f"{rounded.format(name)} AS {name}" for name in SHARES]
    return f"""
WITH of_sessions AS ({of_sessions}),
of_events AS ({of_events}),
windows(age, "window") AS (VALUES (0, '7day'), (1, '30day'), (2, '90day')),
totals AS (
    SELECT roster.tutor_id, windows."window", {", ".join(totals)}
    FROM ({roster}) AS roster
    CROSS JOIN windows
    LEFT JOIN of_sessions
        ON of_sessions.tutor_id = roster.tutor_id AND of_sessions.age = windows.age
    LEFT JOIN of_events ON of_events.tutor_id = roster.tutor_id AND of_events.age = windows.age
    WINDOW so_far AS (PARTITION BY roster.tutor_id ORDER BY windows.age)
),
exact AS ({_METRICS}),
metrics AS (
    SELECT tutor_id, "window", {", ".join((*_COUNTS_OF_ROWS, *metrics))} FROM exact
)
{_TIERS}
"""


def upsert(staged: sql.Composable, *, instant: datetime) -> sql.Composed:
    """The statement that brings staged rows of a reference date into the twin.

    Args:
        staged: The table that holds tutor, window and values.
        instant: The instant that the reference date stands for.
    """
    columns = sql.SQL(", ").join(map(sql.Identifier, ("tutor_id", "window", *VALUES)))
    return sql.SQL(
        # Ids that ascend with time fill the primary key from left to right.
        "INSERT INTO {twin} (metric_id, calculation_date, {columns})"
        " SELECT uuidv7(), {instant}, {columns} FROM {staged}"
        ' ON CONFLICT (tutor_id, calculation_date, "window") DO UPDATE SET {sets}'
    ).format(
        twin=TWIN,
        columns=columns,
        instant=sql.Literal(instant),
        staged=staged,
        sets=sql.SQL(", ").join(
            [sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name)) for name in VALUES]
            + [sql.SQL("updated_at = now()")]
        ),
    )
