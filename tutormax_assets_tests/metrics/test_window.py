"""Each metric by hand."""

from collections.abc import Sequence
from datetime import date, timedelta
from itertools import islice, permutations
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from tutormax_assets.compute.tasks.windows import compute_windows_and_edges, window_metrics
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.quality import good_events
from tutormax_assets.metrics.schemas import WindowMetrics
from tutormax_assets.metrics.window import event_sums, round_hundredths, session_sums, within_window
from tutormax_assets_tests.metrics.rows import (
    DAY_BEFORE,
    D,
    Row,
    events,
    roster,
    sessions,
    source_events,
)

DEFAULT = Policy()
DETERMINISTIC = settings(derandomize=True, deadline=None, max_examples=200)


def metrics_of(
    *session_rows: Row,
    event_rows: Sequence[Row] = (),
    days: int = 7,
    policy: Policy = DEFAULT,
) -> dict[str, Any]:
    """The metrics of tutor t1."""
    found = window_metrics(
        roster("t1"),
        sessions(*session_rows),
        events(*event_rows),
        reference_date=D,
        windows=[days],
        policy=policy,
    )
    return WindowMetrics.validate(found).row(0, named=True)


# Counts


def test_a_session_is_completed_when_it_started_and_was_no_no_show() -> None:
    found = metrics_of(
        {"started": True, "no_show": False},
        {"started": True, "no_show": True},
        {"started": False, "no_show": False},
        {"started": False, "no_show": True},
        {"started": True, "no_show": None},
    )
    assert found["sessions_completed"] == 1
    assert found["no_show_count"] == 2


def test_counts_are_zero_where_nothing_counts() -> None:
    found = metrics_of({"started": False})
    assert (found["sessions_completed"], found["no_show_count"]) == (0, 0)


# Ratings


@pytest.mark.parametrize(
    ("ratings", "expected"),
    [
        ([5], 5.0),
        ([5, 4], 4.5),
        ([5, 4, 4], 4.33),
        ([5, 5, 4], 4.67),
        ([5, None, 1], 3.0),
        ([None, None], None),
        ([], None),
        # 4.125 and 4.375 are halves: to the even neighbour.
        ([5] * 1 + [4] * 7, 4.12),
        ([5] * 3 + [4] * 5, 4.38),
    ],
)
def test_avg_rating(ratings: list[int | None], expected: float | None) -> None:
    found = metrics_of(*({"overall_rating": rating} for rating in ratings))
    assert found["avg_rating"] == expected


def test_no_shows_with_feedback_count_in_avg_rating() -> None:
    found = metrics_of(
        {"no_show": True, "started": False, "overall_rating": 1}, {"overall_rating": 4}
    )
    assert found["avg_rating"] == 2.5


@pytest.mark.parametrize(
    ("numbers_and_ratings", "expected"),
    [
        ([(1, 4)], 100.0),
        ([(1, 3)], 0.0),
        ([(1, 5), (1, 4), (1, 3)], 66.67),
        ([(1, 5), (2, 1), (7, 1)], 100.0),
        ([(1, 5), (1, None)], 100.0),
        ([(1, None)], None),
        ([(2, 5)], None),
        ([(None, 5)], None),
        ([(1, 3), (None, 5)], 0.0),
        ([], None),
    ],
)
def test_first_session_success_rate(
    numbers_and_ratings: list[tuple[int | None, int | None]], expected: float | None
) -> None:
    found = metrics_of(
        *({"session_number": n, "overall_rating": rating} for n, rating in numbers_and_ratings)
    )
    assert found["first_session_success_rate"] == expected


@pytest.mark.parametrize(("rating", "expected"), [(3, 100.0), (4, 50.0), (5, 0.0)])
def test_the_policy_says_which_rating_is_a_success(rating: int, expected: float) -> None:
    found = metrics_of(
        {"session_number": 1, "overall_rating": 3},
        {"session_number": 1, "overall_rating": 4},
        policy=Policy(first_session_success_rating=rating),
    )
    assert found["first_session_success_rate"] == expected


# Reschedules and objectives


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True], 100.0),
        ([False], 0.0),
        ([True, False, False], 33.33),
        ([True, True, False], 66.67),
        ([True, None], 100.0),
        ([None], None),
        ([], None),
    ],
)
@pytest.mark.parametrize(
    ("column", "metric"),
    [
        ("tutor_initiated_reschedule", "reschedule_rate"),
        ("learning_objectives_met", "learning_objectives_met_pct"),
    ],
)
def test_share_of_the_sessions_where_it_is_known(
    column: str, metric: str, values: list[bool | None], expected: float | None
) -> None:
    assert metrics_of(*({column: value} for value in values))[metric] == expected


# Engagement


@pytest.mark.parametrize(
    ("session_rows", "logins", "expected"),
    [
        # 0.4 * 50 + 0.4 * 70 + 0.2 * 50
        ([{"engagement_score": 0.8}, {"engagement_score": 0.6, "late_start_minutes": 11}], 1, 58.0),
        # Without scores the session part is 50: 0.4 * 0 + 0.4 * 50 + 0.2 * 100
        ([{}], 0, 40.0),
        # Where one session has a score, it alone counts: 0.4 * 90
        ([{"engagement_score": 0.9}, {}], 0, 56.0),
        # A score of 0 is a score.
        ([{"engagement_score": 0.0}], 0, 20.0),
        # The login part is capped at 100.
        ([{"engagement_score": 1.0}], 1, 100.0),
        ([{"engagement_score": 1.0}], 9, 100.0),
        ([{}, {}, {}], 1, 53.33),
        # On the late limit and one minute beyond it.
        ([{"late_start_minutes": 10}], 0, 40.0),
        ([{"late_start_minutes": 11}], 0, 20.0),
        ([{"late_start_minutes": 11}, {}, {}], 0, 33.33),
        # Lateness counts where it is known; where it is not known at all there is no score.
        ([{"late_start_minutes": 11}, {"late_start_minutes": None}], 0, 20.0),
        ([{"late_start_minutes": 0}, {"late_start_minutes": None}], 0, 40.0),
        ([{"late_start_minutes": None}], 5, None),
        # No-shows are sessions too.
        ([{}, {"no_show": True, "started": False}], 1, 60.0),
        ([], 5, None),
        ([], 0, None),
    ],
)
def test_engagement_score(session_rows: list[Row], logins: int, expected: float | None) -> None:
    found = metrics_of(*session_rows, event_rows=[{}] * logins)
    assert found["engagement_score"] == expected


def test_only_logins_are_logins() -> None:
    found = metrics_of({}, event_rows=[{"response_time_minutes": None}])
    assert found["engagement_score"] == 40.0


def test_session_scores_from_0_to_100() -> None:
    rows: list[Row] = [{"engagement_score": 80.0}, {"engagement_score": 61.0}]
    found = metrics_of(*rows, policy=Policy(session_score_scale=100))
    assert found["engagement_score"] == 48.2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # login 100, session 80, punctual 50
        ({}, 82.0),
        ({"weights": {"login": 1, "session": 0, "punctual": 0}}, 100.0),
        ({"weights": {"login": 0, "session": 1, "punctual": 0}}, 80.0),
        ({"weights": {"login": 0, "session": 0, "punctual": 1}}, 50.0),
        ({"weights": {"login": 0.25, "session": 0.25, "punctual": 0.5}}, 70.0),
        ({"late_limit_minutes": 30}, 92.0),
        ({"late_limit_minutes": 29}, 82.0),
        ({"late_limit_minutes": 0}, 72.0),
        ({"neutral_session_score": 0}, 82.0),
    ],
)
def test_engagement_score_of_another_policy(overrides: dict[str, Any], expected: float) -> None:
    found = metrics_of(
        {"engagement_score": 0.8, "late_start_minutes": 1},
        {"late_start_minutes": 30},
        event_rows=[{}, {}],
        policy=Policy().with_overrides(overrides),
    )
    assert found["engagement_score"] == expected


@pytest.mark.parametrize(("neutral", "expected"), [(0, 20.0), (50, 40.0), (100, 60.0)])
@pytest.mark.parametrize("scale", [1, 100])
def test_the_neutral_score_is_of_100_on_any_scale(
    neutral: float, expected: float, scale: int
) -> None:
    policy = Policy().with_overrides(
        {"neutral_session_score": neutral, "session_score_scale": scale}
    )
    assert metrics_of({}, policy=policy)["engagement_score"] == expected


# Response time


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [
        ([30.0], 30.0),
        ([30.0, 10.0, 20.5], 20.17),
        ([0.0], 0.0),
        ([10.0, None], 10.0),
        ([None], None),
        ([0.1, 0.2], 0.15),
        ([], None),
    ],
)
def test_response_time_avg_minutes(minutes: list[float | None], expected: float | None) -> None:
    found = metrics_of(event_rows=[{"response_time_minutes": value} for value in minutes])
    assert found["response_time_avg_minutes"] == expected


def test_logins_carry_no_response_time() -> None:
    found = metrics_of(event_rows=[{}, {"response_time_minutes": 8.0}])
    assert found["response_time_avg_minutes"] == 8.0


@pytest.mark.parametrize("literal", ["1e17", "9.9e289", "9.9e299"])
def test_absurd_response_times_are_never_fatal(literal: str) -> None:
    # Each of them is a finite number, so the contract lets it pass.
    good, _ = good_events(
        source_events(*[{"response_time_minutes": literal}] * 200), timezone="UTC"
    )
    found = window_metrics(
        roster("t1"), sessions(), good, reference_date=D, windows=[7], policy=DEFAULT
    )

    WindowMetrics.validate(found)


# Windows and tutors


@pytest.mark.parametrize("days", [1, 7, 30, 90])
def test_a_window_ends_before_the_reference_date_and_has_its_length(days: int) -> None:
    first, last = D - timedelta(days=days), DAY_BEFORE
    outside = [first - timedelta(days=1), D, D + timedelta(days=1)]
    inside = [first, last]

    assert metrics_of(*({"scheduled_date": d} for d in outside), days=days) == metrics_of(days=days)
    assert metrics_of(*({"scheduled_date": d} for d in inside), days=days)[
        "sessions_completed"
    ] == len(inside)


@pytest.mark.parametrize("days", [7, 30, 90])
def test_events_belong_to_the_same_window(days: int) -> None:
    first, last = D - timedelta(days=days), DAY_BEFORE
    minutes = {first - timedelta(days=1): 1000.0, first: 1.0, last: 3.0, D: 1000.0}
    found = metrics_of(
        {},
        event_rows=[{"event_date": d, "response_time_minutes": m} for d, m in minutes.items()]
        + [{"event_date": first - timedelta(days=1)}, {"event_date": D}],
        days=days,
    )
    assert found["response_time_avg_minutes"] == 2.0
    assert found["engagement_score"] == 40.0


def test_within_window_across_a_leap_day() -> None:
    dates = [date(2024, 2, 28), date(2024, 2, 29), date(2024, 3, 1)]
    found = pl.DataFrame({"d": dates}).select(
        within_window("d", reference_date=date(2024, 3, 1), days=1)
    )
    assert found["d"].to_list() == [False, True, False]


def test_the_window_is_named_after_its_days() -> None:
    assert [metrics_of(days=days)["window"] for days in (7, 30, 90)] == ["7day", "30day", "90day"]


def test_a_tutor_without_sessions_has_zeros_and_nulls() -> None:
    assert metrics_of() == {
        "tutor_id": "t1",
        "window": "7day",
        "sessions_completed": 0,
        "avg_rating": None,
        "first_session_success_rate": None,
        "reschedule_rate": None,
        "no_show_count": 0,
        "engagement_score": None,
        "learning_objectives_met_pct": None,
        "response_time_avg_minutes": None,
    }


def test_a_tutor_with_events_and_no_sessions_has_a_response_time() -> None:
    found = metrics_of(event_rows=[{}, {"response_time_minutes": 12.5}])

    assert found == metrics_of() | {"response_time_avg_minutes": 12.5}


def test_every_tutor_of_the_roster_has_a_row_and_nobody_else() -> None:
    found = window_metrics(
        roster("t3", "t1", "t2"),
        sessions({"tutor_id": "t2"}, {"tutor_id": "t9"}, {"tutor_id": "t2"}),
        events({"tutor_id": "t9"}, {"tutor_id": "t3", "response_time_minutes": 1.0}),
        reference_date=D,
        windows=[7],
        policy=DEFAULT,
    )

    columns = ["tutor_id", "sessions_completed", "response_time_avg_minutes"]
    assert found.select(columns).rows() == [("t1", 0, None), ("t2", 2, None), ("t3", 0, 1.0)]


def test_an_empty_roster_has_no_metrics() -> None:
    found = window_metrics(
        roster(), sessions({}), events({}), reference_date=D, windows=[7], policy=DEFAULT
    )

    assert WindowMetrics.validate(found).is_empty()


def test_sums_of_two_parts_add_up_to_those_of_the_whole() -> None:
    rows: list[Row] = [
        {"engagement_score": score, "overall_rating": rating, "session_number": 1}
        for score, rating in [(0.1, 5), (0.2, None), (None, 3), (0.3, 4), (0.7, 1)]
    ]
    whole = session_sums(sessions(*rows), policy=DEFAULT).collect()
    parts = [session_sums(sessions(*half), policy=DEFAULT) for half in (rows[:2], rows[2:])]
    # Counts are unsigned and small in their own frame; only the numbers matter here.
    added = pl.concat(parts).group_by("tutor_id").sum().collect()
    assert_frame_equal(added, whole, check_dtypes=False)

    times: list[Row] = [{}, {"response_time_minutes": 0.1}, {"response_time_minutes": 0.2}]
    in_parts = pl.concat([event_sums(events(*times[:2])), event_sums(events(*times[2:]))])
    assert_frame_equal(
        in_parts.group_by("tutor_id").sum().collect(),
        event_sums(events(*times)).collect(),
        check_dtypes=False,
    )


def test_sums_are_exact_so_that_the_order_of_the_rows_does_not_show() -> None:
    values = [1 / 3, 0.1, 2 / 3, 1e-7, 1 / 7, 0.7]
    score_sums = set()
    minutes_sums = set()
    for order in islice(permutations(values), 0, None, 36):
        scored = sessions(*({"engagement_score": value} for value in order))
        timed = events(*({"response_time_minutes": value} for value in order))
        sums = pl.collect_all([session_sums(scored, policy=DEFAULT), event_sums(timed)])
        score_sums.add(sums[0]["score_sum"].item())
        minutes_sums.add(sums[1]["minutes_sum"].item())

    assert score_sums == {sum(round(value * 1e9) for value in values)}
    assert minutes_sums == {sum(round(value * 1e6) for value in values)}


DATES = [D - timedelta(days=ago) for ago in (40, 3, 1, 0)]
DAYS_AGO = st.integers(-2, 140)


@settings(DETERMINISTIC, max_examples=25)
@given(
    of_sessions=st.lists(
        st.fixed_dictionaries(
            {
                "tutor_id": st.sampled_from(["t1", "t2", "t9"]),
                "scheduled_date": DAYS_AGO.map(lambda ago: D - timedelta(days=ago)),
                "overall_rating": st.none() | st.integers(1, 5),
                "no_show": st.none() | st.booleans(),
                "engagement_score": st.none() | st.floats(0, 10),
            }
        ),
        max_size=30,
    ),
    of_events=st.lists(
        st.fixed_dictionaries(
            {
                "tutor_id": st.sampled_from(["t1", "t3"]),
                "event_date": DAYS_AGO.map(lambda ago: D - timedelta(days=ago)),
                # From 2**53 on, in units of 1e-6, a sum is not exact.
                "response_time_minutes": st.none()
                | st.floats(0, 1e6)
                | st.sampled_from([1e300, 1e10]),
            }
        ),
        max_size=10,
    ),
)
def test_a_date_is_the_same_alone_or_among_others(
    of_sessions: list[Row], of_events: list[Row]
) -> None:
    def computed(dates: list[date]) -> tuple[pl.DataFrame, pl.DataFrame]:
        return compute_windows_and_edges(
            roster("t3", "t1", "t2"),
            sessions(*of_sessions),
            events(*of_events),
            reference_dates=dates,
            windows=[7, 30, 90],
            policy=DEFAULT,
            edges=[1, 7],
        )

    alone = [computed([one]) for one in DATES]
    together = computed(DATES)

    # The sum of numbers that are not exact depends on their order.
    inexact = {row["tutor_id"] for row in of_events if (row["response_time_minutes"] or 0) > 1e6}
    is_inexact = pl.col("tutor_id").is_in(inexact)
    for place in (0, 1):
        apart = pl.concat(found[place] for found in alone)
        for chosen, check_exact in ((~is_inexact, True), (is_inexact, False)):
            assert_frame_equal(
                together[place].filter(chosen),
                apart.filter(chosen),
                check_exact=check_exact,
                rel_tol=1e-12,
                check_row_order=False,
            )
    assert together[0].select("reference_date", "window", "tutor_id").rows() == [
        (one, f"{days}day", tutor)
        for one in DATES
        for days in (7, 30, 90)
        for tutor in ("t1", "t2", "t3")
    ]


# Rounding


def rounded_everywhere(values: list[float]) -> list[list[float]]:
    frame = pl.DataFrame({"x": values}, schema={"x": pl.Float64})
    expression = round_hundredths(pl.col("x"))
    return [
        frame.select(expression)["x"].to_list(),
        frame.lazy().select(expression).collect()["x"].to_list(),
        frame.lazy().select(expression).collect(engine="streaming")["x"].to_list(),
        [pl.select(round_hundredths(pl.lit(value))).item() for value in values[:3]],
    ]


HALVES = st.builds(lambda n: n / 1000, st.integers(0, 10**9).map(lambda n: 10 * n + 5))
EIGHTHS = st.integers(0, 8 * 10**12).map(lambda n: n / 8)


@DETERMINISTIC
@given(st.lists(st.floats(0, 1e12) | st.floats(0, 100) | HALVES | EIGHTHS, min_size=1))
@example([71.395, 0.125, 0.375, 2.675, 1.005, 0.005, 0.015, 4.125, 4.375])
@example([1e300, 1.7e308, 2.0**52, 2.0**53, 0.0, 5e-324, 99.995, 99.99499999999999, 1e12])
def test_rounding_is_pythons(values: list[float]) -> None:
    expected = [round(value, 2) for value in values]

    *columns, literals = rounded_everywhere(values)
    assert columns == [expected] * 3
    assert literals == expected[:3]


def test_every_share_of_small_counts_is_rounded_as_python_does() -> None:
    shares = [100.0 * part / whole for whole in range(1, 400) for part in range(whole + 1)]
    found = pl.DataFrame({"x": shares}).select(round_hundredths(pl.col("x")))["x"]

    assert found.to_list() == [round(share, 2) for share in shares]


def test_null_stays_null() -> None:
    found = pl.DataFrame({"x": [None, 1.0]}, schema={"x": pl.Float64}).select(
        round_hundredths(pl.col("x"))
    )
    assert found["x"].to_list() == [None, 1.0]
