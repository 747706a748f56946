"""The code location: every asset, job and resource, built from the settings."""

from typing import Any

import dagster as dg

from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.tiers import SCHEMAS as TIER_ASSETS
from tutormax_assets.compute.tasks.windows import WINDOW_EDGES, metrics_asset_name
from tutormax_assets.defs.assets.daily_report import daily_report_asset
from tutormax_assets.defs.assets.live_metrics import live_metrics_asset
from tutormax_assets.defs.assets.platform_snapshot import SNAPSHOT_ASSETS, platform_snapshot_assets
from tutormax_assets.defs.assets.platform_tables import platform_tables
from tutormax_assets.defs.assets.tutor_metrics_as_of import tutor_metrics_as_of_asset
from tutormax_assets.defs.assets.tutor_performance_metrics import tutor_performance_metrics_asset
from tutormax_assets.defs.assets.tutor_tier_changes import tutor_tier_changes_asset
from tutormax_assets.defs.assets.tutor_tiers import tutor_tiers_assets
from tutormax_assets.defs.assets.window_metrics import window_metrics_assets
from tutormax_assets.defs.automation.alerts import alert_sensors
from tutormax_assets.defs.automation.late_data import late_data_sensor
from tutormax_assets.defs.automation.metrics import metrics_sensors
from tutormax_assets.defs.automation.retention import retention_job, retention_sensor
from tutormax_assets.defs.automation.schedule import (
    nightly_freshness,
    nightly_schedule,
    weekly_schedules,
)
from tutormax_assets.defs.automation.silence import periods_of, silence_sensor
from tutormax_assets.defs.automation.single_days import single_days_sensors
from tutormax_assets.defs.automation.stale_dates import stale_dates_sensor
from tutormax_assets.defs.checks.refreshes import REFRESHES_ARE_RIGHT, refreshes_check
from tutormax_assets.defs.checks.sessions_snapshot import sessions_snapshot_checks
from tutormax_assets.defs.checks.tutor_events_snapshot import tutor_events_snapshot_checks
from tutormax_assets.defs.checks.tutor_performance_metrics import tutor_performance_metrics_checks
from tutormax_assets.defs.checks.tutor_tier_changes import tutor_tier_changes_checks
from tutormax_assets.defs.checks.tutor_tiers import tutor_tiers_checks
from tutormax_assets.defs.checks.window_metrics import window_metrics_checks
from tutormax_assets.defs.log import line_logger
from tutormax_assets.defs.resources import (
    MetricsPolicy,
    RunOptions,
    compute_resource,
    date_locks_resource,
    load_policy,
    partition_store_resource,
    platform_database_resource,
)
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.report.content import DAILY_REPORT
from tutormax_assets.settings import Settings, load_settings

JOB_NAME = "daily_metrics"

AS_OF_JOB_NAME = "metrics_as_of"

LIVE_JOB_NAME = "refresh_live_metrics"

VERIFICATION_JOB_NAME = "refresh_verification"


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
    # A range of dates is one run, in which the platform is read once. A month at a time bounds what
    # the run holds in memory and what is lost with it.
    backfills = (
        dg.BackfillPolicy.multi_run(max_partitions_per_run=settings.max_dates_per_run)
        if settings.max_dates_per_run
        else dg.BackfillPolicy.single_run()
    )
    assets = [
        platform_snapshot_assets(
            daily,
            backfills,
            window_days=policy.horizon_days,
            number_of_shards=settings.shards,
        ),
        window_metrics_assets(daily, backfills, windows=policy.windows),
        tutor_tiers_assets(daily, backfills, windows=policy.windows),
        tutor_tier_changes_asset(daily, backfills, windows=policy.windows),
        tutor_performance_metrics_asset(
            daily,
            backfills,
            freshness_policy=nightly_freshness(timezone=settings.timezone),
            archive_path=settings.archive_path,
            files_group=settings.files_group,
        ),
        daily_report_asset(daily, backfills, reports_url=settings.reports_url),
    ]
    verified = dg.AssetSelection.checks(REFRESHES_ARE_RIGHT)
    daily_metrics = dg.define_asset_job(
        JOB_NAME,
        selection=dg.AssetSelection.assets(*assets) - verified,
        description="Compute the metrics and tiers of a reference date and keep them.",
    )
    as_of = tutor_metrics_as_of_asset(settings, daily, backfills)
    metrics_as_of = dg.define_asset_job(
        AS_OF_JOB_NAME,
        selection=dg.AssetSelection.assets(as_of),
        description="Compute the metrics of a reference date as they could be known at an instant.",
    )
    live = live_metrics_asset(settings)
    refresh_live_metrics = dg.define_asset_job(
        LIVE_JOB_NAME,
        selection=dg.AssetSelection.assets(live),
        description="Compute the metrics up to now and replace them in tutor_live_metrics.",
    )
    verification = dg.define_asset_job(
        VERIFICATION_JOB_NAME,
        selection=verified,
        description="Compare stored dates with a full computation; nothing is written.",
    )
    partitioned = kept_in_storage(policy)
    retention = retention_job(settings, partitioned)
    schedules: list[Any] = [
        nightly_schedule(daily_metrics, settings),
        *weekly_schedules(verification, settings),
    ]
    sensors = [
        *single_days_sensors(daily_metrics, assets, running=settings.automation),
        *alert_sensors(settings),
        retention_sensor(settings, partitioned, running=settings.automation),
        late_data_sensor(settings, JOB_NAME),
        stale_dates_sensor(settings),
        *metrics_sensors(settings, JOB_NAME),
    ]
    periods = periods_of([one.name for one in schedules], [one.name for one in sensors])
    return dg.Definitions(
        assets=[*platform_tables(settings.source), *assets, as_of, live],
        asset_checks=[*_checks(daily, policy), refreshes_check(settings)],
        jobs=[daily_metrics, metrics_as_of, refresh_live_metrics, verification, retention],
        schedules=schedules,
        sensors=[*sensors, silence_sensor(settings, periods)],
        resources=_resources(settings, policy),
        loggers={"line": line_logger},
        # Stages take fractions of a second; a process each would cost seconds.
        executor=dg.in_process_executor,
    )


def _checks(daily: dg.DailyPartitionsDefinition, policy: Policy) -> list[dg.AssetChecksDefinition]:
    return [
        sessions_snapshot_checks(daily),
        tutor_events_snapshot_checks(daily),
        *(window_metrics_checks(daily, days=days) for days in policy.windows),
        tutor_tiers_checks(daily, windows=policy.windows),
        tutor_tier_changes_checks(daily, windows=policy.windows),
        tutor_performance_metrics_checks(daily, windows=policy.windows),
    ]


def _resources(settings: Settings, policy: Policy) -> dict[str, Any]:
    return {
        "database": platform_database_resource(settings),
        "compute": compute_resource(settings),
        "run_options": RunOptions.configure_at_launch(),
        "metrics_policy": MetricsPolicy.configure_at_launch(
            base=dg.ResourceDefinition.hardcoded_resource(policy)
        ),
        "date_locks": date_locks_resource(settings),
        "partition_store": partition_store_resource(settings),
    }


def kept_in_storage(policy: Policy) -> list[dg.AssetKey]:
    """The assets whose partitions are files in the storage, which the retention deletes."""
    windows = (metrics_asset_name(days) for days in policy.windows)
    return [
        dg.AssetKey(asset)
        for asset in (
            *SNAPSHOT_ASSETS,
            *windows,
            WINDOW_EDGES,
            *TIER_ASSETS,
            TUTOR_TIER_CHANGES,
            DAILY_REPORT,
        )
    ]


@dg.definitions
def defs() -> dg.Definitions:
    """The code location, as the environment says when Dagster loads it."""
    return build_definitions(load_settings())
