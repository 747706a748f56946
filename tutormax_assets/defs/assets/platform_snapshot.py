"""The platform as it was known when the run read it: roster, sessions and events."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime
from time import perf_counter
from typing import Any, NamedTuple

import dagster as dg
import dataframely as dy
import polars as pl
from upath import UPath

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.roster import choose_others, choose_roster
from tutormax_assets.compute.tasks.snapshots import (
    SnapshotPlan,
    SnapshotReport,
    SnapshotRequest,
    collect_snapshots,
    count_reasons,
    read_groups,
    sum_of_reasons,
)
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
    SourceEvents,
    SourceSessions,
    SourceTutors,
    TutorEventsSnapshot,
    TutorRoster,
    origins,
)
from tutormax_assets.runs.read_state import ReadState, computed_with, keep_state, load_state
from tutormax_assets.source.horizon import Horizon, UnknownChangesError
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.view import View, open_view
from tutormax_assets.storage.partition import StoredParts, store_parts, store_slices
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
        first, last = horizon(list(reference_dates(context).values()), window_days=window_days)
        request = SnapshotRequest(
            paths=_paths(context, partition_store),
            start=midnight(first, timezone=daily.timezone),
            end=midnight(last, timezone=daily.timezone),
            window_days=window_days,
            timezone=daily.timezone,
            policy=metrics_policy.policy,
            max_retries=run_options.max_retries,
            retry_delay_seconds=run_options.retry_delay_seconds,
        )

        def read() -> _PlatformRead:
            with open_view(database.source, tutor_ids=partition_store.tutor_ids) as view:
                return _read(context, request, view, compute, run_options, number_of_shards)

        found = run_options.retrying(context.log)(read)
        _log(context, found.report)
        _keep_states(context, request, found, partition_store, run_options)
        yield from _keep(context, request, found, partition_store)

    return platform_snapshot


class _PlatformRead(NamedTuple):
    """The platform as a run has read it.

    Attributes:
        read_at: The instant.
        snapshot: PostgreSQL's name of the snapshot.
        tutors: ``TutorRoster`` of all tutors.
        roster: Those that the run computes.
        shards: How they are divided.
        report: What was stored of their sessions and events.
        horizon: Distinguishes later rows; or the reason why there is none.
    """

    read_at: datetime
    snapshot: str
    tutors: pl.DataFrame
    roster: pl.DataFrame
    shards: Shards
    report: SnapshotReport
    horizon: Horizon | str


def _paths(
    context: dg.AssetExecutionContext, store: PartitionStore
) -> dict[str, dict[date, UPath]]:
    """The partitions of the selected assets, by asset and reference date."""
    days = reference_dates(context)
    return {
        asset: {reference_date: store.path(asset, key) for key, reference_date in days.items()}
        for asset in _READ_FROM
        if dg.AssetKey(asset) in context.selected_asset_keys
    }


def _read(
    context: dg.AssetExecutionContext,
    request: SnapshotRequest,
    view: View,
    compute: Compute,
    run_options: RunOptions,
    number_of_shards: int,
) -> _PlatformRead:
    """Read the platform at the instant of a view, shard by shard."""
    started = perf_counter()
    tutors = view.tutors()
    seconds = perf_counter() - started
    roster = _roster(context, tutors, run_options)
    # A run of chosen tutors leaves the horizon of the date as it is.
    is_chosen = run_options.tutor_ids is not None and run_options.read_state is None
    horizon = "the run was about chosen tutors" if is_chosen else _horizon(view)
    shards = (
        ALL_IN_ONE
        if run_options.tutor_ids
        else Shards.of(roster["tutor_id"], count=number_of_shards)
    )
    shared = view.share() if compute.is_elsewhere else None
    if compute.is_elsewhere and shared is None:
        context.log.info("The platform is a standby, which the cluster cannot read at one instant")
        compute = compute.here()
    plan = SnapshotPlan(request, shared or view, shards)
    groups = compute.groups(range(len(shards)), log=context.log)
    report = read_groups(compute, groups, plan, log=context.log)
    report.read_seconds += seconds
    suspects = [table for table, rows in report.count.items() if not rows]
    for table in view.empty_tables(suspects):
        context.log.warning(f"Table {table}: found no row, expected those of the platform")
    report.count["tutors"] = len(tutors)
    return _PlatformRead(view.read_at, view.snapshot, tutors, roster, shards, report, horizon)


def _horizon(view: View) -> Horizon | str:
    try:
        return view.horizon()
    except UnknownChangesError as error:
        return str(error)


def _keep_states(
    context: dg.AssetExecutionContext,
    request: SnapshotRequest,
    found: _PlatformRead,
    store: PartitionStore,
    run_options: RunOptions,
) -> None:
    """Store what each date was read from, before its rows are stored."""
    is_known = isinstance(found.horizon, Horizon)
    state = ReadState(
        run_ids=(context.run.run_id,),
        read_at=found.read_at,
        computed_with=computed_with(
            request.policy,
            timezone=request.timezone,
            include_inactive=run_options.include_inactive,
        ),
        horizon=found.horizon if is_known else None,
        unknown="" if is_known else found.horizon,
    )
    for key in context.partition_keys:
        if not store.tutor_ids:
            keep_state(store.base_path, key, state)
        elif before := load_state(store.base_path, key):
            of_some = state.of_some_tutors(before, run_options.read_state)
            keep_state(store.base_path, key, of_some)


def _keep(
    context: dg.AssetExecutionContext,
    request: SnapshotRequest,
    found: _PlatformRead,
    store: PartitionStore,
) -> Iterator[dg.MaterializeResult[None]]:
    of_tutors = _store_tutors(request, found, store)
    for asset in request.paths:
        partitions = collect_snapshots(
            request,
            asset,
            of_tutors if asset in of_tutors.stored else found.report,
            found.shards,
            schema=pl.Schema(_SCHEMAS[asset]),
        )
        for key in partitions:
            _add_metadata(context, asset, key, found, store)
        keep_partitions(context, store, asset, partitions)
        yield dg.MaterializeResult(asset_key=asset)


def _store_tutors(
    request: SnapshotRequest, found: _PlatformRead, store: PartitionStore
) -> SnapshotReport:
    """Store the tutors that the run computes and those that it leaves out."""
    stored: dict[str, dict[date, list[StoredParts]]] = {}
    if rosters := request.paths.get("tutor_roster"):
        stored["tutor_roster"] = _store_roster(rosters, found.roster, found.shards)
    others = request.paths.get("tutors_left_out", {})
    if others and not store.tutor_ids:
        left_out = choose_others(found.tutors, found.roster["tutor_id"])
        stored["tutors_left_out"] = _store_roster(others, left_out, found.shards)
    elif others:
        stored["tutors_left_out"] = {
            reference_date: [store_parts(path, left_out.lazy(), shards=found.shards)]
            for reference_date, path in others.items()
            for left_out in [
                _left_out(store, found.tutors, found.roster, reference_date.isoformat())
            ]
        }
    return SnapshotReport(stored=stored)


def _store_roster(
    paths: Mapping[date, UPath], tutors: pl.DataFrame, shards: Shards
) -> dict[date, list[StoredParts]]:
    """Store tutors once for all dates."""
    stored: dict[date, list[StoredParts]] = {reference_date: [] for reference_date in paths}
    for number in range(len(shards)):
        of_shard = tutors.filter(shards.number() == number) if shards.bounds else tutors
        slices = dict.fromkeys(paths, (0, len(of_shard)))
        for reference_date, parts in store_slices(paths, of_shard, slices, shard=number).items():
            stored[reference_date].append(parts)
    return stored


def _roster(
    context: dg.AssetExecutionContext, tutors: pl.DataFrame, run_options: RunOptions
) -> pl.DataFrame:
    """The tutors to compute; logs which of those asked for are not among them."""
    for problem in quality.tutor_problems(tutors):
        context.log.warning(problem)
    asked = run_options.tutor_ids
    chosen = choose_roster(tutors, tutor_ids=asked, include_inactive=run_options.include_inactive)
    # They have left since the date was stored, and nobody asked for them.
    is_refresh = run_options.read_state is not None
    unknown, inactive = ", ".join(chosen.unknown), ", ".join(chosen.inactive)
    what_to_do = "Set include_inactive (`--include-inactive`) to compute them."
    if unknown and not is_refresh:
        context.log.warning(f"Unknown tutors are left out: {unknown}")
    if asked and chosen.tutors.is_empty():
        raise dg.Failure(
            f"None of the tutors is active: {inactive}. {what_to_do}"
            if inactive
            else f"None of the tutors is known: {unknown}. Check the ids.",
            allow_retries=False,
        )
    if inactive and not is_refresh:
        context.log.warning(f"Inactive tutors are left out: {inactive}. {what_to_do}")
    of = f" of {chosen.total}" if asked else ""
    context.log.info(f"Found {len(chosen.tutors)}{of} tutors to process")
    return chosen.tutors


def _left_out(
    store: PartitionStore, tutors: pl.DataFrame, roster: pl.DataFrame, key: str
) -> pl.DataFrame:
    """The platform's tutors who are not in a date's roster once it holds that of a filtered run."""
    computed = roster["tutor_id"]
    with suppress(FileNotFoundError):
        stored = store.whole_partition("tutor_roster", key).rows().scan()
        others = stored.filter(~pl.col("tutor_id").is_in(store.tutor_ids)).select("tutor_id")
        computed = pl.concat([computed, others.collect().to_series()])
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
    found: _PlatformRead,
    store: PartitionStore,
) -> None:
    table, report = _READ_FROM[asset][0], found.report
    context.add_asset_metadata(
        {
            "rows_read_by_run": report.count[table],
            "read_seconds": round(report.read_seconds, 3),
            "read_at": dg.MetadataValue.timestamp(found.read_at),
            "source_snapshot": found.snapshot,
        },
        asset_key=asset,
        partition_key=key,
    )
    if asset != f"{table}_snapshot":
        return
    reasons = report.reasons[table][date.fromisoformat(key)]
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


def _set_aside_lineage(table: str, key: str, instant: str) -> dict[str, list[tuple[str, str]]]:
    return {
        "row_key": [(table, key)],
        "tutor_id": [(table, "tutor_id")],
        "date": [(table, instant)],
    }


_LINEAGE: Mapping[str, Lineage] = {
    "tutor_roster": origins(TutorRoster, source=SourceTutors),
    "tutors_left_out": origins(TutorRoster, source=SourceTutors),
    "sessions_snapshot": origins(SessionsSnapshot, source=SourceSessions),
    "sessions_set_aside": _set_aside_lineage("sessions", "session_id", "scheduled_start"),
    "tutor_events_snapshot": origins(TutorEventsSnapshot, source=SourceEvents),
    "tutor_events_set_aside": _set_aside_lineage("tutor_events", "event_id", "event_timestamp"),
}

SNAPSHOT_ASSETS = tuple(_READ_FROM)
"""The assets that are read from the platform."""
