"""What is good, what is dropped, and what is told of it."""

import math
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.quality import (
    NOT_THE_SESSIONS_TUTOR,
    event_rules,
    good_events,
    good_sessions,
    good_tutors,
    session_rules,
)
from tutormax_assets.metrics.schemas import (
    SessionsSnapshot,
    SetAside,
    TutorEventsSnapshot,
    TutorRoster,
)
from tutormax_assets_tests.metrics.rows import (
    DAY_BEFORE,
    Row,
    source_events,
    source_sessions,
    source_tutors,
)

SCALE_100 = Policy(session_score_scale=100)
ANOTHER = "not the session's tutor"

GOOD_SESSION: Row = {
    "session_number": 1,
    "tutor_initiated_reschedule": True,
    "no_show": False,
    "late_start_minutes": 3,
    "engagement_score": 0.75,
    "learning_objectives_met": True,
    "overall_rating": 4,
}


def checked_sessions(
    *rows: Row, policy: Policy | None = None, timezone: str = "UTC"
) -> tuple[pl.DataFrame, pl.DataFrame]:
    good, set_aside = pl.collect_all(
        good_sessions(source_sessions(*rows), policy=policy or Policy(), timezone=timezone)
    )
    return SessionsSnapshot.validate(good), SetAside.validate(set_aside)


def checked_events(*rows: Row, timezone: str = "UTC") -> tuple[pl.DataFrame, pl.DataFrame]:
    good, set_aside = pl.collect_all(good_events(source_events(*rows), timezone=timezone))
    return TutorEventsSnapshot.validate(good), SetAside.validate(set_aside)


def kept(column: str, value: object, *, policy: Policy | None = None) -> object:
    good, _ = checked_sessions({column: value}, policy=policy)
    return good[column].item()


def told(set_aside: pl.DataFrame) -> list[tuple[Any, ...]]:
    return sorted(set_aside.select("source_table", "row_key", "column", "reason").iter_rows())


# Sessions


def test_a_good_session_is_kept_as_it_is() -> None:
    good, set_aside = checked_sessions(GOOD_SESSION)

    assert good.rows(named=True) == [
        {"tutor_id": "t1", "scheduled_date": DAY_BEFORE, "started": True, **GOOD_SESSION}
    ]
    assert set_aside.is_empty()


def test_no_sessions_are_no_sessions() -> None:
    good, set_aside = checked_sessions()

    assert good.is_empty()
    assert set_aside.is_empty()


def test_what_may_be_unknown_is_not_set_aside() -> None:
    good, set_aside = checked_sessions({"engagement_score": None, "learning_objectives_met": None})

    assert good["engagement_score"].item() is None
    assert good["learning_objectives_met"].item() is None
    assert good["overall_rating"].item() is None
    assert set_aside.is_empty()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("engagement_score", 0.0),
        ("engagement_score", -0.0),
        ("engagement_score", 1.0),
        ("late_start_minutes", 0),
        ("late_start_minutes", 2**31 - 1),
        ("session_number", 1),
        ("no_show", True),
        ("tutor_initiated_reschedule", True),
        ("overall_rating", 1),
        ("overall_rating", 5),
    ],
)
def test_a_value_on_the_bound_is_good(column: str, value: object) -> None:
    good, set_aside = checked_sessions({column: value})

    assert good[column].item() == value
    assert set_aside.is_empty()


BROKEN = [
    ("engagement_score", 1.0000001, "not within 0 and 1"),
    ("engagement_score", -0.0000001, "not within 0 and 1"),
    ("engagement_score", 85.0, "not within 0 and 1"),
    ("engagement_score", math.nan, "not within 0 and 1"),
    ("engagement_score", math.inf, "not within 0 and 1"),
    ("engagement_score", -math.inf, "not within 0 and 1"),
    ("late_start_minutes", -1, "negative"),
    ("late_start_minutes", None, "missing"),
    ("session_number", 0, "below 1"),
    ("session_number", -3, "below 1"),
    ("session_number", None, "missing"),
    ("no_show", None, "missing"),
    ("tutor_initiated_reschedule", None, "missing"),
]


@pytest.mark.parametrize(("column", "value", "reason"), BROKEN)
def test_only_the_broken_value_of_a_session_is_dropped(
    column: str, value: object, reason: str
) -> None:
    good, set_aside = checked_sessions({**GOOD_SESSION, column: value})

    whole, _ = checked_sessions(GOOD_SESSION)
    assert good[column].item() is None
    assert_frame_equal(good.drop(column), whole.drop(column))
    assert told(set_aside) == [("sessions", "s1", column, reason)]


@pytest.mark.parametrize("rating", [0, 6, -1, None])
def test_only_the_broken_rating_is_dropped(rating: int | None) -> None:
    good, set_aside = checked_sessions({**GOOD_SESSION, "overall_rating": rating})

    whole, _ = checked_sessions(GOOD_SESSION)
    assert good["overall_rating"].item() is None
    assert_frame_equal(good.drop("overall_rating"), whole.drop("overall_rating"))
    assert told(set_aside) == [
        ("student_feedback", "f1", "overall_rating", "not within 1 and 5"),
    ]


@pytest.mark.parametrize("tutor", ["t2", None])
def test_feedback_of_another_tutor_is_dropped_and_the_session_stays(tutor: str | None) -> None:
    good, set_aside = checked_sessions({**GOOD_SESSION, "feedback_tutor_id": tutor})

    assert good["overall_rating"].item() is None
    assert good["engagement_score"].item() == 0.75
    assert told(set_aside) == [("student_feedback", "f1", "tutor_id", ANOTHER)]


def test_feedback_is_set_aside_for_one_reason() -> None:
    _, set_aside = checked_sessions({"overall_rating": 9, "feedback_tutor_id": "t2"})

    assert told(set_aside) == [("student_feedback", "f1", "tutor_id", ANOTHER)]


def test_set_aside_feedback_is_found_under_the_sessions_tutor_and_date() -> None:
    _, set_aside = checked_sessions({"overall_rating": 3, "feedback_tutor_id": "t2"})

    assert set_aside.select("tutor_id", "date").row(0) == ("t1", DAY_BEFORE)


def two_feedback_rows(**values: object) -> list[Row]:
    row = {"session_id": "s1", **values}
    return [row | {"overall_rating": 5}, row | {"overall_rating": 1}]


def test_of_two_feedback_rows_for_one_session_none_is_believed() -> None:
    good, set_aside = checked_sessions(*two_feedback_rows(), {"overall_rating": 3})

    assert good["overall_rating"].to_list().count(None) == 1
    assert good["overall_rating"].drop_nulls().to_list() == [3]
    several = "of a session that comes more than once"
    assert [row for row in told(set_aside) if row[0] == "student_feedback"] == [
        ("student_feedback", "f1", "session_id", several),
        ("student_feedback", "f2", "session_id", several),
    ]


def test_of_two_feedback_rows_each_is_set_aside_for_one_reason() -> None:
    _, set_aside = checked_sessions(*two_feedback_rows(feedback_tutor_id="t2"))

    assert set_aside.filter(source_table="student_feedback")["reason"].to_list() == [
        "of a session that comes more than once",
        "of a session that comes more than once",
    ]


def test_two_feedback_rows_do_not_double_what_their_session_has_broken() -> None:
    _, set_aside = checked_sessions(*two_feedback_rows(engagement_score=2.0))

    # The session is one row with one broken value; that the join shows it twice is not its fault.
    assert [row for row in told(set_aside) if row[0] == "sessions"] == [
        ("sessions", "s1", "engagement_score", "not within 0 and 1"),
    ]


def test_a_session_that_comes_twice_counts_once() -> None:
    twice = {**GOOD_SESSION, "session_id": "s1"}
    del twice["overall_rating"]
    good, set_aside = checked_sessions(twice, twice, {"tutor_id": "t2"})

    assert good["tutor_id"].to_list() == ["t1", "t2"]
    assert told(set_aside) == [("sessions", "s1", "session_id", "duplicate")]


def test_of_a_session_that_comes_twice_no_rating_is_believed() -> None:
    twice = {**GOOD_SESSION, "session_id": "s1", "feedback_id": "f1"}
    good, set_aside = checked_sessions(twice, twice)

    assert good["overall_rating"].to_list() == [None]
    assert told(set_aside) == [
        ("sessions", "s1", "session_id", "duplicate"),
        ("student_feedback", "f1", "session_id", "of a session that comes more than once"),
    ]


def test_a_session_that_comes_twice_with_two_feedback_rows_has_no_believed_rating() -> None:
    five: Row = {"session_id": "s1", "feedback_id": "f1", "overall_rating": 5}
    one: Row = {"session_id": "s1", "feedback_id": "f2", "overall_rating": 1}
    for rows in ([five, one, five, one], [one, five, one, five], [five, five, one]):
        good, _ = checked_sessions(*rows)
        assert good["overall_rating"].to_list() == [None]


def test_feedback_of_two_sessions_is_looked_at_twice() -> None:
    bad: Row = {"feedback_id": "f", "overall_rating": 9}
    of_another: Row = {"feedback_id": "f", "overall_rating": 5, "feedback_tutor_id": "t2"}
    good, set_aside = checked_sessions(bad, bad, of_another)

    assert good["overall_rating"].to_list() == [None, None, None]
    assert told(set_aside) == [
        ("student_feedback", "f", "overall_rating", "not within 1 and 5"),
        ("student_feedback", "f", "overall_rating", "not within 1 and 5"),
        ("student_feedback", "f", "tutor_id", "not the session's tutor"),
    ]


def test_every_broken_value_of_a_session_is_told() -> None:
    good, set_aside = checked_sessions(
        {
            "session_number": 0,
            "tutor_initiated_reschedule": None,
            "no_show": None,
            "late_start_minutes": -5,
            "engagement_score": 85.0,
            "overall_rating": 0,
        }
    )

    assert told(set_aside) == [
        ("sessions", "s1", "engagement_score", "not within 0 and 1"),
        ("sessions", "s1", "late_start_minutes", "negative"),
        ("sessions", "s1", "no_show", "missing"),
        ("sessions", "s1", "session_number", "below 1"),
        ("sessions", "s1", "tutor_initiated_reschedule", "missing"),
        ("student_feedback", "f1", "overall_rating", "not within 1 and 5"),
    ]
    assert len(good) == 1
    assert set(good.row(0)) == {"t1", DAY_BEFORE, True, None}


@pytest.mark.parametrize(
    ("value", "policy", "expected"),
    [
        (85.0, SCALE_100, 85.0),
        (100.0, SCALE_100, 100.0),
        (0.85, SCALE_100, 0.85),
        (100.1, SCALE_100, None),
        (-0.1, SCALE_100, None),
        (0.85, Policy(), 0.85),
        (1.1, Policy(), None),
    ],
)
def test_the_scale_says_which_scores_are_good(
    value: float, policy: Policy, expected: float | None
) -> None:
    assert kept("engagement_score", value, policy=policy) == expected


def test_the_reason_names_the_scale() -> None:
    _, set_aside = checked_sessions({"engagement_score": 101.0}, policy=SCALE_100)

    assert set_aside["reason"].item() == "not within 0 and 100"


# Events


@pytest.mark.parametrize(
    ("literal", "minutes"),
    [
        ("12", 12.0),
        ("12.5", 12.5),
        ("1e2", 100.0),
        ("1E+2", 100.0),
        ("5e-1", 0.5),
        ("0", 0.0),
        ("-0", 0.0),
        ("-0.0", 0.0),
        ("1e-400", 0.0),
        ("0.1", 0.1),
        ("123456789.25", 123456789.25),
    ],
)
def test_a_response_time_is_read(literal: str, minutes: float) -> None:
    good, set_aside = checked_events({"response_time_minutes": literal})

    assert good["response_time_minutes"].item() == minutes
    assert set_aside.is_empty()


@pytest.mark.parametrize("literal", [None, "null"])
def test_an_absent_response_time_is_merely_absent(literal: str | None) -> None:
    good, set_aside = checked_events({"response_time_minutes": literal})

    assert good["response_time_minutes"].to_list() == [None]
    assert set_aside.is_empty()


@pytest.mark.parametrize(
    ("literal", "reason"),
    [
        ("-1", "negative"),
        ("-0.001", "negative"),
        ("-1e299", "negative"),
        ('"fast"', "not a finite number"),
        ('"12"', "not a finite number"),
        ('"null"', "not a finite number"),
        ("true", "not a finite number"),
        ("false", "not a finite number"),
        ("{}", "not a finite number"),
        ("[12]", "not a finite number"),
        ("1e400", "not a finite number"),
        ("-1e400", "not a finite number"),
        ("NaN", "not a finite number"),
        ('"NaN"', "not a finite number"),
        ("Infinity", "not a finite number"),
        ("-Infinity", "not a finite number"),
        ("inf", "not a finite number"),
        ("", "not a finite number"),
        (" ", "not a finite number"),
    ],
)
def test_a_bad_response_time_is_dropped_and_the_event_stays(literal: str, reason: str) -> None:
    good, set_aside = checked_events({"response_time_minutes": literal})

    assert good.rows() == [("t1", DAY_BEFORE, "message_response", None)]
    assert set_aside.rows() == [
        ("tutor_events", "e1", "t1", DAY_BEFORE, "metadata.response_time_minutes", reason)
    ]


@pytest.mark.parametrize("literal", ["12", "-1", '"fast"', None])
def test_a_login_carries_no_response_time(literal: str | None) -> None:
    good, set_aside = checked_events({"event_type": "login", "response_time_minutes": literal})

    assert good.rows() == [("t1", DAY_BEFORE, "login", None)]
    assert set_aside.is_empty()


@pytest.mark.parametrize("kind", ["reschedule_request", "availability_change", "Login", ""])
def test_events_of_other_types_are_left_out(kind: str) -> None:
    good, set_aside = checked_events({"event_type": kind, "response_time_minutes": '"fast"'})

    assert good.is_empty()
    assert set_aside.is_empty()


def test_no_events_are_no_events() -> None:
    good, set_aside = checked_events()

    assert good.is_empty()
    assert set_aside.is_empty()


@pytest.mark.parametrize("ids_are_unique", [True, False])
def test_rows_that_are_there_once_are_the_same_whether_repetitions_are_looked_for(
    ids_are_unique: bool,
) -> None:
    rows = source_sessions(
        {},
        {"late_start_minutes": -1},
        {"overall_rating": 6},
        {"overall_rating": 5, "feedback_tutor_id": "another"},
    )

    good, set_aside = pl.collect_all(
        good_sessions(rows, policy=Policy(), timezone="UTC", ids_are_unique=ids_are_unique)
    )

    assert good["late_start_minutes"].null_count() == 1
    assert good["overall_rating"].null_count() == 4
    assert set_aside["reason"].to_list() == [
        "negative",
        NOT_THE_SESSIONS_TUTOR,
        "not within 1 and 5",
    ]


# What was set aside


def test_the_value_itself_is_never_kept() -> None:
    _, of_sessions = checked_sessions(
        {
            "session_number": -424242,
            "late_start_minutes": -424242,
            "engagement_score": 424242.0,
            "overall_rating": 424242,
        }
    )
    _, of_events = checked_events({"response_time_minutes": '"424242"'})

    assert len(of_sessions) == 4
    assert len(of_events) == 1
    assert "424242" not in f"{of_sessions.rows()} {of_events.rows()}"


def test_every_rule_names_a_column_and_a_reason_of_its_own() -> None:
    rules = [*session_rules(Policy()), *event_rules()]

    named = {(rule.source_table, rule.column, rule.reason) for rule in rules}
    assert len(named) == len(rules)
    assert named == {
        *(("sessions", column, reason) for column, _, reason in BROKEN),
        ("sessions", "session_id", "duplicate"),
        ("student_feedback", "session_id", "of a session that comes more than once"),
        ("student_feedback", "tutor_id", ANOTHER),
        ("student_feedback", "overall_rating", "not within 1 and 5"),
        ("tutor_events", "metadata.response_time_minutes", "not a finite number"),
        ("tutor_events", "metadata.response_time_minutes", "negative"),
    }


# Local dates

MICROSECOND = timedelta(microseconds=1)
INSTANTS = [
    (datetime(2025, 11, 6, tzinfo=UTC), "UTC", date(2025, 11, 6)),
    (datetime(2025, 11, 6, tzinfo=UTC) - MICROSECOND, "UTC", date(2025, 11, 5)),
    # New York is 5 hours behind in winter, 4 in summer.
    (datetime(2025, 11, 7, 5, tzinfo=UTC), "America/New_York", date(2025, 11, 7)),
    (datetime(2025, 11, 7, 5, tzinfo=UTC) - MICROSECOND, "America/New_York", date(2025, 11, 6)),
    # The clock goes back on 2 November 2025: the day has 25 hours.
    (datetime(2025, 11, 2, 4, tzinfo=UTC), "America/New_York", date(2025, 11, 2)),
    (datetime(2025, 11, 2, 4, tzinfo=UTC) - MICROSECOND, "America/New_York", date(2025, 11, 1)),
    (datetime(2025, 11, 3, 5, tzinfo=UTC), "America/New_York", date(2025, 11, 3)),
    (datetime(2025, 11, 3, 5, tzinfo=UTC) - MICROSECOND, "America/New_York", date(2025, 11, 2)),
    # It goes forward on 9 March 2025: the day has 23 hours.
    (datetime(2025, 3, 9, 5, tzinfo=UTC), "America/New_York", date(2025, 3, 9)),
    (datetime(2025, 3, 9, 5, tzinfo=UTC) - MICROSECOND, "America/New_York", date(2025, 3, 8)),
    (datetime(2025, 3, 10, 4, tzinfo=UTC), "America/New_York", date(2025, 3, 10)),
    (datetime(2025, 3, 10, 4, tzinfo=UTC) - MICROSECOND, "America/New_York", date(2025, 3, 9)),
    # Half an hour matters; so does a whole day.
    (datetime(2025, 11, 6, 18, 30, tzinfo=UTC), "Asia/Kolkata", date(2025, 11, 7)),
    (datetime(2025, 11, 6, 18, 29, tzinfo=UTC), "Asia/Kolkata", date(2025, 11, 6)),
    (datetime(2025, 11, 6, 10, tzinfo=UTC), "Pacific/Kiritimati", date(2025, 11, 7)),
    # On 4 November 2018 midnight did not exist in Brazil: 23:59:59 was followed by 01:00.
    (datetime(2018, 11, 4, 3, tzinfo=UTC), "America/Sao_Paulo", date(2018, 11, 4)),
    (datetime(2018, 11, 4, 3, tzinfo=UTC) - MICROSECOND, "America/Sao_Paulo", date(2018, 11, 3)),
]


@pytest.mark.parametrize(("instant", "timezone", "day"), INSTANTS)
def test_a_session_belongs_to_its_local_date(instant: datetime, timezone: str, day: date) -> None:
    good, set_aside = checked_sessions(
        {"scheduled_start": instant, "session_number": 0}, timezone=timezone
    )

    assert good["scheduled_date"].item() == day
    assert set_aside["date"].item() == day


@pytest.mark.parametrize(("instant", "timezone", "day"), INSTANTS)
def test_an_event_belongs_to_its_local_date(instant: datetime, timezone: str, day: date) -> None:
    good, set_aside = checked_events(
        {"event_timestamp": instant, "response_time_minutes": "-1"}, timezone=timezone
    )

    assert good["event_date"].item() == day
    assert set_aside["date"].item() == day


# Roster

STATUSES = {
    "t6": "active",
    "t5": "ACTIVE",
    "t4": "Active",
    "t3": "inactive",
    "t2": "CHURNED",
    "t1": None,
}


def test_the_roster_is_the_active_tutors_in_any_case() -> None:
    found = good_tutors(source_tutors(**STATUSES), include_inactive=False).collect()

    assert TutorRoster.validate(found).rows() == [
        ("t4", "active"),
        ("t5", "active"),
        ("t6", "active"),
    ]


def test_inactive_tutors_are_in_the_roster_when_asked_for() -> None:
    found = good_tutors(source_tutors(**STATUSES), include_inactive=True).collect()

    assert TutorRoster.validate(found).rows() == [
        ("t1", None),
        ("t2", "churned"),
        ("t3", "inactive"),
        ("t4", "active"),
        ("t5", "active"),
        ("t6", "active"),
    ]


@pytest.mark.parametrize("include_inactive", [True, False])
def test_an_empty_roster(include_inactive: bool) -> None:
    found = good_tutors(source_tutors(), include_inactive=include_inactive).collect()

    assert TutorRoster.validate(found).is_empty()


def test_other_columns_do_not_enter_the_roster() -> None:
    tutors = source_tutors(t1="active").with_columns(pl.lit("Ann").alias("name"))

    roster = good_tutors(tutors, include_inactive=False).collect()
    assert roster.columns == ["tutor_id", "status"]
