"""The PostgreSQL table that dashboards, managers and churn models read."""

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from threading import Event
from typing import Any, NamedTuple

import dagster as dg

from tutormax_assets.compute import DaskError, EarlierStepError, KilledShardError, ShardsError
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS, TUTOR_TIERS
from tutormax_assets.compute.tasks.writing import (
    WritingPlan,
    WritingReport,
    WritingSummary,
    plan_writing,
    skip_unwritten,
    sum_of_summaries,
    summary_of_skipped,
    write_table,
)
from tutormax_assets.database.date_locks import DateLocks
from tutormax_assets.database.faults import reason
from tutormax_assets.database.metrics_reading import DateCounts, MetricsTableError, count_rows
from tutormax_assets.database.metrics_writing import WRITERS
from tutormax_assets.database.revisions import RevisionRecord
from tutormax_assets.database.tables import METRICS_TABLE, tutor_performance_metrics
from tutormax_assets.dates import midnight
from tutormax_assets.defs.assets import (
    OWNERS,
    PLATFORM_POOL,
    lineage_metadata,
    reference_dates,
    table_metadata,
)
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.partition import Division, Partition
from tutormax_assets.storage.shards import shard_name
from tutormax_assets.storage.store import PartitionStore

SUMMARY_METADATA = "summary"
"""Metadata key under which a materialization says what was saved and what was not."""


def tutor_performance_metrics_asset(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    freshness_policy: dg.FreshnessPolicy,
    archive_path: str,
    files_group: str | None,
) -> dg.AssetsDefinition:
    """Build the asset ``tutor_performance_metrics``.

    Args:
        daily: The reference dates.
        backfill_policy: How many of them a run takes.
        freshness_policy: When the asset is late.
        archive_path: Where the archive is, beside which replaced values are kept.
        files_group: Name of the group that can read it; none for the owner alone.
    """

    @dg.asset(
        deps=[TUTOR_TIERS, TUTOR_TIER_REASONS],
        partitions_def=daily,
        backfill_policy=backfill_policy,
        freshness_policy=freshness_policy,
        # A date that only runs of some tutors have computed is observed instead of materialized.
        output_required=False,
        pool=PLATFORM_POOL,
        group_name="persisted",
        owners=OWNERS,
        kinds={"postgres"},
        metadata=_column_metadata(),
    )
    def tutor_performance_metrics(
        context: dg.AssetExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        compute: dg.ResourceParam[Compute],
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
        date_locks: dg.ResourceParam[DateLocks],
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetMaterialization | dg.AssetObservation]:
        """Metrics and tiers as kept in PostgreSQL: one row per tutor, reference date and window.

        A row whose values did not move is not touched; rows of tutors that the run is not about
        stay as they are. A run of some tutors does not materialize a date that no run of all
        tutors has: it counts as missing until one does. The table ``tutor_tier_reasons`` holds the
        reasons for the tiers.
        """
        saved = _Saved(context.asset_key)
        record = RevisionRecord(
            archive_path, files_group, context.run.run_id, metrics_policy.policy.digest
        )
        # Of several dates two are written at once; workers write the shards of a date at once.
        at_once = 1 if compute.is_elsewhere or len(context.partition_keys) == 1 else WRITERS
        plans = _plan_dates(
            context,
            partition_store,
            run_options,
            timezone=daily.timezone,
            holder=date_locks.holder if compute.is_elsewhere else None,
            record=record,
            writers=WRITERS // at_once,
        )
        for written in _write_dates(compute, plans, at_once=at_once, log=context.log):
            key, reference_date, plan = written.of
            not_written = _summaries_of_failed(partition_store, key, plan.division)
            not_written += skip_unwritten(plan, written.reports, str(written.error))
            metadata = _metadata(written.reports, not_written)
            if written.error is not None:
                saved.break_off(key, metadata, written.error)
                continue
            if run_options.tutor_ids:
                instant = midnight(reference_date, timezone=daily.timezone)
                counts = run_options.retrying(context.log)(count_rows, database.engine, instant)
                others = partition_store.active_tutors_of_others(key)
                metadata |= _of_the_date(counts, metadata, others=others)
            is_partial = bool(run_options.tutor_ids) and not _is_materialized(context, key)
            saved.add(key, plan.division, metadata, is_partial=is_partial)
        yield from saved.events(context)

    return tutor_performance_metrics


def _column_metadata() -> Mapping[str, Any]:
    lineage = {
        name: [(TUTOR_TIERS, name)]
        for name in TutorTiers.columns()
        if name in tutor_performance_metrics.c
    }
    return {
        **table_metadata(tutor_performance_metrics, TutorTiers),
        **lineage_metadata(lineage),
    }


@dataclass
class _Saved:
    """What a run has saved, by reference date.

    Attributes:
        asset_key: The table's.
        written: Metadata of dates that are saved.
        broken_off: Of dates that shards are missing of.
        partial: Of dates that only runs of some tutors have computed.
        failed: Why shards are missing, by name.
        shards: How many shards all dates have.
        error: Why the first of the dates that could not be written was broken off.
    """

    asset_key: dg.AssetKey
    written: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    broken_off: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    partial: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    failed: dict[str, BaseException] = field(default_factory=dict)
    shards: int = 0
    error: Exception | None = None

    def break_off(self, key: str, metadata: Mapping[str, Any], error: Exception) -> None:
        """Add a date that could not be written to its end."""
        self.broken_off[key] = metadata
        self.error = self.error or error

    def add(
        self, key: str, divided: Division, metadata: Mapping[str, Any], *, is_partial: bool
    ) -> None:
        """Add a date that was written to its end."""
        self.shards += len(divided.shards)
        if divided.failed:
            self.broken_off[key] = metadata
            self.failed |= {
                shard_name(key, number): EarlierStepError(why)
                for number, why in divided.failed.items()
            }
        elif is_partial:
            self.partial[key] = metadata
        else:
            self.written[key] = metadata

    def events(
        self, context: dg.AssetExecutionContext
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetMaterialization | dg.AssetObservation]:
        """What the step says of all dates.

        Raises:
            Exception: A date could not be written.
            ShardsError: An earlier step could not compute some shards; the others are saved.
            dagster.Failure: Some tutors of a run of some tutors could not be saved.
        """
        if not self.failed and not self.partial and self.error is None:
            for key, metadata in self.written.items():
                context.add_asset_metadata(metadata, partition_key=key)
            yield dg.MaterializeResult()
            return
        yield from self._without_output()
        if self.error is not None:
            raise self.error
        if self.failed:
            raise ShardsError(self.failed, of=self.shards)
        if not_saved := [key for key, metadata in self.partial.items() if metadata["failed"]]:
            # Elsewhere the checks of the table find it; without an output they do not run.
            raise dg.Failure(
                f"Some tutors of {', '.join(not_saved)} could not be saved. The summary says why.",
                allow_retries=False,
            )

    def _without_output(self) -> Iterator[dg.AssetMaterialization | dg.AssetObservation]:
        """What a step without an output has saved: the output would have said so.

        A date that was broken off is not materialized: it is observed, if any of it was saved. One
        that only runs of some tutors have computed is observed.
        """
        for key, metadata in self.written.items():
            yield dg.AssetMaterialization(self.asset_key, partition=key, metadata=metadata)
        saved_in_part = {key: of for key, of in self.broken_off.items() if of["successful"]}
        for key, metadata in {**saved_in_part, **self.partial}.items():
            yield dg.AssetObservation(self.asset_key, partition=key, metadata=metadata)


def _reasons(store: PartitionStore, key: str) -> Partition | None:
    try:
        return store.partition(TUTOR_TIER_REASONS, key)
    except FileNotFoundError:
        # The tiers were computed without their reasons.
        return None


class _PlanOfDate(NamedTuple):
    key: str
    reference_date: date
    plan: WritingPlan


def _plan_dates(
    context: dg.AssetExecutionContext,
    store: PartitionStore,
    run_options: RunOptions,
    *,
    timezone: str,
    holder: int | None,
    record: RevisionRecord,
    writers: int,
) -> Iterator[_PlanOfDate]:
    partitions = store.partitions(TUTOR_TIERS, context.partition_keys)
    for key, reference_date in reference_dates(context).items():
        plan = plan_writing(
            key,
            partitions[key],
            _reasons(store, key),
            timezone=timezone,
            batch_size=run_options.batch_size,
            max_retries=run_options.max_retries,
            retry_delay_seconds=run_options.retry_delay_seconds,
            holder=holder,
            record=record,
            writers=writers,
        )
        yield _PlanOfDate(key, reference_date, plan)


class _Written(NamedTuple):
    of: _PlanOfDate
    reports: Mapping[str, WritingReport]
    error: Exception | None


def _write_dates(
    compute: Compute, plans: Iterator[_PlanOfDate], *, at_once: int, log: logging.Logger
) -> Generator[_Written, None, None]:
    """Write dates, some at once, and yield the outcomes in the order of the dates.

    After one that is broken off no other is begun.
    """
    is_broken_off = Event()

    def write(one: _PlanOfDate) -> _Written:
        reports, error = _write(compute, one.plan, log=log)
        if error is not None:
            is_broken_off.set()
            log.error(f"{one.key} was broken off: {reason(error)}")
        return _Written(one, reports, error)

    with ThreadPoolExecutor(at_once, thread_name_prefix=METRICS_TABLE) as pool:
        under_way = deque(pool.submit(write, one) for one in islice(plans, at_once))
        try:
            while under_way:
                written = under_way.popleft().result()
                more = 0 if is_broken_off.is_set() else 1
                under_way.extend(pool.submit(write, one) for one in islice(plans, more))
                yield written
        except BaseException:
            # Somebody stops the run: it need not wait for further attempts.
            compute.stop()
            raise


def _write(
    compute: Compute, plan: WritingPlan, *, log: logging.Logger
) -> tuple[dict[str, WritingReport], Exception | None]:
    """The reports of the shards that were written, and why the others were not."""
    reports: dict[str, WritingReport] = {}
    try:
        for name, report in compute.map(write_table, plan.tasks, log=log):
            reports[name] = report
            if report.failure is not None:
                return reports, report.failure
    except (MetricsTableError, ShardsError, DaskError, KilledShardError) as error:
        return reports, error
    return reports, None


def _metadata(
    reports: Mapping[str, WritingReport], not_written: Sequence[WritingSummary]
) -> dict[str, Any]:
    written = [report.summary for report in reports.values()]
    summary = sum_of_summaries([*written, *not_written]).to_dict()
    return {
        SUMMARY_METADATA: dg.MetadataValue.json(summary),
        **{name: value for name, value in summary.items() if name != "errors"},
        "tutors_computed": f"{summary['successful']} of {summary['total_tutors']}",
        "dagster/partition_row_count": summary["total_metrics_saved"],
        "write_seconds": round(sum(report.seconds for report in reports.values()), 3),
        "reasons_write_seconds": round(
            sum(report.reasons_seconds for report in reports.values()), 3
        ),
    }


def _of_the_date(counts: DateCounts, of_run: Mapping[str, Any], *, others: int) -> dict[str, Any]:
    """What a run of some tutors says of the whole date, in place of its own counts."""
    return {
        "total_tutors": counts.tutors,
        "total_metrics_saved": counts.rows,
        "dagster/partition_row_count": counts.rows,
        "tutors_computed": f"{of_run['successful']} of {of_run['total_tutors'] + others}",
    }


def _is_materialized(context: dg.AssetExecutionContext, key: str) -> bool:
    """Whether a run of all tutors has saved a date: only such a run is the first to do so."""
    wanted = dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=[key])
    return bool(context.instance.fetch_materializations(wanted, limit=1).records)


def _summaries_of_failed(
    store: PartitionStore, key: str, divided: Division
) -> list[WritingSummary]:
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
