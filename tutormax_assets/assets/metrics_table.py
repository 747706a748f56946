"""The PostgreSQL table that dashboards, managers and churn models read."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import islice
from time import perf_counter
from typing import Any

import dagster as dg
import polars as pl

from tutormax_assets.assets import OWNERS, PLATFORM_POOL, lineage_metadata, reference_dates
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.partitions import midnight
from tutormax_assets.platform.metrics_table import Batch, MetricsTableError, write_metrics
from tutormax_assets.platform.tables import METRICS_TABLE, tutor_performance_metrics
from tutormax_assets.resources import PlatformDatabase, RunOptions
from tutormax_assets.storage import FramesByDate

SUMMARY_METADATA = "summary"
"""Metadata key under which a materialization says what was saved and what was not."""

_LOGGED_ERRORS = 10
_LOGGED_TUTORS = 10


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
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetMaterialization | dg.AssetObservation]:
        """Metrics and tiers as kept in PostgreSQL: one row per tutor, reference date and window.

        A row whose values did not move is not touched; rows of tutors that the run is not about
        stay as they are.
        """
        written: dict[str, Mapping[str, Any]] = {}
        for key, day in reference_dates(context).items():
            started = perf_counter()
            tiers = tutor_tiers[key].collect()
            batches = []
            try:
                for batch in write_metrics(
                    database.engine,
                    tiers,
                    calculation_date=midnight(day, timezone=daily.timezone),
                    batch_size=run_options.batch_size,
                    retrying=run_options.retrying(context.log),
                    timeouts=database.timeouts,
                ):
                    _log_batch(context, day, batch)
                    batches.append(batch)
            except MetricsTableError as error:
                yield from _of_a_step_that_fails(
                    context.asset_key, written, key, _summary(tiers, batches, not_tried=str(error))
                )
                raise
            metadata = {
                **_metadata(_summary(tiers, batches)),
                "write_seconds": round(perf_counter() - started, 3),
            }
            context.add_asset_metadata(metadata, partition_key=key)
            written[key] = metadata
        yield dg.MaterializeResult()

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
    rows = f"{batch.inserted} inserted, {batch.updated} updated, {batch.unchanged} unchanged"
    if not batch.errors:
        context.log.info(f"{name} committed ({len(batch.tutor_ids)} tutors: {rows})")
        return
    context.log.error(
        f"{name}: {len(batch.errors)} of {len(batch.tutor_ids)} tutors left out ({rows})"
    )
    left_out: dict[str, list[str]] = {}
    for tutor_id, error in batch.errors.items():
        left_out.setdefault(error, []).append(tutor_id)
    for error, tutor_ids in islice(left_out.items(), _LOGGED_ERRORS):
        shown = ", ".join(tutor_ids[:_LOGGED_TUTORS])
        more = len(tutor_ids) - _LOGGED_TUTORS
        context.log.error(f"Left out {shown}{f' and {more} more' if more > 0 else ''}: {error}")


def _summary(
    tiers: pl.DataFrame, batches: Sequence[Batch], *, not_tried: str = ""
) -> dict[str, Any]:
    """What was saved of a date and what was not.

    Args:
        tiers: What was to be saved.
        batches: What became of it.
        not_tried: Why batches are missing, if some are.
    """
    tutor_ids = tiers["tutor_id"].unique().sort().to_list()
    tried = {tutor_id for batch in batches for tutor_id in batch.tutor_ids}
    errors = dict.fromkeys((one for one in tutor_ids if one not in tried), not_tried)
    for batch in batches:
        errors |= batch.errors
    return {
        "total_tutors": len(tutor_ids),
        "successful": len(tutor_ids) - len(errors),
        "failed": len(errors),
        "total_metrics_saved": sum(batch.saved for batch in batches),
        "inserted": sum(batch.inserted for batch in batches),
        "updated": sum(batch.updated for batch in batches),
        "unchanged": sum(batch.unchanged for batch in batches),
        "errors": [
            {"tutor_id": tutor_id, "error": errors[tutor_id]} for tutor_id in sorted(errors)
        ],
    }


def _metadata(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        SUMMARY_METADATA: dg.MetadataValue.json(summary),
        **{name: value for name, value in summary.items() if name != "errors"},
        "dagster/partition_row_count": summary["total_metrics_saved"],
    }


def _of_a_step_that_fails(
    asset_key: dg.AssetKey,
    written: Mapping[str, Mapping[str, Any]],
    broken_off: str,
    summary: Mapping[str, Any],
) -> Iterator[dg.AssetMaterialization | dg.AssetObservation]:
    """What the step has saved all the same: it has no output that would say so.

    A date that was broken off is not materialized: it is observed, if any of it was saved.
    """
    for key, metadata in written.items():
        yield dg.AssetMaterialization(asset_key, partition=key, metadata=metadata)
    if summary["successful"]:
        yield dg.AssetObservation(asset_key, partition=broken_off, metadata=_metadata(summary))
