"""Flags and tiers of a shard, and why they are so, of several dates at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

import dataframely as dy
import polars as pl
from upath import UPath

from tutormax_assets.compute.context import TaskContext
from tutormax_assets.compute.tasks.dates import (
    OfDates,
    batches_of_dates,
    collect_partitions,
    store_dates,
    task_name,
)
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.reasons import tier_reasons
from tutormax_assets.metrics.schemas import (
    TIERS,
    TierReasons,
    TierReasonsOfDates,
    TutorTiers,
    TutorTiersOfDates,
    WindowMetrics,
    WindowSums,
)
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets.storage.partition import Division, Partition, division, expect_columns
from tutormax_assets.storage.rows import Rows

TUTOR_TIERS, TUTOR_TIER_REASONS = "tutor_tiers", "tutor_tier_reasons"

SCHEMAS: Mapping[str, type[dy.Schema]] = {TUTOR_TIERS: TutorTiers, TUTOR_TIER_REASONS: TierReasons}
"""What is stored, by asset."""


@dataclass(frozen=True)
class TiersTask:
    """A shard of one or several reference dates.

    Attributes:
        reference_dates: The dates.
        metrics: Of each date, ``WindowSums`` of each window, the shortest one first.
        shard: Its number.
        paths: The partitions to store, by asset, of each date.
        policy: Thresholds, and how many flags make a tier.
    """

    reference_dates: Sequence[date]
    metrics: Sequence[Sequence[Rows]]
    shard: int
    paths: Mapping[str, Sequence[UPath]]
    policy: Policy


@dataclass(frozen=True)
class TiersPlan:
    """What is to be done for the reference dates of a run.

    Attributes:
        paths: The partitions to store, by asset and date.
        divisions: The shards of each date that have metrics, and those that an earlier step could
            not compute.
        tasks: By the names of their shards.
    """

    paths: Mapping[str, Mapping[str, UPath]]
    divisions: Mapping[str, Division]
    tasks: Mapping[str, TiersTask]


@dataclass(frozen=True)
class TiersCounts:
    """How many tutors of a reference date there are.

    Attributes:
        tiers: By window and tier.
        thin: With thin evidence, by window.
    """

    tiers: Mapping[str, Mapping[str, int]]
    thin: Mapping[str, int]


@dataclass(frozen=True)
class TiersReport:
    """What was stored.

    Attributes:
        stored: By asset and reference date.
        counts: Of each date.
    """

    stored: OfDates
    counts: Mapping[date, TiersCounts]


@dataclass(frozen=True)
class TiersOfDates:
    """What was computed.

    Attributes:
        partitions: By asset and date.
        counts: By date, those of each shard.
    """

    partitions: Mapping[str, Mapping[str, Partition]]
    counts: Mapping[str, Sequence[TiersCounts]]


def plan_tiers(
    metrics: Sequence[Mapping[str, Partition]],
    *,
    paths: Mapping[str, Mapping[str, UPath]],
    policy: Policy,
) -> TiersPlan:
    """Divide reference dates into tasks: a shard each, of several dates with few tutors.

    Args:
        metrics: ``WindowSums`` of each window, the shortest one first, by date in ISO form.
        paths: The partitions to store, by asset and date.
        policy: Thresholds, and how many flags make a tier.
    """
    divisions = {key: division([of_window[key] for of_window in metrics]) for key in metrics[0]}
    tasks = {
        task_name(keys, number): TiersTask(
            [date.fromisoformat(key) for key in keys],
            [[of_window[key].rows(number) for of_window in metrics] for key in keys],
            number or 0,
            {asset: [of_asset[key] for key in keys] for asset, of_asset in paths.items()},
            policy,
        )
        for number, keys in _groups(divisions, metrics[0])
    }
    return TiersPlan(paths, divisions, tasks)


def _groups(
    divisions: Mapping[str, Division], metrics: Mapping[str, Partition]
) -> Iterator[tuple[int | None, list[str]]]:
    """Shards, and the dates for which each is computed at once."""
    tutors: dict[int | None, dict[str, int]] = {}
    for key, divided in divisions.items():
        for number in divided.numbers:
            tutors.setdefault(number, {})[key] = metrics[key].rows(number).count
    for number, of_dates in tutors.items():
        for keys in batches_of_dates(of_dates):
            yield number, keys


def collect_tiers(
    plan: TiersPlan, reports: Mapping[str, TiersReport], errors: Mapping[str, BaseException]
) -> TiersOfDates:
    """The partitions of the reference dates, with the shards that failed named in them.

    Args:
        plan: What was to be done.
        reports: Of the tasks that were computed, by name.
        errors: Why others were not, by name.

    Raises:
        ShardsError: No shard of a date was computed.
    """
    stored = [report.stored for report in reports.values()]
    partitions = collect_partitions(
        plan.paths, plan.divisions, plan.tasks, stored, errors, schemas=SCHEMAS
    )
    counts: dict[str, list[TiersCounts]] = {key: [] for key in plan.divisions}
    for report in reports.values():
        for one, of_date in report.counts.items():
            counts[str(one)].append(of_date)
    return TiersOfDates(partitions, counts)


def compute_tiers(task: TiersTask, context: TaskContext) -> TiersReport:
    """Raise the flags of each tutor and window, find the tier, and say why.

    Raises:
        StorageError: The storage cannot be written, or an earlier version has computed the metrics.
    """
    metrics = _read_metrics(task)
    functions: Mapping[str, Callable[[pl.LazyFrame], pl.LazyFrame]] = {
        TUTOR_TIERS: partial(performance_tiers, policy=task.policy),
        TUTOR_TIER_REASONS: partial(tier_reasons, policy=task.policy),
    }
    frames = pl.collect_all([functions[asset](metrics.lazy()) for asset in task.paths])
    found = {
        asset: _OF_DATES[asset].validate(rows.with_columns(metrics["reference_date"]))
        for asset, rows in zip(task.paths, frames, strict=True)
    }
    stored = {
        asset: store_dates(rows, task.reference_dates, task.paths[asset], shard=task.shard)
        for asset, rows in found.items()
    }
    of_any, reasons = next(iter(found.values())), found.get(TUTOR_TIER_REASONS)
    counts = {
        one: TiersCounts(
            tier_counts(of_any.filter(reference_date=one)),
            thin_counts(None if reasons is None else reasons.filter(reference_date=one)),
        )
        for one in task.reference_dates
    }
    return TiersReport(stored, counts)


def _read_metrics(task: TiersTask) -> pl.DataFrame:
    """The metrics of all windows by date and tutor, the shortest window first."""
    needed = WindowSums if TUTOR_TIER_REASONS in task.paths else WindowMetrics
    scans = []
    for one, of_date in zip(task.reference_dates, task.metrics, strict=True):
        for rows in of_date:
            scan = rows.scan()
            expect_columns(scan, needed.column_names(), path=rows.path)
            scans.append(scan.with_columns(reference_date=one))
    return pl.concat(scans).collect().sort("reference_date", "tutor_id", maintain_order=True)


_OF_DATES: Mapping[str, type[dy.Schema]] = {
    TUTOR_TIERS: TutorTiersOfDates,
    TUTOR_TIER_REASONS: TierReasonsOfDates,
}


def sum_of_counts(
    counts: Iterable[Mapping[str, Mapping[str, int]]],
) -> dict[str, dict[str, int]]:
    """The numbers of tutors by window and tier in all of these together."""
    total: dict[str, dict[str, int]] = {}
    for one in counts:
        for window, tiers in one.items():
            of_window = total.setdefault(window, dict.fromkeys(TIERS, 0))
            for tier, tutors in tiers.items():
                of_window[tier] += tutors
    return total


def tier_counts(tiers: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Number of tutors in each tier by window, tiers without a tutor included.

    Args:
        tiers: ``TutorTiers``, or ``TierReasons``.
    """
    counted = tiers.group_by("window", "performance_tier").len()
    found = {(window, tier): count for window, tier, count in counted.iter_rows()}
    windows = tiers["window"].unique(maintain_order=True)
    return {window: {tier: found.get((window, tier), 0) for tier in TIERS} for window in windows}


def thin_counts(reasons: pl.DataFrame | None) -> dict[str, int]:
    """Number of tutors with thin evidence by window.

    Args:
        reasons: ``TierReasons``.
    """
    if reasons is None:
        return {}
    windows = reasons["window"].unique(maintain_order=True)
    found = dict(reasons.filter(evidence="thin").group_by("window").len().iter_rows())
    return {window: found.get(window, 0) for window in windows}
