"""The frame that enters and leaves each stage.

Source frames are the rows as the platform holds them; the others are what the assets store.
Column descriptions are what the Dagster UI shows.
"""

import dataframely as dy

LOGIN = "login"
MESSAGE_RESPONSE = "message_response"
TIERS = ("Exemplary", "Strong", "Developing", "Needs Attention", "At Risk")


class SourceTutors(dy.Schema):
    """One row per tutor of the platform."""

    tutor_id = dy.String(primary_key=True)
    status = dy.String(nullable=True)


class SourceSessions(dy.Schema):
    """One row per session, with its feedback where there is one; nothing checked yet."""

    session_id = dy.String()
    tutor_id = dy.String()
    session_number = dy.Int32(nullable=True)
    scheduled_start = dy.Datetime(time_zone="UTC")
    started = dy.Bool()
    tutor_initiated_reschedule = dy.Bool(nullable=True)
    no_show = dy.Bool(nullable=True)
    late_start_minutes = dy.Int32(nullable=True)
    engagement_score = dy.Float64(nullable=True, allow_nan=True, allow_inf=True)
    learning_objectives_met = dy.Bool(nullable=True)
    feedback_id = dy.String(nullable=True)
    feedback_tutor_id = dy.String(nullable=True)
    overall_rating = dy.Int32(nullable=True)


class SourceEvents(dy.Schema):
    """One row per login or message response; nothing checked yet."""

    event_id = dy.String(nullable=True, description="Null of a login.")
    tutor_id = dy.String()
    event_type = dy.String()
    event_timestamp = dy.Datetime(time_zone="UTC")
    response_time_minutes = dy.String(
        nullable=True,
        description="The JSON literal under that key of the event's metadata; null without it.",
    )


class TutorRoster(dy.Schema):
    """One row per tutor that the reference date is computed for."""

    tutor_id = dy.String(primary_key=True, description="The platform's id of the tutor.")
    status = dy.String(nullable=True, description="active, inactive or churned, in lower case.")


class SessionsSnapshot(dy.Schema):
    """One row per session of the longest window, with its rating; broken values are null."""

    tutor_id = dy.String(description="The tutor who holds the session.")
    scheduled_date = dy.Date(description="Local date of scheduled_start.")
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
        nullable=True, min=1, max=5, description="The student's rating; null without feedback."
    )


class TutorEventsSnapshot(dy.Schema):
    """One row per login or message response of the longest window; broken values are null."""

    tutor_id = dy.String(description="The tutor who acted.")
    event_date = dy.Date(description="Local date of event_timestamp.")
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

    tutor_id = dy.String(primary_key=True, description="The platform's id of the tutor.")
    window = dy.String(primary_key=True, description="Length of the window, such as 30day.")
    sessions_completed = dy.Int32(
        min=0, description="Sessions with actual_start set that were no no-show."
    )
    avg_rating = dy.Float64(
        nullable=True, min=1, max=5, description="Mean rating of the sessions with feedback."
    )
    first_session_success_rate = dy.Float64(
        nullable=True, min=0, max=100, description="% of rated first sessions rated 4 or more."
    )
    reschedule_rate = dy.Float64(
        nullable=True, min=0, max=100, description="% of sessions that the tutor rescheduled."
    )
    no_show_count = dy.Int32(min=0, description="Sessions that were a no-show.")
    engagement_score = dy.Float64(
        nullable=True,
        min=0,
        max=100,
        description="0.4 login + 0.4 session + 0.2 punctual, each 0 to 100.",
    )
    learning_objectives_met_pct = dy.Float64(
        nullable=True, min=0, max=100, description="% of sessions with known outcome that met it."
    )
    response_time_avg_minutes = dy.Float64(
        nullable=True, min=0, description="Mean minutes to answer a message."
    )


class TutorTiers(WindowMetrics):
    """One row per tutor of the roster and window: the metrics, their flags and the tier."""

    green_flags = dy.UInt8(max=6, description="Metrics on the green side of their threshold.")
    red_flags = dy.UInt8(max=6, description="Metrics on the red side of their threshold.")
    performance_tier = dy.Enum(TIERS, description="Tier that follows from the flags.")
