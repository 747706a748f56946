"""The metrics of all windows of a shard, in one pass over the snapshots of several dates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from time import perf_counter
from typing import Any

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
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.schemas import EdgeSums, EdgeSumsOfDates, WindowSums, WindowSumsOfDates
from tutormax_assets.metrics.window import borders, segment_sums, windows_and_edges
from tutormax_assets.storage.partition import Division, Partition, division
from tutormax_assets.storage.rows import Rows, rows_of_all

WINDOW_EDGES = "window_edges"

EDGE_DAYS = (1, 7)
"""Lengths of the edges of windows: those of the dates that a reference date is compared with."""


@dataclass(frozen=True)
class WindowsTask:
    """A shard of one or several reference dates, whose rows are in the same files.

    Attributes:
        reference_dates: The days after the last one of each window.
        roster: ``TutorRoster`` of each date.
        sessions: ``SessionsSnapshot`` of all of the dates.
        events: ``TutorEventsSnapshot``, likewise.
        shard: Its number.
        paths: The partitions to store, by asset, of each date.
        windows: Lengths in days of the windows to store, the shortest first.
        with_edges: Whether what the edges of all windows add up to is stored, too.
        policy: Thresholds and weights.
    """

    reference_dates: Sequence[date]
    roster: Rows
    sessions: Rows
    events: Rows
    shard: int
    paths: Mapping[str, Sequence[UPath]]
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
    """

    paths: Mapping[str, Mapping[str, UPath]]
    divisions: Mapping[str, Division]
    tasks: Mapping[str, WindowsTask]


@dataclass(frozen=True)
class WindowsReport:
    """What was stored.

    Attributes:
        stored: By asset and reference date.
        compute_seconds: How long the computing of a date took on average.
    """

    stored: OfDates
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
    """Divide reference dates into tasks: a shard each, of dates that were read together.

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
    windows = [days for days in policy.windows if metrics_asset_name(days) in paths]
    tasks: dict[str, WindowsTask] = {}
    for number, keys in _groups(divisions, rosters, sessions, events):
        roster, of_sessions, of_events = (
            rows_of_all([partitions[key].rows(number) for key in keys])
            for partitions in (rosters, sessions, events)
        )
        tasks[task_name(keys, number)] = WindowsTask(
            [date.fromisoformat(key) for key in keys],
            roster,
            of_sessions,
            of_events,
            number or 0,
            {asset: [of_asset[key] for key in keys] for asset, of_asset in paths.items()},
            windows,
            WINDOW_EDGES in paths,
            policy,
        )
    return WindowsPlan(paths, divisions, tasks)


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
    seconds = dict.fromkeys(plan.divisions, 0.0)
    for name, report in reports.items():
        for one in plan.tasks[name].reference_dates:
            seconds[str(one)] += report.compute_seconds
    schemas = {asset: EdgeSums if asset == WINDOW_EDGES else WindowSums for asset in plan.paths}
    stored = [report.stored for report in reports.values()]
    partitions = collect_partitions(
        plan.paths, plan.divisions, plan.tasks, stored, errors, schemas=schemas
    )
    return WindowsOfDates(partitions, seconds)


def compute_windows(task: WindowsTask, context: TaskContext) -> WindowsReport:
    """Go through the snapshots of a shard once for all windows of all dates.

    Raises:
        StorageError: The storage cannot be written.
    """
    started = perf_counter()
    windows, edges = compute_windows_and_edges(
        task.roster.scan(),
        task.sessions.scan(),
        task.events.scan(),
        reference_dates=task.reference_dates,
        windows=task.policy.windows if task.with_edges else task.windows,
        policy=task.policy,
        edges=EDGE_DAYS if task.with_edges else (),
    )
    rows = dict(_by_asset(WindowSumsOfDates.validate(windows), task.windows))
    if task.with_edges:
        rows[WINDOW_EDGES] = EdgeSumsOfDates.validate(edges)
    seconds = (perf_counter() - started) / len(task.reference_dates)
    stored = {
        asset: store_dates(of_asset, task.reference_dates, task.paths[asset], shard=task.shard)
        for asset, of_asset in rows.items()
    }
    return WindowsReport(stored, seconds)


def compute_windows_and_edges(
    roster: pl.LazyFrame,
    sessions: pl.LazyFrame,
    events: pl.LazyFrame,
    /,
    *,
    reference_dates: Sequence[date],
    windows: Sequence[int],
    policy: Policy,
    edges: Sequence[int] = (),
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The metrics of windows, and what the rows at the edges of the windows add up to.

    However many dates and windows there are, sessions and events are gone through once.

    Args:
        roster: ``TutorRoster`` of each date.
        sessions: ``SessionsSnapshot``; rows outside the windows and of other tutors do not count.
        events: ``TutorEventsSnapshot``, likewise.
        reference_dates: The days after the last one of each window.
        windows: Lengths of the windows in days, the shortest first.
        policy: Weights, limits and scale.
        edges: Lengths of the edges in days.

    Returns:
        ``WindowSumsOfDates`` and ``EdgeSumsOfDates``, as ``windows_and_edges`` returns them.
    """
    days = borders(reference_dates, windows, edges)
    sums = segment_sums(sessions, events, borders=days, policy=policy)
    tutors, *of_segments = pl.collect_all([roster.select("tutor_id"), *sums], engine="streaming")
    return windows_and_edges(
        tutors["tutor_id"],
        *of_segments,
        reference_dates=reference_dates,
        windows=windows,
        policy=policy,
        edges=edges,
    )


def window_metrics(
    roster: pl.LazyFrame,
    sessions: pl.LazyFrame,
    events: pl.LazyFrame,
    /,
    *,
    reference_date: date,
    windows: Sequence[int],
    policy: Policy,
) -> pl.DataFrame:
    """``WindowSums`` of a reference date, as ``compute_windows_and_edges`` computes them."""
    found, _ = compute_windows_and_edges(
        roster, sessions, events, reference_dates=[reference_date], windows=windows, policy=policy
    )
    return found.drop("reference_date")


def _by_asset(windows: pl.DataFrame, lengths: Sequence[int]) -> Iterator[tuple[str, pl.DataFrame]]:
    for days in lengths:
        yield metrics_asset_name(days), windows.filter(window=window_name(days))


def metrics_asset_name(days: int) -> str:
    """The name of the asset that holds the metrics of a window of so many days."""
    return f"metrics_{days}day"


def _groups(
    divisions: Mapping[str, Division], *partitions: Mapping[str, Partition]
) -> Iterator[tuple[int | None, list[str]]]:
    """Shards, and the dates for which each can be computed at once."""
    by_files: dict[tuple[Any, ...], list[str]] = {}
    rosters, *_ = partitions
    for key, divided in divisions.items():
        for number in divided.numbers:
            of_date = [by_date[key].rows(number) for by_date in partitions]
            names = tuple(rows.file_names for rows in of_date)
            by_files.setdefault((number, *names), []).append(key)
    for (number, *_), keys in by_files.items():
        tutors = {key: rosters[key].rows(number).count for key in keys}
        for batch in batches_of_dates(tutors):
            yield number, batch
