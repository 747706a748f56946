"""Checks of ``tutor_events_snapshot``: what the platform's events are like."""

from collections.abc import Iterator
from datetime import date
from functools import partial

import dagster as dg
import polars as pl

from tutormax_assets.defs.assets import PLATFORM_POOL
from tutormax_assets.defs.checks import Finding, check_spec, dates_to_check, partition, report
from tutormax_assets.defs.checks.source import (
    NOT_OF_ALL,
    day_volume_is_usual,
    few_rows_set_aside,
    newest_date,
    rows_by_day,
    shortest_window_is_whole,
    source_is_fresh,
)
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.view import AnySource, where_to_look
from tutormax_assets.storage.store import PartitionStore

ASSET = "tutor_events_snapshot"


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
        for key in dates_to_check(context, ASSET):
            day = date.fromisoformat(key)
            by_day, set_aside = pl.collect_all(
                [
                    events_by_day(partition(partition_store, ASSET, key)),
                    partition(partition_store, "tutor_events_set_aside", key),
                ],
                engine="streaming",
            )
            found[key] = {
                "few_rows_set_aside": few_rows_set_aside(
                    by_day.with_columns(pl.lit("tutor_events").alias("source_table")),
                    set_aside,
                    reference_date=day,
                    windows=policy.windows,
                    warn_share=limits.set_aside_warn_share,
                    error_share=limits.set_aside_error_share,
                    min_rows=limits.set_aside_min_rows,
                )
            }
            if partition_store.active_tutors_left_out(key):
                found[key] |= dict.fromkeys(OF_THE_PLATFORM, NOT_OF_ALL)
                continue
            newest = newest_date(
                by_day,
                database.source,
                "tutor_events",
                reference_date=day,
                retrying=retrying,
                timezone=daily.timezone,
            )
            found[key] |= findings_of_platform(
                by_day,
                rows_by_day(partition_store, "logins", key),
                rows_by_day(partition_store, "sessions", key),
                newest=newest,
                source=database.source,
                reference_date=day,
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


OF_THE_PLATFORM = ("events_are_fresh", "shortest_window_is_whole", "day_volume_is_usual")
"""The checks about the platform as a whole, which a run of some tutors does not know."""


def findings_of_platform(
    by_day: pl.DataFrame,
    logins_by_day: pl.DataFrame,
    sessions_by_day: pl.DataFrame,
    /,
    *,
    newest: date | None,
    source: AnySource,
    reference_date: date,
    policy: Policy,
) -> dict[str, Finding]:
    """What the checks about the platform as a whole find, by name.

    Args:
        by_day: As ``events_by_day`` gives it.
        logins_by_day: As ``rows_by_day`` gives it.
        sessions_by_day: As ``rows_by_day`` gives it.
        newest: The day of the newest event.
        source: Where the platform is read, for what a person is shown.
        reference_date: The reference date.
        policy: Its windows, and the limits of checks.
    """
    limits = policy.checks
    return {
        "events_are_fresh": source_is_fresh(
            newest,
            what="logins and message responses",
            reference_date=reference_date,
            warn_days=limits.stale_warn_days,
            error_days=limits.stale_error_days,
            look_at=where_to_look(source, "tutor_events", instant="event_timestamp"),
        ),
        "shortest_window_is_whole": shortest_window_is_whole(
            logins_by_day,
            sessions_by_day,
            what="logins",
            reference_date=reference_date,
            days=policy.windows[0],
            max_loss=limits.window_loss_error_share,
        ),
        "day_volume_is_usual": day_volume_is_usual(
            by_day,
            what="events",
            reference_date=reference_date,
            min_share=limits.volume_share,
            min_deviations=limits.volume_deviations,
            min_weeks=limits.volume_min_weeks,
        ),
    }


def events_by_day(events: pl.LazyFrame, /) -> pl.LazyFrame:
    """Events by day: ``date``, ``rows``, sorted by date.

    Args:
        events: ``TutorEventsSnapshot``.
    """
    return (
        events.group_by(pl.col("event_date").alias("date"))
        .agg(pl.len().cast(pl.Int64).alias("rows"))
        .sort("date")
    )
