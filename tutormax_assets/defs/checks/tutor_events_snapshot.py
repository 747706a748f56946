"""Checks of ``tutor_events_snapshot``: what the platform's events are like."""

from collections.abc import Iterator
from datetime import date
from functools import partial

import dagster as dg
import polars as pl

from tutormax_assets.defs.assets import PLATFORM_POOL
from tutormax_assets.defs.checks import Finding, check_spec, dates_to_check, partition, report
from tutormax_assets.defs.checks.source import SourceTable, few_rows_set_aside
from tutormax_assets.defs.checks.volumes import read_volumes
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.store import PartitionStore

ASSET = "tutor_events_snapshot"

_EVENTS = SourceTable(
    name="tutor_events",
    instant="event_timestamp",
    is_fresh="events_are_fresh",
    what="logins and message responses",
    day_what="events",
    usual="logins",
    other="sessions",
)


def tutor_events_snapshot_checks(daily: dg.DailyPartitionsDefinition) -> dg.AssetChecksDefinition:
    """Build the checks of ``tutor_events_snapshot``."""
    specs = _specs(daily)

    @dg.multi_asset_check(name=f"{ASSET}_checks", specs=specs, can_subset=True, pool=PLATFORM_POOL)
    def checks(
        context: dg.AssetCheckExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
        policy, limits = metrics_policy.policy, metrics_policy.policy.checks
        retrying = run_options.retrying(context.log)
        found: dict[str, dict[str, Finding]] = {}
        keys = dates_to_check(context, ASSET)
        volumes = read_volumes(partition_store, keys, days=policy.horizon_days)
        for key in keys:
            reference_date = date.fromisoformat(key)
            set_aside = partition(partition_store, "tutor_events_set_aside", key).collect()
            found[key] = {
                "few_rows_set_aside": few_rows_set_aside(
                    volumes.events[key].with_columns(pl.lit("tutor_events").alias("source_table")),
                    set_aside,
                    reference_date=reference_date,
                    windows=policy.windows,
                    warn_share=limits.set_aside_warn_share,
                    error_share=limits.set_aside_error_share,
                    min_rows=limits.set_aside_min_rows,
                )
            }
            found[key] |= _EVENTS.look_at(
                volumes,
                partition_store,
                database.source,
                partition_key=key,
                retrying=retrying,
                timezone=daily.timezone,
                policy=policy,
            )
        yield from report(context, specs, found)

    return checks


def _specs(daily: dg.DailyPartitionsDefinition) -> list[dg.AssetCheckSpec]:
    spec = partial(check_spec, asset=ASSET, daily=daily)
    return [
        spec(
            "few_rows_set_aside",
            "Most events of each window keep the source contract.",
            blocking=True,
        ),
        spec(
            "events_are_fresh",
            "The newest event is about as new as the reference date.",
            blocking=True,
        ),
        spec(
            "shortest_window_is_whole",
            "The shortest window has most of the logins that are usual for it.",
            blocking=True,
        ),
        spec(
            "day_volume_is_usual",
            "The newest day has about as many events as that weekday in the weeks before.",
        ),
    ]
