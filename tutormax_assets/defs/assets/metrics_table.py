"""The PostgreSQL table that dashboards, managers and churn models read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from tutormax_assets.compute import DaskError, EarlierStepError, KilledShardError, ShardsError
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.metrics_table import (
    WritingReport,
    WritingSummary,
    plan_writing,
    sum_of_summaries,
    summary_of_skipped,
    write_table,
)
from tutormax_assets.database.date_locks import DateLocks
from tutormax_assets.database.metrics_reading import DateCounts, MetricsTableError, count_rows
from tutormax_assets.database.tables import METRICS_TABLE, tutor_performance_metrics
from tutormax_assets.dates import midnight
from tutormax_assets.defs.assets import OWNERS, PLATFORM_POOL, lineage_metadata, reference_dates
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.partition import Division
from tutormax_assets.storage.shards import shard_name
from tutormax_assets.storage.store import PartitionStore

_TIERS = "tutor_tiers"

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
        deps=[_TIERS],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        freshness_policy=freshness_policy,
        # A date that only runs of some tutors have computed is observed instead of materialized.
        output_required=False,
        pool=PLATFORM_POOL,
        group_name="persisted",
        owners=OWNERS,
        kinds={"postgres"},
        metadata={"dagster/table_name": METRICS_TABLE, **_column_metadata()},
    )
    def tutor_performance_metrics(
        context: dg.AssetExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        compute: dg.ResourceParam[Compute],
        run_options: RunOptions,
        partition_store: dg.ResourceParam[PartitionStore],
        date_locks: dg.ResourceParam[DateLocks],
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetMaterialization | dg.AssetObservation]:
        """Metrics and tiers as kept in PostgreSQL: one row per tutor, reference date and window.

        A row whose values did not move is not touched; rows of tutors that the run is not about
        stay as they are. A run of some tutors does not materialize a date that no run of all
        tutors has: it counts as missing until one does.
        """
        tiers = partition_store.partitions(_TIERS, context.partition_keys)
        written: dict[str, Mapping[str, Any]] = {}
        broken_off: dict[str, Mapping[str, Any]] = {}
        partial: dict[str, Mapping[str, Any]] = {}
        failed: dict[str, BaseException] = {}
        shards = 0
        retrying = run_options.retrying(context.log)
        for key, day in reference_dates(context).items():
            plan = plan_writing(
                key,
                tiers[key],
                timezone=daily.timezone,
                batch_size=run_options.batch_size,
                max_retries=run_options.max_retries,
                retry_delay_seconds=run_options.retry_delay_seconds,
                holder=date_locks.holder if compute.is_elsewhere else None,
            )
            divided = plan.division
            not_computed = _not_computed(partition_store, key, divided)
            reports: dict[str, WritingReport] = {}
            try:
                for name, report in compute.map(write_table, plan.tasks, log=context.log):
                    reports[name] = report
                    if report.failure is not None:
                        raise report.failure
            except (MetricsTableError, ShardsError, DaskError, KilledShardError) as error:
                not_written = [
                    summary_of_skipped(task.tiers.scan(), str(error))
                    for name, task in plan.tasks.items()
                    if name not in reports
                ]
                broken_off[key] = _metadata(reports.values(), [*not_computed, *not_written])
                yield from _without_output(context.asset_key, written, broken_off, partial)
                raise
            metadata = _metadata(reports.values(), not_computed)
            if run_options.tutor_ids:
                metadata |= _of_the_date(
                    retrying(count_rows, database.engine, midnight(day, timezone=daily.timezone)),
                    tutors=metadata["successful"],
                    of=metadata["total_tutors"] + partition_store.active_tutors_of_others(key),
                )
            shards += len(divided.shards)
            if divided.failed:
                broken_off[key] = metadata
                failed |= {
                    shard_name(key, number): EarlierStepError(why)
                    for number, why in divided.failed.items()
                }
            elif run_options.tutor_ids and not _is_materialized(context, key):
                partial[key] = metadata
            else:
                context.add_asset_metadata(metadata, partition_key=key)
                written[key] = metadata
        if failed or partial:
            yield from _without_output(context.asset_key, written, broken_off, partial)
        if failed:
            raise ShardsError(failed, of=shards)
        if not partial:
            yield dg.MaterializeResult()
        elif not_saved := [key for key, metadata in partial.items() if metadata["failed"]]:
            # Elsewhere the checks of the table find it; without an output they do not run.
            raise dg.Failure(
                f"Some tutors of {', '.join(not_saved)} could not be saved. The summary says why.",
                allow_retries=False,
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
    lineage = {name: [(_TIERS, name)] for name in described if name in tutor_performance_metrics.c}
    return {"dagster/column_schema": dg.TableSchema(columns), **lineage_metadata(lineage)}


def _metadata(
    reports: Iterable[WritingReport], not_written: Sequence[WritingSummary]
) -> dict[str, Any]:
    reports = list(reports)
    summary = sum_of_summaries([*(report.summary for report in reports), *not_written]).to_dict()
    return {
        SUMMARY_METADATA: dg.MetadataValue.json(summary),
        **{name: value for name, value in summary.items() if name != "errors"},
        "tutors_computed": f"{summary['successful']} of {summary['total_tutors']}",
        "dagster/partition_row_count": summary["total_metrics_saved"],
        "write_seconds": round(sum(report.seconds for report in reports), 3),
    }


def _of_the_date(counts: DateCounts, *, tutors: int, of: int) -> dict[str, Any]:
    """What a run of some tutors says of the whole date, in place of its own counts."""
    return {
        "total_tutors": counts.tutors,
        "total_metrics_saved": counts.rows,
        "dagster/partition_row_count": counts.rows,
        "tutors_computed": f"{tutors} of {of}",
    }


def _is_materialized(context: dg.AssetExecutionContext, key: str) -> bool:
    """Whether a run of all tutors has saved a date: only such a run is the first to do so."""
    wanted = dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=[key])
    return bool(context.instance.fetch_materializations(wanted, limit=1).records)


def _not_computed(store: PartitionStore, key: str, divided: Division) -> list[WritingSummary]:
    """The summaries of the shards that an earlier step could not compute."""
    if not divided.failed:
        return []
    roster = store.partitions("tutor_roster", [key])[key].rows().scan()
    return [
        summary_of_skipped(
            roster.filter(divided.shards.number() == number), f"{shard_name(key, number)}: {why}"
        )
        for number, why in divided.failed.items()
    ]


def _without_output(
    asset_key: dg.AssetKey,
    written: Mapping[str, Mapping[str, Any]],
    broken_off: Mapping[str, Mapping[str, Any]],
    partial: Mapping[str, Mapping[str, Any]],
) -> Iterator[dg.AssetMaterialization | dg.AssetObservation]:
    """What a step without an output has saved: the output would have said so.

    A date that was broken off is not materialized: it is observed, if any of it was saved. One that
    only runs of some tutors have computed is observed.
    """
    for key, metadata in written.items():
        yield dg.AssetMaterialization(asset_key, partition=key, metadata=metadata)
    saved_in_part = {key: of for key, of in broken_off.items() if of["successful"]}
    for key, metadata in {**saved_in_part, **partial}.items():
        yield dg.AssetObservation(asset_key, partition=key, metadata=metadata)
