"""Several columns of a row as one number.

Server and driver spend more on a field than on what is in it. What PostgreSQL packs and what Polars
takes apart again stand side by side here.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate

import polars as pl

from tutormax_assets.metrics.schemas import SourceSessions
from tutormax_assets.source.contract import columns_read

PACKED = "packed"
"""Name of the column that holds the others."""

_UNKNOWN_FLAG = 2

LONG_DELAY = "long_delay"
"""Name of the column of delays that are too long to be packed, of 32 years and more."""

# Of a bigint, what is no integer stays on the same side of whatever the contract asks. The longest
# field comes last, for the sum of the others is an integer then, and no bigint.
_BITS_OF_NUMBERS = {"late_start_minutes": 24, "session_number": 32}
_LARGEST_NUMBER = 2**31 - 1
_SMALLEST_NUMBER = -1
# Zero is for null.
_CODE_OF_ZERO = 1 - _SMALLEST_NUMBER

_RATING_BITS = 3
RATING = f"least(greatest(f.overall_rating, 0), {2**_RATING_BITS - 1})"
"""SQL of the rating of a feedback ``f``, likewise; null becomes zero."""


def _session_fields() -> Mapping[str, tuple[str, int, int]]:
    """The column of each packed field of a session, at which bit it begins, and how many it has."""
    schema = pl.Schema(SourceSessions)
    columns = columns_read(SourceSessions, "sessions")
    bits = {
        **{
            name: 2 if SourceSessions.columns()[name].nullable else 1
            for name in columns
            if schema[name] == pl.Boolean
        },
        **_BITS_OF_NUMBERS,
    }
    first = accumulate(bits.values(), initial=0)
    return {name: (columns[name], at, bits[name]) for name, at in zip(bits, first, strict=False)}


_SESSION_FIELDS = _session_fields()


def pack_session() -> str:
    """SQL of a bigint of the whole numbers and booleans of a session ``t``."""
    return " + ".join(
        f"{_code(name, f't.{column}')} * {2**first}"
        for name, (column, first, _) in _SESSION_FIELDS.items()
    )


def long_delay() -> str:
    """SQL of the delay of a session ``t``, where it is too long to be packed, as an integer."""
    longest = _largest("late_start_minutes")
    return (
        f"CASE WHEN t.late_start_minutes > {longest}"
        f" THEN least(t.late_start_minutes, {_LARGEST_NUMBER})::integer END"
    )


def unpack_session() -> Iterator[pl.Expr]:
    """The columns of ``SourceSessions`` that ``pack_session`` packs."""
    for name, (_, first, bits) in _SESSION_FIELDS.items():
        code = pl.col(PACKED) // 2**first % 2**bits
        if name in _BITS_OF_NUMBERS:
            value = pl.when(code > 0).then(code - _CODE_OF_ZERO).cast(pl.Int32)
            if name == "late_start_minutes":
                value = pl.coalesce(LONG_DELAY, value)
        elif SourceSessions.columns()[name].nullable:
            value = pl.when(code != _UNKNOWN_FLAG).then(code == 1)
        else:
            value = code == 1
        yield value.alias(name)


def _code(name: str, column: str) -> str:
    if name in _BITS_OF_NUMBERS:
        largest = _largest(name)
        number = f"{column}::bigint" if largest == _LARGEST_NUMBER else column
        return (
            f"CASE WHEN {column} < {_SMALLEST_NUMBER} THEN 1"
            f" WHEN {column} > {largest} THEN {largest + _CODE_OF_ZERO}"
            f" ELSE coalesce({number} + {_CODE_OF_ZERO}, 0) END"
        )
    if SourceSessions.columns()[name].nullable:
        return f"coalesce({column}::integer, {_UNKNOWN_FLAG})"
    return f"({column} IS NOT NULL)::integer"


def _largest(name: str) -> int:
    return min((1 << _BITS_OF_NUMBERS[name]) - 1 - _CODE_OF_ZERO, _LARGEST_NUMBER)


def pack_feedback(tutor_hash: str) -> str:
    """SQL of a bigint of the tutor's hash and the rating of a feedback ``f``.

    The rating takes the place of the lowest bits of the hash.

    Args:
        tutor_hash: SQL of the hash.
    """
    return f"({tutor_hash} & {-(2**_RATING_BITS)}) | {RATING}"


def unpack_feedback() -> Iterator[pl.Expr]:
    """Tutor and rating of a feedback, on rows that have the hash of the session's ``tutor_id``.

    Another tutor than the session's is a number that is not the session's tutor's hash.
    """
    of_feedback, of_session = pl.col(PACKED), pl.col("tutor_id")
    values = 2**_RATING_BITS
    is_sessions_tutor = of_feedback // values == of_session // values
    yield (
        pl.when(is_sessions_tutor)
        .then(of_session)
        .otherwise(of_feedback)
        .alias("feedback_tutor_id")
    )
    yield (of_feedback % values).cast(pl.Int32).alias("overall_rating")
