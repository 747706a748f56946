"""Changes the platform between runs that read only changed tutors, and compares with full runs.

After some runs that read only changed tutors, a full run must not change any row, neither in the
tables nor in Parquet.
"""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta

import sqlalchemy as sa

from chaos.ground import END, Ground, differences, ground, ground_on, silent_log
from chaos.report import Report
from tutormax_assets.api.runs import aggregate
from tutormax_assets.api.summary import CHANGED_TUTORS
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.settings import load_settings

TUTORS = 40
DATES = [END - timedelta(days=1), END]

_CHANGES_AT_ONCE = 3
_STEPS_BETWEEN_COMPARISONS = 3

_SESSION = "(SELECT session_id FROM sessions ORDER BY hashtext(session_id || {seed}) LIMIT 1)"
_RATED = "(SELECT session_id FROM student_feedback ORDER BY hashtext(session_id || {seed}) LIMIT 1)"
_UNRATED = """
    (SELECT session_id FROM sessions AS s
     WHERE NOT EXISTS (SELECT FROM student_feedback AS f WHERE f.session_id = s.session_id)
     ORDER BY hashtext(session_id || {seed}) LIMIT 1)
"""
_EVENT = "(SELECT event_id FROM tutor_events ORDER BY hashtext(event_id || {seed}) LIMIT 1)"
_TUTOR = "(SELECT tutor_id FROM tutors ORDER BY hashtext(tutor_id || {seed}) LIMIT 1)"

# A few rows each, chosen by {seed}, a text that is another one each time.
CHANGES = {
    "late feedback": f"""
        INSERT INTO student_feedback (feedback_id, session_id, student_id, tutor_id,
            overall_rating, is_first_session, submitted_at, created_at)
        SELECT 'late ' || {{seed}}, session_id, student_id, tutor_id, 2, false, now(), now()
        FROM sessions WHERE session_id = {_UNRATED}
    """,
    "rating corrected": f"""
        UPDATE student_feedback SET overall_rating = 1 + overall_rating % 5
        WHERE session_id = {_RATED}
    """,
    "rating of another tutor": f"""
        UPDATE student_feedback SET tutor_id = {_TUTOR} WHERE session_id = {_RATED}
    """,
    "rating moved": f"""
        UPDATE student_feedback SET session_id = {_UNRATED} WHERE session_id = {_RATED}
    """,
    "rating deleted": f"DELETE FROM student_feedback WHERE session_id = {_RATED}",
    "session corrected": f"""
        UPDATE sessions SET no_show = NOT no_show, late_start_minutes = late_start_minutes + 20
        WHERE session_id = {_SESSION}
    """,
    "session broken": f"""
        UPDATE sessions SET engagement_score = 7, late_start_minutes = -3
        WHERE session_id = {_SESSION}
    """,
    "session moved to another day": f"""
        UPDATE sessions SET scheduled_start = scheduled_start - interval '20 days'
        WHERE session_id = {_SESSION}
    """,
    "session moved out of the window": f"""
        UPDATE sessions SET scheduled_start = scheduled_start - interval '2 years'
        WHERE session_id = {_SESSION}
    """,
    "session moved to another tutor": f"""
        UPDATE sessions SET tutor_id = {_TUTOR} WHERE session_id = {_SESSION}
    """,
    "session deleted": f"DELETE FROM sessions WHERE session_id = {_SESSION}",
    "session replaced in one transaction": f"""
        CREATE TEMPORARY TABLE gone ON COMMIT DROP AS
            SELECT * FROM sessions WHERE session_id = {_SESSION};
        DELETE FROM sessions WHERE session_id IN (SELECT session_id FROM gone);
        UPDATE gone SET session_id = 'new ' || {{seed}}, no_show = NOT no_show;
        INSERT INTO sessions SELECT * FROM gone
    """,
    "event corrected": f"""
        UPDATE tutor_events SET event_type = 'message_response',
            metadata = '{{{{"response_time_minutes": 90}}}}'
        WHERE event_id = {_EVENT}
    """,
    "event deleted": f"DELETE FROM tutor_events WHERE event_id = {_EVENT}",
    "event repeated": f"""
        INSERT INTO tutor_events (event_id, tutor_id, event_type, event_timestamp, created_at)
        SELECT 'again ' || {{seed}}, tutor_id, event_type, event_timestamp, now()
        FROM tutor_events WHERE event_id = {_EVENT}
    """,
    "tutor leaves or returns": f"""
        UPDATE tutors
        SET status = CASE lower(status) WHEN 'active' THEN 'INACTIVE' ELSE 'active' END
        WHERE tutor_id = {_TUTOR}
    """,
    "tutor removed": f"DELETE FROM tutors WHERE tutor_id = {_TUTOR}",
    "tutor joins": """
        INSERT INTO tutors (tutor_id, name, email, onboarding_date, status, subjects,
            education_level, location, baseline_sessions_per_week, behavioral_archetype,
            created_at, updated_at)
        SELECT 'joined ' || {seed}, name, {seed} || email, onboarding_date, 'active', subjects,
            education_level, location, baseline_sessions_per_week, behavioral_archetype, now(),
            now()
        FROM tutors LIMIT 1
    """,
}
"""What happens to rows, by name."""

REWRITES = {
    "VACUUM FREEZE": "VACUUM FREEZE sessions, student_feedback, tutor_events",
    "VACUUM FULL": "VACUUM FULL student_feedback",
    "CLUSTER": "CLUSTER sessions USING sessions_pkey",
    "table filled again": """
        BEGIN; CREATE TEMPORARY TABLE kept ON COMMIT DROP AS TABLE tutor_events;
        TRUNCATE tutor_events; INSERT INTO tutor_events TABLE kept; COMMIT
    """,
}
"""What happens to tables as a whole; the rows stay the same."""


@dataclass
class _Lane:
    """A ground, and what happens there.

    Attributes:
        here: The ground.
        report: What is counted.
        choice: Chooses what happens.
        open: Transactions that have changed rows and are not committed.
        number: Of the next change.
    """

    here: Ground
    report: Report
    choice: random.Random
    open: list[sa.Connection] = field(default_factory=list)
    number: int = 0


def run(*, steps: int, seconds: float, seed: int, on: sa.Engine | None = None) -> Report:
    """Change the platform, bring two dates up to date, and compare with runs of all tutors.

    Args:
        steps: How often.
        seconds: When to stop at the latest.
        seed: Seed of what happens.
        on: A database with all tables; one of a server of its own when None.

    Returns:
        Figures of what happened, how dates were brought up to date, and what was wrong.
    """
    names = ("steps", "changes", "dates compared with a run of all tutors", "wrong")
    report = Report("late", dict.fromkeys(names, 0))
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        stack.enter_context(silent_log())
        here = stack.enter_context(ground() if on is None else ground_on(on))
        sample_platform.generate(
            here.engine, tutors=TUTORS, sessions_per_tutor=40, days=100, end=END, seed=seed
        )
        lane = _Lane(here, report, random.Random(seed))
        stack.callback(_end_all, lane)
        with here.as_environment(TUTORMAX_REFRESH_MAX_SHARE="0.5"):
            _bring_up_to_date(lane, changed_only=False)
            for step in range(1, steps + 1):
                if time.monotonic() > deadline:
                    break
                report.count("steps")
                _step(lane)
                if step % _STEPS_BETWEEN_COMPARISONS == 0:
                    _compare(lane)
            _compare(lane)
    return report


def _step(lane: _Lane) -> None:
    before = lane.choice.random()
    if before < 0.1:
        _rewrite(lane)
    elif before < 0.25:
        _run_of_some(lane)
    elif before < 0.35:
        _killed_run(lane)
    for connection in [*lane.open]:
        if lane.choice.random() < 0.5:
            _end(lane, connection)
    for _ in range(lane.choice.randint(0, _CHANGES_AT_ONCE)):
        _change(lane)
    _bring_up_to_date(lane, changed_only=True)


def _change(lane: _Lane) -> None:
    """Change rows: at once, or in a transaction that commits later, with a savepoint."""
    name = lane.choice.choice([*CHANGES])
    lane.number += 1
    statement = sa.text(CHANGES[name].format(seed=f"'{lane.number}'").replace(":", r"\:"))
    connection = lane.here.engine.connect()
    connection.begin()
    # What a transaction that is not committed holds, another one would wait for.
    connection.exec_driver_sql("SET LOCAL lock_timeout = '200ms'")
    try:
        with connection.begin_nested():
            connection.execute(statement)
    except sa.exc.DBAPIError as error:
        lane.report.count("changes that waited for another one, or were of no use")
        if not isinstance(error, sa.exc.OperationalError | sa.exc.IntegrityError):
            raise
        connection.close()
        return
    lane.report.count("changes")
    lane.report.count(f"change: {name}")
    # A run cannot save a tutor that an open transaction is deleting.
    if "tutor" not in name.split()[0] and lane.choice.random() < 0.2:
        lane.report.count("of them, committed or rolled back later")
        lane.open.append(connection)
    else:
        _commit(connection)


def _commit(connection: sa.Connection) -> None:
    connection.get_transaction().commit()  # type: ignore[union-attr]
    connection.close()


def _end(lane: _Lane, connection: sa.Connection) -> None:
    """Commit a transaction that is open, or roll it back."""
    lane.open.remove(connection)
    if lane.choice.random() < 0.8:
        _commit(connection)
    else:
        connection.close()


def _end_all(lane: _Lane) -> None:
    for connection in [*lane.open]:
        _end(lane, connection)


def _rewrite(lane: _Lane) -> None:
    name = lane.choice.choice([*REWRITES])
    # It waits for whoever has changed the table.
    _end_all(lane)
    with lane.here.engine.connect() as connection:
        alone = connection.execution_options(isolation_level="AUTOCOMMIT")
        for statement in REWRITES[name].split(";"):
            alone.exec_driver_sql(statement)
    lane.report.count(f"rewrite: {name}")


def _run_of_some(lane: _Lane) -> None:
    with lane.here.engine.connect() as connection:
        tutors = sorted(connection.exec_driver_sql("SELECT tutor_id FROM tutors").scalars())
    lane.report.count("runs of some tutors")
    options = _options(tutor_ids=lane.choice.sample(tutors, 3))
    aggregate(load_settings(), [lane.choice.choice(DATES)], options)


def _killed_run(lane: _Lane) -> None:
    day = str(lane.choice.choice(DATES))
    command = lane.here.start("run", "--date", day, "--full", log=lane.here.home / "killed.log")
    time.sleep(lane.choice.uniform(1, 4))
    if command.kill():
        lane.report.count("runs killed")


def _bring_up_to_date(lane: _Lane, *, changed_only: bool) -> None:
    for day in DATES:
        [summary] = aggregate(load_settings(), [day], _options(), changed_only=changed_only)
        if changed_only:
            lane.report.count(f"dates of which was read: {summary.read}")
            if summary.read == CHANGED_TUTORS:
                lane.report.count("tutors read for these", summary.total_tutors)
        if not summary.all_saved:
            lane.report.count("wrong")
            lane.report.wrong.append(f"{day} failed: {summary.errors[0]['error'][:500]}")


def _compare(lane: _Lane) -> None:
    found = lane.here.frames(DATES)
    _bring_up_to_date(lane, changed_only=False)
    lane.report.count("dates compared with a run of all tutors", len(DATES))
    for sentence in differences(found, lane.here.frames(DATES)):
        lane.report.count("wrong")
        lane.report.wrong.append(f"after {lane.number} changes: {sentence}")


def _options(tutor_ids: Sequence[str] | None = None) -> RunOptions:
    given = None if tutor_ids is None else list(tutor_ids)
    return RunOptions(tutor_ids=given, max_retries=2, retry_delay_seconds=0.1)
