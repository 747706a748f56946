"""The queries that read the platform. Values are bound; names are those of the source contract.

A statement with bound parameters makes the driver leave the binary COPY protocol, which doubles
its time. So ids are bound to a transaction-local setting first, which the query reads; instants are
bound by the client, since the server would read a setting anew for each row.

The driver spends more on a text than on a number, so ids travel as 64-bit hashes, and those that
are needed are looked up afterwards. ``bind_values`` fills in ``{start}``, ``{end}``, ``{score}``,
``{only_tutors}``, and ``{known}`` and ``{known_feedback}``.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import LiteralString

import polars as pl
from psycopg import sql

from tutormax_assets.metrics.schemas import SourceSessions
from tutormax_assets.source.contract import NEEDED_COLUMNS, columns_read
from tutormax_assets.source.packing import (
    LONG_DELAY,
    PACKED,
    RATING,
    long_delay,
    pack_feedback,
    pack_session,
)
from tutormax_assets.storage.shards import ALL_TUTORS, TutorRange

TUTORS = """
SELECT t.tutor_id::text, t.status::text
FROM tutors AS t
WHERE true {known}
"""

# Whatever the collation of a column is, the bytes of an id count.
HASH = 'hashtextextended(({})::text COLLATE "C", 0)'


def hash_of(id_: str) -> str:
    """The hash of an id, null where that is."""
    return HASH.format(id_)


# Sessions and events without a tutor have an empty id.
TUTOR_HASHES = f"""
SELECT {hash_of("tutor_id")} AS hash, tutor_id AS id
FROM (
    SELECT coalesce(t.tutor_id::text, '') AS tutor_id FROM tutors AS t WHERE true {{only_tutors}}
    UNION
    SELECT ''
) AS ids
"""  # noqa: S608 - constants only


# PostgreSQL refuses a numeric value that is too large or too small for a double, and repeats it in
# its message. Here it stays on its side of the contract; NaN counts as larger than any number.
NUMERIC_SCORE = """
    CASE
        WHEN t.engagement_score > 1e300 THEN 'Infinity'
        WHEN t.engagement_score < -1e300 THEN '-Infinity'
        WHEN abs(t.engagement_score) < 1e-300 THEN sign(t.engagement_score) * 1e-300
        ELSE t.engagement_score
    END::double precision
"""

SCORE = "t.engagement_score::double precision"

_OF_SESSIONS = columns_read(SourceSessions, "sessions")

# PostgreSQL gives an age as a distance in a circle of 2^32, negative beyond half of it. Frozen rows
# keep the id of their transaction for longer than that, and are not new.
AGE_OF_ROW = "mod(age({}.xmin) + 4294967296, 4294967296)"

OF_WINDOW = "t.scheduled_start >= {start} AND t.scheduled_start < {end}"


def _id(column: str, *, hashed: bool) -> str:
    """An id, of which an empty one stands for none."""
    text = f"coalesce({column}::text, '')"
    return hash_of(text) if hashed else text


def _session_columns(*, hashed: bool) -> Iterator[str]:
    schema = pl.Schema(SourceSessions)
    for name, column in _OF_SESSIONS.items():
        match schema[name]:
            case pl.String():
                yield f"{_id(f't.{column}', hashed=hashed)} AS {name}"
            case pl.Datetime():
                yield f"t.{column} AS {name}"
            case pl.Float64():
                yield f"{{score}} AS {name}"
    yield f"{pack_session()} AS {PACKED}"
    yield f"{long_delay()} AS {LONG_DELAY}"


def sessions_query(*, hashed: bool) -> str:
    """Sessions, with hashes of ids or the ids themselves."""
    columns = ",\n    ".join(_session_columns(hashed=hashed))
    return f"SELECT {columns}\nFROM sessions AS t\nWHERE {OF_WINDOW} {{only_tutors}} {{known}}"


def feedback_query(*, hashed: bool) -> str:
    """Feedback of any session, likewise; a feedback has its session's hash and no id then."""
    columns = (
        f"{hash_of('f.session_id')} AS session_id,"
        f" {pack_feedback(hash_of('f.tutor_id'))} AS {PACKED}"
        if hashed
        else "f.session_id::text AS session_id, coalesce(f.feedback_id::text, '') AS feedback_id,"
        f" f.tutor_id::text AS feedback_tutor_id, {RATING}::integer AS overall_rating"
    )
    return f"SELECT {columns}\nFROM student_feedback AS f\nWHERE true {{known_feedback}}"


# Feedback has no column that tells when its session is. Where most of it is of other sessions the
# server finds what is wanted; elsewhere that join costs more than it saves.
_OF_SESSIONS_READ = f"""
    f.session_id IN (SELECT t.session_id FROM sessions AS t WHERE {OF_WINDOW} {{only_tutors}})
"""  # noqa: S608 - constants only

OF_SESSIONS_READ = f" AND {_OF_SESSIONS_READ}"

MOST_FEEDBACK_PER_SESSION = 2

OF_EVENTS = """
    t.event_timestamp >= {start}
    AND t.event_timestamp < {end}
    AND t.event_type::text IN ('login', 'message_response')
    {only_tutors}
"""


def events_query(*, hashed: bool) -> str:
    """Logins and message responses, with hashes of ids or the ids themselves.

    Nothing of a login can be broken, so its id is of no use; that it has none says the type. An
    enum without one of the labels is compared as text.
    """
    event_id, tutor_id = (_id(f"t.{name}", hashed=hashed) for name in ("event_id", "tutor_id"))
    return f"""
SELECT
    CASE WHEN t.event_type::text = 'message_response' THEN {event_id} END AS event_id,
    {tutor_id} AS tutor_id,
    t.event_timestamp,
    CASE
        WHEN t.event_type::text = 'message_response'
        THEN (t.metadata -> 'response_time_minutes')::text
    END AS response_time_minutes
FROM tutor_events AS t
WHERE {OF_EVENTS} {{known}}
"""  # noqa: S608 - constants only


_LOOKED_UP = {
    "sessions": ("sessions AS t", "t.session_id", "t.session_id", OF_WINDOW + " {only_tutors}"),
    "student_feedback": (
        "student_feedback AS f",
        "f.session_id",
        "f.feedback_id",
        _OF_SESSIONS_READ,
    ),
    "tutor_events": ("tutor_events AS t", "t.event_id", "t.event_id", OF_EVENTS),
}


def ids_query(table: str, hashes: Sequence[int]) -> str:
    """The ids of rows by the hash that they were read with.

    That of a feedback is the hash of its session's id.

    Args:
        table: The table of the rows.
        hashes: Those of the rows that are looked up.
    """
    rows, hashed, wanted, condition = _LOOKED_UP[table]
    return _look_up(rows, hashed, wanted, condition, hashes)


def unknown_tutors_query(table: str, hashes: Sequence[int]) -> str:
    """Likewise the ids of tutors that a table names and the platform's tutors lack."""
    rows, _, _, condition = _LOOKED_UP[table]
    return _look_up(rows, "t.tutor_id", "t.tutor_id", condition, hashes)


def _look_up(rows: str, hashed: str, wanted: str, condition: str, hashes: Sequence[int]) -> str:
    # Joined and not compared with an array: PostgreSQL 13 searches long arrays one by one. To the
    # parser, one literal is one node, however many numbers it has.
    listed = ",".join(map(str, hashes))
    return f"""
SELECT DISTINCT asked.hash, coalesce({wanted}::text, '') AS id
FROM {rows}
JOIN unnest('{{{{{listed}}}}}'::bigint[]) AS asked (hash) ON asked.hash = {_id(hashed, hashed=True)}
WHERE {condition}
"""  # noqa: S608 - numbers and constants only


# What lies before the first year, as minus infinity does, has no date here.
NEWEST = {
    "sessions": """
SELECT max(scheduled_start) AS newest
FROM sessions
WHERE scheduled_start < {end} AND scheduled_start >= '0001-01-02'
""",
    "tutor_events": """
SELECT max(event_timestamp) AS newest
FROM tutor_events
WHERE event_timestamp < {end} AND event_timestamp >= '0001-01-02'
    AND event_type::text IN ('login', 'message_response')
""",
}

INSTANT = """
SELECT transaction_timestamp() AS read_at, pg_current_snapshot()::text AS snapshot
"""

ENCODING = "SELECT current_setting('server_encoding') AS encoding"

# Who shares a snapshot waits for the others, however long they read. A standby exports a snapshot
# without the transactions in progress if one of them has more than 64 savepoints. A reader of that
# snapshot takes their rows for rolled back and marks them so, which hides them from all readers of
# the standby for good.
SHARED = """
SELECT CASE WHEN NOT pg_is_in_recovery() THEN pg_export_snapshot() END AS name
FROM (SELECT set_config('idle_in_transaction_session_timeout', '0', true)) AS patient
"""

IS_EMPTY = {
    name: f"SELECT NOT EXISTS (SELECT FROM {name}) AS is_empty"  # noqa: S608 - constants only
    for name in NEEDED_COLUMNS
}

ONLY_TUTORS = """
    AND t.tutor_id IN (
        SELECT jsonb_array_elements_text(current_setting('tutormax.tutor_ids')::jsonb)
    )
"""

# A row without these instants is never known.
KNOWN = " AND t.created_at <= {}"

KNOWN_FEEDBACK = " AND f.submitted_at <= {0} AND f.created_at <= {0}"

# Whether an index keeps an id unique, among all rows that a query of the table sees.
IS_UNIQUE = """
SELECT bool_and(EXISTS (
    SELECT FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indrelid
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
    WHERE c.oid = to_regclass(id.table_name) AND a.attname = id.column_name
        AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 AND i.indpred IS NULL
        AND NOT (c.relkind = 'r' AND c.relhassubclass)
)) AS is_unique
FROM (VALUES
    ('sessions', 'session_id'),
    ('student_feedback', 'session_id'),
    ('student_feedback', 'feedback_id')
) AS id (table_name, column_name)
"""


def bind_values(
    query: str,
    *,
    tutor_ids: Sequence[str] = (),
    tutor_range: TutorRange = ALL_TUTORS,
    is_utf8: bool = True,
    score: LiteralString = SCORE,
    as_of: datetime | None = None,
    **values: datetime | int | str,
) -> str:
    """A query with its values as literals of SQL, for ADBC binds none in a COPY.

    Rows that were not known yet at ``as_of`` are left out.
    """

    def known(condition: LiteralString) -> sql.Composable:
        return sql.SQL("") if as_of is None else sql.SQL(condition).format(sql.Literal(as_of))

    return (
        sql.SQL(query)
        .format(
            known=known(KNOWN),
            known_feedback=known(KNOWN_FEEDBACK),
            only_tutors=sql.SQL(ONLY_TUTORS if tutor_ids else "")
            + range_condition(tutor_range, is_utf8=is_utf8),
            score=sql.SQL(score),
            **{name: sql.Literal(value) for name, value in values.items()},
        )
        .as_string(None)
    )


def range_condition(tutor_range: TutorRange, *, is_utf8: bool) -> sql.Composed:
    """The condition that a tutor is of the range, in the order of the bytes of UTF-8."""
    tutor_id = sql.SQL(
        't.tutor_id::text COLLATE "C"' if is_utf8 else "convert_to(t.tutor_id::text, 'UTF8')"
    )
    conditions = []
    for operator, bound in ((">=", tutor_range.lower), ("<", tutor_range.upper)):
        if bound is not None:
            literal = sql.Literal(bound if is_utf8 else bound.encode())
            conditions.append(sql.SQL(f"{{}} {operator} {{}}").format(tutor_id, literal))
    condition = sql.SQL(" AND ").join(conditions)
    if tutor_range.lower is None and conditions:
        # Rows without a tutor are of one range, too.
        condition = sql.SQL("({} OR t.tutor_id IS NULL)").format(condition)
    return sql.SQL(" AND {}").format(condition) if conditions else sql.Composed([])
