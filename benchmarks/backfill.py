"""A range of reference dates, against the least that persisting its rows takes."""

from collections import Counter
from datetime import date, timedelta
from typing import Any

from psycopg import sql

from benchmarks.answers import TABLE
from benchmarks.contestants import (
    ORACLE,
    Measured,
    differing,
    differing_from_oracle,
    peer,
    product,
)
from benchmarks.platforms import Platform, midnight
from benchmarks.results import median_seconds, peak, result


def measure(platform: Platform, *, dates: int, repeats: int) -> dict[str, Any]:
    """Measure a range of reference dates, the last of which is the platform's.

    The answers of the first, the middle and the last date are compared with those of the SQL
    statement and of the oracle.

    Args:
        platform: One whose rows go back far enough for the first date.
        dates: Number of reference dates.
        repeats: Rounds.

    Returns:
        What ``report`` shows, as JSON can hold it.
    """
    last = platform.end
    first = last - timedelta(days=dates - 1)
    ours: list[Measured] = []
    floor: list[Measured] = []
    for _ in range(repeats):
        platform.forget(first, last)
        ours.append(product(platform, "backfill", "--from", str(first), "--to", str(last)))
        floor.append(peer(platform, "upsert_floor", last))
    rows_differing: Counter[str] = Counter()
    days = {first, first + timedelta(days=dates // 2), last}
    for day in days:
        rows_differing["floor"] += differing(platform, day, exact=True)
    for day in days:
        platform.renew_twin()
        peer(platform, "sql", day)
        rows_differing["sql"] += differing(platform, day)
        rows_differing[ORACLE] += differing_from_oracle(platform, day)
    return result(
        "backfill",
        platform,
        ours=median_seconds(ours),
        peers={"floor": median_seconds(floor)["total"]},
        compared="whole_process",
        peak_rss_bytes=peak(ours),
        peer_peak_rss_bytes={"floor": peak(floor)},
        differing=rows_differing,
        dates=dates,
        rows_persisted=_rows(platform, first, last),
        repeats=repeats,
    )


def _rows(platform: Platform, first: date, last: date) -> int:
    query = sql.SQL("SELECT count(*) FROM {} WHERE calculation_date BETWEEN %s AND %s")
    with platform.connect() as connection:
        [rows] = connection.execute(
            query.format(TABLE), [midnight(first), midnight(last)]
        ).fetchone() or (0,)
    return int(rows)
