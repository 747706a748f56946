"""The metrics of a window, each defined once, from sums that a tutor's rows add up to.

The starts of the windows, and of their edges, divide the days before a reference date into
segments. What a tutor's rows of a segment add up to is computed once, and a window is the sum of
its segments.
"""

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from functools import partial
from itertools import pairwise

import polars as pl

from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import LOGIN, EdgeSums, WindowMetrics, WindowSums

# Sums are taken over whole multiples of these, so that they are exact and the order of the rows
# does not show: a float holds every whole number up to 2**53.
_SCORE_DECIMALS = 9
_MINUTES_DECIMALS = 6

# 2**27 + 1 splits a float's 53 bits in halves; from 2**52 on a float has no decimals.
_SPLITTER = 2.0**27 + 1
_WHOLE_FROM = 2.0**52


def within_window(column: str, *, reference_date: date, days: int) -> pl.Expr:
    """Whether a local date lies in ``[reference_date - days, reference_date)``."""
    start = reference_date - timedelta(days=days)
    return pl.col(column).is_between(start, reference_date, closed="left")


def window_metrics(
    roster: pl.LazyFrame,
    sessions: pl.LazyFrame,
    events: pl.LazyFrame,
    /,
    *,
    reference_date: date,
    windows: Sequence[int],
    policy: Policy,
) -> pl.LazyFrame:
    """The metrics of every tutor of the roster over the days before the reference date.

    However many windows there are, sessions and events are gone through once.

    Args:
        roster: ``TutorRoster``.
        sessions: ``SessionsSnapshot``; rows outside the windows and of other tutors do not count.
        events: ``TutorEventsSnapshot``, likewise.
        reference_date: The day after the last one of each window.
        windows: Lengths of the windows in days, the shortest first.
        policy: Weights, limits and scale.

    Returns:
        ``WindowSums``, one row per window and tutor of the roster, the shortest window first and
        each of them sorted by tutor. Rates and means are rounded to two decimals, half to even.
    """
    found, _ = windows_and_edges(
        roster, sessions, events, reference_date=reference_date, windows=windows, policy=policy
    )
    return found


def windows_and_edges(
    roster: pl.LazyFrame,
    sessions: pl.LazyFrame,
    events: pl.LazyFrame,
    /,
    *,
    reference_date: date,
    windows: Sequence[int],
    policy: Policy,
    edges: Sequence[int] = (),
) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """The metrics of windows, and what the rows at the edges of the windows add up to.

    To collect both together goes through sessions and events once.

    Args:
        roster: As for ``window_metrics``.
        sessions: Likewise.
        events: Likewise.
        reference_date: Likewise.
        windows: Likewise.
        policy: Likewise.
        edges: Lengths of the edges in days.

    Returns:
        What ``window_metrics`` returns, and ``EdgeSums``: one row for each tutor and edge that has
        a row of the tutor.
    """
    of_windows, spans = {window_name(days): (0, days) for days in windows}, _edges(windows, edges)
    ends = sorted({*windows, *(day for span in spans.values() for day in span if day > 0)})
    in_segments = partial(_in_segments, reference_date=reference_date, ends=ends)
    by = ["tutor_id", "segment"]
    of_sessions = session_sums(in_segments(sessions, "scheduled_date"), policy=policy, by=by)
    of_events = event_sums(in_segments(events, "event_date"), by=by)
    names = pl.LazyFrame({"days": windows, "window": [window_name(days) for days in windows]})
    key = ["tutor_id", "window"]
    found = (
        roster.select("tutor_id")
        .join(names, how="cross")
        .join(_span_sums(of_sessions, of_windows, ends, "window"), on=key, how="left")
        .join(_span_sums(of_events, of_windows, ends, "window"), on=key, how="left")
        .with_columns(pl.col(_SUMS).fill_null(0))
        .with_columns(**metrics(policy))
        .pipe(round_rates)
        .sort("days", "tutor_id")
        .select(pl.col(name).cast(dtype) for name, dtype in pl.Schema(WindowSums).items())
    )
    at_edges = _span_sums(of_sessions, spans, ends, "edge").join(
        _span_sums(of_events, spans, ends, "edge"),
        on=["tutor_id", "edge"],
        how="full",
        coalesce=True,
    )
    return found, (
        at_edges.with_columns(pl.exclude("tutor_id", "edge").fill_null(0))
        .sort("tutor_id", "edge")
        .select(pl.col(name).cast(dtype) for name, dtype in pl.Schema(EdgeSums).items())
    )


def last_edge(days: int) -> str:
    """The name of the last days before a reference date, in which all windows end."""
    return f"last_{days}"


def first_edge(window: int, days: int) -> str:
    """The name of the first days of a window."""
    return f"{window_name(window)}_first_{days}"


def _edges(windows: Sequence[int], edges: Sequence[int]) -> dict[str, tuple[int, int]]:
    """The edges of windows by name: how many days before a reference date each ends and begins."""
    shorter = [(window, days) for window in windows for days in edges if days < window]
    last = {last_edge(days): (0, days) for _, days in shorter}
    return last | {first_edge(window, days): (window - days, window) for window, days in shorter}


def session_sums(
    sessions: pl.LazyFrame, /, *, policy: Policy, by: Sequence[str] = ("tutor_id",)
) -> pl.LazyFrame:
    """What a tutor's sessions add up to; sums of two sets of sessions add up to those of both.

    Args:
        sessions: ``SessionsSnapshot``.
        policy: Says when a session is punctual and when a first session is a success.
        by: The columns whose values make a group.

    Returns:
        One row per group that has a session: counts, and sums of ratings and scores, all of them
        whole numbers as ``WindowSums`` describes them.
    """
    rated = pl.col("overall_rating").is_not_null()
    first = (pl.col("session_number") == 1) & rated
    success = pl.col("overall_rating") >= policy.first_session_success_rating
    late = pl.col("late_start_minutes")
    return sessions.group_by(by).agg(
        pl.len().alias("sessions"),
        (pl.col("started") & ~pl.col("no_show")).sum().alias("completed"),
        pl.col("no_show").sum().alias("no_shows"),
        pl.col("tutor_initiated_reschedule").count().alias("reschedules_known"),
        pl.col("tutor_initiated_reschedule").sum().alias("reschedules"),
        pl.col("overall_rating").count().alias("ratings"),
        pl.col("overall_rating").cast(pl.Int64).sum().alias("rating_sum"),
        pl.col("overall_rating").cast(pl.Int64).pow(2).sum().alias("rating_square_sum"),
        first.sum().alias("first_rated"),
        (first & success).sum().alias("first_successes"),
        late.count().alias("lateness_known"),
        (late <= policy.late_limit_minutes).sum().alias("punctual"),
        pl.col("engagement_score").count().alias("scores"),
        _exact_sum("engagement_score", _SCORE_DECIMALS).alias("score_sum"),
        pl.col("learning_objectives_met").count().alias("objectives_known"),
        pl.col("learning_objectives_met").sum().alias("objectives_met"),
    )


def event_sums(events: pl.LazyFrame, /, *, by: Sequence[str] = ("tutor_id",)) -> pl.LazyFrame:
    """What a tutor's events add up to.

    Args:
        events: ``TutorEventsSnapshot``.
        by: The columns whose values make a group.

    Returns:
        One row per group that has an event: logins, responses that carry a time, sum of the times.
    """
    return events.group_by(by).agg(
        (pl.col("event_type") == LOGIN).sum().alias("logins"),
        pl.col("response_time_minutes").count().alias("responses"),
        _exact_sum("response_time_minutes", _MINUTES_DECIMALS).alias("minutes_sum"),
    )


def metrics(policy: Policy) -> dict[str, pl.Expr]:
    """The definition of each metric, not rounded, over ``session_sums`` and ``event_sums``.

    A share of nothing is null. Source: the product's specification, "The nine metrics".
    """
    weights, parts = policy.weights, engagement_parts(policy)
    engagement = (
        weights.login * parts["login"]
        + weights.session * parts["session"]
        + weights.punctual * parts["punctual"]
    )
    return {
        "sessions_completed": pl.col("completed").cast(pl.Int32),
        "avg_rating": _mean("rating_sum", "ratings", 0),
        "first_session_success_rate": _share("first_successes", "first_rated"),
        "reschedule_rate": _share("reschedules", "reschedules_known"),
        "no_show_count": pl.col("no_shows").cast(pl.Int32),
        "engagement_score": pl.when(pl.col("sessions") > 0).then(engagement),
        "learning_objectives_met_pct": _share("objectives_met", "objectives_known"),
        "response_time_avg_minutes": _mean("minutes_sum", "responses", _MINUTES_DECIMALS),
    }


def engagement_parts(policy: Policy) -> dict[str, pl.Expr]:
    """The parts of ``engagement_score``, each 0 to 100, over the same sums."""
    score = _mean("score_sum", "scores", _SCORE_DECIMALS) * 100 / policy.session_score_scale
    return {
        "login": _share("logins", "sessions").clip(upper_bound=100),
        "session": score.fill_null(policy.neutral_session_score),
        "punctual": _share("punctual", "lateness_known"),
    }


_SUMS = [
    "completed",
    "no_shows",
    *(name for name in WindowSums.column_names() if name not in WindowMetrics.column_names()),
]
_RATES = [name for name, dtype in pl.Schema(WindowMetrics).items() if dtype == pl.Float64]


def _in_segments(
    rows: pl.LazyFrame, column: str, /, *, reference_date: date, ends: Sequence[int]
) -> pl.LazyFrame:
    """The rows of the longest window; a segment is named by how many of the ends come before it.

    Args:
        rows: With the local date in ``column``.
        column: Its name.
        reference_date: The day after the last one.
        ends: Days before the reference date at which a segment ends and the next one begins,
            ascending.
    """
    is_before = (pl.col(column) < reference_date - timedelta(days=days) for days in ends)
    return rows.filter(
        within_window(column, reference_date=reference_date, days=ends[-1])
    ).with_columns(pl.sum_horizontal(is_before).cast(pl.UInt8).alias("segment"))


def _span_sums(
    sums: pl.LazyFrame, spans: Mapping[str, tuple[int, int]], ends: Sequence[int], name: str
) -> pl.LazyFrame:
    """The sums of each span of days, by its ``name``, from those of the segments."""
    segments = pl.LazyFrame(
        [
            (segment, span)
            for span, (first, last) in spans.items()
            for segment, (begin, end) in enumerate(pairwise([0, *ends]))
            if first <= begin and end <= last
        ],
        schema={"segment": pl.UInt8, name: pl.String},
        orient="row",
    )
    of_spans = sums.join(segments, on="segment").group_by("tutor_id", name)
    return of_spans.agg(pl.exclude("segment").sum())


def _exact_sum(column: str, decimals: int) -> pl.Expr:
    return (pl.col(column) * 10.0**decimals).round().sum()


def _mean(total: str, count: str, decimals: int) -> pl.Expr:
    return pl.when(pl.col(count) > 0).then(pl.col(total) / (pl.col(count) * 10.0**decimals))


def _share(part: str, whole: str) -> pl.Expr:
    return pl.when(pl.col(whole) > 0).then(100.0 * pl.col(part) / pl.col(whole))


def round_rates(metrics: pl.LazyFrame) -> pl.LazyFrame:
    """The metrics with their rates and means rounded, as they are shown and judged."""
    # Rounding repeats what it rounds: in the same step the plan would grow many times over.
    return metrics.with_columns(round_hundredths(pl.col(_RATES)))


def round_hundredths(expression: pl.Expr) -> pl.Expr:
    """The nearest hundredth, half to even, as Python's ``round(x, 2)`` finds it."""
    # The nearest hundredth of the float itself, up to 1e13.
    # Polars rounds 100 * x instead: a product that came out at a half may lie beside it. Dekker's
    # product (T. J. Dekker, Numerische Mathematik 18, 1971) tells by how much.
    product = expression * 100
    upper = expression * _SPLITTER - (expression * _SPLITTER - expression)
    error = (upper * 100 - product) + (expression - upper) * 100
    below = product.floor()
    rest = product - below
    up = (rest > 0.5) | ((rest == 0.5) & ((error > 0) | ((error == 0) & (below % 2 == 1))))
    # Polars divides by a constant through its reciprocal; its round() finds the nearest float.
    rounded = ((below + up) / 100).round(2)
    return pl.when(expression < _WHOLE_FROM).then(rounded).otherwise(expression)
