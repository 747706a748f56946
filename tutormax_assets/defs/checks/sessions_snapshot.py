"""Checks of ``sessions_snapshot``: what the platform's sessions and feedback are like."""

from collections.abc import Iterator
from datetime import date, timedelta
from functools import partial

import dagster as dg
import polars as pl

from tutormax_assets.defs.assets import PLATFORM_POOL
from tutormax_assets.defs.checks import (
    ERROR,
    WARN,
    Finding,
    Metadata,
    check_spec,
    dates_to_check,
    first_keys,
    partition,
    report,
)
from tutormax_assets.defs.checks.source import SourceTable, few_rows_set_aside, source_is_fresh
from tutormax_assets.defs.checks.volumes import read_volumes, unknown_tutors
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.quality import DUPLICATE, NOT_THE_SESSIONS_TUTOR
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.view import AnySource, where_to_look
from tutormax_assets.storage.store import PartitionStore

ASSET = "sessions_snapshot"

_SESSIONS = SourceTable(
    name="sessions",
    instant="scheduled_start",
    is_fresh="sessions_are_fresh",
    what="sessions",
    day_what="sessions",
    usual="sessions",
    other="logins",
)

_HINTS = {
    "engagement_score": "Most of them have an engagement_score outside 0 to 1: if the platform"
    " scores sessions from 0 to 100, set session_score_scale = 100 in the policy. "
}


def sessions_snapshot_checks(daily: dg.DailyPartitionsDefinition) -> dg.AssetChecksDefinition:
    """Build the checks of ``sessions_snapshot``."""
    specs = _specs(daily)

    @dg.multi_asset_check(name=f"{ASSET}_checks", specs=specs, can_subset=True, pool=PLATFORM_POOL)
    def checks(
        context: dg.AssetCheckExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
        policy, retrying = metrics_policy.policy, run_options.retrying(context.log)
        found: dict[str, dict[str, Finding]] = {}
        keys = dates_to_check(context, ASSET)
        volumes = read_volumes(partition_store, keys, days=policy.horizon_days)
        unknown = unknown_tutors(partition_store, keys)
        for key in keys:
            reference_date = date.fromisoformat(key)
            by_day = volumes.sessions[key]
            found[key] = findings_of_rows(
                by_day,
                unknown[key],
                partition(partition_store, "sessions_set_aside", key).collect(),
                reference_date=reference_date,
                policy=policy,
            )
            found[key] |= _SESSIONS.look_at(
                volumes,
                partition_store,
                database.source,
                partition_key=key,
                retrying=retrying,
                timezone=daily.timezone,
                policy=policy,
                more={
                    "feedback_is_fresh": partial(
                        feedback_is_fresh,
                        by_day,
                        source=database.source,
                        reference_date=reference_date,
                        policy=policy,
                    )
                },
            )
        yield from report(context, specs, found)

    return checks


def _specs(daily: dg.DailyPartitionsDefinition) -> list[dg.AssetCheckSpec]:
    spec = partial(check_spec, asset=ASSET, daily=daily)
    return [
        spec(
            "few_rows_set_aside",
            "Most sessions and feedback of each window keep the source contract.",
            blocking=True,
        ),
        spec("no_duplicate_sessions", "A session id is there once."),
        spec(
            "engagement_scores_fill_their_scale",
            "Session engagement scores are on the scale that the policy names.",
        ),
        spec("feedback_is_of_the_sessions_tutor", "Feedback names the tutor of its session."),
        spec("tutors_are_known", "The tutor of a session is in tutors.", blocking=True),
        spec(
            "sessions_are_fresh",
            "The newest session is about as new as the reference date.",
            blocking=True,
        ),
        spec("feedback_is_fresh", "Sessions of the last weeks have feedback."),
        spec(
            "shortest_window_is_whole",
            "The shortest window has most of the sessions that are usual for it.",
            blocking=True,
        ),
        spec(
            "day_volume_is_usual",
            "The newest day has about as many sessions as that weekday in the weeks before.",
        ),
    ]


def findings_of_rows(
    by_day: pl.DataFrame,
    unknown: pl.DataFrame | None,
    set_aside: pl.DataFrame,
    /,
    *,
    reference_date: date,
    policy: Policy,
) -> dict[str, Finding]:
    """What the checks find in the rows of a partition, by name.

    Args:
        by_day: As ``sessions_by_day`` gives it.
        unknown: What ``unknown_tutors`` returns for the date.
        set_aside: ``SetAside``.
        reference_date: The reference date.
        policy: Its windows, and the limits of checks.
    """
    limits = policy.checks
    return {
        "few_rows_set_aside": few_rows_set_aside(
            rows_read(by_day, set_aside),
            set_aside,
            reference_date=reference_date,
            windows=policy.windows,
            warn_share=limits.set_aside_warn_share,
            error_share=limits.set_aside_error_share,
            min_rows=limits.set_aside_min_rows,
            hints=_HINTS if policy.session_score_scale == 1 else None,
        ),
        "engagement_scores_fill_their_scale": engagement_scores_fill_their_scale(
            by_day["highest_score"].max(),  # type: ignore[arg-type]
            scale=policy.session_score_scale,
        ),
        "no_duplicate_sessions": no_duplicate_sessions(set_aside),
        "feedback_is_of_the_sessions_tutor": feedback_is_of_the_sessions_tutor(
            set_aside,
            rated=int(by_day["rated"].sum()),
            warn_share=limits.other_tutor_feedback_share,
        ),
        "tutors_are_known": tutors_are_known(
            unknown,
            sessions_read=int(by_day["rows"].sum()),
            error_share=limits.unknown_tutors_error_share,
        ),
    }


def feedback_is_fresh(
    by_day: pl.DataFrame, /, *, source: AnySource, reference_date: date, policy: Policy
) -> Finding:
    """Whether sessions of the last weeks have feedback.

    Args:
        by_day: As ``sessions_by_day`` gives it.
        source: Where the platform is read, for what a person is shown.
        reference_date: The reference date.
        policy: Its windows, and the limits of checks.
    """
    return source_is_fresh(
        by_day.filter(pl.col("rated") > 0)["date"].max(),  # type: ignore[arg-type]
        what="rated sessions",
        reference_date=reference_date,
        warn_days=policy.checks.stale_feedback_days,
        since=reference_date - timedelta(days=policy.horizon_days),
        look_at=where_to_look(source, "student_feedback", instant="submitted_at"),
    )


def rows_read(by_day: pl.DataFrame, set_aside: pl.DataFrame, /) -> pl.DataFrame:
    """Rows that were read by table and day: what can be used, and what is in no snapshot.

    Args:
        by_day: As ``sessions_by_day`` gives them.
        set_aside: ``SetAside``.

    Returns:
        ``source_table``, ``date``, ``rows``.
    """
    # A session with a broken value is in the snapshot; one that is there twice is in it once.
    repeated = set_aside.filter(
        pl.col("source_table") == "sessions", pl.col("reason") == DUPLICATE
    ).select("source_table", "date", pl.lit(1, pl.Int64).alias("rows"))
    # Feedback that is set aside leaves no rating there.
    unrated = (
        set_aside.filter(pl.col("source_table") == "student_feedback")
        .unique("row_key")
        .select("source_table", "date", pl.lit(1, pl.Int64).alias("rows"))
    )
    return pl.concat(
        [
            by_day.select(pl.lit("sessions").alias("source_table"), "date", "rows"),
            by_day.select(
                pl.lit("student_feedback").alias("source_table"),
                "date",
                pl.col("rated").alias("rows"),
            ),
            repeated,
            unrated,
        ]
    )


def no_duplicate_sessions(set_aside: pl.DataFrame, /) -> Finding:
    """Whether each session id was read once.

    Args:
        set_aside: ``SetAside``.
    """
    repeated = set_aside.filter(pl.col("source_table") == "sessions", pl.col("reason") == DUPLICATE)
    if repeated.is_empty():
        return Finding(True)
    return Finding(
        False,
        f"{repeated['row_key'].n_unique()} session ids come more than once; one row of each is"
        " used, and no rating of theirs.",
        {
            "session_ids": repeated["row_key"].n_unique(),
            "first_rows": first_keys(repeated, "row_key", "tutor_id"),
            "see_the_rest": "SELECT session_id, count(*) FROM sessions"
            " GROUP BY session_id HAVING count(*) > 1",
        },
        WARN,
        "sessions has lost its primary key: fix it in the platform.",
    )


def engagement_scores_fill_their_scale(highest: float | None, /, *, scale: int) -> Finding:
    """Whether session engagement scores are on the policy's scale, and not on a smaller one.

    Scores above the scale break the source contract, which ``few_rows_set_aside`` finds.

    Args:
        highest: The highest score; null where no session has one.
        scale: Upper end of the policy's scale, 1 or 100.
    """
    if highest is None or scale == 1 or highest > 1:
        return Finding(True)
    return Finding(
        False,
        f"No session has an engagement_score above 1, and session_score_scale is {scale}.",
        severity=WARN,
        advice="If the platform scores sessions from 0 to 1, set session_score_scale = 1 in the"
        " policy and run the date again: until then the session part of engagement_score is"
        " near 0.",
    )


def feedback_is_of_the_sessions_tutor(
    set_aside: pl.DataFrame, /, *, rated: int, warn_share: float
) -> Finding:
    """Whether almost all feedback names the tutor of its session.

    Args:
        set_aside: ``SetAside``.
        rated: Sessions whose feedback is used.
        warn_share: Share of the feedback above which the check warns.
    """
    feedback = set_aside.filter(pl.col("source_table") == "student_feedback")
    others = feedback.filter(pl.col("reason") == NOT_THE_SESSIONS_TUTOR)
    count = others["row_key"].n_unique()
    read = rated + feedback["row_key"].n_unique()
    metadata: Metadata = {"of_another_tutor": count, "feedback_read": read}
    if count <= warn_share * read:
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"{count} of {read} rows of student_feedback name another tutor than their session:"
        f" {count / read:.1%}, with {warn_share:.1%} expected at most. Their ratings are not used.",
        {
            **metadata,
            "first_rows": first_keys(others, "row_key", "tutor_id"),
            "see_the_rest": "SELECT f.feedback_id, f.tutor_id, s.session_id, s.tutor_id FROM"
            " student_feedback AS f JOIN sessions AS s USING (session_id)"
            " WHERE f.tutor_id IS DISTINCT FROM s.tutor_id",
        },
        WARN,
        "Fix them in the platform and run the date again.",
    )


def tutors_are_known(
    unknown: pl.DataFrame | None, /, *, sessions_read: int, error_share: float
) -> Finding:
    """Whether the tutors of the sessions were in the platform's tutors.

    Both are as of one instant: a tutor who was deleted later is no fault of the date.

    Args:
        unknown: Those who were not in ``tutors`` when the sessions were read, with their number of
            sessions: ``tutor_id``, ``rows``; None if that is not known.
        sessions_read: Sessions of all tutors.
        error_share: Share of the sessions above which the check fails: then tutors are missing,
            and the metrics of those who are there are not the whole.
    """
    if unknown is None:
        return Finding(
            True,
            "Not compared: tutors_left_out is not there for this date.",
            advice="Run the date again to compare it.",
        )
    sessions, read = int(unknown["rows"].sum()), sessions_read
    metadata: Metadata = {
        "unknown_tutors": len(unknown),
        "their_sessions": sessions,
        "sessions_read": read,
    }
    if unknown.is_empty():
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"{sessions} of {read} sessions are of {len(unknown)} tutors who were not in tutors when"
        " both were read; they count for nobody.",
        {
            **metadata,
            "first_tutors": first_keys(unknown, "tutor_id"),
            "see_the_rest": "SELECT s.tutor_id, count(*) FROM sessions AS s WHERE NOT EXISTS"
            " (SELECT FROM tutors AS t WHERE t.tutor_id = s.tutor_id) GROUP BY s.tutor_id",
        },
        ERROR if sessions > error_share * read else WARN,
        "See to what loads the platform's database, then run the date again.",
    )
