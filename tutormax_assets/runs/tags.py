"""The tags of runs: what they compute, what started them, and who deals with their failure."""

from datetime import date, timedelta

import dagster as dg

RANGE_START_TAG = "dagster/asset_partition_range_start"

RANGE_END_TAG = "dagster/asset_partition_range_end"

PARTITION_TAG = "dagster/partition"

WILL_RETRY_TAG = "dagster/will_retry"

ATTENDED_TAG = "tutormax/attended"
"""On a run whose own process deals with its failure, as ``tutormax run`` and ``backfill`` do."""

SOURCE_TAG = "tutormax/source"
"""On such a run: what started it, such as ``tutormax run``."""

RANGE_RUN_TAG = "tutormax/range_run"
"""On the run of a single date: id of the failed range run that it stems from."""

RANGE_DATES_TAG = "tutormax/range_dates"
"""On the run of a single date: number of dates in that range."""


def partition_keys(run: dg.DagsterRun) -> list[str]:
    """The reference dates of a run, none if it has no partitions."""
    if PARTITION_TAG in run.tags:
        return [run.tags[PARTITION_TAG]]
    if RANGE_START_TAG not in run.tags:
        return []
    first, last = (date.fromisoformat(run.tags[tag]) for tag in (RANGE_START_TAG, RANGE_END_TAG))
    return [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]


def is_attended(run: dg.DagsterRun) -> bool:
    """Whether the run's own process deals with its failure.

    A re-execution has the tags of the run that it repeats, but is a run of Dagster's.
    """
    return ATTENDED_TAG in run.tags and run.parent_run_id is None


def will_be_retried(run: dg.DagsterRun) -> bool:
    """Whether Dagster runs a failed run again by itself, as it does when the worker crashed."""
    return run.tags.get(WILL_RETRY_TAG) == "true"
