"""The metrics of a reference date as they could be known at an instant."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
from upath import UPath

from tutormax_assets.compute.tasks.reading import read_good_rows, tiers_of
from tutormax_assets.compute.tasks.roster import choose_roster
from tutormax_assets.dates import midnight
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.schemas import TutorMetricsAsOf
from tutormax_assets.source.view import View
from tutormax_assets.storage.partition import Partition, partition_of, store_parts
from tutormax_assets.storage.shards import ALL_IN_ONE, Shards


@dataclass(frozen=True, kw_only=True)
class AsOfRequest:
    """What is to be computed and stored for a reference date.

    Attributes:
        reference_date: The date.
        as_of: The instant at which rows had to be known, no earlier than the date begins.
        path: The partition to store.
        tutor_ids: Only these tutors; all when None.
        policy: Windows, thresholds and weights.
        timezone: In which a date begins.
        number_of_shards: Shards that tutors are divided into; as many as they ask for when 0.
    """

    reference_date: date
    as_of: datetime
    path: UPath
    tutor_ids: Collection[str] | None
    policy: Policy
    timezone: str
    number_of_shards: int


def store_metrics_as_of(view: View, request: AsOfRequest, folder: Path) -> Partition:
    """Compute the metrics of a reference date as of an instant, and store them shard by shard.

    Tutors of any status are computed: who has left since was there then.

    Args:
        view: The platform, opened with the columns that say when a row was known.
        request: What is to be computed.
        folder: Where the source may keep rows while they are read.

    Returns:
        The partition of ``TutorMetricsAsOf``, which is read once it is kept.

    Raises:
        SourceError: The platform cannot be read.
        StorageError: The storage cannot be written.
    """
    then = view.known_at(request.as_of)
    chosen = choose_roster(then.tutors(), tutor_ids=request.tutor_ids, include_inactive=True)
    roster = chosen.tutors
    days = timedelta(days=request.policy.horizon_days)
    shards = (
        ALL_IN_ONE
        if request.tutor_ids
        else Shards.of(roster["tutor_id"], count=request.number_of_shards)
    )
    stored = []
    for number in range(len(shards)):
        rows = read_good_rows(
            then,
            folder,
            start=midnight(request.reference_date - days, timezone=request.timezone),
            end=midnight(request.reference_date, timezone=request.timezone),
            policy=request.policy,
            timezone=request.timezone,
            tutor_range=shards.range_of([number]),
        )
        of_shard = roster.filter(shards.number() == number) if shards.bounds else roster
        tiers = tiers_of(
            of_shard, rows, reference_date=request.reference_date, policy=request.policy
        )
        found = TutorMetricsAsOf.validate(
            tiers.with_columns(pl.lit(request.as_of.astimezone(UTC)).alias("as_of")), cast=True
        )
        stored.append(store_parts(request.path, found.lazy(), first=number))
    return partition_of(request.path, shards, stored)
