"""A synthetic tutoring platform: deterministic frames of the five source tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import polars as pl

from tutormax_assets.sample.breaches import break_rows
from tutormax_assets.sample.kinds import (
    AVAILABILITY_CHANGE_SHARE,
    CIRCLE_STUDENTS,
    DURATION_WEIGHTS,
    DURATIONS_MINUTES,
    EDUCATION_LEVELS,
    FADE_DAYS,
    FEEDBACK_DELAY_HOURS_MEDIAN,
    FEEDBACK_DELAY_LOG_SD,
    FEEDBACK_SHARE,
    FIRST_HOUR,
    HOUR_WEIGHTS,
    IMPROVEMENT_AREAS,
    KINDS,
    LATEST_START_MINUTES,
    LOCATIONS,
    MESSAGE_SHARE,
    NO_SHOW_FEEDBACK_SHARE,
    OPTIONAL_RATINGS,
    SKILL_ENGAGEMENT,
    SKILL_RATING,
    SKILL_TROUBLE,
    SUBJECTS,
    WEEKDAY_WEIGHTS,
)

Floats = npt.NDArray[np.float64]

Ints = npt.NDArray[np.int64]

Flags = npt.NDArray[np.bool_]

MINUTE = np.timedelta64(60_000_000, "us")

BOOKED_MINUTES_AHEAD = 12 * 60
"""A session is on record half a day before it begins."""

DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class _Roster:
    """The tutors of a slice, one element of each array a tutor."""

    number: Ints
    kind: Ints
    skill: Floats
    ids: pl.Series
    status: Ints
    onboarded_days_ago: Ints
    first_day: Ints
    last_day: Ints
    activity: Floats
    subject: Ints
    subject_count: Ints

    def of(self, field: str) -> Floats:
        """A field of the kinds, for each tutor."""
        return np.array([getattr(kind, field) for kind in KINDS], dtype=np.float64)[self.kind]

    def trouble(self, field: str) -> Floats:
        """A share or mean of the kinds that skill makes smaller, for each tutor."""
        return self.of(field) * np.exp(-SKILL_TROUBLE * self.skill)


class SampleArguments(TypedDict):
    """The arguments of `sample_frames`, which documents them, without ``first_tutor``."""

    tutors: int
    sessions_per_tutor: int
    days: int
    end: date
    seed: int
    bad_rows: NotRequired[float]


def sample_frames(
    *,
    tutors: int,
    sessions_per_tutor: int,
    days: int,
    end: date,
    seed: int,
    bad_rows: float = 0.0,
    first_tutor: int = 0,
) -> dict[str, pl.DataFrame]:
    """Rows of a synthetic platform; the same arguments give the same frames.

    Sessions and events lie in ``[end - days, end)`` UTC, and no feedback is later. Ids derive from
    the tutor's number, so frames made for disjoint ranges of tutors fit into one database.

    Args:
        tutors: Number of tutors, at least 1.
        sessions_per_tutor: Mean number of sessions of a tutor; the total is exact, while busy and
            long-serving tutors have more of it.
        days: Length of the history in days, at least 1.
        end: Day before which the history ends.
        seed: Seed of the random numbers, not negative.
        bad_rows: Share, 0 to 1, of the rows of sessions, feedback and events that break the source
            contract; rounded to whole rows for each table.
        first_tutor: Number of the first tutor.

    Returns:
        ``tutors``, ``students``, ``sessions``, ``student_feedback`` and ``tutor_events``, in the
        order in which foreign keys allow them to be written, without ``updated_at``, and
        students without ``created_at``. Integers are 32 bits wide, instants have microseconds and
        UTC, and ``metadata`` is JSON text.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_arguments(
        tutors=tutors, sessions_per_tutor=sessions_per_tutor, days=days, bad_rows=bad_rows
    )
    rng = np.random.default_rng([seed, first_tutor])
    begin = np.datetime64(end - timedelta(days=days), "us")
    stop = np.datetime64(end, "us")

    roster = _roster(rng, first_tutor + np.arange(tutors, dtype=np.int64), days)
    tutor, minute = _timetable(rng, roster, tutors * sessions_per_tutor, end, days)
    students, sessions = _sessions(rng, roster, tutor, begin + minute * MINUTE, days)
    feedback = _feedback(rng, roster, tutor, sessions, stop)
    events = _events(rng, roster, tutor, sessions)
    if bad_rows > 0:
        sessions, feedback, events = break_rows(
            rng, bad_rows, roster.ids, sessions, feedback, events
        )
    return {
        "tutors": _tutors(rng, roster, stop, len(sessions)),
        "students": students,
        "sessions": sessions,
        "student_feedback": feedback,
        "tutor_events": events,
    }


def check_arguments(
    *, tutors: int, sessions_per_tutor: int, days: int, bad_rows: float = 0.0, **_others: object
) -> None:
    """Check the ranges of the arguments of `sample_frames`; the others may have any value.

    Raises:
        ValueError: An argument is out of its range.
    """
    if tutors < 1 or days < 1 or sessions_per_tutor < 0:
        raise ValueError(
            f"got {tutors} tutors, {sessions_per_tutor} sessions per tutor, {days} days; "
            "expected at least 1, 0 and 1"
        )
    if not 0 <= bad_rows <= 1:
        raise ValueError(f"got a share of bad rows of {bad_rows}; expected 0 to 1")


def _cumulative(weights: Sequence[float]) -> Floats:
    return np.cumsum(np.asarray(weights, dtype=np.float64) / sum(weights))


def _draw(rng: np.random.Generator, weights: Sequence[float], size: int) -> Ints:
    """Positions in ``weights``, drawn with these weights."""
    # Above the last but one bound lies the last position, so rounding cannot lead past the end.
    return np.searchsorted(_cumulative(weights)[:-1], rng.random(size), side="right")


def _ids(letter: str, *numbers: Ints, widths: Sequence[int]) -> pl.Series:
    """Ids such as ``S000012-0034``: at most 12 bytes, which Polars keeps without a heap."""
    parts: list[pl.Expr] = [pl.lit(letter)]
    for place, (number, width) in enumerate(zip(numbers, widths, strict=True)):
        if place:
            parts.append(pl.lit("-"))
        parts.append(pl.lit(pl.Series(number)).cast(pl.String).str.zfill(width))
    return pl.select(pl.concat_str(parts).alias("id")).to_series()


def _subjects(first: Ints, count: Ints) -> pl.Series:
    """Lists of neighbouring subjects."""
    lists = [
        [SUBJECTS[(start + step) % len(SUBJECTS)] for step in range(length)]
        for start in range(len(SUBJECTS))
        for length in (1, 2, 3)
    ]
    return pl.Series(lists, dtype=pl.List(pl.String)).gather(first * 3 + count - 1)


def _words(words: Sequence[str], places: Ints) -> pl.Series:
    return pl.Series(words, dtype=pl.String).gather(places)


def _instants(values: npt.NDArray[np.datetime64]) -> pl.Series:
    return pl.Series(values).dt.replace_time_zone("UTC")


def _roster(rng: np.random.Generator, number: Ints, days: int) -> _Roster:
    size = len(number)
    kind = np.searchsorted(
        _cumulative([kind.share for kind in KINDS])[:-1],
        (np.arange(size) + 0.5) / size,
        side="right",
    )
    rng.shuffle(kind)
    youngest, oldest = np.array([k.onboarded_days_ago for k in KINDS])[kind].T
    onboarded = rng.integers(youngest, oldest, endpoint=True)
    inactive = np.array([k.inactive_share for k in KINDS])[kind]
    churned = np.array([k.churned_share for k in KINDS])[kind]
    luck = rng.random(size)
    status = np.where(luck < churned, 2, np.where(luck < churned + inactive, 1, 0))
    # Work begins the day after onboarding; who left did so one to eight weeks ago.
    first_day = np.clip(days - onboarded + 1, 0, days - 1)
    last_day = np.where(status > 0, days - rng.integers(7, 57, size), days)
    activity = np.array([k.activity for k in KINDS])[kind]
    return _Roster(
        number=number,
        kind=kind,
        skill=np.clip(rng.standard_normal(size), -2.5, 2.5),
        ids=_ids("T", number, widths=[6]),
        status=status,
        onboarded_days_ago=onboarded,
        first_day=first_day,
        last_day=np.maximum(last_day, first_day + 1),
        activity=activity * rng.uniform(0.7, 1.3, size),
        subject=rng.integers(0, len(SUBJECTS), size),
        subject_count=rng.integers(1, 3, size, endpoint=True),
    )


def _timetable(
    rng: np.random.Generator, roster: _Roster, total: int, end: date, days: int
) -> tuple[Ints, Ints]:
    """Each session's tutor (position) and start (minutes since the begin), sorted by both."""
    day = np.arange(days)
    weekday = (end.weekday() - days + day) % 7
    usual = np.array(WEEKDAY_WEIGHTS)[weekday]
    fading = usual * np.clip((days - day) / FADE_DAYS, 0.05, 1.0)
    # One axis holds the usual days and then the fading ones. A tutor's days are a stretch of it,
    # so a uniform draw from the stretch of the cumulated weights is a weighted draw of a day.
    bound = np.concatenate([[0.0], np.cumsum(np.concatenate([usual, fading]))])
    offset = np.where(roster.of("fades") > 0, days, 0)
    low, high = bound[roster.first_day + offset], bound[roster.last_day + offset]
    weight = roster.activity * (high - low)
    tutor = np.repeat(np.arange(len(weight)), rng.multinomial(total, weight / weight.sum()))
    at = rng.uniform(low[tutor], high[tutor])
    drawn = np.searchsorted(bound, at, side="right") - 1 - offset[tutor]
    # Rounding may put a draw on the upper bound, which is the next day.
    drawn = np.minimum(drawn, roster.last_day[tutor] - 1)
    hour = FIRST_HOUR + _draw(rng, HOUR_WEIGHTS, total)
    minute = drawn * DAY_MINUTES + hour * 60 + 15 * rng.integers(0, 4, total)
    key = np.sort(tutor * (days * DAY_MINUTES) + minute)
    return key // (days * DAY_MINUTES), key % (days * DAY_MINUTES)


def _rank(groups: Ints) -> Ints:
    """Position of each element within its group, where equal groups are neighbours."""
    place = np.arange(len(groups))
    is_first = np.ones(len(groups), dtype=np.bool_)
    is_first[1:] = groups[1:] != groups[:-1]
    return place - np.maximum.accumulate(np.where(is_first, place, 0))


def _meetings(
    rng: np.random.Generator, roster: _Roster, tutor: Ints, rank: Ints, days: int
) -> tuple[Ints, Ints, Flags]:
    """Student (position among the tutor's) and session number of each session.

    The flags mark the first row of each student.
    """
    size = len(tutor)
    # The circle moves on by one student after as many sessions as it has students.
    student = rank // CIRCLE_STUDENTS + rng.integers(0, CIRCLE_STUDENTS, size)
    pair = tutor * (size + CIRCLE_STUDENTS) + student
    order = np.argsort(pair, kind="stable")
    meeting = np.empty(size, dtype=np.int64)
    meeting[order] = _rank(pair[order])
    # The first circle of a tutor who was there before the history began has met before.
    earlier = rng.integers(1, 25, (len(roster.number), CIRCLE_STUDENTS))
    is_known = (student < CIRCLE_STUDENTS) & (roster.onboarded_days_ago[tutor] > days)
    before = np.where(is_known, earlier[tutor, student % CIRCLE_STUDENTS], 0)
    return student, meeting + before + 1, meeting == 0


def _sessions(
    rng: np.random.Generator,
    roster: _Roster,
    tutor: Ints,
    scheduled: npt.NDArray[np.datetime64],
    days: int,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The students who have a session, and the sessions."""
    size = len(tutor)
    number, rank = roster.number[tutor], _rank(tutor)
    student, session_number, is_first_row = _meetings(rng, roster, tutor, rank, days)
    subject = roster.subject[tutor] + rng.integers(0, roster.subject_count[tutor])
    subject %= len(SUBJECTS)
    no_show = rng.random(size) < roster.trouble("no_show_share")[tutor]
    late = rng.standard_exponential(size) * roster.trouble("late_minutes_mean")[tutor]
    late = np.where(no_show, 0, np.minimum(late.astype(np.int64), LATEST_START_MINUTES))
    centre = roster.of("engagement_mean") + SKILL_ENGAGEMENT * roster.skill
    engagement = np.clip(centre[tutor] + 0.1 * rng.standard_normal(size), 0, 1).round(4)
    sessions = pl.DataFrame(
        {
            "session_id": _ids("S", number, rank, widths=[6, 4]),
            "tutor_id": roster.ids.gather(tutor),
            "student_id": _ids("P", number, student, widths=[6, 3]),
            "session_number": pl.Series(session_number, dtype=pl.Int32),
            "scheduled_start": _instants(scheduled),
            "actual_start": _instants(
                np.where(no_show, np.datetime64("NaT"), scheduled + late * MINUTE)
            ),
            "duration_minutes": pl.Series(
                np.array(DURATIONS_MINUTES)[_draw(rng, DURATION_WEIGHTS, size)], dtype=pl.Int32
            ),
            "subject": _words(SUBJECTS, subject),
            "session_type": _words(("one_on_one", "group"), _draw(rng, (0.85, 0.15), size)),
            "tutor_initiated_reschedule": rng.random(size)
            < roster.trouble("reschedule_share")[tutor],
            "no_show": no_show,
            "late_start_minutes": pl.Series(late, dtype=pl.Int32),
            "engagement_score": engagement,
            "learning_objectives_met": rng.random(size) < roster.of("objectives_met_share")[tutor],
            "technical_issues": rng.random(size) < 0.04,
            "created_at": _instants(scheduled - BOOKED_MINUTES_AHEAD * MINUTE),
        }
    )
    has_engagement = ~no_show & (rng.random(size) >= 0.05)
    has_objectives = ~no_show & (rng.random(size) >= 0.10)
    sessions = sessions.with_columns(
        pl.when(pl.lit(pl.Series(has_engagement))).then("engagement_score"),
        pl.when(pl.lit(pl.Series(has_objectives))).then("learning_objectives_met"),
    )
    students = _students(rng, sessions["student_id"].filter(is_first_row), subject[is_first_row])
    return students, sessions


def _students(rng: np.random.Generator, ids: pl.Series, subject: Ints) -> pl.DataFrame:
    age = rng.integers(7, 18, len(ids), endpoint=True)
    grades = ["kindergarten", *(f"grade {grade}" for grade in range(1, 13))]
    return pl.DataFrame(
        {
            "student_id": ids,
            "name": "Sample Student " + ids,
            "age": pl.Series(age, dtype=pl.Int32),
            "grade_level": _words(grades, age - 6),
            "subjects_interested": _subjects(subject, rng.integers(1, 3, len(ids), endpoint=True)),
        }
    )


def _feedback(
    rng: np.random.Generator,
    roster: _Roster,
    tutor: Ints,
    sessions: pl.DataFrame,
    stop: np.datetime64,
) -> pl.DataFrame:
    size = len(sessions)
    share = np.where(sessions["no_show"].to_numpy(), NO_SHOW_FEEDBACK_SHARE, FEEDBACK_SHARE)
    hours = FEEDBACK_DELAY_HOURS_MEDIAN * np.exp(FEEDBACK_DELAY_LOG_SD * rng.standard_normal(size))
    seconds = (np.clip(hours, 0.3, 60 * 24) * 3600).astype(np.int64)
    began = pl.coalesce("actual_start", "scheduled_start")
    answered = sessions.select(
        pl.concat_str(pl.lit("F"), pl.col("session_id").str.slice(1)).alias("feedback_id"),
        "session_id",
        "student_id",
        "tutor_id",
        pl.lit(pl.Series(tutor)).alias("tutor"),
        (pl.col("session_number") == 1).alias("is_first_session"),
        (
            began
            + pl.duration(minutes="duration_minutes")
            + pl.duration(seconds=pl.lit(pl.Series(seconds)))
        ).alias("submitted_at"),
        pl.lit(pl.Series(rng.random(size) < share)).alias("has_feedback"),
    ).filter("has_feedback", pl.col("submitted_at") < pl.lit(stop).dt.replace_time_zone("UTC"))

    size = len(answered)
    of = answered["tutor"].to_numpy()
    centre = roster.of("rating_mean") + SKILL_RATING * roster.skill
    rating = centre[of] + roster.of("rating_sd")[of] * rng.standard_normal(size)
    rating = np.clip(np.rint(rating), 1, 5).astype(np.int64)
    optional = {}
    for name in OPTIONAL_RATINGS:
        stars = np.clip(rating + rng.integers(-1, 1, size, endpoint=True), 1, 5)
        optional[f"{name}_rating"] = _nullable(stars, rng.random(size) < 0.85, pl.Int32)
    areas = pl.Series([[word] for word in IMPROVEMENT_AREAS] + [[*IMPROVEMENT_AREAS[:2]], None])
    area = rng.integers(0, len(IMPROVEMENT_AREAS), size, endpoint=True)
    return answered.select(
        "feedback_id",
        "session_id",
        "student_id",
        "tutor_id",
        pl.Series("overall_rating", rating, dtype=pl.Int32),
        "is_first_session",
        *(values.alias(name) for name, values in optional.items()),
        _nullable(rating >= 4, rng.random(size) < 0.95, pl.Boolean).alias("would_recommend"),
        areas.gather(np.where(rating <= 3, area, len(areas) - 1)).alias("improvement_areas"),
        pl.lit(None, dtype=pl.String).alias("free_text_feedback"),
        "submitted_at",
        pl.col("submitted_at").alias("created_at"),
    )


def _nullable(values: Ints | Flags, is_set: Flags, dtype: type[pl.DataType]) -> pl.Series:
    series = pl.Series(values, dtype=dtype)
    return series.zip_with(pl.Series(is_set), pl.Series([None], dtype=dtype))


def _events(
    rng: np.random.Generator, roster: _Roster, tutor: Ints, sessions: pl.DataFrame
) -> pl.DataFrame:
    size = len(sessions)
    place = np.arange(size)
    logins = (roster.of("logins_per_session")[tutor] + rng.random(size)).astype(np.int64)
    of_type = [
        np.repeat(place, logins),
        place[rng.random(size) < MESSAGE_SHARE],
        place[sessions["tutor_initiated_reschedule"].to_numpy()],
        place[rng.random(size) < AVAILABILITY_CHANGE_SHARE],
    ]
    types = ("login", "message_response", "reschedule_request", "availability_change")
    kind = np.repeat(np.arange(len(types)), [len(places) for places in of_type])
    session = np.concatenate(of_type)
    size = len(session)
    # Logins come shortly before their session, all else earlier on the same day.
    seconds = rng.random(size) * np.where(kind == 0, 45 * 60, 6 * 3600)
    scheduled = sessions["scheduled_start"].dt.replace_time_zone(None).to_numpy()
    at = scheduled[session] - seconds.astype(np.int64) * np.timedelta64(1_000_000, "us")
    order = np.lexsort((at, tutor[session]))
    kind, of, at = kind[order], tutor[session][order], at[order]
    minutes = roster.of("response_minutes_median")[of] * np.exp(0.6 * rng.standard_normal(size))
    response = pl.lit(pl.Series(minutes.round(2))).cast(pl.String)
    is_response = pl.lit(pl.Series(kind == 1))
    is_request = pl.lit(pl.Series((kind == 2) & (rng.random(size) < 0.5)))
    return pl.select(
        _ids("E", roster.number[of], _rank(of), widths=[6, 4]).alias("event_id"),
        roster.ids.gather(of).alias("tutor_id"),
        _words(types, kind).alias("event_type"),
        _instants(at).alias("event_timestamp"),
        pl.when(is_response)
        .then(pl.concat_str(pl.lit('{"response_time_minutes": '), response, pl.lit("}")))
        .when(is_request)
        .then(pl.lit('{"initiated_by": "tutor"}'))
        .alias("metadata"),
        # They arrive in batches, on the hour.
        _instants(at).dt.truncate("1h").dt.offset_by("1h").alias("created_at"),
    )


def _tutors(
    rng: np.random.Generator, roster: _Roster, stop: np.datetime64, sessions: int
) -> pl.DataFrame:
    size = len(roster.ids)
    days = roster.last_day - roster.first_day
    weekly = 7 * sessions * roster.activity / np.sum(roster.activity * days)
    statuses = ("active", "inactive", "churned", "ACTIVE", "INACTIVE", "CHURNED")
    # The platform stores the status in either case.
    upper = 3 * (rng.random(size) < 0.3)
    onboarded = stop - roster.onboarded_days_ago * DAY_MINUTES * MINUTE + 9 * 60 * MINUTE
    return pl.DataFrame(
        {
            "tutor_id": roster.ids,
            "name": "Sample Tutor " + roster.ids,
            "email": "tutor." + roster.ids.str.to_lowercase() + "@example.com",
            "onboarding_date": _instants(onboarded),
            "status": _words(statuses, roster.status + upper),
            "subjects": _subjects(roster.subject, roster.subject_count),
            "education_level": _words(EDUCATION_LEVELS, rng.integers(0, 4, size)),
            "location": _words(LOCATIONS, rng.integers(0, 5, size)),
            "baseline_sessions_per_week": weekly.round(1),
            "behavioral_archetype": _words([kind.name for kind in KINDS], roster.kind),
            "created_at": _instants(onboarded),
        }
    )
