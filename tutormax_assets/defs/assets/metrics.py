"""The metrics of each window: one asset a window, all of them computed in one step."""

from collections.abc import Iterator, Mapping, Sequence

import dagster as dg

from tutormax_assets.compute import ShardsError
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.windows import WindowsOfShard, WindowsTask, compute_windows
from tutormax_assets.database.faults import reason
from tutormax_assets.defs.assets import OWNERS, frame_metadata, reference_dates
from tutormax_assets.defs.io_manager import PartitionedParquetIOManager, PartitionsByDate
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.metrics.schemas import WindowMetrics
from tutormax_assets.storage.partition import StoredParts, division, partition_of
from tutormax_assets.storage.shards import shard_name

_SESSIONS, _EVENTS = "sessions_snapshot", "tutor_events_snapshot"
_LINEAGE = {
    "tutor_id": [("tutor_roster", "tutor_id")],
    "sessions_completed": [(_SESSIONS, "started"), (_SESSIONS, "no_show")],
    "avg_rating": [(_SESSIONS, "overall_rating")],
    "first_session_success_rate": [(_SESSIONS, "session_number"), (_SESSIONS, "overall_rating")],
    "reschedule_rate": [(_SESSIONS, "tutor_initiated_reschedule")],
    "no_show_count": [(_SESSIONS, "no_show")],
    "engagement_score": [
        (_EVENTS, "event_type"),
        (_SESSIONS, "engagement_score"),
        (_SESSIONS, "late_start_minutes"),
    ],
    "learning_objectives_met_pct": [(_SESSIONS, "learning_objectives_met")],
    "response_time_avg_minutes": [(_EVENTS, "response_time_minutes")],
}

# A date with few tutors does not keep all cores busy; one with many takes the memory of many.
_TUTORS_AT_ONCE = 40_000


def metrics_asset_name(days: int) -> str:
    """The name of the asset that holds the metrics of a window of so many days."""
    return f"metrics_{days}day"


def window_metrics_assets(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    windows: Sequence[int],
) -> dg.AssetsDefinition:
    """Build the assets of the windows, such as ``metrics_30day``, all of them in one step."""

    @dg.multi_asset(
        name="window_metrics",
        outs={metrics_asset_name(days): _out(days) for days in windows},
        can_subset=True,
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="metrics",
    )
    def metrics_of_windows(
        context: dg.AssetExecutionContext,
        compute: dg.ResourceParam[Compute],
        metrics_policy: MetricsPolicy,
        io_manager: dg.ResourceParam[PartitionedParquetIOManager],
        tutor_roster: PartitionsByDate,
        sessions_snapshot: PartitionsByDate,
        tutor_events_snapshot: PartitionsByDate,
    ) -> Iterator[dg.Output[PartitionsByDate]]:
        """Go through the snapshots of each reference date once for all windows."""
        selected = {
            days: asset
            for days in windows
            if (asset := dg.AssetKey(metrics_asset_name(days))) in context.selected_asset_keys
        }
        divided = {
            key: division([tutor_roster[key], sessions_snapshot[key], tutor_events_snapshot[key]])
            for key in tutor_roster
        }
        waiting = {
            shard_name(key, number): (
                key,
                WindowsOfShard(
                    day,
                    tutor_roster[key].rows(number),
                    sessions_snapshot[key].rows(number),
                    tutor_events_snapshot[key].rows(number),
                    number or 0,
                    {days: io_manager.path(asset, key) for days, asset in selected.items()},
                ),
            )
            for key, day in reference_dates(context).items()
            for number in divided[key].numbers
        }
        at_once = {_group_name(names): names for names in _at_once(waiting)}
        tasks = {
            group: WindowsTask([waiting[name][1] for name in names], metrics_policy.policy)
            for group, names in at_once.items()
        }
        stored: dict[int, dict[str, list[StoredParts]]] = {
            days: {key: [] for key in divided} for days in selected
        }
        seconds = dict.fromkeys(divided, 0.0)
        failed = {key: dict(of_date.failed) for key, of_date in divided.items()}
        try:
            for group, report in compute.map(compute_windows, tasks, log=context.log):
                for name, of_shard in zip(at_once[group], report.stored, strict=True):
                    key, _ = waiting[name]
                    seconds[key] += report.compute_seconds
                    for days, parts in of_shard.items():
                        stored[days][key].append(parts)
        except ShardsError as error:
            for group, failure in error.errors.items():
                for key, shard in map(waiting.__getitem__, at_once[group]):
                    failed[key][shard.shard] = reason(failure)
            if any(len(failed[key]) == len(of_date.shards) for key, of_date in divided.items()):
                raise
        for key in divided:
            # On one of the assets, so that the seconds of a run add up.
            context.add_asset_metadata(
                {"all_windows_compute_seconds": round(seconds[key], 3)},
                asset_key=next(iter(selected.values())),
                partition_key=key,
            )
        for days, asset in selected.items():
            partitions = {
                key: partition_of(
                    io_manager.path(asset, key),
                    divided[key].shards,
                    parts,
                    failed=failed[key],
                    no_rows=WindowMetrics.create_empty(),
                )
                for key, parts in stored[days].items()
            }
            yield dg.Output(partitions, asset.to_python_identifier())

    return metrics_of_windows


def _out(days: int) -> dg.AssetOut:
    return dg.AssetOut(
        is_required=False,
        description=(
            f"The eight metrics of every tutor of the roster over the {days} days before a "
            "reference date. One row per tutor per reference date."
        ),
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(WindowMetrics, _LINEAGE),
    )


def _group_name(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _at_once(shards: Mapping[str, tuple[str, WindowsOfShard]]) -> Iterator[list[str]]:
    """The names of what is computed at once: a shard, or whole dates of few tutors."""
    group: list[str] = []
    tutors = 0
    for name, (key, shard) in shards.items():
        if name != key:
            yield [name]
            continue
        if group and tutors + shard.roster.count > _TUTORS_AT_ONCE:
            yield group
            group, tutors = [], 0
        group.append(name)
        tutors += shard.roster.count
    if group:
        yield group
