"""Writing a shard to the table that dashboards, managers and churn models read."""

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from itertools import islice
from time import perf_counter
from typing import Any

import polars as pl
import tenacity

from tutormax_assets.compute.context import TaskContext
from tutormax_assets.database.date_locks import is_held
from tutormax_assets.database.faults import retrying
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.metrics_writing import WRITERS, Batch, write_metrics
from tutormax_assets.database.revisions import RevisionRecord
from tutormax_assets.database.rows_of_date import RowsOfDate
from tutormax_assets.database.tables import tutor_tier_reasons
from tutormax_assets.dates import midnight
from tutormax_assets.metrics.schemas import TierReasons
from tutormax_assets.storage.partition import Division, Partition, division
from tutormax_assets.storage.rows import Rows
from tutormax_assets.storage.shards import shard_name

_LOGGED_ERRORS = 10
_LOGGED_TUTORS = 10


@dataclass(frozen=True)
class WritingTask:
    """A shard of a reference date.

    Attributes:
        tiers: ``TutorTiers``.
        reference_date: The reference date.
        calculation_date: The instant that it stands for.
        batch_size: Tutors per transaction at most.
        max_retries: How often a batch is tried again.
        retry_delay_seconds: Seconds before the first retry.
        holder: Who has the date for the run, as ``DateLocks.holder`` says. A worker may outlive
            the run, and another one have written newer rows.
        reasons: ``TierReasons``; None if they are not stored.
        record: Keeps the values that are replaced; they are lost when None.
        writers: How many connections write at once at most.
    """

    tiers: Rows
    reference_date: date
    calculation_date: datetime
    batch_size: int
    max_retries: int
    retry_delay_seconds: float
    holder: int | None = None
    reasons: Rows | None = None
    record: RevisionRecord | None = None
    writers: int = WRITERS


@dataclass(frozen=True)
class WritingPlan:
    """What is to be written of a reference date.

    Attributes:
        division: The shards that have tiers, and those that an earlier step could not compute.
        tasks: By the name of the shard.
    """

    division: Division
    tasks: Mapping[str, WritingTask]


@dataclass(frozen=True)
class WritingSummary:
    """What was saved and what was not.

    Attributes:
        total_tutors: Tutors that were to be saved.
        total_metrics_saved: Rows of those tutors that the table holds now.
        inserted: Rows that were not there before.
        updated: Rows whose values moved.
        unchanged: Rows that were left as they were.
        errors: Why a tutor is not saved with all windows, by id.
    """

    total_tutors: int
    total_metrics_saved: int
    inserted: int
    updated: int
    unchanged: int
    errors: Mapping[str, str]

    @property
    def failed(self) -> int:
        """Tutors that are not saved."""
        return len(self.errors)

    @property
    def successful(self) -> int:
        """Tutors that are in the table with all windows."""
        return self.total_tutors - self.failed

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON can hold it."""
        return {
            "total_tutors": self.total_tutors,
            "successful": self.successful,
            "failed": self.failed,
            "total_metrics_saved": self.total_metrics_saved,
            "inserted": self.inserted,
            "updated": self.updated,
            "unchanged": self.unchanged,
            "errors": [
                {"tutor_id": tutor_id, "error": self.errors[tutor_id]}
                for tutor_id in sorted(self.errors)
            ],
        }


@dataclass(frozen=True)
class WritingReport:
    """What was saved and what was not.

    Attributes:
        summary: Counts, and the error of each tutor who is not saved.
        seconds: How long the writing of the metrics took.
        reasons_seconds: How long the writing of the reasons took.
        failure: Why the table cannot be written, if it cannot.
    """

    summary: WritingSummary
    seconds: float
    reasons_seconds: float
    failure: MetricsTableError | None = None


def plan_writing(
    partition_key: str,
    tiers: Partition,
    reasons: Partition | None = None,
    *,
    timezone: str,
    batch_size: int,
    max_retries: int,
    retry_delay_seconds: float,
    holder: int | None,
    record: RevisionRecord | None = None,
    writers: int = WRITERS,
) -> WritingPlan:
    """Divide a reference date into tasks.

    Args:
        partition_key: The reference date in ISO form.
        tiers: ``TutorTiers``.
        reasons: ``TierReasons``; None if they are not stored.
        timezone: In which the date begins.
        batch_size: Tutors per transaction at most.
        max_retries: How often a batch is tried again.
        retry_delay_seconds: Seconds before the first retry.
        holder: Who has the date for the run, as ``DateLocks.holder`` says.
        record: Keeps the values that are replaced; they are lost when None.
        writers: How many connections write a shard at once at most.
    """
    reference_date = date.fromisoformat(partition_key)
    divided = division([tiers])
    tasks = {
        shard_name(partition_key, number): WritingTask(
            tiers.rows(number),
            reference_date,
            midnight(reference_date, timezone=timezone),
            batch_size,
            max_retries,
            retry_delay_seconds,
            holder,
            _rows_of_shard(reasons, divided, number),
            record,
            writers,
        )
        for number in divided.numbers
    }
    return WritingPlan(divided, tasks)


def _rows_of_shard(reasons: Partition | None, divided: Division, number: int | None) -> Rows | None:
    if reasons is None:
        return None
    # Divided otherwise, as by another run, all rows are read for those of the shard.
    return reasons.rows(number if reasons.shards == divided.shards else None)


def _retrying(task: WritingTask, context: TaskContext) -> tenacity.Retrying:
    """The retries of a task, which end at once when the run ends early."""
    attempts = retrying(
        max_retries=task.max_retries,
        retry_delay_seconds=task.retry_delay_seconds,
        log=context.log,
    )
    return attempts.copy(
        sleep=tenacity.sleep_using_event(context.over),
        stop=lambda state: context.over.is_set() or attempts.stop(state),
    )


def write_table(task: WritingTask, context: TaskContext) -> WritingReport:
    """Bring the table's rows of a shard to those of its tiers, and the reasons to theirs."""
    started = perf_counter()
    metrics_written = None
    tiers = task.tiers.scan().collect()
    batches: list[Batch] = []
    failure = None
    without_reasons: Mapping[str, str] = {}
    attempts = _retrying(task, context)
    is_wanted = None if task.holder is None else is_held(task.holder)
    try:
        for batch in write_metrics(
            context.database.engine,
            tiers,
            calculation_date=task.calculation_date,
            batch_size=task.batch_size,
            retrying=attempts,
            timeouts=context.database.timeouts,
            is_wanted=is_wanted,
            record=task.record,
            writers=task.writers,
            over=context.over,
        ):
            _log_batch(context.log, task.reference_date, batch)
            batches.append(batch)
        metrics_written = perf_counter()
        left_out = [one for batch in batches for one in batch.errors]
        saved = tiers.filter(~pl.col("tutor_id").is_in(left_out))
        rows_of_date = RowsOfDate(
            context.database.engine,
            task.calculation_date,
            context.database.timeouts,
            attempts,
            is_wanted,
            task.writers,
        )
        without_reasons = rows_of_date.write(
            tutor_tier_reasons,
            _reasons_of(saved, task.reasons),
            tutor_ids=saved["tutor_id"].unique().to_list(),
        )
    except MetricsTableError as error:
        failure = error
    summary = _summary(tiers, batches, reason=str(failure or ""))
    if without_reasons:
        said = {
            tutor_id: f"The metrics are saved, but {tutor_tier_reasons.name} keeps its rows: {why}"
            for tutor_id, why in without_reasons.items()
        }
        _log_left_out(context.log, said)
        summary = replace(summary, errors={**summary.errors, **said})
    ended = perf_counter()
    metrics_written = metrics_written or ended
    return WritingReport(summary, metrics_written - started, ended - metrics_written, failure)


def _reasons_of(tiers: pl.DataFrame, reasons: Rows | None) -> pl.DataFrame:
    """The reasons for these tiers; those for other tiers are of another run and left out."""
    if reasons is None:
        return TierReasons.create_empty()
    key = ["tutor_id", "window", "performance_tier"]
    return reasons.scan().join(tiers.lazy(), on=key, how="semi").collect()


def summary_of_skipped(tutors: pl.LazyFrame, reason: str) -> WritingSummary:
    """The summary of tutors that were not tried, all for one reason."""
    return _summary(tutors.select("tutor_id").collect(), [], reason=reason)


def skip_unwritten(plan: WritingPlan, reports: Container[str], reason: str) -> list[WritingSummary]:
    """The summaries of the shards of a plan that have no report, all for one reason."""
    return [
        summary_of_skipped(task.tiers.scan(), reason)
        for name, task in plan.tasks.items()
        if name not in reports
    ]


def sum_of_summaries(summaries: Iterable[WritingSummary]) -> WritingSummary:
    """The summary of all shards from that of each."""
    summaries = list(summaries)
    return WritingSummary(
        sum(one.total_tutors for one in summaries),
        sum(one.total_metrics_saved for one in summaries),
        sum(one.inserted for one in summaries),
        sum(one.updated for one in summaries),
        sum(one.unchanged for one in summaries),
        {tutor_id: error for one in summaries for tutor_id, error in one.errors.items()},
    )


def _log_batch(log: logging.Logger, reference_date: date, batch: Batch) -> None:
    name = f"Batch {batch.number}/{batch.of} of {reference_date}"
    rows = f"{batch.inserted} inserted, {batch.updated} updated, {batch.unchanged} unchanged"
    if not batch.errors:
        log.info(f"{name} committed ({len(batch.tutor_ids)} tutors: {rows})")
        return
    log.error(f"{name}: {len(batch.errors)} of {len(batch.tutor_ids)} tutors left out ({rows})")
    _log_left_out(log, batch.errors)


def _log_left_out(log: logging.Logger, errors: Mapping[str, str]) -> None:
    left_out: dict[str, list[str]] = {}
    for tutor_id, error in errors.items():
        left_out.setdefault(error, []).append(tutor_id)
    for error, tutor_ids in islice(left_out.items(), _LOGGED_ERRORS):
        shown = ", ".join(tutor_ids[:_LOGGED_TUTORS])
        more = len(tutor_ids) - _LOGGED_TUTORS
        log.error(f"Left out {shown}{f' and {more} more' if more > 0 else ''}: {error}")


def _summary(tiers: pl.DataFrame, batches: Sequence[Batch], *, reason: str = "") -> WritingSummary:
    """What was saved of a shard and what was not.

    Args:
        tiers: What was to be saved.
        batches: What became of it.
        reason: Why batches are missing, if some are.
    """
    tutor_ids = tiers["tutor_id"].unique().to_list()
    tried = {tutor_id for batch in batches for tutor_id in batch.tutor_ids}
    errors = dict.fromkeys((one for one in tutor_ids if one not in tried), reason)
    for batch in batches:
        errors |= batch.errors
    return WritingSummary(
        total_tutors=len(tutor_ids),
        total_metrics_saved=sum(batch.saved for batch in batches),
        inserted=sum(batch.inserted for batch in batches),
        updated=sum(batch.updated for batch in batches),
        unchanged=sum(batch.unchanged for batch in batches),
        errors=errors,
    )
