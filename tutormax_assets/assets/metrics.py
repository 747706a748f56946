"""The metrics of each window: one asset a window, all of them computed in one step."""

from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter

import dagster as dg
import polars as pl

from tutormax_assets.assets import OWNERS, frame_metadata, reference_dates
from tutormax_assets.metrics.policy import window_name
from tutormax_assets.metrics.schemas import WindowMetrics
from tutormax_assets.metrics.window import window_metrics
from tutormax_assets.resources import MetricsPolicy
from tutormax_assets.storage import FramesByDate

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

# A date with few tutors does not keep all cores busy; one with many takes the memory of many dates.
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
        metrics_policy: MetricsPolicy,
        tutor_roster: FramesByDate,
        sessions_snapshot: FramesByDate,
        tutor_events_snapshot: FramesByDate,
    ) -> Iterator[dg.Output[FramesByDate]]:
        """Go through the snapshots of each reference date once for all windows."""
        policy = metrics_policy.policy
        selected = {
            days: name
            for days in windows
            if dg.AssetKey(name := metrics_asset_name(days)) in context.selected_asset_keys
        }
        dates = reference_dates(context)
        found: dict[str, FramesByDate] = {name: {} for name in selected.values()}
        for keys in _at_once(tutor_roster, dates):
            started = perf_counter()
            frames = pl.collect_all(
                [
                    window_metrics(
                        tutor_roster[key],
                        sessions_snapshot[key],
                        tutor_events_snapshot[key],
                        reference_date=dates[key],
                        windows=list(selected),
                        policy=policy,
                    ).pipe(WindowMetrics.validate, eager=False)
                    for key in keys
                ],
                engine="streaming",
            )
            seconds = (perf_counter() - started) / len(keys)
            for key, rows in zip(keys, frames, strict=True):
                # On one of the assets, so that the seconds of a run add up.
                context.add_asset_metadata(
                    {"all_windows_compute_seconds": round(seconds, 3)},
                    asset_key=next(iter(found)),
                    partition_key=key,
                )
                for days, name in selected.items():
                    found[name][key] = rows.filter(window=window_name(days)).lazy()
        for name in selected.values():
            yield dg.Output(found.pop(name), name)

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


def _at_once(rosters: FramesByDate, keys: Iterable[str]) -> Iterator[list[str]]:
    """The keys in groups whose tutors are few enough to be computed at once."""
    keys = list(keys)
    counts = pl.collect_all([rosters[key].select(pl.len()) for key in keys])
    most = max((count.item() for count in counts), default=0)
    size = max(1, _TUTORS_AT_ONCE // max(1, most))
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
