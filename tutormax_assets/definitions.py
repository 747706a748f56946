"""The code location: every asset, job and resource, built from the settings."""

import dagster as dg

from tutormax_assets.assets.metrics import window_metrics_asset
from tutormax_assets.assets.metrics_table import tutor_performance_metrics_asset
from tutormax_assets.assets.platform import platform_tables
from tutormax_assets.assets.snapshots import (
    sessions_snapshot_asset,
    tutor_events_snapshot_asset,
    tutor_roster_asset,
)
from tutormax_assets.assets.tiers import tutor_tiers_asset
from tutormax_assets.log import line_logger
from tutormax_assets.resources import MetricsPolicy, PlatformDatabase, RunOptions, load_policy
from tutormax_assets.settings import Settings, load_settings
from tutormax_assets.storage import PartitionedParquetIOManager

JOB_NAME = "daily_metrics"

# A range of dates is one run, in which the platform is read once. A month at a time bounds what
# the run holds in memory and what is lost with it.
MAX_PARTITIONS_PER_RUN = 31


def build_definitions(settings: Settings) -> dg.Definitions:
    """The definitions for these settings. Nothing is connected to or started.

    Raises:
        SettingsError: The policy file cannot be read.
        PolicyError: The policy file is malformed or contradicts itself.
    """
    policy = load_policy(settings)
    daily = dg.DailyPartitionsDefinition(
        start_date=settings.first_date.isoformat(), timezone=settings.timezone, end_offset=1
    )
    backfills = dg.BackfillPolicy.multi_run(max_partitions_per_run=MAX_PARTITIONS_PER_RUN)
    assets = [
        tutor_roster_asset(daily, backfills),
        sessions_snapshot_asset(daily, backfills, window_days=policy.horizon_days),
        tutor_events_snapshot_asset(daily, backfills, window_days=policy.horizon_days),
        *(window_metrics_asset(daily, backfills, days=days) for days in policy.windows),
        tutor_tiers_asset(daily, backfills, windows=policy.windows),
        tutor_performance_metrics_asset(daily, backfills),
    ]
    database = PlatformDatabase()
    run_options = RunOptions.configure_at_launch()
    return dg.Definitions(
        assets=[*platform_tables(), *assets],
        jobs=[
            dg.define_asset_job(
                JOB_NAME,
                selection=dg.AssetSelection.assets(*assets),
                description="Compute the metrics and tiers of a reference date and keep them.",
            )
        ],
        resources={
            "database": database,
            "run_options": run_options,
            "metrics_policy": MetricsPolicy.configure_at_launch(),
            "io_manager": PartitionedParquetIOManager(
                base_path=settings.storage_path, run_options=run_options, database=database
            ),
        },
        loggers={"line": line_logger},
        # Stages take fractions of a second; a process each would cost seconds.
        executor=dg.in_process_executor,
    )


defs = build_definitions(load_settings())
