"""The platform as it was known when the run read it: roster, sessions and events."""

from datetime import datetime
from time import perf_counter

import dagster as dg
import dataframely as dy
import polars as pl

from tutormax_assets.assets import OWNERS, PLATFORM_POOL, Lineage, frame_metadata, reference_dates
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
        pool=PLATFORM_POOL,
        group_name="snapshots",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(TutorRoster, _ROSTER_LINEAGE),
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
                _SESSIONS_LINEAGE,
                "Sessions of the days before a reference date that the longest window spans, with "
                "their rating; values that break the source contract are null. One row per "
                "session per reference date, as known when it ran.",
            ),
            "sessions_set_aside": _out(
                SetAside,
                _set_aside_lineage("sessions", "session_id", "scheduled_start"),
                "Values of sessions and feedback that break the source contract, by the keys of "
                "their rows. One row per broken value per reference date.",
            ),
        },
        deps=["sessions", "student_feedback"],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        pool=PLATFORM_POOL,
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
        started = perf_counter()
        rows = snapshot.read_sessions(
            database.url, start=start, end=end, tutor_ids=run_options.tutor_ids
        )
        good, set_aside = pl.collect_all(
            quality.good_sessions(
                rows.lazy(), policy=metrics_policy.policy, timezone=daily.timezone
            )
        )
        _log_read(context, "sessions", rows, set_aside)
        _add_read_metadata(context, "sessions_snapshot", rows, perf_counter() - started)
        _add_set_aside_metadata(context, "sessions_snapshot", set_aside, window_days)
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
                _EVENTS_LINEAGE,
                "Logins and message responses of the days before a reference date that the "
                "longest window spans. One row per event per reference date, as known when it ran.",
            ),
            "tutor_events_set_aside": _out(
                SetAside,
                _set_aside_lineage("tutor_events", "event_id", "event_timestamp"),
                "Response times that break the source contract, by the keys of their rows. One "
                "row per broken value per reference date.",
            ),
        },
        deps=["tutor_events"],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        pool=PLATFORM_POOL,
        group_name="snapshots",
    )
    def tutor_events_snapshot(
        context: dg.AssetExecutionContext, database: PlatformDatabase, run_options: RunOptions
    ) -> tuple[FramesByDate, FramesByDate]:
        """Read the events once for all reference dates of the run, and slice them by date."""
        start, end = _horizon(context, daily, window_days)
        started = perf_counter()
        rows = snapshot.read_events(
            database.url, start=start, end=end, tutor_ids=run_options.tutor_ids
        )
        good, set_aside = pl.collect_all(quality.good_events(rows.lazy(), timezone=daily.timezone))
        _log_read(context, "events", rows, set_aside)
        _add_read_metadata(context, "tutor_events_snapshot", rows, perf_counter() - started)
        _add_set_aside_metadata(context, "tutor_events_snapshot", set_aside, window_days)
        return (
            _by_reference_date(context, good, "event_date", window_days),
            _by_reference_date(context, set_aside, "date", window_days),
        )

    return tutor_events_snapshot


def _out(schema: type[dy.Schema], lineage: Lineage, description: str) -> dg.AssetOut:
    return dg.AssetOut(
        description=description,
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(schema, lineage),
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
    for source_table, column, reason, count in _reasons(set_aside).iter_rows():
        context.log.warning(f"Set aside {count} of {source_table}: {column} is {reason}")


def _add_read_metadata(
    context: dg.AssetExecutionContext, asset: str, rows: pl.DataFrame, seconds: float
) -> None:
    for key in context.partition_keys:
        context.add_asset_metadata(
            {"rows_read_by_run": len(rows), "read_seconds": round(seconds, 3)},
            asset_key=asset,
            partition_key=key,
        )


def _add_set_aside_metadata(
    context: dg.AssetExecutionContext, asset: str, set_aside: pl.DataFrame, window_days: int
) -> None:
    of_date = _by_reference_date(context, set_aside, "date", window_days)
    for key, rows in of_date.items():
        reasons = _reasons(rows.collect())
        context.add_asset_metadata(
            {
                "values_set_aside": int(reasons["values"].sum()),
                "set_aside_by_reason": dg.MetadataValue.table(
                    [dg.TableRecord(reason) for reason in reasons.to_dicts()],
                    dg.TableSchema(
                        [dg.TableColumn(name, str(dtype)) for name, dtype in reasons.schema.items()]
                    ),
                ),
            },
            asset_key=asset,
            partition_key=key,
        )


def _reasons(set_aside: pl.DataFrame) -> pl.DataFrame:
    reasons = set_aside.group_by("source_table", "column", "reason")
    return reasons.agg(pl.len().alias("values")).sort(pl.all())


_ROSTER_LINEAGE = {
    "tutor_id": [("tutors", "tutor_id")],
    "status": [("tutors", "status")],
}
_SESSIONS_LINEAGE = {
    **{
        column: [("sessions", column)]
        for column in (
            "tutor_id",
            "session_number",
            "tutor_initiated_reschedule",
            "no_show",
            "late_start_minutes",
            "engagement_score",
            "learning_objectives_met",
        )
    },
    "scheduled_date": [("sessions", "scheduled_start")],
    "started": [("sessions", "actual_start")],
    "overall_rating": [("student_feedback", "overall_rating"), ("student_feedback", "tutor_id")],
}
_EVENTS_LINEAGE = {
    "tutor_id": [("tutor_events", "tutor_id")],
    "event_date": [("tutor_events", "event_timestamp")],
    "event_type": [("tutor_events", "event_type")],
    "response_time_minutes": [("tutor_events", "metadata")],
}


def _set_aside_lineage(table: str, key: str, instant: str) -> dict[str, list[tuple[str, str]]]:
    return {
        "row_key": [(table, key)],
        "tutor_id": [(table, "tutor_id")],
        "date": [(table, instant)],
    }
