"""A second run of a reference date, after some of the tutors changed."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from psycopg import sql

from benchmarks.answers import TABLE, VALUES
from benchmarks.contestants import (
    ORACLE,
    Measured,
    differing,
    differing_from_oracle,
    peer,
    product,
)
from benchmarks.peers import ROSTER, sampled
from benchmarks.platforms import Platform, midnight
from benchmarks.results import median_seconds, peak, result

CHANGED_SHARE = 0.01
"""Share of the roster's tutors that change between the runs."""

# Its own reverse, so that the platform is as it was afterwards.
_CHANGE = """
    UPDATE sessions SET no_show = NOT no_show
    WHERE session_id IN (
        SELECT DISTINCT ON (tutor_id) session_id FROM sessions
        WHERE tutor_id = ANY(%(tutor_ids)s) AND scheduled_start < %(end)s
        ORDER BY tutor_id, scheduled_start DESC, session_id
    )
"""
_BEFORE = sql.Identifier("benchmark_before")


def measure(platform: Platform, *, repeats: int) -> dict[str, Any]:
    """Measure a run and, after the newest session of 1 % of the tutors changed, a second one.

    Args:
        platform: Whose last date is computed.
        repeats: Rounds, each from a table without the date.

    Returns:
        What ``report`` shows, as JSON can hold it; the stages of the first run begin with
        ``first_``. ``rows_written`` are the rows of which the second run made a new version, and
        ``rows_changed`` those whose values moved, both of the last round.
    """
    day = platform.end
    run = ("run", "--date", day.isoformat())
    firsts: list[Measured] = []
    seconds: list[Measured] = []
    of_sql: list[Measured] = []
    rows_differing: Counter[str] = Counter()
    for _ in range(repeats):
        platform.forget(day, day)
        firsts.append(product(platform, *run))
        peer(platform, "sql", day)
        with _changed(platform) as tutors_changed:
            seconds.append(product(platform, *run))
            rows = _rows(platform)
            of_sql.append(peer(platform, "sql", day))
            rows_differing["sql"] += differing(platform, day)
            rows_differing[ORACLE] += differing_from_oracle(platform, day)
    # The platform is as it was; its table would hold what it is not.
    platform.forget(day, day)
    first, second = median_seconds(firsts), median_seconds(seconds)
    return result(
        "again",
        platform,
        ours={**second, **{f"first_{stage}": value for stage, value in first.items()}},
        peers={"first": first["read_to_persisted"], "sql": median_seconds(of_sql)["total"]},
        compared="read_to_persisted",
        peak_rss_bytes=peak(seconds),
        peer_peak_rss_bytes={"sql": peak(of_sql)},
        differing=rows_differing,
        tutors_changed=tutors_changed,
        **rows,
        repeats=repeats,
    )


@contextmanager
def _changed(platform: Platform) -> Iterator[int]:
    """Change some tutors for as long as the block lasts; keep how the table was before."""
    with platform.connect() as connection:
        roster = sorted(tutor_id for (tutor_id,) in connection.execute(ROSTER))
        tutor_ids = sampled(roster, max(1, round(CHANGED_SHARE * len(roster))))
        parameters = {"tutor_ids": tutor_ids, "end": midnight(platform.end)}
        connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(_BEFORE))
        connection.execute(
            sql.SQL(
                "CREATE TABLE {} AS SELECT *, xmin::text AS version FROM {}"
                " WHERE calculation_date = {}"
            ).format(_BEFORE, TABLE, sql.Literal(midnight(platform.end)))
        )
        connection.execute(_CHANGE, parameters)
        connection.execute("CHECKPOINT")
        try:
            yield len(tutor_ids)
        finally:
            connection.execute(_CHANGE, parameters)
            connection.execute(sql.SQL("DROP TABLE {}").format(_BEFORE))
            connection.execute("VACUUM sessions")


def _rows(platform: Platform) -> dict[str, int]:
    """How many rows of the date have new values, a new version, and are there at all."""
    query = sql.SQL(
        "SELECT count(*) FILTER (WHERE ({ours}) IS DISTINCT FROM ({before})),"
        " count(*) FILTER (WHERE o.xmin::text IS DISTINCT FROM b.version), count(*)"
        " FROM {table} AS o FULL JOIN {kept} AS b USING (metric_id)"
        " WHERE coalesce(o.calculation_date, b.calculation_date) = {instant}"
    ).format(
        ours=sql.SQL(", ").join(sql.Identifier("o", name) for name in VALUES),
        before=sql.SQL(", ").join(sql.Identifier("b", name) for name in VALUES),
        table=TABLE,
        kept=_BEFORE,
        instant=sql.Literal(midnight(platform.end)),
    )
    with platform.connect() as connection:
        row = connection.execute(query).fetchone() or (0, 0, 0)
    return dict(zip(("rows_changed", "rows_written", "rows"), row, strict=True))
