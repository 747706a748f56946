"""Finds the reference dates whose source rows have changed since they were read.

Each table is scanned once for all dates: its rows are counted by day, and the newest transaction id
of each day is compared with the horizon of each date.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import partial

import dataframely as dy
import polars as pl
from adbc_driver_postgresql import dbapi

from tutormax_assets.source import lake, postgres
from tutormax_assets.source.changed_tutors import check_age
from tutormax_assets.source.horizon import Horizon, UnknownChangesError, expect_same_server
from tutormax_assets.source.lake_files import Lake
from tutormax_assets.source.queries import AGE_OF_ROW, OF_EVENTS, OF_WINDOW, bind_values
from tutormax_assets.source.streams import fetch_frame
from tutormax_assets.source.view import AnySource

_AGES = """
SELECT xmin, age(xmin::text::xid8::xid) AS age,
    (pg_snapshot_xmax(pg_current_snapshot())::text::numeric - xmin)::bigint AS passed
FROM unnest({xmins}::bigint[]) AS horizon (xmin)
"""

_BY_DAY = "SELECT ({instant} AT TIME ZONE {{timezone}})::date AS day, count(*) AS rows"

_SESSIONS = f"""
{_BY_DAY.format(instant="t.scheduled_start")}, min({AGE_OF_ROW.format("t")}) AS age
FROM sessions AS t
WHERE {OF_WINDOW}
GROUP BY day
"""

_EVENTS = f"""
{_BY_DAY.format(instant="t.event_timestamp")}, min({AGE_OF_ROW.format("t")}) AS age
FROM tutor_events AS t
WHERE {OF_EVENTS}
GROUP BY day
"""

_FEEDBACK = f"""
{_BY_DAY.format(instant="t.scheduled_start")}, min({AGE_OF_ROW.format("f")}) AS age
FROM student_feedback AS f
JOIN sessions AS t ON t.session_id = f.session_id
WHERE {OF_WINDOW}
GROUP BY day
"""

_QUERIES = {"sessions": _SESSIONS, "feedback": _FEEDBACK, "events": _EVENTS}


@dataclass(frozen=True)
class DateRead:
    """What a run has read for a reference date.

    Attributes:
        horizon: Distinguishes the rows that came later.
        rows: Number of ``sessions``, of ``feedback`` of these, and of ``events``.
    """

    horizon: Horizon
    rows: Mapping[str, int]


class _Age(dy.Schema):
    xmin = dy.Int64()
    age = dy.Int32()
    passed = dy.Int64()


class _RowsOfDay(dy.Schema):
    day = dy.Date()
    rows = dy.Int64()
    age = dy.Int64()


def find_changed_dates(
    source: AnySource,
    dates: Mapping[date, DateRead],
    *,
    start: datetime,
    end: datetime,
    timezone: str,
    window_days: int,
    most_transactions: int,
) -> dict[date, bool | str]:
    """Find the reference dates whose sessions, feedback or events have changed since.

    Args:
        source: The platform.
        dates: What was read for each date.
        start: The instant at which the first window begins.
        end: The instant at which the last window ends.
        timezone: In which a date begins.
        window_days: Length of the longest window.
        most_transactions: As for ``find_changed_tutors``.

    Returns:
        Whether rows of a date have changed, by date; or the reason why that is unknown. Of a lake,
        whether any file has changed.

    Raises:
        SourceError: The platform cannot be read.
    """
    if isinstance(source, Lake):
        of_lake = lake.open_view(source).horizon()
        return {day: read.horizon != of_lake for day, read in dates.items()}
    with postgres.open_view(source) as view:
        try:
            now = view.horizon()
        except UnknownChangesError as error:
            return dict.fromkeys(dates, str(error))
        [of_day, ages] = view.read(
            partial(_look, dates=dates, start=start, end=end, timezone=timezone)
        )
    found: dict[date, bool | str] = {}
    for day, read in dates.items():
        try:
            expect_same_server(read.horizon, now)
            age = _age(ages, read.horizon, most=most_transactions)
        except UnknownChangesError as error:
            found[day] = str(error)
            continue
        begin = day - timedelta(days=window_days)
        in_window = {
            table: rows.filter(pl.col("day").is_between(begin, day, closed="left"))
            for table, rows in of_day.items()
        }
        found[day] = any(
            int(rows["rows"].sum()) != read.rows[table] or bool((rows["age"] <= age).any())
            for table, rows in in_window.items()
        )
    return found


def _look(
    cursor: dbapi.Cursor,
    *,
    dates: Mapping[date, DateRead],
    start: datetime,
    end: datetime,
    timezone: str,
) -> tuple[dict[str, pl.DataFrame], pl.DataFrame]:
    """The rows of each day by table, and the ages of the horizons of all dates."""
    xmins = sorted({read.horizon.xmin for read in dates.values()})
    ages = fetch_frame(cursor, bind_values(_AGES, xmins=f"{{{','.join(map(str, xmins))}}}"), _Age)
    bound = partial(bind_values, start=start, end=end, timezone=timezone)
    of_day = {
        table: fetch_frame(cursor, bound(query), _RowsOfDay) for table, query in _QUERIES.items()
    }
    return of_day, ages


def _age(ages: pl.DataFrame, horizon: Horizon, *, most: int) -> int:
    _, age, passed = ages.row(by_predicate=pl.col("xmin") == horizon.xmin)
    return check_age(age, passed, most=most)
