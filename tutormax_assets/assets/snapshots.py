"""The platform as it was known when the run read it: roster, sessions and events."""

from datetime import datetime

import dagster as dg
import dataframely as dy
import polars as pl

from tutormax_assets.assets import OWNERS, frame_metadata, reference_dates
from tutormax_assets.metrics import quality
from tutormax_assets.metrics.schemas import (
    SessionsSnapshot,
    SetAside,
    TutorEventsSnapshot,
    TutorRoster,
)
from tutormax_assets.metrics.window import within_window
from tutormax_assets.partitions import horizon, midnight
from tutormax_assets.platform import snapshot
from tutormax_assets.resources import MetricsPolicy, PlatformDatabase, RunOptions
from tutormax_assets.storage import FramesByDate


def tutor_roster_asset(
    daily: dg.DailyPartitionsDefinition, backfill_policy: dg.BackfillPolicy
) -> dg.AssetsDefinition:
    """Build the asset ``tutor_roster``."""

    @dg.asset(
        deps=["tutors"],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="snapshots",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(TutorRoster),
    )
    def tutor_roster(
        context: dg.AssetExecutionContext, database: PlatformDatabase, run_options: RunOptions
    ) -> FramesByDate:
        """The tutors that a reference date is computed for: active ones unless the run says all.

        One row per tutor per reference date, as known when it ran.
        """
        tutors = snapshot.read_tutors(database.url, tutor_ids=run_options.tutor_ids)
        if unknown := sorted(set(run_options.tutor_ids) - set(tutors["tutor_id"])):
            context.log.warning(f"Unknown tutors are left out: {', '.join(unknown)}")
        if run_options.tutor_ids and tutors.is_empty():
            raise dg.Failure(
                f"None of the tutors is known: {', '.join(unknown)}. Check the ids.",
                allow_retries=False,
            )
        roster = quality.good_tutors(
            tutors.lazy(), include_inactive=run_options.include_inactive
        ).collect()
        inactive = sorted(set(tutors["tutor_id"]) - set(roster["tutor_id"]))
        if run_options.tutor_ids and inactive:
            context.log.warning(
                f"Inactive tutors are left out: {', '.join(inactive)}."
                " Set include_inactive to compute them."
            )
        context.log.info(f"Found {len(roster)} tutors to process")
        return {key: roster.lazy() for key in context.partition_keys}

    return tutor_roster


def sessions_snapshot_asset(
    daily: dg.DailyPartitionsDefinition, backfill_policy: dg.BackfillPolicy, *, window_days: int
) -> dg.AssetsDefinition:
    """Build the assets ``sessions_snapshot`` and ``sessions_set_aside``."""

    @dg.multi_asset(
        name="sessions_snapshot",
        outs={
            "sessions_snapshot": _out(
                SessionsSnapshot,
                "Sessions of the days before a reference date that the longest window spans, with "
                "their rating; values that break the source contract are null. One row per "
                "session per reference date, as known when it ran.",
            ),
            "sessions_set_aside": _out(
                SetAside,
                "Values of sessions and feedback that break the source contract, by the keys of "
                "their rows. One row per broken value per reference date.",
            ),
        },
        deps=["sessions", "student_feedback"],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="snapshots",
    )
    def sessions_snapshot(
        context: dg.AssetExecutionContext,
        database: PlatformDatabase,
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
    ) -> tuple[FramesByDate, FramesByDate]:
        """Read the sessions once for all reference dates of the run, and slice them by date."""
        start, end = _horizon(context, daily, window_days)
        rows = snapshot.read_sessions(
            database.url, start=start, end=end, tutor_ids=run_options.tutor_ids
        )
        good, set_aside = pl.collect_all(
            quality.good_sessions(
                rows.lazy(), policy=metrics_policy.policy, timezone=daily.timezone
            )
        )
        _log_read(context, "sessions", rows, set_aside)
        return (
            _by_reference_date(context, good, "scheduled_date", window_days),
            _by_reference_date(context, set_aside, "date", window_days),
        )

    return sessions_snapshot


def tutor_events_snapshot_asset(
    daily: dg.DailyPartitionsDefinition, backfill_policy: dg.BackfillPolicy, *, window_days: int
) -> dg.AssetsDefinition:
    """Build the assets ``tutor_events_snapshot`` and ``tutor_events_set_aside``."""

    @dg.multi_asset(
        name="tutor_events_snapshot",
        outs={
            "tutor_events_snapshot": _out(
                TutorEventsSnapshot,
                "Logins and message responses of the days before a reference date that the "
                "longest window spans. One row per event per reference date, as known when it ran.",
            ),
            "tutor_events_set_aside": _out(
                SetAside,
                "Response times that break the source contract, by the keys of their rows. One "
                "row per broken value per reference date.",
            ),
        },
        deps=["tutor_events"],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="snapshots",
    )
    def tutor_events_snapshot(
        context: dg.AssetExecutionContext, database: PlatformDatabase, run_options: RunOptions
    ) -> tuple[FramesByDate, FramesByDate]:
        """Read the events once for all reference dates of the run, and slice them by date."""
        start, end = _horizon(context, daily, window_days)
        rows = snapshot.read_events(
            database.url, start=start, end=end, tutor_ids=run_options.tutor_ids
        )
        good, set_aside = pl.collect_all(quality.good_events(rows.lazy(), timezone=daily.timezone))
        _log_read(context, "events", rows, set_aside)
        return (
            _by_reference_date(context, good, "event_date", window_days),
            _by_reference_date(context, set_aside, "date", window_days),
        )

    return tutor_events_snapshot


def _out(schema: type[dy.Schema], description: str) -> dg.AssetOut:
    return dg.AssetOut(
        description=description,
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(schema),
    )


def _horizon(
    context: dg.AssetExecutionContext, daily: dg.DailyPartitionsDefinition, window_days: int
) -> tuple[datetime, datetime]:
    first, last = horizon(list(reference_dates(context).values()), window_days=window_days)
    return midnight(first, timezone=daily.timezone), midnight(last, timezone=daily.timezone)


def _by_reference_date(
    context: dg.AssetExecutionContext, rows: pl.DataFrame, column: str, window_days: int
) -> FramesByDate:
    return {
        key: rows.lazy().filter(within_window(column, reference_date=day, days=window_days))
        for key, day in reference_dates(context).items()
    }


def _log_read(
    context: dg.AssetExecutionContext, name: str, rows: pl.DataFrame, set_aside: pl.DataFrame
) -> None:
    context.log.info(f"Read {len(rows)} {name}, set {len(set_aside)} values aside")
    reasons = set_aside.group_by("source_table", "column", "reason").len().sort(pl.all())
    for source_table, column, reason, count in reasons.iter_rows():
        context.log.warning(f"Set aside {count} of {source_table}: {column} is {reason}")
