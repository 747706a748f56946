"""A page about a reference date for those who act on tiers."""

from datetime import date

import dagster as dg
from dagster import MetadataValue
from upath import UPath

from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS, TUTOR_TIERS
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.dates import midnight
from tutormax_assets.defs.assets import OWNERS, PLATFORM_POOL, reference_dates
from tutormax_assets.defs.resources import MetricsPolicy
from tutormax_assets.report.content import (
    DAILY_REPORT,
    DailyReport,
    ReportSource,
    chart_metadata,
    report_path,
)
from tutormax_assets.report.record import DateRecord, read_record
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.files import write_text
from tutormax_assets.storage.store import PartitionStore


def daily_report_asset(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    reports_url: str | None,
) -> dg.AssetsDefinition:
    """Build the asset ``daily_report``.

    Args:
        daily: The reference dates.
        backfill_policy: How many of them a run takes.
        reports_url: Where a web server shows the folder of the pages, if one does.
    """

    @dg.asset(
        name=DAILY_REPORT,
        deps=[TUTOR_TIERS, TUTOR_TIER_REASONS, TUTOR_TIER_CHANGES, METRICS_TABLE],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        pool=PLATFORM_POOL,
        group_name="persisted",
        owners=OWNERS,
        kinds={"html"},
    )
    def daily_report(
        context: dg.AssetExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> None:
        """One page per reference date: movers, who is At Risk, what is unusual, data quality.

        It is about all tutors of the date, whichever the run is filtered to.
        """
        from tutormax_assets.report.page import daily_report_page

        source = ReportSource(
            partition_store,
            database.engine,
            database.timeouts,
            metrics_policy.policy,
            context.instance,
        )
        records = read_record(context.instance, context.run.run_id)
        for key, reference_date in reference_dates(context).items():
            report = source.collect(
                reference_date,
                records.get(key, DateRecord()),
                calculation_date=midnight(reference_date, timezone=daily.timezone),
            )
            path = report_path(partition_store.base_path, reference_date)
            write_text(path, daily_report_page(report))
            metadata = {
                "report": _link(path, reference_date, reports_url),
                "open_with": f"tutormax report --date {key} --open",
                **_numbers(report, days=metrics_policy.policy.windows[0]),
            }
            context.add_asset_metadata(metadata, partition_key=key)

    return daily_report


def _numbers(report: DailyReport, *, days: int) -> dict[str, int | float]:
    """The numbers of a report, which the UI plots and later reports chart."""
    charted = {
        chart_metadata(chart.name, days): float(chart.values[-1])
        for chart in report.charts
        if chart.is_current
    }
    at_risk = {f"at_risk_{window}": rows.total for window, rows in report.at_risk.items()}
    return {
        "movers": report.movers.total,
        "signals": sum(chart.is_signal for chart in report.charts),
        "checks_not_passed": sum(not check.passed for check in report.checks),
        **charted,
        **at_risk,
    }


def _link(path: UPath, day: date, reports_url: str | None) -> dg.MetadataValue[str]:
    if reports_url is not None:
        return MetadataValue.url(f"{reports_url.rstrip('/')}/{day}.html")
    return MetadataValue.path(str(path))
