"""The metrics of all windows of a shard, in one pass over its snapshots."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from time import perf_counter

import polars as pl
from upath import UPath

from tutormax_assets.compute import ShardsError
from tutormax_assets.compute.context import TaskContext
from tutormax_assets.database.faults import reason
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import EdgeSums, WindowSums
from tutormax_assets.metrics.window import windows_and_edges
from tutormax_assets.storage.partition import (
    Division,
    Partition,
    Rows,
    StoredParts,
    division,
    partition_of,
    store_parts,
)
from tutormax_assets.storage.shards import shard_name

WINDOW_EDGES = "window_edges"

EDGE_DAYS = (1, 7)
"""Lengths of the edges of windows: those of the dates that a reference date is compared with."""

# A date with few tutors does not keep all cores busy; one with many takes the memory of many.
_TUTORS_AT_ONCE = 40_000


@dataclass(frozen=True)
class WindowsOfShard:
    """A shard of a reference date.

    Attributes:
        reference_date: The day after the last one of each window.
        roster: ``TutorRoster``.
        sessions: ``SessionsSnapshot``.
        events: ``TutorEventsSnapshot``.
        shard: Its number.
        paths: The partitions to store, by asset.
    """

    reference_date: date
    roster: Rows
    sessions: Rows
    events: Rows
    shard: int
    paths: Mapping[str, UPath]


@dataclass(frozen=True)
class WindowsTask:
    """Shards to compute at once.

    Attributes:
        shards: The shards.
        windows: Lengths in days of the windows to store, the shortest first.
        with_edges: Whether what the edges of all windows add up to is stored, too.
        policy: Thresholds and weights.
    """

    shards: Sequence[WindowsOfShard]
    windows: Sequence[int]
    with_edges: bool
    policy: Policy


@dataclass(frozen=True)
class WindowsPlan:
    """What is to be done for the reference dates of a run.

    Attributes:
        paths: The partitions to store, by asset and date.
        divisions: The shards of each date that can be computed, and those that cannot.
        tasks: By the names of their shards.
        dates: Of each task, the dates that its shards are of.
    """

    paths: Mapping[str, Mapping[str, UPath]]
    divisions: Mapping[str, Division]
    tasks: Mapping[str, WindowsTask]
    dates: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class WindowsReport:
    """What was stored.

    Attributes:
        stored: Of each shard, by asset.
        compute_seconds: How long the computing of a shard took on average.
    """

    stored: list[dict[str, StoredParts]]
    compute_seconds: float


@dataclass(frozen=True)
class WindowsOfDates:
    """What was computed.

    Attributes:
        partitions: By asset and date.
        compute_seconds: How long the computing of all windows of a date took.
    """

    partitions: Mapping[str, Mapping[str, Partition]]
    compute_seconds: Mapping[str, float]


def plan_windows(
    rosters: Mapping[str, Partition],
    sessions: Mapping[str, Partition],
    events: Mapping[str, Partition],
    *,
    paths: Mapping[str, Mapping[str, UPath]],
    policy: Policy,
) -> WindowsPlan:
    """Divide reference dates into tasks: a shard each, or whole dates of few tutors.

    Args:
        rosters: ``TutorRoster`` by reference date in ISO form.
        sessions: ``SessionsSnapshot`` of the same dates.
        events: ``TutorEventsSnapshot`` of the same dates.
        paths: The partitions to store, by asset and date: windows of the policy and their edges.
        policy: Thresholds and weights.
    """
    divisions = {
        key: division([roster, sessions[key], events[key]]) for key, roster in rosters.items()
    }
    shards = {
        shard_name(key, number): (
            key,
            WindowsOfShard(
                date.fromisoformat(key),
                rosters[key].rows(number),
                sessions[key].rows(number),
                events[key].rows(number),
                number or 0,
                {asset: of_asset[key] for asset, of_asset in paths.items()},
            ),
        )
        for key, divided in divisions.items()
        for number in divided.numbers
    }
    groups = {_group_name(names): [shards[name] for name in names] for names in _groups(shards)}
    windows = [days for days in policy.windows if metrics_asset_name(days) in paths]
    return WindowsPlan(
        paths,
        divisions,
        {
            name: WindowsTask([one for _, one in group], windows, WINDOW_EDGES in paths, policy)
            for name, group in groups.items()
        },
        {name: [key for key, _ in group] for name, group in groups.items()},
    )


def collect_windows(
    plan: WindowsPlan, reports: Mapping[str, WindowsReport], errors: Mapping[str, BaseException]
) -> WindowsOfDates:
    """The partitions of the reference dates, with the shards that failed named in them.

    Args:
        plan: What was to be done.
        reports: Of the tasks that were computed, by name.
        errors: Why others were not, by name.

    Raises:
        ShardsError: No shard of a date was computed.
    """
    stored: dict[tuple[str, str], list[StoredParts]] = {}
    seconds = dict.fromkeys(plan.divisions, 0.0)
    failed = {key: dict(divided.failed) for key, divided in plan.divisions.items()}
    for name, report in reports.items():
        for key, of_shard in zip(plan.dates[name], report.stored, strict=True):
            seconds[key] += report.compute_seconds
            for asset, parts in of_shard.items():
                stored.setdefault((asset, key), []).append(parts)
    for name, error in errors.items():
        for key, shard in zip(plan.dates[name], plan.tasks[name].shards, strict=True):
            failed[key][shard.shard] = reason(error)
    if errors and any(len(failed[key]) == len(of.shards) for key, of in plan.divisions.items()):
        raise ShardsError(errors, of=len(plan.tasks)) from next(iter(errors.values()))
    partitions = {
        asset: {
            key: partition_of(
                path,
                plan.divisions[key].shards,
                stored.get((asset, key), []),
                failed=failed[key],
                no_rows=(EdgeSums if asset == WINDOW_EDGES else WindowSums).create_empty(),
            )
            for key, path in of_asset.items()
        }
        for asset, of_asset in plan.paths.items()
    }
    return WindowsOfDates(partitions, seconds)


def compute_windows(task: WindowsTask, context: TaskContext) -> WindowsReport:
    """Go through the snapshots of each shard once for all windows.

    Raises:
        StorageError: The storage cannot be written.
    """
    started = perf_counter()
    lazy = [frame for shard in task.shards for frame in _frames(shard, task)]
    frames = pl.collect_all(lazy, engine="streaming")
    seconds = (perf_counter() - started) / len(task.shards)
    each = len(lazy) // len(task.shards)
    stored = [
        dict(_store(shard, task, frames[each * place : each * (place + 1)]))
        for place, shard in enumerate(task.shards)
    ]
    return WindowsReport(stored, seconds)


def _frames(shard: WindowsOfShard, task: WindowsTask) -> Iterator[pl.LazyFrame]:
    """The windows of a shard, and what their edges add up to if that is wanted."""
    windows, edges = windows_and_edges(
        shard.roster.scan(),
        shard.sessions.scan(),
        shard.events.scan(),
        reference_date=shard.reference_date,
        windows=task.policy.windows if task.with_edges else task.windows,
        policy=task.policy,
        edges=EDGE_DAYS if task.with_edges else (),
    )
    yield windows.pipe(WindowSums.validate, eager=False)
    if task.with_edges:
        yield edges.pipe(EdgeSums.validate, eager=False)


def _store(
    shard: WindowsOfShard, task: WindowsTask, frames: Sequence[pl.DataFrame]
) -> Iterator[tuple[str, StoredParts]]:
    windows, *edges = (frame.lazy() for frame in frames)
    rows = {
        metrics_asset_name(days): windows.filter(window=window_name(days)) for days in task.windows
    }
    for of_edges in edges:
        rows[WINDOW_EDGES] = of_edges
    for asset, of_asset in rows.items():
        yield asset, store_parts(shard.paths[asset], of_asset, first=shard.shard)


def metrics_asset_name(days: int) -> str:
    """The name of the asset that holds the metrics of a window of so many days."""
    return f"metrics_{days}day"


def _group_name(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _groups(shards: Mapping[str, tuple[str, WindowsOfShard]]) -> Iterator[list[str]]:
    """The names of shards that are computed at once: one, or whole dates of few tutors."""
    group: list[str] = []
    tutors = 0
    for name, (key, shard) in shards.items():
        if name != key:
            yield [name]
            continue
        if group and tutors + shard.roster.count > _TUTORS_AT_ONCE:
            yield group
            group, tutors = [], 0
        group.append(name)
        tutors += shard.roster.count
    if group:
        yield group
