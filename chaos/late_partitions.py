"""Partitioned tables whose rows and partitions come and go between runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from chaos.lane import NOT_UNIQUE, OTHER_FILES, Lane, begin
from chaos.servers import servers
from tutormax_assets.api.summary import ALL_TUTORS, CHANGED_TUTORS

_MONTHS = ("2025-08-01", "2025-09-01", "2025-10-01", "2025-11-01")

_SPLIT = """
    CREATE TABLE plain (LIKE {table} INCLUDING DEFAULTS);
    INSERT INTO plain SELECT * FROM {table};
    DROP TABLE {table} CASCADE;
    CREATE TABLE {table} (LIKE plain INCLUDING DEFAULTS{key}) PARTITION BY {by}
"""


def _split(one: Lane, table: str, by: str, bounds: Sequence[str], *, key: str = "") -> None:
    """Replace a table by a partitioned one with the same rows."""
    parts = [
        f"CREATE TABLE {table}_{number} PARTITION OF {table} FOR VALUES {bound}"
        for number, bound in enumerate(bounds)
    ]
    rows = (f"INSERT INTO {table} SELECT * FROM plain", "DROP TABLE plain")
    one.execute(_SPLIT.format(table=table, by=by, key=key), *parts, *rows)


def _by_month() -> list[str]:
    ends = [f"('{month}')" for month in _MONTHS]
    return [
        f"FROM {lower} TO {upper}"
        for lower, upper in zip(["(MINVALUE)", *ends], [*ends, "(MAXVALUE)"], strict=True)
    ]


def _by_hash(count: int = 3) -> list[str]:
    return [f"WITH (MODULUS {count}, REMAINDER {rest})" for rest in range(count)]


@dataclass(frozen=True)
class Step:
    """What happens to partitions, and what a run has to read then.

    Attributes:
        name: What happens.
        statements: How.
        read: Which tutors have to be read.
        why: Part of the reason for reading all.
    """

    name: str
    statements: tuple[str, ...]
    read: str = CHANGED_TUTORS
    why: str = ""


_OF_SEPTEMBER = """
    (SELECT event_id FROM tutor_events_2 WHERE event_type = 'login' ORDER BY event_id LIMIT 1)
"""
_ANSWER = '{"response_time_minutes": 90}'
_DETACH = "ALTER TABLE tutor_events DETACH PARTITION tutor_events_3"
_OCTOBER = "FOR VALUES FROM ('2025-10-01') TO ('2025-11-01')"
_ATTACH = f"ALTER TABLE tutor_events ATTACH PARTITION tutor_events_3 {_OCTOBER}"
_SOME = "(SELECT event_id FROM tutor_events_3 WHERE event_type = 'login' ORDER BY event_id LIMIT 2)"

UNIQUE_IDS = (
    Step(
        "an event moves to another month",
        (
            "UPDATE tutor_events SET event_timestamp = event_timestamp + interval '1 month'"
            f" WHERE event_id = {_OF_SEPTEMBER}",
        ),
    ),
    Step(
        "an event moves to another tutor of the same month",
        (
            "UPDATE tutor_events SET tutor_id ="
            " (SELECT max(tutor_id) FROM tutors WHERE status = 'active')"
            f" WHERE event_id = {_OF_SEPTEMBER}",
        ),
    ),
    Step(
        "a session gets another id",
        (
            "UPDATE sessions SET session_id = 'moved ' || session_id"
            " WHERE session_id IN (SELECT session_id FROM sessions"
            " WHERE scheduled_start > '2025-10-01' ORDER BY session_id LIMIT 4)",
        ),
    ),
    Step("a partition is detached", (_DETACH,), ALL_TUTORS, OTHER_FILES),
    Step(
        "a partition with other rows is attached",
        (
            "CREATE TABLE other (LIKE tutor_events_3)",
            "INSERT INTO other SELECT event_id, tutor_id, event_type, event_timestamp,"
            f" '{_ANSWER}', created_at FROM tutor_events_3",
            f"ALTER TABLE tutor_events ATTACH PARTITION other {_OCTOBER}",
        ),
        ALL_TUTORS,
        OTHER_FILES,
    ),
    Step(
        "the first partition is attached again",
        ("ALTER TABLE tutor_events DETACH PARTITION other", _ATTACH),
        ALL_TUTORS,
        OTHER_FILES,
    ),
    Step(
        "rows are updated in a partition while it is detached",
        (
            _DETACH,
            "UPDATE tutor_events_3 SET event_type = 'message_response',"
            f" metadata = '{_ANSWER}' WHERE event_id IN {_SOME}",
            _ATTACH,
        ),
    ),
    Step(
        "rows are deleted from a partition while it is detached",
        (_DETACH, f"DELETE FROM tutor_events_3 WHERE event_id IN {_SOME}", _ATTACH),
    ),
    Step("a partition is truncated", ("TRUNCATE tutor_events_1",), ALL_TUTORS, OTHER_FILES),
)
"""Steps on partitions that keep the ids of sessions and feedback unique."""

_DETACH_SESSIONS = "ALTER TABLE sessions DETACH PARTITION sessions_3"

_OTHERS = (
    Step("sessions by month, feedback and events by tutor", ()),
    Step(
        "a session moves to another month",
        (
            "UPDATE sessions SET scheduled_start = scheduled_start - interval '1 month'"
            " WHERE session_id = (SELECT min(session_id) FROM sessions_3)",
        ),
    ),
    Step(
        "a rating moves to another tutor",
        (
            "UPDATE student_feedback SET tutor_id = (SELECT max(tutor_id) FROM student_feedback)"
            " WHERE feedback_id = (SELECT min(feedback_id) FROM student_feedback)",
        ),
    ),
    Step("a month of sessions is detached", (_DETACH_SESSIONS,)),
    Step(
        "a month of sessions is attached",
        (f"ALTER TABLE sessions ATTACH PARTITION sessions_3 {_OCTOBER}",),
    ),
)


def take_steps(one: Lane, steps: Sequence[Step]) -> None:
    """Take steps on partitions that keep ids unique, beside changes of rows."""
    _split(one, "sessions", "HASH (session_id)", _by_hash(), key=", PRIMARY KEY (session_id)")
    _split(one, "tutor_events", "RANGE (event_timestamp)", _by_month())
    # The rows of September are in partitions of a partition.
    one.execute("ALTER TABLE tutor_events DETACH PARTITION tutor_events_2")
    _split(one, "tutor_events_2", "HASH (tutor_id)", _by_hash())
    one.execute(
        "ALTER TABLE tutor_events ATTACH PARTITION tutor_events_2"
        " FOR VALUES FROM ('2025-09-01') TO ('2025-10-01')"
    )
    one.expect("partitions", ALL_TUTORS, OTHER_FILES if one.steps else "")
    for step in steps:
        one.execute(*step.statements)
        one.expect(step.name, step.read, step.why)


def partitions(one: Lane) -> None:
    """Take all steps, on a server of their own."""
    with servers("one") as (server,):
        begin(one, server)
        one.change()
        take_steps(one, UNIQUE_IDS)
        one.change()
        one.expect("rows change", CHANGED_TUTORS)

        one.execute("DROP TABLE other")
        _split(one, "student_feedback", "HASH (tutor_id)", _by_hash())
        _split(one, "sessions", "RANGE (scheduled_start)", _by_month())
        _split(one, "tutor_events", "HASH (tutor_id)", _by_hash())
        for step in _OTHERS:
            one.execute(*step.statements)
            one.change()
            one.expect(step.name, ALL_TUTORS, NOT_UNIQUE)
