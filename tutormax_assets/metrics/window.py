"""The metrics of a window, each defined once, from sums that a tutor's rows add up to.

The starts and ends of all windows divide the days into segments. What a tutor's rows of a segment
add up to is computed once; then each window of each reference date is the difference of two sums
over segments. They are whole numbers, so that a date comes out the same alone or among others,
unless a sum is too large to be exact.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta

import dataframely as dy
import polars as pl

from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import (
    LOGIN,
    EdgeSumsOfDates,
    WindowMetrics,
    WindowSumsOfDates,
)

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


def borders(
    reference_dates: Iterable[date], windows: Sequence[int], edges: Sequence[int] = ()
) -> list[date]:
    """The days on which a window or an edge begins or ends, ascending; there segments meet.

    Args:
        reference_dates: The days after the last one of each window.
        windows: Lengths of the windows in days.
        edges: Lengths of the edges in days.
    """
    spans = [*_windows(windows).values(), *_edges(windows, edges).values()]
    days = {day for span in spans for day in span}
    return sorted({one - timedelta(days=day) for one in reference_dates for day in days})


def segment_sums(
    sessions: pl.LazyFrame,
    events: pl.LazyFrame,
    /,
    *,
    borders: Sequence[date],
    policy: Policy,
) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """What a tutor's sessions, and a tutor's events, of each segment add up to.

    Args:
        sessions: ``SessionsSnapshot``; rows that are in no segment do not count.
        events: ``TutorEventsSnapshot``, likewise.
        borders: What ``borders`` returns.
        policy: As for ``session_sums``.

    Returns:
        ``session_sums`` and ``event_sums`` by ``tutor_id`` and ``segment``.
    """
    by = ["tutor_id", "segment"]
    return (
        session_sums(_in_segments(sessions, "scheduled_date", borders), policy=policy, by=by),
        event_sums(_in_segments(events, "event_date", borders), by=by),
    )


def windows_and_edges(
    roster: pl.Series,
    of_sessions: pl.DataFrame,
    of_events: pl.DataFrame,
    /,
    *,
    reference_dates: Sequence[date],
    windows: Sequence[int],
    policy: Policy,
    edges: Sequence[int] = (),
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The metrics of windows, and what the rows at the edges of the windows add up to.

    Args:
        roster: The ids of the tutors of each date.
        of_sessions: What ``segment_sums`` returns for the borders of all of these dates.
        of_events: Likewise.
        reference_dates: The days after the last one of each window.
        windows: Lengths of the windows in days, the shortest first.
        policy: Weights, limits and scale.
        edges: Lengths of the edges in days.

    Returns:
        ``WindowSumsOfDates``, one row per date, window and tutor of the roster in this order, the
        shortest window first and tutors sorted; rates and means are rounded to two decimals, half
        to even. And ``EdgeSumsOfDates``, date by date, one row for each tutor and edge that has a
        session, a login or a response time of the tutor.
    """
    days = borders(reference_dates, windows, edges)
    # Sums that are too large to be exact are not told apart by differences: of a date by itself,
    # no window is one.
    are_exact = _are_exact(of_sessions, of_events)
    found = []
    for dates in [reference_dates] if are_exact else [[one] for one in reference_dates]:
        known = [day for day in days if day <= max(dates)]
        since = _SumsSinceBorders(
            roster, of_sessions, of_events, known, later=len(days) - len(known)
        )
        found += [
            (
                _of_windows(since, one, _windows(windows), policy),
                _of_edges(since, one, _edges(windows, edges)),
            )
            for one in dates
        ]
    return pl.concat(sums for sums, _ in found), pl.concat(sums for _, sums in found)


def last_edge(days: int) -> str:
    """The name of the last days before a reference date, in which all windows end."""
    return f"last_{days}"


def first_edge(window: int, days: int) -> str:
    """The name of the first days of a window."""
    return f"{window_name(window)}_first_{days}"


def _windows(windows: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Windows by name: how many days before a reference date each ends and begins."""
    return {window_name(days): (0, days) for days in windows}


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


_RATES = [name for name, dtype in pl.Schema(WindowMetrics).items() if dtype == pl.Float64]


def _cast_to(schema: type[dy.Schema]) -> list[pl.Expr]:
    return [pl.col(name).cast(dtype) for name, dtype in pl.Schema(schema).items()]


def _in_segments(rows: pl.LazyFrame, column: str, borders: Sequence[date]) -> pl.LazyFrame:
    """The rows between the first border and the last, with the number of their ``segment``.

    The last segment, which ends at the last border, has the number 0.

    Args:
        rows: With the local date in ``column``.
        column: Its name.
        borders: The days on which segments begin, and the day after the last one; ascending.
    """
    begun = pl.lit(pl.Series(borders, dtype=pl.Date)).search_sorted(pl.col(column), side="right")
    return rows.filter(
        pl.col(column).is_between(borders[0], borders[-1], closed="left")
    ).with_columns((len(borders) - 1 - begun).cast(pl.UInt32).alias("segment"))


def _are_exact(*of_segments: pl.DataFrame) -> bool:
    """Whether what each tutor's rows add up to, all of them together, is exact."""
    totals = (sums.group_by("tutor_id").agg(pl.col(pl.Float64).sum()) for sums in of_segments)
    largest = (sums.select(pl.col(pl.Float64).max()).row(0) for sums in totals)
    return all(one is None or one < _WHOLE_FROM for sums in largest for one in sums)


class _SumsSinceBorders:
    """What each tutor's rows add up to from each border on, up to the last border."""

    def __init__(
        self,
        roster: pl.Series,
        of_sessions: pl.DataFrame,
        of_events: pl.DataFrame,
        borders: Sequence[date],
        *,
        later: int,
    ) -> None:
        """Add up segments, the last one first.

        Args:
            roster: The ids of the tutors of each date.
            of_sessions: Sums of segments.
            of_events: Likewise.
            borders: Where they meet, up to the last reference date.
            later: How many segments there are after that.
        """
        ids = (of_sessions["tutor_id"], of_events["tutor_id"])
        self._tutors = pl.concat([roster, *ids]).unique().sort()
        self._in_roster = self._tutors.is_in(roster.implode())
        self._number_of = {border: number for number, border in enumerate(reversed(borders))}
        in_order = pl.DataFrame({"tutor_id": self._tutors}).with_row_index("tutor")
        tutors, segments = len(in_order), len(borders) - 1
        each = pl.select(pl.int_range(tutors * segments, dtype=pl.UInt32).alias("place"))
        for sums in (of_sessions, of_events):
            placed = sums.filter(pl.col("segment") >= later).join(in_order, on="tutor_id")
            each = each.join(
                placed.select(
                    ((pl.col("segment") - later) * tutors + pl.col("tutor")).alias("place"),
                    pl.exclude("tutor_id", "segment", "tutor"),
                ),
                on="place",
                how="left",
                maintain_order="left",
            )
        each = each.drop("place").fill_null(0)
        self._sums = [each.clear(tutors).fill_null(0)]
        for number in range(segments):
            self._sums.append(self._sums[-1] + each.slice(number * tutors, tutors))

    def span(self, reference_date: date, days: tuple[int, int]) -> pl.DataFrame:
        """The sums of a span of days by ``tutor_id``, sorted.

        Args:
            reference_date: The day that is counted from, a border.
            days: How many days before it the span ends and begins, both borders.
        """
        end, start = (self._number_of[reference_date - timedelta(days=day)] for day in days)
        sums = self._sums[start] - self._sums[end] if end else self._sums[start]
        return sums.with_columns(tutor_id=self._tutors)

    def of_roster(self, sums: pl.DataFrame) -> pl.DataFrame:
        """A span without the tutors who are not in the roster."""
        return sums if self._in_roster.all() else sums.filter(self._in_roster)


def _of_windows(
    since: _SumsSinceBorders, one: date, windows: Mapping[str, tuple[int, int]], policy: Policy
) -> pl.DataFrame:
    sums = pl.concat(
        since.of_roster(since.span(one, days)).with_columns(window=pl.lit(name))
        for name, days in windows.items()
    )
    found = round_rates(sums.with_columns(**metrics(policy))).with_columns(reference_date=one)
    return found.select(_cast_to(WindowSumsOfDates))


def _of_edges(
    since: _SumsSinceBorders, one: date, edges: Mapping[str, tuple[int, int]]
) -> pl.DataFrame:
    has_row = pl.any_horizontal(pl.col("sessions", "logins", "responses") > 0)
    none = pl.DataFrame(schema=pl.Schema(EdgeSumsOfDates))
    found = [
        since.span(one, days).filter(has_row).with_columns(edge=pl.lit(name), reference_date=one)
        for name, days in edges.items()
    ]
    return pl.concat([none, *(sums.select(_cast_to(EdgeSumsOfDates)) for sums in found)])


def _exact_sum(column: str, decimals: int) -> pl.Expr:
    return (pl.col(column) * 10.0**decimals).round().sum()


def _mean(total: str, count: str, decimals: int) -> pl.Expr:
    return pl.when(pl.col(count) > 0).then(pl.col(total) / (pl.col(count) * 10.0**decimals))


def _share(part: str, whole: str) -> pl.Expr:
    return pl.when(pl.col(whole) > 0).then(100.0 * pl.col(part) / pl.col(whole))


def round_rates(metrics: pl.DataFrame) -> pl.DataFrame:
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
