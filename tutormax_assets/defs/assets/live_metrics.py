"""The live numbers of each tutor: windows that end now, replaced in place."""

from datetime import timedelta
from typing import Any

import dagster as dg

from tutormax_assets.compute.tasks.live import LiveReport, refresh_live_metrics
from tutormax_assets.compute.tasks.tiers import tier_counts
from tutormax_assets.database.tables import tutor_live_metrics
from tutormax_assets.defs.assets import OWNERS, PLATFORM_POOL, table_metadata
from tutormax_assets.defs.assets.distribution import distribution_image
from tutormax_assets.defs.assets.platform_tables import PLATFORM_TABLES
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.settings import Settings
from tutormax_assets.source.platform import PlatformDatabase

LIVE_METRICS = "live_metrics"

RECORD_SECONDS = 600
"""Seconds between two materializations that `tutormax live --watch` puts on record."""


def live_metrics_asset(settings: Settings) -> dg.AssetsDefinition:
    """Build the asset ``live_metrics``."""

    @dg.asset(
        name=LIVE_METRICS,
        deps=PLATFORM_TABLES,
        pool=PLATFORM_POOL,
        group_name="live",
        owners=OWNERS,
        kinds={"postgres"},
        # Its first materialization starts the clock, so nothing is late where nobody uses it.
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=timedelta(seconds=3 * RECORD_SECONDS)
        ),
        metadata=table_metadata(tutor_live_metrics, TutorTiers),
    )
    def live_metrics(
        context: dg.AssetExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
    ) -> dg.MaterializeResult[None]:
        """The metrics of active tutors in windows that end now, in the table tutor_live_metrics.

        One row per tutor and window, replaced in place, with the instant at which the window ends.
        `tutormax live --watch` refreshes them every TUTORMAX_LIVE_SECONDS and materializes this
        asset every ten minutes. They are never part of the daily rows.
        """
        report = run_options.retrying(context.log)(
            refresh_live_metrics,
            database,
            settings.home_path,
            policy=metrics_policy.policy,
            tutor_ids=run_options.tutor_ids or (),
        )
        return dg.MaterializeResult(metadata=live_metadata(report))

    return live_metrics


def live_metadata(report: LiveReport) -> dict[str, Any]:
    """What a materialization says of a refresh."""
    return {
        "calculated_at": dg.MetadataValue.timestamp(report.calculated_at),
        "tutors": report.tiers["tutor_id"].n_unique(),
        "rows_changed": report.rows_changed,
        "tiers": dg.MetadataValue.md(distribution_image(tier_counts(report.tiers))),
        "seconds": round(report.seconds, 3),
    }
