"""The platform as it was known when the run read it: roster, sessions and events."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from time import perf_counter
from typing import Any

import dagster as dg
import dataframely as dy
import polars as pl

from tutormax_assets.compute import KilledShardError, ShardsError
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.roster import choose_others, choose_roster
from tutormax_assets.compute.tasks.snapshots import (
    SnapshotPlan,
    SnapshotReport,
    count_reasons,
    read_snapshots,
    sum_of_reasons,
    sum_of_reports,
)
from tutormax_assets.database.faults import may_pass, reason
from tutormax_assets.dates import horizon, midnight
from tutormax_assets.defs.assets import (
    OWNERS,
    PLATFORM_POOL,
    Lineage,
    frame_metadata,
    keep_partitions,
    reference_dates,
)
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics import quality
from tutormax_assets.metrics.schemas import (
    SessionsSnapshot,
    SetAside,
    TutorEventsSnapshot,
    TutorRoster,
)
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.view import View, open_view
from tutormax_assets.storage.partition import partition_of, store_parts
from tutormax_assets.storage.shards import ALL_IN_ONE, Shards
from tutormax_assets.storage.store import PartitionStore

SET_ASIDE_METADATA = "set_aside_by_reason"
"""Metadata key under which a materialization says which values were not used, and why."""

SET_ASIDE_BY_RUN_METADATA = "set_aside_by_run"
"""Metadata key of the same for the tutors of the run, in a run of some tutors."""


def platform_snapshot_assets(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    window_days: int,
    number_of_shards: int,
) -> dg.AssetsDefinition:
    """Build the assets that are read from the platform, all of them in one step.

    Args:
        daily: The reference dates.
        backfill_policy: How many of them a run takes.
        window_days: Days before a reference date that its partitions hold.
        number_of_shards: Shards that tutors are divided into; as many as they ask for when 0.
    """

    @dg.multi_asset(
        name="platform_snapshot",
        specs=[_spec(asset) for asset in _READ_FROM],
        can_subset=True,
        partitions_def=daily,
        backfill_policy=backfill_policy,
        pool=PLATFORM_POOL,
    )
    def platform_snapshot(
        context: dg.AssetExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        compute: dg.ResourceParam[Compute],
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.MaterializeResult[None]]:
        """Read the platform at one instant for all reference dates of the run; slice by date."""
        days = reference_dates(context)
        selected = [
            asset for asset in _READ_FROM if dg.AssetKey(asset) in context.selected_asset_keys
        ]
        first, last = horizon(list(days.values()), window_days=window_days)
        paths = {
            asset: {day: partition_store.path(asset, key) for key, day in days.items()}
            for asset in selected
        }

        def read() -> tuple[View, Shards, SnapshotReport]:
            started = perf_counter()
            with open_view(database.source, tutor_ids=run_options.tutor_ids or ()) as view:
                tutors = view.tutors()
                seconds = perf_counter() - started
                roster = _roster(context, tutors, run_options)
                shards = (
                    ALL_IN_ONE
                    if run_options.tutor_ids
                    else Shards.of(roster["tutor_id"], count=number_of_shards)
                )

                plan = SnapshotPlan(
                    view=view.share() if compute.is_elsewhere else view,
                    shards=shards,
                    paths=paths,
                    start=midnight(first, timezone=daily.timezone),
                    end=midnight(last, timezone=daily.timezone),
                    window_days=window_days,
                    timezone=daily.timezone,
                    policy=metrics_policy.policy,
                    max_retries=run_options.max_retries,
                    retry_delay_seconds=run_options.retry_delay_seconds,
                )
                groups = compute.groups(range(len(shards)), log=context.log)
                report = _read_groups(compute, groups, plan, log=context.log)
                report.read_seconds += seconds
                suspects = [table for table, rows in report.count.items() if not rows]
                for table in view.empty_tables(suspects):
                    context.log.warning(
                        f"Table {table}: found no row, expected those of the platform"
                    )
            report.count["tutors"] = len(tutors)
            report.stored["tutor_roster"] = {
                day: [store_parts(path, roster.lazy(), shards=shards)]
                for day, path in paths.get("tutor_roster", {}).items()
            }
            report.stored["tutors_left_out"] = {
                day: [store_parts(path, left_out.lazy(), shards=shards)]
                for day, path in paths.get("tutors_left_out", {}).items()
                for left_out in [_left_out(partition_store, tutors, roster, day.isoformat())]
            }
            return view, shards, report

        view, shards, report = run_options.retrying(context.log)(read)
        _log(context, report)
        for asset in selected:
            for key, day in days.items():
                _add_metadata(context, asset, key, view, report, day, partition_store)
            partitions = {
                key: partition_of(
                    paths[asset][day],
                    shards,
                    report.stored[asset][day],
                    failed={} if _READ_FROM[asset] == ("tutors",) else report.failed,
                    no_rows=_SCHEMAS[asset].create_empty(),
                )
                for key, day in days.items()
            }
            keep_partitions(context, partition_store, asset, partitions)
            yield dg.MaterializeResult(asset_key=asset)

    return platform_snapshot


def _read_groups(
    compute: Compute,
    groups: list[Sequence[int]],
    plan: SnapshotPlan,
    *,
    log: logging.Logger,
) -> SnapshotReport:
    """Read groups of shards; those of one that fails are read one by one, to keep the others.

    Raises:
        ShardsError: No group could be read.
        Exception: What may pass when all is read again, as ``may_pass`` says.
        KilledShardError: The only shard could not be read.
    """
    reports: list[SnapshotReport] = []
    failed: dict[int, str] = {}
    while groups:
        named = {f"shards {numbers[0]} to {numbers[-1]}": numbers for numbers in groups}
        tasks = {name: plan.task(numbers) for name, numbers in named.items()}
        try:
            for _, report in compute.map(read_snapshots, tasks, log=log):
                reports.append(report)
        except KilledShardError as error:
            [(only, numbers)] = named.items()
            if len(numbers) == 1:
                raise
            errors: Mapping[str, BaseException] = {only: error}
        except ShardsError as error:
            errors = error.errors
            if not reports and not any(map(may_pass, errors.values())):
                raise
        else:
            break
        for failure in filter(may_pass, errors.values()):
            raise failure
        groups = []
        for name, failure in errors.items():
            if len(named[name]) > 1:
                groups += [[number] for number in named[name]]
            else:
                failed[named[name][0]] = reason(failure)
    return replace(sum_of_reports(reports), failed=failed)


def _roster(
    context: dg.AssetExecutionContext, tutors: pl.DataFrame, run_options: RunOptions
) -> pl.DataFrame:
    """The tutors to compute; logs which of those asked for are not among them."""
    for problem in quality.tutor_problems(tutors):
        context.log.warning(problem)
    asked = run_options.tutor_ids
    chosen = choose_roster(tutors, tutor_ids=asked, include_inactive=run_options.include_inactive)
    unknown, inactive = ", ".join(chosen.unknown), ", ".join(chosen.inactive)
    what_to_do = "Set include_inactive (`--include-inactive`) to compute them."
    if unknown:
        context.log.warning(f"Unknown tutors are left out: {unknown}")
    if asked and chosen.tutors.is_empty():
        raise dg.Failure(
            f"None of the tutors is active: {inactive}. {what_to_do}"
            if inactive
            else f"None of the tutors is known: {unknown}. Check the ids.",
            allow_retries=False,
        )
    if inactive:
        context.log.warning(f"Inactive tutors are left out: {inactive}. {what_to_do}")
    of = f" of {chosen.total}" if asked else ""
    context.log.info(f"Found {len(chosen.tutors)}{of} tutors to process")
    return chosen.tutors


def _left_out(
    store: PartitionStore, tutors: pl.DataFrame, roster: pl.DataFrame, key: str
) -> pl.DataFrame:
    """The platform's tutors who are not in a date's roster once it holds that of the run."""
    computed = roster["tutor_id"]
    if store.tutor_ids:
        with suppress(FileNotFoundError):
            stored = store.whole_partition("tutor_roster", key).rows().scan()
            computed = pl.concat([computed, stored.select("tutor_id").collect().to_series()])
    return choose_others(tutors, computed)


def _spec(asset: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        asset,
        deps=_READ_FROM[asset],
        skippable=True,
        description=_DESCRIPTIONS[asset],
        group_name="snapshots",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(_SCHEMAS[asset], _LINEAGE[asset]),
    )


def _log(context: dg.AssetExecutionContext, report: SnapshotReport) -> None:
    for table, reasons in report.reasons.items():
        values = int(reasons[None]["values"].sum())
        what = table.removeprefix("tutor_")
        context.log.info(f"Read {report.count[table]} {what}, set {values} values aside")
        for source_table, column, problem, count in reasons[None].iter_rows():
            context.log.warning(f"Set aside {count} of {source_table}: {column} is {problem}")


def _add_metadata(
    context: dg.AssetExecutionContext,
    asset: str,
    key: str,
    view: View,
    report: SnapshotReport,
    day: date,
    store: PartitionStore,
) -> None:
    table = _READ_FROM[asset][0]
    context.add_asset_metadata(
        {
            "rows_read_by_run": report.count[table],
            "read_seconds": round(report.read_seconds, 3),
            "read_at": dg.MetadataValue.timestamp(view.read_at),
            "source_snapshot": view.snapshot,
        },
        asset_key=asset,
        partition_key=key,
    )
    if asset != f"{table}_snapshot":
        return
    reasons = report.reasons[table][day]
    metadata: dict[str, Any] = {"clean_seconds": round(report.clean_seconds[table], 3)}
    if store.tutor_ids:
        metadata[SET_ASIDE_BY_RUN_METADATA] = _reasons_table(reasons)
        others = store.rows_of_others(f"{table}_set_aside", key)
        if others is not None:
            reasons = sum_of_reasons([reasons, count_reasons(others.collect())])
    metadata |= {
        "values_set_aside": int(reasons["values"].sum()),
        SET_ASIDE_METADATA: _reasons_table(reasons),
    }
    context.add_asset_metadata(metadata, asset_key=asset, partition_key=key)


def _reasons_table(reasons: pl.DataFrame) -> dg.TableMetadataValue:
    return dg.MetadataValue.table(
        [dg.TableRecord(reason) for reason in reasons.to_dicts()],
        dg.TableSchema(
            [dg.TableColumn(name, str(dtype)) for name, dtype in reasons.schema.items()]
        ),
    )


_SCHEMAS: dict[str, type[dy.Schema]] = {
    "tutor_roster": TutorRoster,
    "tutors_left_out": TutorRoster,
    "sessions_snapshot": SessionsSnapshot,
    "sessions_set_aside": SetAside,
    "tutor_events_snapshot": TutorEventsSnapshot,
    "tutor_events_set_aside": SetAside,
}
_DESCRIPTIONS = {
    "tutor_roster": (
        "The tutors that a reference date is computed for: active ones unless the run says "
        "all. One row per tutor per reference date, as known when it ran."
    ),
    "tutors_left_out": (
        "The platform's other tutors, who are not computed: inactive ones, and active ones "
        "while only runs of some tutors have computed the date. One row per tutor per "
        "reference date, as known when it ran."
    ),
    "sessions_snapshot": (
        "Sessions of the days before a reference date that the longest window spans, with "
        "their rating; values that break the source contract are null. One row per "
        "session per reference date, as known when it ran."
    ),
    "sessions_set_aside": (
        "Values of sessions and feedback that break the source contract, by the keys of "
        "their rows. One row per broken value per reference date."
    ),
    "tutor_events_snapshot": (
        "Logins and message responses of the days before a reference date that the "
        "longest window spans. One row per event per reference date, as known when it ran."
    ),
    "tutor_events_set_aside": (
        "Response times that break the source contract, by the keys of their rows. One "
        "row per broken value per reference date."
    ),
}
# The first one is the table whose rows an asset has one row of each.
_READ_FROM: dict[str, tuple[str, ...]] = {
    "tutor_roster": ("tutors",),
    "tutors_left_out": ("tutors",),
    "sessions_snapshot": ("sessions", "student_feedback"),
    "sessions_set_aside": ("sessions", "student_feedback"),
    "tutor_events_snapshot": ("tutor_events",),
    "tutor_events_set_aside": ("tutor_events",),
}
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


_LINEAGE: Mapping[str, Lineage] = {
    "tutor_roster": _ROSTER_LINEAGE,
    "tutors_left_out": _ROSTER_LINEAGE,
    "sessions_snapshot": _SESSIONS_LINEAGE,
    "sessions_set_aside": _set_aside_lineage("sessions", "session_id", "scheduled_start"),
    "tutor_events_snapshot": _EVENTS_LINEAGE,
    "tutor_events_set_aside": _set_aside_lineage("tutor_events", "event_id", "event_timestamp"),
}

SNAPSHOT_ASSETS = tuple(_READ_FROM)
"""The assets that are read from the platform."""
