"""Changes of tiers and flags between two reference dates, and their causes.

The sums of a window differ for three reasons: rows of days that entered the window came in, rows of
days that left it aged out, and rows of days in both were corrected between the two reads. The sums
are whole numbers, so the three parts add up exactly.
"""

from collections.abc import Mapping, Sequence
from datetime import date, timedelta

import polars as pl

from tutormax_assets.metrics.schemas import FLAGGED, MOVES, SUMS, TierChanges
from tutormax_assets.metrics.window import first_edge, last_edge, within_window

COMPONENTS: Mapping[str, Sequence[tuple[str, str]]] = {
    "avg_rating": [("rating_sum", "ratings")],
    "first_session_success_rate": [("first_successes", "first_rated")],
    "reschedule_rate": [("reschedules", "reschedules_known")],
    "no_show_count": [("no_shows", "sessions")],
    "engagement_score": [
        ("logins", "sessions"),
        ("score_sum", "scores"),
        ("punctual", "lateness_known"),
    ],
    "learning_objectives_met_pct": [("objectives_met", "objectives_known")],
}
"""The sums that a flagged metric is computed from, each as numerator and denominator."""

_PARTS = ("before", "came_in", "aged_out", "corrected", "after")
_MOVED = ("tutor_id", "window", "move", "tier", "tier_before")
_KEY = ["tutor_id", "window"]


def moves(after: pl.LazyFrame, before: pl.LazyFrame, /) -> pl.LazyFrame:
    """The tutors and windows whose tier or flags differ from those of an earlier reference date.

    Args:
        after: ``TierReasons`` of the reference date.
        before: The same of the earlier one.

    Returns:
        ``tutor_id``, ``window``, ``move``, ``tier``, ``tier_before``, ``metrics``, the list of
        those whose flags differ, and of each metric value and flag, with ``_before`` those of the
        earlier date; sorted by key. A tutor who was not there before is new, and one who is not
        there any more is gone. What moved neither tier nor flag is left out.
    """
    sides = [column for name in FLAGGED for column in (name, f"{name}_flag")]
    after, before = (
        frame.select(*_KEY, pl.col("performance_tier").alias("tier"), *sides, present=True)
        for frame in (after, before)
    )
    both = after.join(before, on=_KEY, how="full", coalesce=True, suffix="_before")
    is_new, is_gone = pl.col("present_before").is_null(), pl.col("present").is_null()
    changed = {
        name: pl.col(f"{name}_flag").ne_missing(pl.col(f"{name}_flag_before")) for name in FLAGGED
    }
    moved = both.filter(
        pl.any_horizontal(
            is_new, is_gone, pl.col("tier") != pl.col("tier_before"), *changed.values()
        )
    )
    # The best tier comes first.
    rank, rank_before = pl.col("tier").to_physical(), pl.col("tier_before").to_physical()
    move = (
        pl.when(is_new)
        .then(_move("new"))
        .when(is_gone)
        .then(_move("gone"))
        .when(rank < rank_before)
        .then(_move("up"))
        .when(rank > rank_before)
        .then(_move("down"))
        .otherwise(_move("same"))
    )
    is_in_both = ~is_new & ~is_gone
    metrics = pl.concat_list(
        pl.when(is_in_both & is_changed).then(pl.lit(name, dtype=pl.Enum(FLAGGED)))
        for name, is_changed in changed.items()
    )
    return moved.select(
        *_KEY,
        move.alias("move"),
        "tier",
        "tier_before",
        metrics.list.drop_nulls().alias("metrics"),
        *(f"{column}{suffix}" for column in sides for suffix in ("", "_before")),
    ).sort(_KEY)


def sum_splits(
    tutors: pl.LazyFrame,
    after: tuple[pl.LazyFrame, pl.LazyFrame],
    before: tuple[pl.LazyFrame, pl.LazyFrame],
    /,
    *,
    days: int,
    window: int,
) -> pl.LazyFrame:
    """Why the sums of a window differ from those of an earlier reference date.

    Rows of the last days came in, and rows of the first days of the window then aged out; all other
    days are in both windows, and what their sums differ by was corrected. Source: the product's
    specification, "Evidence, reasons, changes".

    Args:
        tutors: Rows with ``tutor_id``.
        after: ``WindowSums`` of the window and ``EdgeSums``, of the reference date.
        before: The same of the earlier one.
        days: Days from the earlier one to the reference date.
        window: Length of the window in days.

    Returns:
        The rows, and of each of ``SUMS`` its parts, such as ``ratings_before``, ``_came_in``,
        ``_aged_out``, ``_corrected`` and ``_after``: whole numbers, of which before + came_in -
        aged_out + corrected is after.
    """
    is_apart = days >= window
    came_in = after[0] if is_apart else after[1].filter(edge=last_edge(days))
    aged_out = before[0] if is_apart else before[1].filter(edge=first_edge(window, days))
    parts = {"after": after[0], "before": before[0], "came_in": came_in, "aged_out": aged_out}
    rows = tutors
    for part, sums in parts.items():
        columns = [pl.col(name).cast(pl.Int64).alias(f"{name}_{part}") for name in SUMS]
        rows = rows.join(
            _with_no_shows(sums).select("tutor_id", *columns), on="tutor_id", how="left"
        )
    known = [f"{name}_{part}" for name in SUMS for part in parts]
    return rows.with_columns(pl.col(known).fill_null(0)).with_columns(
        (
            pl.col(f"{name}_after")
            - pl.col(f"{name}_came_in")
            - pl.col(f"{name}_before")
            + pl.col(f"{name}_aged_out")
        ).alias(f"{name}_corrected")
        for name in SUMS
    )


def _with_no_shows(sums: pl.LazyFrame) -> pl.LazyFrame:
    # The metric is the sum itself.
    if "no_shows" in sums.collect_schema():
        return sums
    return sums.with_columns(no_shows="no_show_count")


def tier_changes(moved: pl.LazyFrame, splits: pl.LazyFrame, /, *, days: int) -> pl.LazyFrame:
    """What moved against an earlier reference date, and why.

    Args:
        moved: As ``moves`` gives it.
        splits: Those of its rows of which a flag changed, as ``sum_splits`` gives them.
        days: Days from the earlier date to the reference date.

    Returns:
        ``TierChanges``, sorted by key.
    """
    # Each component would compute them anew.
    splits = splits.cache()
    of_metrics = [
        _of_component(splits, metric, *pair)
        for metric, pairs in COMPONENTS.items()
        for pair in pairs
    ]
    without = moved.filter(pl.col("metrics").list.len() == 0).select(_MOVED)
    return (
        pl.concat([without, *of_metrics], how="diagonal")
        .sort(*_KEY, "metric", "numerator")
        .with_columns(
            days=pl.lit(days, dtype=pl.UInt16),
            position=pl.int_range(pl.len(), dtype=pl.UInt8).over(_KEY),
        )
        .select(TierChanges.column_names())
    )


def _of_component(
    rows: pl.LazyFrame, metric: str, numerator: str, denominator: str
) -> pl.LazyFrame:
    """The rows in which the flag of a metric changed, with the parts of two of its sums."""
    return rows.filter(pl.col("metrics").list.contains(metric)).select(
        *_MOVED,
        metric=pl.lit(metric, dtype=pl.Enum(FLAGGED)),
        flag=pl.col(f"{metric}_flag"),
        flag_before=pl.col(f"{metric}_flag_before"),
        value=pl.col(metric).cast(pl.Float64),
        value_before=pl.col(f"{metric}_before").cast(pl.Float64),
        numerator=pl.lit(numerator, dtype=pl.Enum(SUMS)),
        denominator=pl.lit(denominator, dtype=pl.Enum(SUMS)),
        **{
            f"{role}_{part}": pl.col(f"{name}_{part}")
            for role, name in (("numerator", numerator), ("denominator", denominator))
            for part in _PARTS
        },
    )


def _move(name: str) -> pl.Expr:
    return pl.lit(name, dtype=pl.Enum(MOVES))


def moving_rows(
    after: pl.LazyFrame,
    before: pl.LazyFrame,
    /,
    *,
    column: str,
    reference_date: date,
    days: int,
    window: int,
) -> pl.LazyFrame:
    """The rows that the difference of a window from that of an earlier date is made of.

    Args:
        after: Rows of a snapshot of the reference date, of one tutor.
        before: The same of the earlier one.
        column: The local date of a row.
        reference_date: The later date.
        days: Days from the earlier one to it.
        window: Length of the window in days.

    Returns:
        The rows with their ``part``: came_in, aged_out, corrected_from or corrected_to; a row that
        was corrected is there as it was known then and as it is known now, one that was deleted or
        added only once.
    """
    earlier = reference_date - timedelta(days=days)
    in_after = within_window(column, reference_date=reference_date, days=window)
    in_before = within_window(column, reference_date=earlier, days=window)
    names = after.collect_schema().names()

    def part(rows: pl.LazyFrame, name: str) -> pl.LazyFrame:
        return rows.select(*names, part=pl.lit(name))

    def numbered(rows: pl.LazyFrame) -> pl.LazyFrame:
        # Of rows that are alike, as many are left as one side has more.
        return rows.filter(in_after & in_before).with_columns(
            number=pl.int_range(pl.len()).over(names)
        )

    known_now, known_then = numbered(after), numbered(before)
    key = [*names, "number"]
    return pl.concat(
        [
            part(after.filter(in_after & ~in_before), "came_in"),
            part(before.filter(in_before & ~in_after), "aged_out"),
            part(
                known_then.join(known_now, on=key, how="anti", nulls_equal=True), "corrected_from"
            ),
            part(known_now.join(known_then, on=key, how="anti", nulls_equal=True), "corrected_to"),
        ]
    ).sort(column, "part", maintain_order=True)
