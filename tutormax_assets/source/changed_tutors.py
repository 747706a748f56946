"""Finds the tutors whose rows have changed since a run read the platform.

Transaction ids identify rows that were inserted or updated later. Row counts per tutor reveal rows
that were deleted or moved away. The server returns one row per tutor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import dataframely as dy
import polars as pl
from adbc_driver_postgresql import dbapi

from tutormax_assets.source import postgres
from tutormax_assets.source.horizon import Horizon, UnknownChangesError, expect_same_server
from tutormax_assets.source.queries import AGE_OF_ROW, OF_EVENTS, OF_WINDOW, bind_values
from tutormax_assets.source.streams import fetch_frame
from tutormax_assets.source.view import View

# The age of a transaction id is its distance from the newest one, in the transaction that asks.
_AGE = """
SELECT
    age(({xmin}::text)::xid8::xid) AS age,
    (pg_snapshot_xmax(pg_current_snapshot())::text::numeric - {xmin})::bigint AS passed
"""

_ROWS_BY_TUTOR = f"""
SELECT
    coalesce(t.tutor_id::text, '') AS tutor_id,
    count(*) AS rows,
    min({AGE_OF_ROW.format("t")}) AS age
"""

_SESSIONS = f"""
{_ROWS_BY_TUTOR}
FROM sessions AS t
WHERE {OF_WINDOW}
GROUP BY t.tutor_id
"""

_EVENTS = f"""
{_ROWS_BY_TUTOR}
FROM tutor_events AS t
WHERE {OF_EVENTS}
GROUP BY t.tutor_id
"""

_IS_NEWER = f"{AGE_OF_ROW.format('f')} <= {{age}}"

_NEWER_FEEDBACK = f"""
SELECT count(*) AS rows FROM student_feedback AS f WHERE {_IS_NEWER}
"""  # noqa: S608 - constants only

# Feedback belongs to the tutor of its session, whomever it names.
_TUTORS_OF_NEWER_FEEDBACK = f"""
SELECT coalesce(t.tutor_id::text, '') AS tutor_id, count(*) AS rows, 0::bigint AS age
FROM student_feedback AS f
JOIN sessions AS t ON t.session_id = f.session_id
WHERE {_IS_NEWER} AND {OF_WINDOW}
GROUP BY t.tutor_id
"""  # noqa: S608 - constants only

_FEEDBACK = f"""
SELECT coalesce(t.tutor_id::text, '') AS tutor_id, count(*) AS rows, 0::bigint AS age
FROM student_feedback AS f
JOIN sessions AS t ON t.session_id = f.session_id
WHERE {OF_WINDOW}
GROUP BY t.tutor_id
"""  # noqa: S608 - constants only


@dataclass(frozen=True)
class Changes:
    """What has changed.

    Attributes:
        tutor_ids: Tutors whose rows may have changed, sorted.
        horizon: The starting point of the next search.
        read_at: The instant of the view.
        tutors: ``SourceTutors`` at that instant.
    """

    tutor_ids: tuple[str, ...]
    horizon: Horizon
    read_at: datetime
    tutors: pl.DataFrame


class _Age(dy.Schema):
    age = dy.Int32()
    passed = dy.Int64()


class _Rows(dy.Schema):
    rows = dy.Int64()


class _RowsOfTutor(dy.Schema):
    tutor_id = dy.String()
    rows = dy.Int64()
    age = dy.Int64()


def find_changed_tutors(
    view: View,
    then: Horizon,
    read: pl.DataFrame,
    *,
    start: datetime,
    end: datetime,
    most_transactions: int,
) -> Changes:
    """Find the tutors whose sessions, feedback or events in ``[start, end)`` are not those read.

    Args:
        view: The platform at one instant.
        then: The horizon of the run that read them.
        read: By ``tutor_id`` the number of ``sessions``, of those with ``feedback`` and of
            ``events`` that were read.
        start: First instant.
        end: First instant after them.
        most_transactions: How many transactions may have begun since then, below 2^31: ids of
            transactions are compared in a circle of 2^32.

    Raises:
        UnknownChangesError: The changes cannot be determined, as when files of a lake have changed.
        SourceError: The platform cannot be read.
    """
    now = view.horizon()
    if not isinstance(view, postgres.View):
        if now != then:
            raise UnknownChangesError("files of the lake have changed")
        return Changes((), then, view.read_at, view.tutors())
    expect_same_server(then, now)
    bound = partial(bind_values, start=start, end=end)
    of_sessions = partial(
        _of_sessions, bound=bound, then=then, now=now, read=read, most=most_transactions
    )
    of_events = partial(_of_events, bound=bound, then=then, read=read, most=most_transactions)
    found = view.read_at_once({"sessions": of_sessions, "tutor_events": of_events})
    changed = pl.concat(found.values()).unique().sort()
    return Changes(tuple(changed), now, view.read_at, view.tutors())


def _of_sessions(
    cursor: dbapi.Cursor,
    *,
    bound: Callable[..., str],
    then: Horizon,
    now: Horizon,
    read: pl.DataFrame,
    most: int,
) -> pl.Series:
    age = _age(cursor, then, most=most)
    sessions = fetch_frame(cursor, bound(_SESSIONS), _RowsOfTutor)
    changed = [_changed(sessions, read.select("tutor_id", rows="sessions"), age)]
    newer = fetch_frame(cursor, bound(_NEWER_FEEDBACK, age=age), _Rows).item()
    if newer:
        of_newer = fetch_frame(cursor, bound(_TUTORS_OF_NEWER_FEEDBACK, age=age), _RowsOfTutor)
        changed.append(of_newer["tutor_id"])
    if now.feedback_rows - newer != then.feedback_rows:
        # Feedback was deleted or updated. Counting it by tutor is slower, but finds where.
        feedback = fetch_frame(cursor, bound(_FEEDBACK), _RowsOfTutor)
        changed.append(_changed(feedback, read.select("tutor_id", rows="feedback"), age=-1))
    return pl.concat(changed)


def _of_events(
    cursor: dbapi.Cursor,
    *,
    bound: Callable[..., str],
    then: Horizon,
    read: pl.DataFrame,
    most: int,
) -> pl.Series:
    age = _age(cursor, then, most=most)
    events = fetch_frame(cursor, bound(_EVENTS), _RowsOfTutor)
    return _changed(events, read.select("tutor_id", rows="events"), age)


def _age(cursor: dbapi.Cursor, then: Horizon, *, most: int) -> int:
    """The age of the horizon; rows of this age or younger may be new.

    Raises:
        UnknownChangesError: Too many transactions have begun since then.
    """
    return check_age(
        *fetch_frame(cursor, bind_values(_AGE, xmin=then.xmin), _Age).row(0), most=most
    )


def check_age(age: int, passed: int, *, most: int) -> int:
    """The age of a horizon, if transaction ids have not wrapped around since.

    Args:
        age: As PostgreSQL's function ``age`` gives it.
        passed: Number of transactions that have begun since.
        most: How many may have.

    Raises:
        UnknownChangesError: Too many have.
    """
    if not 0 <= passed <= most:
        raise UnknownChangesError(
            f"found {passed} transactions since it was read, expected at most {most}"
        )
    return age


def _changed(found: pl.DataFrame, read: pl.DataFrame, age: int) -> pl.Series:
    """Tutors who have another number of rows than were read, or one that is not older."""
    both = found.join(
        read.filter(pl.col("rows") > 0), on="tutor_id", how="full", coalesce=True, suffix="_read"
    )
    is_other = pl.col("rows").ne_missing(pl.col("rows_read"))
    return both.filter(is_other | (pl.col("age") <= age))["tutor_id"]
