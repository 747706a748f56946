"""The platform as it was known when the run read it: roster, sessions and events."""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

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
from tutormax_assets.platform.contract import NEEDED_COLUMNS
from tutormax_assets.platform.snapshot import PlatformRows
from tutormax_assets.resources import MetricsPolicy, PlatformDatabase, RunOptions
from tutormax_assets.spool import spool_folder
from tutormax_assets.storage import FramesByDate

SET_ASIDE_METADATA = "set_aside_by_reason"
"""Metadata key under which a materialization says which values were not used, and why."""


def platform_snapshot_assets(
    daily: dg.DailyPartitionsDefinition, backfill_policy: dg.BackfillPolicy, *, window_days: int
) -> dg.AssetsDefinition:
    """Build the assets that are read from the platform, all of them in one step."""

    @dg.multi_asset(
        name="platform_snapshot",
        outs={
            "tutor_roster": _out(
                TutorRoster,
                _ROSTER_LINEAGE,
                "The tutors that a reference date is computed for: active ones unless the run says "
                "all. One row per tutor per reference date, as known when it ran.",
            ),
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
        deps=list(NEEDED_COLUMNS),
        internal_asset_deps={
            asset: {dg.AssetKey(table) for table in tables} for asset, tables in _READ_FROM.items()
        },
        can_subset=True,
        partitions_def=daily,
        backfill_policy=backfill_policy,
        pool=PLATFORM_POOL,
        group_name="snapshots",
    )
    def platform_snapshot(
        context: dg.AssetExecutionContext,
        database: PlatformDatabase,
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
    ) -> Iterator[dg.Output[FramesByDate]]:
        """Read the platform at one instant for all reference dates of the run; slice by date."""
        selected = _selected(context)
        start, end = _horizon(context, daily, window_days)
        with spool_folder(database.home) as folder:
            rows = run_options.retrying(context.log)(
                snapshot.read,
                database.source,
                folder / "source",
                tables={_READ_FROM[asset][0] for asset in selected},
                start=start,
                end=end,
                tutor_ids=run_options.tutor_ids,
            )
            for table in rows.empty_tables:
                context.log.warning(f"Table {table}: found no row, expected those of the platform")
            if "tutor_roster" in selected:
                roster = _roster(context, rows, run_options)
                yield dg.Output(dict.fromkeys(context.partition_keys, roster), "tutor_roster")
            good_sessions = partial(
                quality.good_sessions,
                policy=metrics_policy.policy,
                timezone=daily.timezone,
                ids_are_unique=rows.ids_are_unique,
            )
            good_events = partial(quality.good_events, timezone=daily.timezone)
            sessions = _by_parts(rows.sessions, good_sessions, folder / "sessions")
            yield from _cleaned(context, "sessions", rows, sessions, window_days)
            events = _by_parts(rows.events, good_events, folder / "tutor_events")
            yield from _cleaned(context, "tutor_events", rows, events, window_days)

    return platform_snapshot


def _selected(context: dg.AssetExecutionContext) -> set[str]:
    return {key.to_user_string() for key in context.selected_asset_keys}


def _roster(
    context: dg.AssetExecutionContext, rows: PlatformRows, run_options: RunOptions
) -> pl.LazyFrame:
    """The tutors to compute; says which of those asked for are not among them."""
    tutors = rows.tutors
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
    _add_read_metadata(context, "tutor_roster", rows, "tutors")
    return roster.lazy()


def _out(schema: type[dy.Schema], lineage: Lineage, description: str) -> dg.AssetOut:
    return dg.AssetOut(
        is_required=False,
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


def _cleaned(
    context: dg.AssetExecutionContext,
    table: Literal["sessions", "tutor_events"],
    rows: PlatformRows,
    cleaned: tuple[pl.LazyFrame, pl.DataFrame, float],
    window_days: int,
) -> Iterator[dg.Output[FramesByDate]]:
    """The good rows of a table and what was set aside, each by reference date."""
    kept, aside = f"{table}_snapshot", f"{table}_set_aside"
    selected = _selected(context) & {kept, aside}
    if not selected:
        return
    good, set_aside, clean_seconds = cleaned
    what = table.removeprefix("tutor_")
    context.log.info(f"Read {rows.count[table]} {what}, set {len(set_aside)} values aside")
    for source_table, column, reason, count in _reasons(set_aside).iter_rows():
        context.log.warning(f"Set aside {count} of {source_table}: {column} is {reason}")
    if kept in selected:
        _add_read_metadata(context, kept, rows, table, clean_seconds=clean_seconds)
        _add_set_aside_metadata(context, kept, set_aside, window_days)
        yield dg.Output(_by_reference_date(context, good, _DATE_COLUMNS[table], window_days), kept)
    if aside in selected:
        yield dg.Output(_by_reference_date(context, set_aside.lazy(), "date", window_days), aside)


def _by_parts(
    parts: Iterable[pl.LazyFrame],
    clean: Callable[[pl.LazyFrame], tuple[pl.LazyFrame, pl.LazyFrame]],
    folder: Path,
) -> tuple[pl.LazyFrame, pl.DataFrame, float]:
    """The good rows, which wait in a folder, what was set aside, and the seconds that it took."""
    started = perf_counter()
    folder.mkdir()
    set_aside = []
    for number, part in enumerate(parts):
        # What is good and what is set aside would each join the part anew.
        good, aside = pl.collect_all(clean(part.collect().lazy()))
        good.write_ipc(folder / f"{number}.ipc")
        set_aside.append(aside)
    return pl.scan_ipc(folder / "*.ipc"), pl.concat(set_aside), perf_counter() - started


def _by_reference_date(
    context: dg.AssetExecutionContext, rows: pl.LazyFrame, column: str, window_days: int
) -> FramesByDate:
    return {
        key: rows.filter(within_window(column, reference_date=day, days=window_days))
        for key, day in reference_dates(context).items()
    }


def _add_read_metadata(
    context: dg.AssetExecutionContext,
    asset: str,
    rows: PlatformRows,
    table: snapshot.Table,
    **seconds: float,
) -> None:
    for key in context.partition_keys:
        context.add_asset_metadata(
            {
                "rows_read_by_run": rows.count[table],
                "read_seconds": round(rows.seconds, 3),
                **{name: round(value, 3) for name, value in seconds.items()},
                "read_at": dg.MetadataValue.timestamp(rows.read_at),
                "source_snapshot": rows.snapshot,
            },
            asset_key=asset,
            partition_key=key,
        )


def _add_set_aside_metadata(
    context: dg.AssetExecutionContext, asset: str, set_aside: pl.DataFrame, window_days: int
) -> None:
    of_date = _by_reference_date(context, set_aside.lazy(), "date", window_days)
    for key, rows in of_date.items():
        reasons = _reasons(rows.collect())
        context.add_asset_metadata(
            {
                "values_set_aside": int(reasons["values"].sum()),
                SET_ASIDE_METADATA: dg.MetadataValue.table(
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


# The first one is the table whose rows an asset has one row of each.
_READ_FROM: dict[str, tuple[snapshot.Table, *tuple[str, ...]]] = {
    "tutor_roster": ("tutors",),
    "sessions_snapshot": ("sessions", "student_feedback"),
    "sessions_set_aside": ("sessions", "student_feedback"),
    "tutor_events_snapshot": ("tutor_events",),
    "tutor_events_set_aside": ("tutor_events",),
}
_DATE_COLUMNS = {"sessions": "scheduled_date", "tutor_events": "event_date"}
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
