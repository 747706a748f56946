"""The PostgreSQL table that dashboards, managers and churn models read."""

from collections.abc import Mapping
from datetime import date
from time import perf_counter
from typing import Any

import dagster as dg

from tutormax_assets.assets import OWNERS, PLATFORM_POOL, lineage_metadata, reference_dates
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.partitions import midnight
from tutormax_assets.platform.metrics_table import Batch, write_metrics
from tutormax_assets.platform.tables import METRICS_TABLE, tutor_performance_metrics
from tutormax_assets.resources import PlatformDatabase, RunOptions
from tutormax_assets.storage import FramesByDate

SUMMARY_METADATA = "summary"
"""Metadata key under which a materialization says what was saved and what was not."""


def tutor_performance_metrics_asset(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    freshness_policy: dg.FreshnessPolicy,
) -> dg.AssetsDefinition:
    """Build the asset ``tutor_performance_metrics``."""

    @dg.asset(
        partitions_def=daily,
        backfill_policy=backfill_policy,
        freshness_policy=freshness_policy,
        pool=PLATFORM_POOL,
        group_name="persisted",
        owners=OWNERS,
        kinds={"postgres"},
        metadata={"dagster/table_name": METRICS_TABLE, **_column_metadata()},
    )
    def tutor_performance_metrics(
        context: dg.AssetExecutionContext,
        database: PlatformDatabase,
        run_options: RunOptions,
        tutor_tiers: FramesByDate,
    ) -> None:
        """Metrics and tiers as kept in PostgreSQL: one row per tutor, reference date and window.

        A row whose values did not move is not touched; rows of tutors that the run is not about
        stay as they are.
        """
        for key, day in reference_dates(context).items():
            started = perf_counter()
            batches = []
            for batch in write_metrics(
                database.engine,
                tutor_tiers[key].collect(),
                calculation_date=midnight(day, timezone=daily.timezone),
                batch_size=run_options.batch_size,
                max_retries=run_options.max_retries,
                retry_delay_seconds=run_options.retry_delay_seconds,
            ):
                _log_batch(context, day, batch)
                batches.append(batch)
            summary = _summary(batches)
            context.add_asset_metadata(
                {
                    SUMMARY_METADATA: dg.MetadataValue.json(summary),
                    **{name: value for name, value in summary.items() if name != "errors"},
                    "write_seconds": round(perf_counter() - started, 3),
                    "dagster/partition_row_count": summary["total_metrics_saved"],
                },
                partition_key=key,
            )

    return tutor_performance_metrics


def _column_metadata() -> Mapping[str, Any]:
    described = {name: column.description for name, column in TutorTiers.columns().items()}
    columns = [
        dg.TableColumn(
            column.name,
            type=str(column.type),
            description=described.get(column.name),
            constraints=dg.TableColumnConstraints(
                nullable=bool(column.nullable), unique=column.primary_key
            ),
        )
        for column in tutor_performance_metrics.columns
    ]
    lineage = {
        name: [("tutor_tiers", name)] for name in described if name in tutor_performance_metrics.c
    }
    return {"dagster/column_schema": dg.TableSchema(columns), **lineage_metadata(lineage)}


def _log_batch(context: dg.AssetExecutionContext, day: date, batch: Batch) -> None:
    name = f"Batch {batch.number}/{batch.of} of {day}"
    size = f"{len(batch.tutor_ids)} tutors"
    if batch.error is None:
        context.log.info(
            f"{name} committed ({size}: {batch.inserted} inserted, "
            f"{batch.updated} updated, {batch.unchanged} unchanged)"
        )
    else:
        context.log.error(f"{name} failed ({size}): {batch.error}")


def _summary(batches: list[Batch]) -> dict[str, Any]:
    saved = [batch for batch in batches if batch.error is None]
    failed = [batch for batch in batches if batch.error is not None]
    return {
        "total_tutors": sum(len(batch.tutor_ids) for batch in batches),
        "successful": sum(len(batch.tutor_ids) for batch in saved),
        "failed": sum(len(batch.tutor_ids) for batch in failed),
        "total_metrics_saved": sum(batch.saved for batch in saved),
        "inserted": sum(batch.inserted for batch in saved),
        "updated": sum(batch.updated for batch in saved),
        "unchanged": sum(batch.unchanged for batch in saved),
        "errors": [
            {"tutor_id": tutor_id, "error": batch.error}
            for batch in failed
            for tutor_id in batch.tutor_ids
        ],
    }
