"""Comparing what a peer wrote into the twin with what the product wrote into the table."""

from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from chaos.oracle import COUNTS, SHARES

TABLE = sql.Identifier("tutor_performance_metrics")
TWIN_NAME = "benchmark_twin"
TWIN = sql.Identifier(TWIN_NAME)

TIER = "performance_tier"
VALUES = (*COUNTS, *SHARES, TIER)

ROUNDING = 0.01
"""How far the rates of a peer that rounds halves in its own way may be from ours."""

_QUERY = """
SELECT tutor_id, "window"
FROM (SELECT * FROM {table} WHERE calculation_date = %(date)s {sample}) AS ours
FULL JOIN (SELECT * FROM {twin} WHERE calculation_date = %(date)s) AS theirs
    USING (tutor_id, "window")
WHERE ours.metric_id IS NULL OR theirs.metric_id IS NULL OR {differ}
    OR (ours.{tier} IS DISTINCT FROM theirs.{tier} AND {rates_equal})
ORDER BY tutor_id, "window"
"""


def differences(
    connection: psycopg.Connection[Any],
    *,
    date: datetime,
    rounding: float = ROUNDING,
    sample: bool = False,
) -> list[tuple[str, str]]:
    """Tutor and window of the rows of a reference date in which table and twin differ.

    Counts and nulls must be equal, rates within ``rounding``, tiers wherever the rates are equal:
    a hundredth may lie on either side of a threshold.

    Args:
        connection: To the database of both.
        date: The instant that the reference date stands for.
        rounding: How far rates may differ.
        sample: Compare the tutors of the twin only.
    """
    differ = [sql.SQL("ours.{0} IS DISTINCT FROM theirs.{0}").format(_name(n)) for n in COUNTS]
    differ += [
        sql.SQL("num_nulls(ours.{0}, theirs.{0}) = 1 OR abs(ours.{0} - theirs.{0}) > {1}").format(
            _name(name), sql.Literal(rounding and rounding + 1e-9)
        )
        for name in SHARES
    ]
    equal = [sql.SQL("ours.{0} IS NOT DISTINCT FROM theirs.{0}").format(_name(n)) for n in SHARES]
    query = sql.SQL(_QUERY).format(
        table=TABLE,
        twin=TWIN,
        sample=sql.SQL("AND tutor_id IN (SELECT tutor_id FROM {})").format(TWIN)
        if sample
        else sql.SQL(""),
        differ=sql.SQL(" OR ").join(differ),
        tier=_name(TIER),
        rates_equal=sql.SQL(" AND ").join(equal),
    )
    return connection.execute(query, {"date": date}).fetchall()


def _name(column: str) -> sql.Identifier:
    return sql.Identifier(column)
