"""Checks of ``tutor_tier_changes``: what is said of a difference is all of it."""

from collections.abc import Iterator, Sequence
from functools import partial

import dagster as dg
import polars as pl

from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.windows import metrics_asset_name
from tutormax_assets.defs.checks import (
    Finding,
    Metadata,
    check_spec,
    dates_to_check,
    first_keys,
    of_the_date,
    partition,
    report,
)
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.metrics.schemas import SUMS
from tutormax_assets.storage.store import PartitionStore

_KEY = ["tutor_id", "window"]


def tutor_tier_changes_checks(
    daily: dg.DailyPartitionsDefinition, *, windows: Sequence[int]
) -> dg.AssetChecksDefinition:
    """Build the checks of ``tutor_tier_changes``."""
    spec = partial(check_spec, asset=TUTOR_TIER_CHANGES, daily=daily)
    specs = [
        spec(
            "splits_add_up",
            "What came in, aged out and was corrected is the difference of the windows' sums.",
            blocking=True,
        )
    ]

    @dg.multi_asset_check(name=f"{TUTOR_TIER_CHANGES}_checks", specs=specs, can_subset=True)
    def checks(
        context: dg.AssetCheckExecutionContext,
        run_options: RunOptions,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
        found = {}
        for key in dates_to_check(context, TUTOR_TIER_CHANGES):
            changes = partition(partition_store, TUTOR_TIER_CHANGES, key).collect()
            sums = _sums(partition_store, key, windows, changes)
            found[key] = {
                "splits_add_up": of_the_date(
                    splits_add_up, changes, sums, tutor_ids=run_options.tutor_ids
                )
            }
        yield from report(context, specs, found)

    return checks


def _sums(
    store: PartitionStore, key: str, windows: Sequence[int], changes: pl.DataFrame
) -> pl.DataFrame:
    """The sums of the windows of the tutors that moved, as ``splits_add_up`` takes them."""
    moved = changes["tutor_id"].unique().implode()
    return pl.concat(
        partition(store, metrics_asset_name(days), key)
        .filter(pl.col("tutor_id").is_in(moved))
        .with_columns(no_shows="no_show_count")
        .select(*_KEY, pl.col(SUMS).cast(pl.Int64))
        for days in windows
    ).collect()


def splits_add_up(changes: pl.DataFrame, sums: pl.DataFrame, /) -> Finding:
    """Whether the parts of each difference add up to what the windows hold.

    The earlier date may have been computed anew since, so that its windows are no measure.

    Args:
        changes: ``TierChanges``.
        sums: The sums of the windows: ``tutor_id``, ``window`` and each of ``SUMS``.
    """
    rows = changes.filter(pl.col("metric").is_not_null())
    of_windows = rows.join(sums, on=_KEY, how="left")
    wrong = []
    for role in ("numerator", "denominator"):
        before, came_in, aged_out, corrected, after = (
            pl.col(f"{role}_{part}")
            for part in ("before", "came_in", "aged_out", "corrected", "after")
        )
        total = before + came_in - aged_out + corrected
        held = pl.coalesce(pl.when(pl.col(role) == name).then(pl.col(name)) for name in SUMS)
        # All are counts, or sums of what is never negative.
        is_possible = came_in.is_between(0, after) & aged_out.is_between(0, before)
        is_right = (total == after) & (after == held) & is_possible
        wrong.append(of_windows.filter(~is_right.fill_null(False)))
    found = pl.concat(frame.select(*_KEY, "days", "metric") for frame in wrong).unique()
    metadata: Metadata = {"splits": len(rows), "wrong_splits": len(found)}
    if found.is_empty():
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"{len(found)} of {len(rows)} splits are not what the windows differ by.",
        {**metadata, "first_splits": first_keys(found, *_KEY, "metric")},
        advice="The metrics are of another run than the snapshots: run the date again.",
    )
