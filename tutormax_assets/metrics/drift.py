"""Compares the stored values of a reference date with the source, and finds why they differ.

Rows of a snapshot have no key, so they are matched by their values; of equal rows, the number
counts.
"""

from collections.abc import Iterator, Sequence
from datetime import date

import polars as pl

from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import (
    LOGIN,
    SessionsSnapshot,
    TutorEventsSnapshot,
    WindowMetrics,
    origins,
)
from tutormax_assets.metrics.window import within_window

LATE_FEEDBACK, CORRECTED, DELETED, NEW_ROWS = "late feedback", "corrected", "deleted", "new rows"
POLICY, ROSTER = "policy", "roster"
CAUSES = (LATE_FEEDBACK, CORRECTED, DELETED, NEW_ROWS, POLICY, ROSTER)
"""Causes of a difference: row changes, another policy or version, tutors that joined or left."""

METRICS = tuple(name for name in WindowMetrics.column_names() if name not in ("tutor_id", "window"))
TIER = "performance_tier"

_ROW = "row"
_RATING = "overall_rating"


def session_changes(stored: pl.LazyFrame, source: pl.LazyFrame, /) -> pl.LazyFrame:
    """Find the changes of sessions.

    A session with changed values is recognized by its tutor, date and number.

    Args:
        stored: ``SessionsSnapshot``.
        source: The same rows as the source has them.

    Returns:
        ``tutor_id``, ``date``, ``column`` and ``cause``; a row that came or went as a whole has the
        column ``row``.
    """
    columns = SessionsSnapshot.column_names()
    values = [name for name in columns if name not in ("tutor_id", "scheduled_date")]
    but_rating = [name for name in columns if name != _RATING]
    gone, came = _apart(stored.select(columns), source.select(columns), columns)
    rated_anew, gone, came = _pairs(gone, came, but_rating)
    changed, gone, came = _pairs(gone, came, ["tutor_id", "scheduled_date", "session_number"])
    of_values = [_changes_of(pairs, name) for pairs in (rated_anew, changed) for name in values]
    return pl.concat(
        [
            *of_values,
            _whole(gone, "scheduled_date", DELETED),
            _whole(came, "scheduled_date", NEW_ROWS),
        ]
    )


def event_changes(stored: pl.LazyFrame, source: pl.LazyFrame, /) -> pl.LazyFrame:
    """Find the changes of logins and message responses.

    Args:
        stored: ``TutorEventsSnapshot``.
        source: The same rows as the source has them.

    Returns:
        As ``session_changes``; the column is ``event_type`` of a login, and else
        ``response_time_minutes``.
    """
    columns = TutorEventsSnapshot.column_names()
    gone, came = _apart(stored.select(columns), source.select(columns), columns)
    corrected, gone, came = _pairs(gone, came, ["tutor_id", "event_date", "event_type"])
    is_login = pl.col("event_type") == LOGIN
    return pl.concat(
        rows.select(
            "tutor_id",
            pl.col("event_date").alias("date"),
            pl.when(is_login)
            .then(pl.lit("event_type"))
            .otherwise(pl.lit("response_time_minutes"))
            .alias("column"),
            pl.lit(cause).alias("cause"),
        )
        for rows, cause in ((corrected, CORRECTED), (gone, DELETED), (came, NEW_ROWS))
    )


def differences(stored: pl.LazyFrame, source: pl.LazyFrame, /) -> pl.LazyFrame:
    """Find the values that differ between the stored tiers of a date and the source's.

    Args:
        stored: ``TutorTiers``.
        source: The same as computed from the source.

    Returns:
        ``tutor_id``, ``window``, ``metric``, ``stored`` and ``now`` as texts, sorted. Of a tutor
        who is in one of them only, the tier differs.
    """
    key = ["tutor_id", "window"]
    names = [*METRICS, TIER]
    sides = [
        rows.select(*key, pl.col(names).cast(pl.String)).unpivot(
            index=key, variable_name="metric", value_name=name
        )
        for rows, name in ((stored, "stored"), (source, "now"))
    ]
    both = sides[0].join(sides[1], on=[*key, "metric"], how="full", coalesce=True)
    differs = pl.col("stored").ne_missing(pl.col("now"))
    is_one_sided = (pl.col("stored").is_null() | pl.col("now").is_null()).all().over(key)
    return both.filter(differs & (~is_one_sided | (pl.col("metric") == TIER))).sort(*key, "metric")


def with_causes(
    found: pl.DataFrame,
    changes: pl.DataFrame,
    of_policy: pl.DataFrame,
    /,
    *,
    reference_date: date,
    policy: Policy,
) -> pl.DataFrame:
    """Add the causes of differences.

    Args:
        found: ``differences`` between what is stored and the source.
        changes: What ``session_changes`` and ``event_changes`` return.
        of_policy: ``differences`` between the stored tiers and those recomputed from stored rows.
        reference_date: The date.
        policy: Its windows.

    Returns:
        The rows with their ``causes``, a list sorted as ``CAUSES``. Differences without another
        cause count as corrected: the snapshots do not contain broken values.
    """
    relevant = pl.concat(
        changes.filter(within_window("date", reference_date=reference_date, days=days))
        .join(_relevance(), on="column")
        .select("tutor_id", "metric", "cause", window=pl.lit(window_name(days)))
        for days in policy.windows
    ).unique()
    key = ["tutor_id", "window", "metric"]
    relevant = relevant.select(*key, "cause")
    by_policy = of_policy.select(*key, cause=pl.lit(POLICY))
    by_value = pl.concat([relevant, by_policy]).unique()
    # A tier differs for the reasons for which its metrics do.
    of_values = found.filter(pl.col("metric") != TIER).join(by_value, on=key, how="left")
    of_tiers = of_values.with_columns(metric=pl.lit(TIER)).select(*key, "cause")
    causes = (
        pl.concat([of_values.select(*key, "cause"), of_tiers, by_policy.filter(metric=TIER)])
        .drop_nulls("cause")
        .group_by(key)
        .agg(pl.col("cause").unique().cast(pl.Enum(CAUSES)).sort().alias("causes"))
    )
    is_roster = (pl.col("metric") == TIER) & (pl.col("stored").is_null() | pl.col("now").is_null())
    listed = pl.List(pl.Enum(CAUSES))
    return found.join(causes, on=key, how="left", maintain_order="left").with_columns(
        causes=pl.when(is_roster)
        .then(pl.lit([ROSTER], dtype=listed))
        .otherwise(pl.coalesce("causes", pl.lit([CORRECTED], dtype=listed)))
    )


def _relevance() -> pl.DataFrame:
    """Which metric is computed from a column of a snapshot, or from its rows as a whole."""
    pairs = {
        (column, metric)
        for metric, columns in origins(WindowMetrics).items()
        for table, source in columns
        for column in _columns_of(table, source)
        if metric in METRICS
    }
    return pl.DataFrame(sorted(pairs), schema=["column", "metric"], orient="row")


def _columns_of(table: str, column: str) -> Iterator[str]:
    yield column
    if table == "sessions_snapshot":
        yield _ROW


def _apart(
    stored: pl.LazyFrame, source: pl.LazyFrame, columns: Sequence[str]
) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """The rows that are only stored, and those that are only there now."""
    _, gone, came = _pairs(stored, source, columns)
    return gone, came


def _pairs(
    gone: pl.LazyFrame, came: pl.LazyFrame, key: Sequence[str]
) -> tuple[pl.LazyFrame, pl.LazyFrame, pl.LazyFrame]:
    """Rows that went and came with the same key, side by side, and the others of both."""
    gone, came = (_numbered(rows, key) for rows in (gone, came))
    on = [*key, "number"]
    pairs = gone.join(came, on=on, how="inner", nulls_equal=True, suffix="_now")
    gone_alone, came_alone = (
        one.join(other, on=on, how="anti", nulls_equal=True).drop("number")
        for one, other in ((gone, came), (came, gone))
    )
    return pairs.drop("number"), gone_alone, came_alone


def _numbered(rows: pl.LazyFrame, key: Sequence[str]) -> pl.LazyFrame:
    return rows.with_columns(number=pl.int_range(pl.len()).over(key))


def _changes_of(pairs: pl.LazyFrame, name: str) -> pl.LazyFrame:
    """The pairs in which a value differs."""
    if f"{name}_now" not in pairs.collect_schema():
        return pairs.filter(False).select(
            "tutor_id", date="scheduled_date", column=pl.lit(name), cause=pl.lit(CORRECTED)
        )
    before, after = pl.col(name), pl.col(f"{name}_now")
    cause = pl.lit(CORRECTED)
    if name == _RATING:
        cause = (
            pl.when(before.is_null())
            .then(pl.lit(LATE_FEEDBACK))
            .when(after.is_null())
            .then(pl.lit(DELETED))
            .otherwise(cause)
        )
    return pairs.filter(before.ne_missing(after)).select(
        "tutor_id",
        pl.col("scheduled_date").alias("date"),
        pl.lit(name).alias("column"),
        cause.alias("cause"),
    )


def _whole(rows: pl.LazyFrame, column: str, cause: str) -> pl.LazyFrame:
    return rows.select(
        "tutor_id",
        pl.col(column).alias("date"),
        pl.lit(_ROW).alias("column"),
        pl.lit(cause).alias("cause"),
    )
