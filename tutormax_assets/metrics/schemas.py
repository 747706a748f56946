"""The frame that enters and leaves each stage.

Source frames are the rows as the platform holds them; the others are what the assets store. What is
read of the platform, the columns of the metrics table, and the descriptions and the lineage that
the Dagster UI shows follow from these declarations.
"""

from collections.abc import Sequence

import dataframely as dy

from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, LOWER_IS_BETTER

LOGIN = "login"
MESSAGE_RESPONSE = "message_response"
FLAGS = ("green", "red")
CERTAINTIES = ("certain", "within_noise")
EVIDENCE = ("sufficient", "thin")
FLAGGED = (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
"""The metrics that carry a flag."""

MOVES = ("up", "down", "new", "gone", "same")
TIERS = ("Exemplary", "Strong", "Developing", "Needs Attention", "At Risk")


_ORIGINS = "origins"


def _from(*columns: str) -> dict[str, Sequence[str]]:
    """Metadata of a column that says what it is made from, each as ``table.column``."""
    return {_ORIGINS: columns}


def origins(
    schema: type[dy.Schema], *, source: type[dy.Schema] | None = None
) -> dict[str, list[tuple[str, str]]]:
    """By column, the columns that it is made from, each as table or asset and name.

    A column that is made from none, such as the name of a window, is left out.

    Args:
        schema: Of which columns.
        source: The source frame whose columns keep their names in it.
    """
    read = source.columns() if source else {}
    found = {}
    for name, column in schema.columns().items():
        of_source = read[name].metadata if name in read else None
        declared = {**(of_source or {}), **(column.metadata or {})}
        if _ORIGINS in declared:
            columns = [origin.partition(".") for origin in declared[_ORIGINS]]
            found[name] = [(table, column) for table, _, column in columns]
    return found


class SourceTutors(dy.Schema):
    """One row per tutor of the platform."""

    tutor_id = dy.String(primary_key=True, metadata=_from("tutors.tutor_id"))
    status = dy.String(nullable=True, metadata=_from("tutors.status"))


class SourceSessions(dy.Schema):
    """One row per session, with its feedback where there is one; nothing checked yet."""

    session_id = dy.String(metadata=_from("sessions.session_id", "student_feedback.session_id"))
    tutor_id = dy.String(metadata=_from("sessions.tutor_id"))
    session_number = dy.Int32(nullable=True, metadata=_from("sessions.session_number"))
    scheduled_start = dy.Datetime(time_zone="UTC", metadata=_from("sessions.scheduled_start"))
    started = dy.Bool(metadata=_from("sessions.actual_start"))
    tutor_initiated_reschedule = dy.Bool(
        nullable=True, metadata=_from("sessions.tutor_initiated_reschedule")
    )
    no_show = dy.Bool(nullable=True, metadata=_from("sessions.no_show"))
    late_start_minutes = dy.Int32(nullable=True, metadata=_from("sessions.late_start_minutes"))
    engagement_score = dy.Float64(
        nullable=True, allow_nan=True, allow_inf=True, metadata=_from("sessions.engagement_score")
    )
    learning_objectives_met = dy.Bool(
        nullable=True, metadata=_from("sessions.learning_objectives_met")
    )
    feedback_id = dy.String(nullable=True, metadata=_from("student_feedback.feedback_id"))
    feedback_tutor_id = dy.String(nullable=True, metadata=_from("student_feedback.tutor_id"))
    overall_rating = dy.Int32(nullable=True, metadata=_from("student_feedback.overall_rating"))


class SourceEvents(dy.Schema):
    """One row per login or message response; nothing checked yet."""

    event_id = dy.String(
        nullable=True, description="Null of a login.", metadata=_from("tutor_events.event_id")
    )
    tutor_id = dy.String(metadata=_from("tutor_events.tutor_id"))
    event_type = dy.String(metadata=_from("tutor_events.event_type"))
    event_timestamp = dy.Datetime(time_zone="UTC", metadata=_from("tutor_events.event_timestamp"))
    response_time_minutes = dy.String(
        nullable=True,
        description="The JSON literal under that key of the event's metadata; null without it.",
        metadata=_from("tutor_events.metadata"),
    )


class TutorRoster(dy.Schema):
    """One row per tutor that the reference date is computed for."""

    tutor_id = dy.String(primary_key=True, description="The platform's id of the tutor.")
    status = dy.String(nullable=True, description="active, inactive or churned, in lower case.")


class SessionsSnapshot(dy.Schema):
    """One row per session of the longest window, with its rating; broken values are null."""

    tutor_id = dy.String(description="The tutor who holds the session.")
    scheduled_date = dy.Date(
        description="Local date of scheduled_start.", metadata=_from("sessions.scheduled_start")
    )
    session_number = dy.Int32(
        nullable=True, min=1, description="Position among the sessions of tutor and student."
    )
    started = dy.Bool(description="Whether actual_start is set.")
    tutor_initiated_reschedule = dy.Bool(
        nullable=True, description="Whether the tutor moved the session."
    )
    no_show = dy.Bool(nullable=True, description="Whether the session did not take place.")
    late_start_minutes = dy.Int32(
        nullable=True, min=0, description="Minutes from scheduled to actual start."
    )
    engagement_score = dy.Float64(
        nullable=True, min=0, description="Engagement on the platform's own scale."
    )
    learning_objectives_met = dy.Bool(
        nullable=True, description="Whether the session met its objectives; null where unknown."
    )
    overall_rating = dy.Int32(
        nullable=True,
        min=1,
        max=5,
        description="The student's rating; null without feedback.",
        metadata=_from("student_feedback.overall_rating", "student_feedback.tutor_id"),
    )


class TutorEventsSnapshot(dy.Schema):
    """One row per login or message response of the longest window; broken values are null."""

    tutor_id = dy.String(description="The tutor who acted.")
    event_date = dy.Date(
        description="Local date of event_timestamp.", metadata=_from("tutor_events.event_timestamp")
    )
    event_type = dy.Enum([LOGIN, MESSAGE_RESPONSE], description="login or message_response.")
    response_time_minutes = dy.Float64(
        nullable=True, min=0, description="Minutes to answer a message; null where not carried."
    )


class SetAside(dy.Schema):
    """One row per broken value: where it is and why it was not used, never the value itself."""

    source_table = dy.String(description="Table that holds the row.")
    row_key = dy.String(description="Primary key of the row.")
    tutor_id = dy.String(description="The tutor of the session or event.")
    date = dy.Date(description="Local date of the session or event.")
    column = dy.String(description="Column that holds the broken value.")
    reason = dy.String(description="What the contract asks for that the value is not.")


class WindowMetrics(dy.Schema):
    """One row per tutor of the roster and window: the eight numbers that the tier is read from."""

    tutor_id = dy.String(
        primary_key=True,
        description="The platform's id of the tutor.",
        metadata=_from("tutor_roster.tutor_id"),
    )
    window = dy.String(primary_key=True, description="Length of the window, such as 30day.")
    sessions_completed = dy.Int32(
        min=0,
        description="Sessions with actual_start set that were no no-show.",
        metadata=_from("sessions_snapshot.started", "sessions_snapshot.no_show"),
    )
    avg_rating = dy.Float64(
        nullable=True,
        min=1,
        max=5,
        description="Mean rating of the sessions with feedback.",
        metadata=_from("sessions_snapshot.overall_rating"),
    )
    first_session_success_rate = dy.Float64(
        nullable=True,
        min=0,
        max=100,
        description="% of rated first sessions rated 4 or more.",
        metadata=_from("sessions_snapshot.session_number", "sessions_snapshot.overall_rating"),
    )
    reschedule_rate = dy.Float64(
        nullable=True,
        min=0,
        max=100,
        description="% of sessions that the tutor rescheduled.",
        metadata=_from("sessions_snapshot.tutor_initiated_reschedule"),
    )
    no_show_count = dy.Int32(
        min=0,
        description="Sessions that were a no-show.",
        metadata=_from("sessions_snapshot.no_show"),
    )
    engagement_score = dy.Float64(
        nullable=True,
        min=0,
        max=100,
        description="0.4 login + 0.4 session + 0.2 punctual, each 0 to 100.",
        metadata=_from(
            "tutor_events_snapshot.event_type",
            "sessions_snapshot.engagement_score",
            "sessions_snapshot.late_start_minutes",
        ),
    )
    learning_objectives_met_pct = dy.Float64(
        nullable=True,
        min=0,
        max=100,
        description="% of sessions with known outcome that met it.",
        metadata=_from("sessions_snapshot.learning_objectives_met"),
    )
    response_time_avg_minutes = dy.Float64(
        nullable=True,
        min=0,
        description="Mean minutes to answer a message.",
        metadata=_from("tutor_events_snapshot.response_time_minutes"),
    )


class FlaggedSums(dy.Schema):
    """Whole numbers that flagged metrics are computed from."""

    sessions = dy.UInt32(
        description="Sessions.", metadata=_from("sessions_snapshot.scheduled_date")
    )
    reschedules_known = dy.UInt32(
        description="Sessions with a known reschedule flag.",
        metadata=_from("sessions_snapshot.tutor_initiated_reschedule"),
    )
    reschedules = dy.UInt32(
        description="Sessions that the tutor rescheduled.",
        metadata=_from("sessions_snapshot.tutor_initiated_reschedule"),
    )
    ratings = dy.UInt32(
        description="Sessions with a rating.", metadata=_from("sessions_snapshot.overall_rating")
    )
    rating_sum = dy.Int64(
        description="Sum of the ratings.", metadata=_from("sessions_snapshot.overall_rating")
    )
    first_rated = dy.UInt32(
        description="First sessions with a rating.",
        metadata=_from("sessions_snapshot.session_number", "sessions_snapshot.overall_rating"),
    )
    first_successes = dy.UInt32(
        description="Of these, those rated 4 or more.",
        metadata=_from("sessions_snapshot.session_number", "sessions_snapshot.overall_rating"),
    )
    lateness_known = dy.UInt32(
        description="Sessions whose late_start_minutes is usable.",
        metadata=_from("sessions_snapshot.late_start_minutes"),
    )
    punctual = dy.UInt32(
        description="Of these, those that began within the late limit.",
        metadata=_from("sessions_snapshot.late_start_minutes"),
    )
    scores = dy.UInt32(
        description="Sessions with an engagement score.",
        metadata=_from("sessions_snapshot.engagement_score"),
    )
    score_sum = dy.Float64(
        description="Sum of the scores, in units of 1e-9: a whole number.",
        metadata=_from("sessions_snapshot.engagement_score"),
    )
    objectives_known = dy.UInt32(
        description="Sessions with a known outcome.",
        metadata=_from("sessions_snapshot.learning_objectives_met"),
    )
    objectives_met = dy.UInt32(
        description="Of these, those that met their objectives.",
        metadata=_from("sessions_snapshot.learning_objectives_met"),
    )
    logins = dy.UInt32(description="Logins.", metadata=_from("tutor_events_snapshot.event_type"))


class WindowSums(WindowMetrics, FlaggedSums):
    """The metrics of a tutor and window, and the whole numbers that they are computed from."""

    rating_square_sum = dy.Int64(
        description="Sum of the squares of the ratings.",
        metadata=_from("sessions_snapshot.overall_rating"),
    )
    responses = dy.UInt32(
        description="Message responses that carry a time.",
        metadata=_from("tutor_events_snapshot.response_time_minutes"),
    )
    minutes_sum = dy.Float64(
        description="Sum of the response times in minutes, in units of 1e-6: a whole number.",
        metadata=_from("tutor_events_snapshot.response_time_minutes"),
    )


class OfDates(dy.Schema):
    """Rows of several reference dates."""

    reference_date = dy.Date(primary_key=True, description="The day after the last one.")


class WindowSumsOfDates(WindowSums, OfDates):
    """``WindowSums`` of several reference dates."""


class WindowEdge(dy.Schema):
    """The first or the last days of a window, of a tutor."""

    tutor_id = dy.String(
        primary_key=True,
        description="The platform's id of the tutor.",
        metadata=_from("sessions_snapshot.tutor_id", "tutor_events_snapshot.tutor_id"),
    )
    edge = dy.String(
        primary_key=True,
        description="last_7: the last 7 days; 30day_first_7: the first 7 days of that window.",
    )
    no_shows = dy.UInt32(
        description="Sessions that were a no-show.", metadata=_from("sessions_snapshot.no_show")
    )


class EdgeSums(WindowEdge, FlaggedSums):
    """The sums of a tutor's rows at an edge of the windows."""


class EdgeSumsOfDates(EdgeSums, OfDates):
    """``EdgeSums`` of several reference dates."""


SUMS = ("no_shows", *FlaggedSums.column_names())
"""The sums that flagged metrics are computed from."""


class TutorTiers(WindowMetrics):
    """One row per tutor of the roster and window: the metrics, their flags and the tier."""

    green_flags = dy.UInt8(max=6, description="Metrics on the green side of their threshold.")
    red_flags = dy.UInt8(max=6, description="Metrics on the red side of their threshold.")
    performance_tier = dy.Enum(TIERS, description="Tier that follows from the flags.")


class TutorMetricsAsOf(TutorTiers):
    """``TutorTiers`` as they could be known at an instant."""

    as_of = dy.Datetime(
        time_zone="UTC", description="The instant up to which rows and ratings were known."
    )


class TutorTiersOfDates(TutorTiers, OfDates):
    """``TutorTiers`` of several reference dates."""


class TierReasons(dy.Schema):
    """One row per tutor of the roster and window: why the tier, and how sure it is.

    Of each metric that carries a flag there are its value, the number of rows that it rests on, its
    95 % interval where it has one, its flag, and whether the flag is more than noise.
    """

    tutor_id = dy.String(primary_key=True, description="The platform's id of the tutor.")
    window = dy.String(primary_key=True, description="Length of the window, such as 30day.")
    performance_tier = dy.Enum(TIERS, description="Tier that follows from the flags.")
    sessions = dy.UInt32(description="Sessions of the window.")
    evidence = dy.Enum(
        EVIDENCE,
        description="thin with fewer sessions than evidence_min_sessions, else sufficient.",
    )
    green_flags = dy.UInt8(max=6, description="Metrics on the green side of their threshold.")
    red_flags = dy.UInt8(max=6, description="Metrics on the red side of their threshold.")
    avg_rating = dy.Float64(nullable=True, description="Value of avg_rating.")
    avg_rating_denominator = dy.UInt32(description="Number of ratings.")
    avg_rating_low = dy.Float64(
        nullable=True, min=1, max=5, description="Lower end of its 95 % interval."
    )
    avg_rating_high = dy.Float64(
        nullable=True, min=1, max=5, description="Upper end of its 95 % interval."
    )
    avg_rating_flag = dy.Enum(FLAGS, nullable=True, description="green, red, or null for neither.")
    avg_rating_certainty = dy.Enum(
        CERTAINTIES, nullable=True, description="certain or within_noise; null without a flag."
    )
    first_session_success_rate = dy.Float64(
        nullable=True, description="Value of first_session_success_rate."
    )
    first_session_success_rate_denominator = dy.UInt32(
        description="Number of rated first sessions."
    )
    first_session_success_rate_low = dy.Float64(
        nullable=True, min=0, max=100, description="Lower end of its 95 % interval."
    )
    first_session_success_rate_high = dy.Float64(
        nullable=True, min=0, max=100, description="Upper end of its 95 % interval."
    )
    first_session_success_rate_flag = dy.Enum(
        FLAGS, nullable=True, description="green, red, or null for neither."
    )
    first_session_success_rate_certainty = dy.Enum(
        CERTAINTIES, nullable=True, description="certain or within_noise; null without a flag."
    )
    reschedule_rate = dy.Float64(nullable=True, description="Value of reschedule_rate.")
    reschedule_rate_denominator = dy.UInt32(
        description="Number of sessions with a known reschedule flag."
    )
    reschedule_rate_low = dy.Float64(
        nullable=True, min=0, max=100, description="Lower end of its 95 % interval."
    )
    reschedule_rate_high = dy.Float64(
        nullable=True, min=0, max=100, description="Upper end of its 95 % interval."
    )
    reschedule_rate_flag = dy.Enum(
        FLAGS, nullable=True, description="green, red, or null for neither."
    )
    reschedule_rate_certainty = dy.Enum(
        CERTAINTIES, nullable=True, description="certain or within_noise; null without a flag."
    )
    no_show_count = dy.Int32(min=0, description="Value of no_show_count.")
    no_show_count_denominator = dy.UInt32(description="Number of sessions.")
    no_show_count_flag = dy.Enum(
        FLAGS, nullable=True, description="green, red, or null for neither."
    )
    engagement_score = dy.Float64(nullable=True, description="Value of engagement_score.")
    engagement_score_denominator = dy.UInt32(description="Number of sessions.")
    engagement_score_flag = dy.Enum(
        FLAGS, nullable=True, description="green, red, or null for neither."
    )
    learning_objectives_met_pct = dy.Float64(
        nullable=True, description="Value of learning_objectives_met_pct."
    )
    learning_objectives_met_pct_denominator = dy.UInt32(
        description="Number of sessions with a known outcome."
    )
    learning_objectives_met_pct_low = dy.Float64(
        nullable=True, min=0, max=100, description="Lower end of its 95 % interval."
    )
    learning_objectives_met_pct_high = dy.Float64(
        nullable=True, min=0, max=100, description="Upper end of its 95 % interval."
    )
    learning_objectives_met_pct_flag = dy.Enum(
        FLAGS, nullable=True, description="green, red, or null for neither."
    )
    learning_objectives_met_pct_certainty = dy.Enum(
        CERTAINTIES, nullable=True, description="certain or within_noise; null without a flag."
    )


class TierReasonsOfDates(TierReasons, OfDates):
    """``TierReasons`` of several reference dates."""


class TierChanges(dy.Schema):
    """What moved against an earlier reference date: tier and flags, and why.

    One row per tutor, window and metric whose flag changed, and per component of that metric; one
    row without a metric where the tier moved and no flag did. Of each component there are numerator
    and denominator then and now, and what the difference is made of: ``before + came_in - aged_out
    + corrected`` is ``after``.
    """

    tutor_id = dy.String(primary_key=True, description="The platform's id of the tutor.")
    window = dy.String(primary_key=True, description="Length of the window, such as 30day.")
    days = dy.UInt16(primary_key=True, description="Days from the earlier reference date: 1 or 7.")
    position = dy.UInt8(
        primary_key=True, description="Number of the row among those of tutor, window and days."
    )
    move = dy.Enum(MOVES, description="up, down, new, gone, or same where only flags changed.")
    tier = dy.Enum(TIERS, nullable=True, description="Tier now; null of a tutor who is gone.")
    tier_before = dy.Enum(TIERS, nullable=True, description="Tier then; null of a new tutor.")
    metric = dy.Enum(FLAGGED, nullable=True, description="Metric whose flag changed.")
    flag = dy.Enum(FLAGS, nullable=True, description="Its flag now.")
    flag_before = dy.Enum(FLAGS, nullable=True, description="Its flag then.")
    value = dy.Float64(nullable=True, description="Its value now.")
    value_before = dy.Float64(nullable=True, description="Its value then.")
    numerator = dy.Enum(SUMS, nullable=True, description="A sum that the metric is computed from.")
    numerator_before = dy.Int64(nullable=True, description="That sum then.")
    numerator_came_in = dy.Int64(nullable=True, description="Of days that entered the window.")
    numerator_aged_out = dy.Int64(nullable=True, description="Of days that left the window.")
    numerator_corrected = dy.Int64(
        nullable=True, description="Of days in both, as known now less as known then."
    )
    numerator_after = dy.Int64(nullable=True, description="That sum now.")
    denominator = dy.Enum(SUMS, nullable=True, description="The sum that it is divided by.")
    denominator_before = dy.Int64(nullable=True, description="That sum then.")
    denominator_came_in = dy.Int64(nullable=True, description="Of days that entered the window.")
    denominator_aged_out = dy.Int64(nullable=True, description="Of days that left the window.")
    denominator_corrected = dy.Int64(
        nullable=True, description="Of days in both, as known now less as known then."
    )
    denominator_after = dy.Int64(nullable=True, description="That sum now.")
