"""What holds on any platform, and the specification once more in plain Python."""

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from tutormax_assets.compute.tasks.windows import window_metrics
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.quality import good_events, good_sessions, good_tutors
from tutormax_assets.metrics.schemas import (
    SessionsSnapshot,
    SetAside,
    SourceEvents,
    SourceSessions,
    SourceTutors,
    TutorEventsSnapshot,
    TutorRoster,
    TutorTiers,
    WindowMetrics,
)
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets_tests.metrics.rows import Row, frame

WINDOWS = (7, 30, 90)
STATUSES = {"t1": "active", "t2": "ACTIVE", "t3": "inactive", "t4": "Active"}
POLICIES = [
    Policy(),
    Policy(session_score_scale=100),
    Policy().with_overrides(
        {
            "weights": {"login": 0.15, "session": 0.25, "punctual": 0.6},
            "late_limit_minutes": 29,
            "first_session_success_rating": 5,
            "neutral_session_score": 33.3,
        }
    ),
]
COUNTS = ["sessions_completed", "no_show_count"]
RATES = [
    "avg_rating",
    "first_session_success_rate",
    "reschedule_rate",
    "engagement_score",
    "learning_objectives_met_pct",
    "response_time_avg_minutes",
]


def deterministic(examples: int) -> settings:
    return settings(derandomize=True, deadline=None, max_examples=examples)


@dataclass(frozen=True)
class Platform:
    """Source rows, and how they are to be read."""

    sessions: list[Row]
    events: list[Row]
    policy: Policy
    timezone: str
    reference_date: date

    def day_of(self, row: Row) -> date:
        instant: datetime = row.get("scheduled_start") or row["event_timestamp"]
        return instant.astimezone(ZoneInfo(self.timezone)).date()

    def within(self, row: Row, days: int) -> bool:
        start = self.reference_date - timedelta(days=days)
        return start <= self.day_of(row) < self.reference_date

    def only(self, keep: Callable[[Row], bool]) -> "Platform":
        return replace(
            self,
            sessions=[row for row in self.sessions if keep(row)],
            events=[row for row in self.events if keep(row)],
        )


@dataclass(frozen=True)
class Computed:
    """What the code under test makes of a platform."""

    roster: pl.DataFrame
    sessions: pl.DataFrame
    events: pl.DataFrame
    set_aside: pl.DataFrame
    metrics: pl.DataFrame
    tiers: pl.DataFrame


def computed(
    platform: Platform,
    *,
    tutor_ids: Iterable[str] = STATUSES,
    windows: Sequence[int] = WINDOWS,
) -> Computed:
    tutors: list[Row] = [{"tutor_id": t, "status": STATUSES[t]} for t in tutor_ids]
    # Stage by stage, as the assets do it; all in one plan takes five times as long.
    roster = good_tutors(frame(SourceTutors, tutors), include_inactive=False).collect()
    sessions, of_sessions = pl.collect_all(
        good_sessions(
            frame(SourceSessions, platform.sessions),
            policy=platform.policy,
            timezone=platform.timezone,
        )
    )
    events, of_events = pl.collect_all(
        good_events(frame(SourceEvents, platform.events), timezone=platform.timezone)
    )
    metrics = window_metrics(
        roster.lazy(),
        sessions.lazy(),
        events.lazy(),
        reference_date=platform.reference_date,
        windows=windows,
        policy=platform.policy,
    )
    return Computed(
        roster=roster,
        sessions=sessions,
        events=events,
        set_aside=pl.concat([of_sessions, of_events]).sort(pl.all()),
        metrics=metrics,
        tiers=performance_tiers(metrics.lazy(), policy=platform.policy).collect(),
    )


# Platforms

MINUTE = timedelta(minutes=1)
DAYS_AROUND_THE_ENDS = [-1, -1, -2, -7, -8, -30, -31, -90, -91, 0, 1]

moments = st.tuples(
    st.sampled_from(DAYS_AROUND_THE_ENDS) | st.integers(-95, 2),
    st.sampled_from(["first instant", "last instant", "midday"]),
)
tutor_ids = st.sampled_from(list(STATUSES))
scores = (
    st.none()
    | st.floats(0, 1)
    | st.integers(0, 10**4).map(lambda n: n / 10**4)
    | st.integers(0, 1000).map(lambda n: n / 10)
    | st.sampled_from([math.nan, math.inf, -math.inf, -0.1, 1.5, 100.5])
)
feedback: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "of_another": st.sampled_from([False, False, False, True]),
        "ratings": st.lists(st.sampled_from([1, 3, 4, 5, 4, 0, 6, None]), min_size=1, max_size=1)
        | st.lists(st.integers(1, 5), min_size=1, max_size=2),
    }
)
sessions: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "tutor_id": tutor_ids,
        "moment": moments,
        "session_number": st.sampled_from([1, 1, 1, 2, 3, 0, -1, None]),
        "started": st.booleans(),
        "tutor_initiated_reschedule": st.sampled_from([True, False, False, None]),
        "no_show": st.sampled_from([True, False, False, None]),
        "late_start_minutes": st.sampled_from([0, 3, 10, 11, 29, 30, -1, None]),
        "engagement_score": scores,
        "learning_objectives_met": st.sampled_from([True, True, False, None]),
        "feedback": st.none() | feedback,
    }
)
literals = (
    st.integers(0, 3000).map(str)
    | st.floats(0, 1e4).map(repr)
    | st.sampled_from(
        ["12.345", "1e2", "0", "-0", "-1", "null", '"fast"', '"7"', "true", "{}", "[]", "1e400"]
    )
    | st.none()
)
events: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "tutor_id": tutor_ids,
        "moment": moments,
        "event_type": st.sampled_from(
            ["login", "message_response", "message_response", "reschedule_request"]
        ),
        "response_time_minutes": literals,
    }
)


@st.composite
def platforms(draw: st.DrawFn) -> Platform:
    timezone = draw(st.sampled_from(["UTC", "America/New_York", "Asia/Kolkata"]))
    # In New York the clock changed on 2 November and 9 March 2025.
    day = draw(st.sampled_from([date(2025, 11, 7), date(2025, 11, 3), date(2025, 3, 16)]))

    def instant(moment: tuple[int, str]) -> datetime:
        offset, part = moment
        begin, end = (
            datetime.combine(
                day + timedelta(days=offset + n), datetime.min.time(), ZoneInfo(timezone)
            ).astimezone(UTC)
            for n in (0, 1)
        )
        return {
            "first instant": begin,
            "last instant": end - timedelta(microseconds=1),
            "midday": begin + 700 * MINUTE,
        }[part]

    drawn_sessions = draw(few_or_many(sessions))
    drawn_events = draw(few_or_many(events))
    return Platform(
        sessions=[
            row
            for number, drawn in enumerate(drawn_sessions)
            for row in session_rows(number, drawn, scheduled_start=instant(drawn["moment"]))
        ],
        events=[
            {
                "event_id": f"e{number}",
                "tutor_id": drawn["tutor_id"],
                "event_type": drawn["event_type"],
                "event_timestamp": instant(drawn["moment"]),
                "response_time_minutes": drawn["response_time_minutes"],
            }
            for number, drawn in enumerate(drawn_events)
        ],
        policy=draw(st.sampled_from(POLICIES)),
        timezone=timezone,
        reference_date=day,
    )


def few_or_many(
    rows: st.SearchStrategy[dict[str, Any]],
) -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.lists(rows, max_size=3) | st.lists(rows, min_size=12, max_size=30)


def session_rows(number: int, drawn: Row, *, scheduled_start: datetime) -> list[Row]:
    """The rows of one session as the query reads them: one, or one for each feedback."""
    columns = SourceSessions.column_names()
    row = {name: value for name, value in drawn.items() if name in columns}
    row |= {"session_id": f"s{number}", "scheduled_start": scheduled_start}
    if drawn["feedback"] is None:
        return [row]
    of_another = drawn["feedback"]["of_another"]
    author = f"not {row['tutor_id']}" if of_another else row["tutor_id"]
    return [
        row
        | {
            "feedback_id": f"f{number}.{n}",
            "feedback_tutor_id": author,
            "overall_rating": rating,
        }
        for n, rating in enumerate(drawn["feedback"]["ratings"])
    ]


# The specification in plain Python


def share(part: int, whole: int) -> Fraction | None:
    return Fraction(100 * part, whole) if whole else None


def mean(values: list[Any]) -> Fraction | None:
    return sum((Fraction(value) for value in values), Fraction()) / len(values) if values else None


def rating_of(rows: Sequence[Row]) -> int | None:
    """The rating of one session, given its row for each feedback."""
    believed = [row for row in rows if row.get("feedback_id") is not None]
    if len(rows) > 1 or not believed or believed[0]["feedback_tutor_id"] != rows[0]["tutor_id"]:
        return None
    rating: int | None = believed[0]["overall_rating"]
    return rating if rating in range(1, 6) else None


def minutes_of(event: Row) -> float | None:
    literal = event["response_time_minutes"]
    if event["event_type"] != "message_response" or literal is None:
        return None
    value = json.loads(literal)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and value >= 0 else None


def reference(platform: Platform, tutor_id: str, days: int) -> dict[str, Fraction | int | None]:
    """The metrics of one tutor and window, exact."""
    policy = platform.policy
    by_session: dict[str, list[dict[str, Any]]] = {}
    for row in platform.sessions:
        if row["tutor_id"] == tutor_id and platform.within(row, days):
            by_session.setdefault(row["session_id"], []).append(dict(row))
    mine = [rows[0] | {"rating": rating_of(rows)} for rows in by_session.values()]
    my_events = [e for e in platform.events if e["tutor_id"] == tutor_id]
    my_events = [e for e in my_events if platform.within(e, days)]

    ratings = [s["rating"] for s in mine if s["rating"] is not None]
    first = [s["rating"] for s in mine if s["session_number"] == 1 and s["rating"] is not None]
    successes = [rating for rating in first if rating >= policy.first_session_success_rating]
    reschedules = [s["tutor_initiated_reschedule"] for s in mine]
    objectives = [s["learning_objectives_met"] for s in mine]
    scored = [
        s["engagement_score"]
        for s in mine
        if s["engagement_score"] is not None
        and 0 <= s["engagement_score"] <= policy.session_score_scale
    ]
    lateness = [s["late_start_minutes"] for s in mine]
    lateness = [late for late in lateness if late is not None and late >= 0]
    logins = sum(e["event_type"] == "login" for e in my_events)
    minutes = [value for e in my_events if (value := minutes_of(e)) is not None]

    engagement = None
    punctual = share(sum(n <= policy.late_limit_minutes for n in lateness), len(lateness))
    if mine and punctual is not None:
        login = min(Fraction(100), Fraction(100 * logins, len(mine)))
        score = mean(scored)
        session = (
            Fraction(policy.neutral_session_score)
            if score is None
            else score * 100 / policy.session_score_scale
        )
        login_weight, session_weight, punctual_weight = (
            Fraction(str(weight))
            for weight in (policy.weights.login, policy.weights.session, policy.weights.punctual)
        )
        engagement = login_weight * login + session_weight * session + punctual_weight * punctual
    return {
        "sessions_completed": sum(s["started"] and s["no_show"] is False for s in mine),
        "no_show_count": sum(s["no_show"] is True for s in mine),
        "avg_rating": mean(ratings),
        "first_session_success_rate": share(len(successes), len(first)),
        "reschedule_rate": share(
            reschedules.count(True), len(reschedules) - reschedules.count(None)
        ),
        "engagement_score": engagement,
        "learning_objectives_met_pct": share(
            objectives.count(True), len(objectives) - objectives.count(None)
        ),
        "response_time_avg_minutes": mean(minutes),
    }


def tier_by_hand(row: Row) -> str:
    """The tier of the contract, read from stored values."""
    green = red = 0
    for name, green_from, red_below in [
        ("avg_rating", 4.5, 3.5),
        ("first_session_success_rate", 85, 70),
        ("engagement_score", 80, 60),
        ("learning_objectives_met_pct", 90, 80),
    ]:
        if row[name] is not None:
            green += row[name] >= green_from
            red += row[name] < red_below
    for name, green_to, red_above in [("reschedule_rate", 10, 15), ("no_show_count", 0, 3)]:
        if row[name] is not None:
            green += row[name] <= green_to
            red += row[name] > red_above
    if green >= 5 and red == 0:
        return "Exemplary"
    if red >= 3:
        return "At Risk"
    if red >= 1:
        return "Needs Attention"
    return "Strong" if green >= 3 else "Developing"


# What holds


@deterministic(80)
@given(platforms())
def test_the_plain_specification_agrees(platform: Platform) -> None:
    found = computed(platform).tiers

    assert found.select("tutor_id", "window").rows() == [
        (tutor, f"{days}day") for days in WINDOWS for tutor in ("t1", "t2", "t4")
    ]
    for row in found.iter_rows(named=True):
        expected = reference(platform, row["tutor_id"], int(row["window"].removesuffix("day")))
        assert {name: row[name] for name in COUNTS} == {name: expected[name] for name in COUNTS}
        for name in RATES:
            exact = expected[name]
            assert (row[name] is None) == (exact is None), name
            if exact is not None:
                # Half a hundredth of rounding, and what floats and sums of 9 decimals may miss.
                assert row[name] == pytest.approx(float(exact), abs=0.005 + 1e-6, rel=0), name
                assert row[name] == round(row[name], 2)
        assert row["performance_tier"] == tier_by_hand(row)


@deterministic(25)
@given(platforms())
def test_all_results_are_valid_and_no_row_is_lost(platform: Platform) -> None:
    found = computed(platform)

    TutorRoster.validate(found.roster)
    SessionsSnapshot.validate(found.sessions)
    TutorEventsSnapshot.validate(found.events)
    SetAside.validate(found.set_aside)
    WindowMetrics.validate(found.metrics)
    TutorTiers.validate(found.tiers)
    used = [e for e in platform.events if e["event_type"] != "reschedule_request"]
    keys = {row.get("feedback_id") for row in platform.sessions}
    keys |= {row["session_id"] for row in platform.sessions} | {row["event_id"] for row in used}
    assert len(found.sessions) == len({row["session_id"] for row in platform.sessions})
    assert len(found.events) == len(used)
    assert set(found.set_aside["row_key"]) <= keys


@deterministic(20)
@given(platforms(), st.integers(0, 2**32))
def test_the_order_of_the_rows_does_not_show(platform: Platform, seed: int) -> None:
    shuffle = random.Random(seed)
    shuffled = replace(
        platform,
        sessions=shuffle.sample(platform.sessions, len(platform.sessions)),
        events=shuffle.sample(platform.events, len(platform.events)),
    )
    one = computed(platform)
    other = computed(shuffled, tutor_ids=shuffle.sample(list(STATUSES), len(STATUSES)))

    assert_frame_equal(one.tiers, other.tiers, check_exact=True)
    assert_frame_equal(one.roster, other.roster)
    assert_frame_equal(one.set_aside, other.set_aside)
    assert_frame_equal(one.sessions, other.sessions, check_row_order=False, check_exact=True)
    assert_frame_equal(one.events, other.events, check_row_order=False, check_exact=True)


@deterministic(15)
@given(platforms(), st.sets(tutor_ids))
def test_two_halves_make_the_whole(platform: Platform, half: set[str]) -> None:
    parts = [
        computed(platform.only(partial(is_of, tutors)), tutor_ids=tutors)
        for tutors in (half, STATUSES.keys() - half)
    ]
    whole = computed(platform)

    key = ["tutor_id", "window"]
    tiers = pl.concat(part.tiers for part in parts)
    assert_frame_equal(tiers.sort(key), whole.tiers.sort(key), check_exact=True)
    set_aside = pl.concat(part.set_aside for part in parts)
    assert_frame_equal(set_aside.sort(pl.all()), whole.set_aside)


def is_of(tutors: Iterable[str], row: Row) -> bool:
    return row["tutor_id"] in tutors


@deterministic(25)
@given(platforms(), st.sampled_from(WINDOWS))
def test_rows_outside_a_window_do_not_count(platform: Platform, days: int) -> None:
    inside = platform.only(lambda row: platform.within(row, days))

    assert_frame_equal(
        computed(platform, windows=[days]).tiers,
        computed(inside, windows=[days]).tiers,
        check_exact=True,
    )


@deterministic(20)
@given(platforms())
def test_counts_never_shrink_with_a_longer_window(platform: Platform) -> None:
    found = computed(platform).metrics

    for name in COUNTS:
        short, middle, long = (found.filter(window=f"{d}day")[name] for d in WINDOWS)
        assert (short <= middle).all()
        assert (middle <= long).all()


@deterministic(25)
@given(platforms(), st.sets(st.sampled_from([1, 2, *WINDOWS]), min_size=1))
def test_a_window_is_the_same_whichever_are_computed_with_it(
    platform: Platform, windows: set[int]
) -> None:
    together = computed(platform, windows=sorted(windows)).metrics

    alone = pl.concat(computed(platform, windows=[days]).metrics for days in sorted(windows))
    assert_frame_equal(together, alone, check_exact=True)
