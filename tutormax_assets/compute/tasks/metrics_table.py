"""Writing a shard to the table that dashboards, managers and churn models read."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import islice
from time import perf_counter
from typing import Any

import polars as pl

from tutormax_assets.compute.context import TaskContext
from tutormax_assets.database.date_locks import is_held
from tutormax_assets.database.faults import retrying
from tutormax_assets.database.metrics_table import Batch, MetricsTableError, write_metrics
from tutormax_assets.storage.partition import Rows

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
    """

    tiers: Rows
    reference_date: date
    calculation_date: datetime
    batch_size: int
    max_retries: int
    retry_delay_seconds: float
    holder: int | None = None


@dataclass(frozen=True)
class WritingReport:
    """What was saved and what was not.

    Attributes:
        summary: Counts, and the error of each tutor who is not saved.
        seconds: How long the writing took.
        failure: Why the table cannot be written, if it cannot.
    """

    summary: dict[str, Any]
    seconds: float
    failure: MetricsTableError | None = None


def write_table(task: WritingTask, context: TaskContext) -> WritingReport:
    """Bring the table's rows of a shard to those of its tiers."""
    started = perf_counter()
    tiers = task.tiers.scan().collect()
    batches: list[Batch] = []
    failure = None
    try:
        for batch in write_metrics(
            context.database.engine,
            tiers,
            calculation_date=task.calculation_date,
            batch_size=task.batch_size,
            retrying=retrying(
                max_retries=task.max_retries,
                retry_delay_seconds=task.retry_delay_seconds,
                log=context.log,
            ),
            timeouts=context.database.timeouts,
            is_wanted=None if task.holder is None else is_held(task.holder),
        ):
            _log_batch(context.log, task.reference_date, batch)
            batches.append(batch)
    except MetricsTableError as error:
        failure = error
    summary = _summary(tiers, batches, not_tried=str(failure or ""))
    return WritingReport(summary, perf_counter() - started, failure)


def not_tried(tutors: pl.LazyFrame, reason: str) -> dict[str, Any]:
    """The summary of tutors without a report."""
    return _summary(tutors.select("tutor_id").collect(), [], not_tried=reason)


def added_up(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of all shards from that of each, at least one."""
    first, *others = summaries
    total = dict(first)
    for summary in others:
        for name, value in summary.items():
            total[name] += value
    total["errors"] = sorted(total["errors"], key=lambda error: str(error["tutor_id"]))
    return total


def _log_batch(log: logging.Logger, day: date, batch: Batch) -> None:
    name = f"Batch {batch.number}/{batch.of} of {day}"
    rows = f"{batch.inserted} inserted, {batch.updated} updated, {batch.unchanged} unchanged"
    if not batch.errors:
        log.info(f"{name} committed ({len(batch.tutor_ids)} tutors: {rows})")
        return
    log.error(f"{name}: {len(batch.errors)} of {len(batch.tutor_ids)} tutors left out ({rows})")
    left_out: dict[str, list[str]] = {}
    for tutor_id, error in batch.errors.items():
        left_out.setdefault(error, []).append(tutor_id)
    for error, tutor_ids in islice(left_out.items(), _LOGGED_ERRORS):
        shown = ", ".join(tutor_ids[:_LOGGED_TUTORS])
        more = len(tutor_ids) - _LOGGED_TUTORS
        log.error(f"Left out {shown}{f' and {more} more' if more > 0 else ''}: {error}")


def _summary(
    tiers: pl.DataFrame, batches: Sequence[Batch], *, not_tried: str = ""
) -> dict[str, Any]:
    """What was saved of a shard and what was not.

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
