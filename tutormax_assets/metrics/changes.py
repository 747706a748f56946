"""What moved: tiers and flags of a reference date against those of an earlier one, and why.

The sums of a window differ for three reasons, which add up exactly because the sums are whole
numbers: rows of days that entered the window came in, rows of days that left it aged out, and rows
of days in both were corrected between the two readings of the platform.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial

import polars as pl

from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, LOWER_IS_BETTER, Policy
from tutormax_assets.metrics.schemas import MOVES, SumSplit, TierChanges
from tutormax_assets.metrics.window import event_sums, session_sums, within_window

FLAGGED = (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)

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

_SUMS = {name for pairs in COMPONENTS.values() for pair in pairs for name in pair}
_SPLIT = ("before", "came_in", "aged_out", "corrected", "after")
_KEY = ["tutor_id", "window"]
_PART = ["tutor_id", "is_common"]


def moves(after: pl.LazyFrame, before: pl.LazyFrame, /) -> pl.LazyFrame:
    """The tutors and windows whose tier or flags differ from those of an earlier reference date.

    Args:
        after: ``TierReasons`` of the reference date.
        before: The same of the earlier one.

    Returns:
        ``tutor_id``, ``window``, ``move``, ``tier``, ``tier_before`` and ``metrics``, the list of
        those whose flags differ, sorted by key. A tutor who was not there before is new, and one
        who is not there any more is gone. What moved neither tier nor flag is left out.
    """
    flags = [f"{name}_flag" for name in FLAGGED]
    after, before = (
        frame.select(*_KEY, pl.col("performance_tier").alias("tier"), *flags, present=True)
        for frame in (after, before)
    )
    both = after.join(before, on=_KEY, how="full", coalesce=True, suffix="_before")
    # The best tier comes first.
    rank, rank_before = pl.col("tier").to_physical(), pl.col("tier_before").to_physical()
    move = (
        pl.when(pl.col("present_before").is_null())
        .then(_move("new"))
        .when(pl.col("present").is_null())
        .then(_move("gone"))
        .when(rank < rank_before)
        .then(_move("up"))
        .when(rank > rank_before)
        .then(_move("down"))
        .otherwise(_move("same"))
    )
    is_in_both = pl.col("present") & pl.col("present_before")
    changed = [
        pl.when(is_in_both & pl.col(f"{name}_flag").ne_missing(pl.col(f"{name}_flag_before"))).then(
            pl.lit(name)
        )
        for name in FLAGGED
    ]
    metrics = pl.concat_list(changed).list.drop_nulls().alias("metrics")
    return (
        both.select(*_KEY, move.alias("move"), "tier", "tier_before", metrics)
        .filter((pl.col("move") != "same") | (pl.col("metrics").list.len() > 0))
        .sort(_KEY)
    )


def tier_changes(
    moved: pl.LazyFrame,
    after: pl.LazyFrame,
    before: pl.LazyFrame,
    splits: pl.LazyFrame,
    /,
    *,
    days: int,
) -> pl.LazyFrame:
    """What moved against an earlier reference date, and why.

    Args:
        moved: As ``moves`` gives it.
        after: ``TierReasons`` of the reference date.
        before: The same of the earlier one.
        splits: ``SumSplit`` with the ``window``, of the tutors that moved.
        days: Days from the earlier one to the reference date.

    Returns:
        ``TierChanges``, sorted by key.
    """
    components = pl.LazyFrame(
        [(metric, *pair) for metric, pairs in COMPONENTS.items() for pair in pairs],
        schema=["metric", "numerator", "denominator"],
        orient="row",
    )
    rows = moved.rename({"metrics": "metric"}).explode("metric")
    for frame, suffix in ((after, ""), (before, "_before")):
        rows = rows.join(_by_metric(frame, suffix), on=[*_KEY, "metric"], how="left")
    rows = rows.join(components, on="metric", how="left")
    for role in ("numerator", "denominator"):
        of_role = splits.rename({"sum": role, **{part: f"{role}_{part}" for part in _SPLIT}})
        rows = rows.join(of_role, on=[*_KEY, role], how="left").with_columns(
            # A sum that is 0 in all of its parts has no row.
            pl.when(pl.col(role).is_not_null()).then(pl.col(f"{role}_{part}").fill_null(0))
            for part in _SPLIT
        )
    return (
        rows.with_columns(days=pl.lit(days, dtype=pl.UInt16))
        .sort(*_KEY, "metric", "numerator")
        .select(TierChanges.column_names())
    )


def _by_metric(reasons: pl.LazyFrame, suffix: str) -> pl.LazyFrame:
    """The value and the flag of each metric in a row of its own."""
    return pl.concat(
        reasons.select(
            *_KEY,
            pl.lit(name).alias("metric"),
            pl.col(name).cast(pl.Float64).alias(f"value{suffix}"),
            pl.col(f"{name}_flag").alias(f"flag{suffix}"),
        )
        for name in FLAGGED
    )


def _move(name: str) -> pl.Expr:
    return pl.lit(name, dtype=pl.Enum(MOVES))


def sum_splits(
    after: tuple[pl.LazyFrame, pl.LazyFrame],
    before: tuple[pl.LazyFrame, pl.LazyFrame],
    /,
    *,
    reference_date: date,
    days: int,
    window: int,
    policy: Policy,
) -> pl.LazyFrame:
    """Why the sums of a window differ from those of an earlier reference date.

    Source: the product's specification, "Evidence, reasons, changes".

    Args:
        after: ``SessionsSnapshot`` and ``TutorEventsSnapshot`` of the reference date.
        before: The same of the earlier one.
        reference_date: The later one.
        days: Days from the earlier one to it.
        window: Length of the window in days.
        policy: Says when a session is punctual and when a first session is a success.

    Returns:
        ``SumSplit``, one row per tutor and sum that is not 0 in all of its parts.
    """
    earlier = reference_date - timedelta(days=days)
    sums = partial(_sums, window=window, policy=policy)
    value, is_common = pl.col("value"), pl.col("is_common")
    nothing = pl.lit(0, dtype=pl.Int64)
    of_after = sums(*after, at=reference_date, other=earlier).select(
        "tutor_id",
        "sum",
        before=nothing,
        came_in=pl.when(~is_common).then(value).otherwise(0),
        aged_out=nothing,
        corrected=pl.when(is_common).then(value).otherwise(0),
        after=value,
    )
    of_before = sums(*before, at=earlier, other=reference_date).select(
        "tutor_id",
        "sum",
        before=value,
        came_in=nothing,
        aged_out=pl.when(~is_common).then(value).otherwise(0),
        corrected=pl.when(is_common).then(-value).otherwise(0),
        after=nothing,
    )
    return (
        pl.concat([of_after, of_before])
        .group_by("tutor_id", "sum")
        .agg(pl.all().sum())
        .filter(pl.any_horizontal(pl.col(_SPLIT) != 0))
        .sort("tutor_id", "sum")
        .select(SumSplit.column_names())
    )


def _sums(
    sessions: pl.LazyFrame,
    events: pl.LazyFrame,
    *,
    at: date,
    other: date,
    window: int,
    policy: Policy,
) -> pl.LazyFrame:
    """The sums of a window by tutor, apart for the days that it shares with that of another date.

    Returns:
        ``tutor_id``, ``is_common``, ``sum`` and its ``value``.
    """

    def within(rows: pl.LazyFrame, column: str) -> pl.LazyFrame:
        is_common = within_window(column, reference_date=other, days=window)
        of_window = within_window(column, reference_date=at, days=window)
        return rows.filter(of_window).with_columns(is_common.alias("is_common"))

    of_sessions = session_sums(within(sessions, "scheduled_date"), policy=policy, by=_PART)
    of_events = event_sums(within(events, "event_date"), by=_PART)
    return pl.concat(
        sums.select(*_PART, pl.col(names).cast(pl.Int64)).unpivot(
            on=names, index=_PART, variable_name="sum", value_name="value"
        )
        for sums, names in (
            (of_sessions, sorted(_SUMS - {"logins"})),
            (of_events, ["logins"]),
        )
    )


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


@dataclass(frozen=True)
class TierRun:
    """The unbroken run of a tier that ends at a reference date.

    Attributes:
        tier_since: Its first reference date.
        held_days: Days from the first to the last date of it, both included.
        dates_missing: Of these, those that were not computed for the tutor.
        previous_tier: The tier before it; None if there is none.
    """

    tier_since: date
    held_days: int
    dates_missing: int
    previous_tier: str | None


def tier_run(tiers: Mapping[date, str], /, *, reference_date: date) -> TierRun | None:
    """The run of the tier of a reference date; None where the date has none.

    A date that was not computed does not break a run.

    Args:
        tiers: The tiers of a tutor and window by reference date, in any order.
        reference_date: The last date of the run; later ones do not count.
    """
    tier = tiers.get(reference_date)
    if tier is None:
        return None
    since, computed, previous = reference_date, 0, None
    for day in sorted((one for one in tiers if one <= reference_date), reverse=True):
        if tiers[day] != tier:
            previous = tiers[day]
            break
        since, computed = day, computed + 1
    held_days = (reference_date - since).days + 1
    return TierRun(since, held_days, held_days - computed, previous)
