"""Kinds of tutors, and the shares, weights and words of the generated platform."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TutorKind:
    """How the tutors of one kind work. Shares are probabilities, 0 to 1.

    Attributes:
        name: Value of ``behavioral_archetype``.
        share: Share of all tutors.
        rating_mean: Centre of the ratings before they are rounded to 1-5 stars.
        rating_sd: Their standard deviation, stars.
        reschedule_share: Sessions that the tutor rescheduled.
        no_show_share: Sessions that did not take place.
        late_minutes_mean: Mean of the exponential delay of a start, minutes.
        engagement_mean: Mean engagement of a session, 0 to 1.
        objectives_met_share: Sessions that met their learning objectives.
        logins_per_session: Logins for each session.
        response_minutes_median: Median time until a message is answered, minutes.
        activity: Sessions a day, relative to the other kinds.
        onboarded_days_ago: Youngest and oldest onboarding, days before the end.
        inactive_share: Tutors whose status is inactive.
        churned_share: Tutors whose status is churned.
        fades: Whether sessions become rare in the last weeks.
    """

    name: str
    share: float
    rating_mean: float
    rating_sd: float
    reschedule_share: float
    no_show_share: float
    late_minutes_mean: float
    engagement_mean: float
    objectives_met_share: float
    logins_per_session: float
    response_minutes_median: float
    activity: float
    onboarded_days_ago: tuple[int, int]
    inactive_share: float
    churned_share: float
    fades: bool


_TABLE: dict[str, tuple[Any, ...]] = {
    "name": ("high_performer", "at_risk", "new_tutor", "steady", "churner"),
    "share": (0.30, 0.20, 0.25, 0.20, 0.05),
    "rating_mean": (4.85, 3.55, 4.3, 4.25, 3.8),
    "rating_sd": (0.5, 0.9, 0.6, 0.4, 0.8),
    "reschedule_share": (0.03, 0.17, 0.08, 0.06, 0.18),
    "no_show_share": (0.005, 0.06, 0.02, 0.012, 0.05),
    "late_minutes_mean": (1.5, 7, 4, 3, 7),
    "engagement_mean": (0.90, 0.60, 0.73, 0.74, 0.60),
    "objectives_met_share": (0.94, 0.73, 0.86, 0.88, 0.75),
    "logins_per_session": (1.1, 0.55, 0.85, 0.8, 0.4),
    "response_minutes_median": (8, 50, 20, 15, 70),
    "activity": (1.1, 0.9, 0.8, 1.0, 0.8),
    "onboarded_days_ago": ((120, 1200), (120, 900), (10, 60), (120, 1200), (120, 900)),
    "inactive_share": (0.02, 0.06, 0.01, 0.03, 0.05),
    "churned_share": (0.0, 0.02, 0.0, 0.0, 0.35),
    "fades": (False, False, False, False, True),
}

KINDS = tuple(
    TutorKind(**dict(zip(_TABLE, column, strict=True)))
    for column in zip(*_TABLE.values(), strict=True)
)
"""The kinds of tutors: the columns of the table above, whose shares add up to 1."""

# Tutors of one kind differ: a tutor's skill is standard normal; one unit of it moves the centre of
# the ratings (stars) and of the engagement (0 to 1) up, and the logarithm of the reschedule and
# no-show shares and of the lateness down.
SKILL_RATING = 0.12

SKILL_ENGAGEMENT = 0.03

SKILL_TROUBLE = 0.3

FEEDBACK_SHARE = 0.74  # of the sessions that took place; some of it arrives after the end

NO_SHOW_FEEDBACK_SHARE = 0.12

FEEDBACK_DELAY_HOURS_MEDIAN = 12.0

FEEDBACK_DELAY_LOG_SD = 1.4  # one in a hundred arrives after two weeks

MESSAGE_SHARE = 0.2  # message responses for each session

AVAILABILITY_CHANGE_SHARE = 0.03  # availability changes for each session

FADE_DAYS = 28  # over which a churner's sessions become rare

CIRCLE_STUDENTS = 6  # taught by a tutor at a time; after as many sessions, one is replaced

WEEKDAY_WEIGHTS = (1.1, 1.15, 1.15, 1.1, 0.8, 0.7, 0.5)  # Monday first

# Sessions start at quarters of these hours, UTC. None begins or ends near midnight, so that a
# session, the events of its day and the window's ends never need clipping.
FIRST_HOUR = 7

HOUR_WEIGHTS = (0.3, 0.5, 0.6, 0.6, 0.6, 0.5, 0.6, 1.2, 2.0, 2.4, 2.2, 1.8, 1.2, 0.6)

LATEST_START_MINUTES = 45

DURATIONS_MINUTES = (30, 45, 60, 90)

DURATION_WEIGHTS = (0.2, 0.2, 0.45, 0.15)

SUBJECTS = (
    "algebra",
    "biology",
    "calculus",
    "chemistry",
    "english",
    "history",
    "physics",
    "spanish",
)

# No comma, quote or brace in subjects and areas: they go into array literals as they are.
IMPROVEMENT_AREAS = ("pacing", "clarity", "punctuality", "preparation")

EDUCATION_LEVELS = ("bachelor", "master", "doctorate", "undergraduate")

LOCATIONS = ("Northtown", "Southtown", "Easton", "Westbury", "remote")

OPTIONAL_RATINGS = ("subject_knowledge", "communication", "patience", "engagement", "helpfulness")
