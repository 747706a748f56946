"""What tasks of several reference dates have in common: their names, and what is collected."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from typing import Protocol

import dataframely as dy
import polars as pl
from upath import UPath

from tutormax_assets.compute import ShardsError
from tutormax_assets.database.faults import reason
from tutormax_assets.storage.partition import (
    Division,
    Partition,
    StoredParts,
    partition_of,
    slices_of,
    store_slices,
)
from tutormax_assets.storage.shards import shard_name

# Tutors of all dates of a task; bounds the memory.
_TUTORS_AT_ONCE = 80_000

OfDates = Mapping[str, Mapping[date, StoredParts]]
"""What a task has stored, by asset and reference date."""


class TaskOfDates(Protocol):
    """A shard of one or several reference dates."""

    @property
    def reference_dates(self) -> Sequence[date]:
        """The dates."""
        ...

    @property
    def shard(self) -> int:
        """Its number."""
        ...


def task_name(keys: Sequence[str], number: int | None) -> str:
    """How a shard of several dates is called; all of it where it has no number."""
    return shard_name(keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]}", number)


def batches_of_dates(tutors: Mapping[str, int]) -> Iterator[list[str]]:
    """Neighbouring dates that are computed at once: of few tutors several, of many one.

    Args:
        tutors: Number of tutors of each date.
    """
    batch: list[str] = []
    total = 0
    for key, count in tutors.items():
        if batch and total + count > _TUTORS_AT_ONCE:
            yield batch
            batch, total = [], 0
        batch.append(key)
        total += count
    if batch:
        yield batch


def store_dates(
    rows: pl.DataFrame, reference_dates: Sequence[date], paths: Sequence[UPath], *, shard: int
) -> dict[date, StoredParts]:
    """Store rows with a ``reference_date``, sorted by it, as those of several dates.

    Args:
        rows: The rows.
        reference_dates: The dates, of which some may have no row.
        paths: The partition of each date.
        shard: The number of the shard.

    Raises:
        StorageError: The storage cannot be written.
    """
    spans = {one: (one, one + timedelta(days=1)) for one in reference_dates}
    return store_slices(
        dict(zip(reference_dates, paths, strict=True)),
        rows.drop("reference_date"),
        slices_of(rows["reference_date"], spans),
        shard=shard,
    )


def collect_partitions(
    paths: Mapping[str, Mapping[str, UPath]],
    divisions: Mapping[str, Division],
    tasks: Mapping[str, TaskOfDates],
    stored: Iterable[OfDates],
    errors: Mapping[str, BaseException],
    *,
    schemas: Mapping[str, type[dy.Schema]],
) -> dict[str, dict[str, Partition]]:
    """The partitions by asset and date, with the shards that failed named in them.

    Args:
        paths: Where they are, by asset and date in ISO form.
        divisions: The shards of each date, and those that an earlier step could not compute.
        tasks: All tasks by name.
        stored: What those that were computed have stored.
        errors: Why others were not, by name.
        schemas: What an asset's rows are; a shard that failed has none.

    Raises:
        ShardsError: No shard of a date was computed.
    """
    failed = {key: dict(divided.failed) for key, divided in divisions.items()}
    for name, error in errors.items():
        for one in tasks[name].reference_dates:
            failed[str(one)][tasks[name].shard] = reason(error)
    if errors and any(len(failed[key]) == len(of.shards) for key, of in divisions.items()):
        raise ShardsError(errors, of=len(tasks)) from next(iter(errors.values()))
    parts: dict[tuple[str, str], list[StoredParts]] = {}
    for report in stored:
        for asset, of_dates in report.items():
            for one, of_date in of_dates.items():
                parts.setdefault((asset, str(one)), []).append(of_date)
    return {
        asset: {
            key: partition_of(
                path,
                divisions[key].shards,
                parts.get((asset, key), []),
                failed=failed[key],
                schema=pl.Schema(schemas[asset]),
            )
            for key, path in of_asset.items()
        }
        for asset, of_asset in paths.items()
    }
