"""The asset checks, one file for each asset that they check.

What a check finds is a pure function of frames and limits. The Dagster shell around it reads the
frames, and records what was found for each reference date by itself, in a range as in a single run.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import NamedTuple

import dagster as dg
import polars as pl

from tutormax_assets.compute.tasks.dates import batches_of_dates
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.defs.resources import newest_dates
from tutormax_assets.runs.private_dagster import TargetMaterialization
from tutormax_assets.runs.tags import partition_keys
from tutormax_assets.storage.files import StorageError
from tutormax_assets.storage.partition import Partition
from tutormax_assets.storage.rows import read_dates
from tutormax_assets.storage.store import PartitionStore

# A longer outage changes so much that a comparison says little.
_LOOK_BACK_DAYS = 7

ADVICE_METADATA = "advice"
"""Name of the metadata that holds what to do about what a check found."""

FIRST_KEYS = 10
"""How many of the offending keys the metadata of a failed check names."""

# A status for each date rests on it, and the version that it may change in is pinned.
warnings.filterwarnings(
    "ignore", message="Specifying a partitions_def on an AssetCheckSpec", category=dg.PreviewWarning
)

Metadata = dict[str, int | float | str | pl.DataFrame]
"""Counts, shares, queries, and frames of keys; never the values of a person's row."""

ERROR = dg.AssetCheckSeverity.ERROR
WARN = dg.AssetCheckSeverity.WARN


@dataclass(frozen=True)
class Finding:
    """What a check found for one reference date.

    Attributes:
        passed: Whether the data is as expected.
        problem: What is wrong; of a check that passed because there is nothing to compare, why.
        metadata: What shows with it in the UI.
        severity: Of a check that did not pass.
        advice: What to do about the problem.
    """

    passed: bool
    problem: str | None = None
    metadata: Metadata = field(default_factory=dict)
    severity: dg.AssetCheckSeverity = ERROR
    advice: str = ""

    @property
    def description(self) -> str | None:
        """The problem and the advice, as the UI shows them."""
        return f"{self.problem} {self.advice}" if self.advice else self.problem


NOT_OF_ALL = Finding(
    passed=True, problem="Not compared: only runs of some tutors have read this date so far."
)
"""Of a check about the platform as a whole, on a date of which it is not known."""


def check_spec(
    name: str,
    description: str,
    *,
    asset: str,
    daily: dg.DailyPartitionsDefinition,
    blocking: bool = False,
) -> dg.AssetCheckSpec:
    """A check with a status of its own for each reference date.

    Args:
        name: What holds when the check passes.
        description: What the check looks at.
        asset: The asset that is checked.
        daily: The partitions of the asset.
        blocking: Whether nothing downstream is computed when it fails with an error.
    """
    return dg.AssetCheckSpec(
        name,
        asset=asset,
        description=description,
        blocking=blocking,
        partitions_def=daily,
    )


def dates_to_check(context: dg.AssetCheckExecutionContext, asset: str) -> list[str]:
    """The reference dates that a run checks: its own, else the newest one of the asset.

    The UI executes the checks of an asset by themselves without naming a date.

    Raises:
        dagster.Failure: The asset has never been materialized.
    """
    keys = partition_keys(context.run) or newest_dates(context.instance, [dg.AssetKey(asset)])
    if not keys:
        raise dg.Failure(
            f"{asset} has no date to check. Materialize a date, then execute its checks again.",
            allow_retries=False,
        )
    return keys


def report(
    context: dg.AssetCheckExecutionContext,
    specs: Iterable[dg.AssetCheckSpec],
    found: Mapping[str, Mapping[str, Finding]],
) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
    """Record what was found, by partition key and check name.

    Yields:
        One evaluation for each of them, then the outputs that what is downstream waits for. Once
        all are recorded Dagster fails the step if a blocking check failed with an error.
    """
    selected = [spec for spec in specs if spec.key in context.selected_asset_check_keys]
    for asset_key in {spec.asset_key: None for spec in selected}:
        newest = _newest_materializations(context.instance, asset_key, list(found))
        of_asset = [spec for spec in selected if spec.asset_key == asset_key]
        for key, findings in found.items():
            for spec in of_asset:
                finding = findings[spec.name]
                evaluation = dg.AssetCheckEvaluation(
                    asset_key=asset_key,
                    check_name=spec.name,
                    passed=finding.passed,
                    severity=finding.severity,
                    description=finding.description,
                    metadata=shown_metadata(finding),
                    blocking=spec.blocking,
                    partition=key,
                    target_materialization_data=newest.get(key),
                )
                if not finding.passed:
                    log = context.log.warning if finding.severity is WARN else context.log.error
                    log(sentence(evaluation))
                yield evaluation
    for spec in selected:
        yield dg.Output(None, spec.get_python_identifier())


def sentence(evaluation: dg.AssetCheckEvaluation) -> str:
    """What a check that did not pass says, and of what."""
    asset = evaluation.asset_key.to_user_string()
    of = f"{asset} of {evaluation.partition}" if evaluation.partition else asset
    return f"{of}, check {evaluation.check_name}: {evaluation.description}"


def is_blocked_by(evaluation: dg.AssetCheckEvaluation) -> bool:
    """Whether what is downstream was not computed because of it."""
    return bool(not evaluation.passed and evaluation.blocking and evaluation.severity is ERROR)


def partition(store: PartitionStore, asset: str, partition_key: str) -> pl.LazyFrame:
    """A partition of an asset with all of its tutors, whichever the run is filtered to.

    The status of a check is the date's. It is read here and not as an input of the check, of which
    Dagster records two events.
    """
    return store.whole_partition(asset, partition_key).rows().scan()


class RowsAndRoster(NamedTuple):
    """A partition with a row for each tutor, and the tutors who should have one.

    Attributes:
        rows: The rows.
        roster: ``TutorRoster`` without the shards that failed.
        of_failed_shards: What is to be said of those if there are any. That is a warning: the other
            tutors are computed and saved all the same, and the step that saves them fails.
    """

    rows: pl.DataFrame
    roster: pl.DataFrame
    of_failed_shards: Finding | None


def rows_and_rosters(
    store: PartitionStore, asset: str, partition_keys: Sequence[str]
) -> Iterator[tuple[str, RowsAndRoster]]:
    """The rows and rosters of some dates by partition key; those of several dates read at once."""
    stored = {key: store.whole_partition(asset, key) for key in partition_keys}
    counts = {key: of_date.rows().count for key, of_date in stored.items()}
    for keys in batches_of_dates(counts):
        rows = read_dates({key: stored[key].rows() for key in keys})
        rosters = read_dates(
            {key: store.whole_partition("tutor_roster", key).rows() for key in keys}
        )
        for key in keys:
            yield key, _rows_and_roster(stored[key], rows[key], rosters[key])


def _rows_and_roster(stored: Partition, rows: pl.DataFrame, tutors: pl.DataFrame) -> RowsAndRoster:
    if not stored.failed:
        return RowsAndRoster(rows, tutors, None)
    # A run of some tutors may have computed tutors of a shard that failed.
    is_left_out = stored.shards.number().is_in(list(stored.failed)) & ~pl.col("tutor_id").is_in(
        rows["tutor_id"].implode()
    )
    left_out = tutors.filter(is_left_out)
    number, why = min(stored.failed.items())
    finding = Finding(
        False,
        f"{len(stored.failed)} of {len(stored.shards)} shards could not be computed, so"
        f" {len(left_out)} tutors have no rows; shard {number}: {why.rstrip('.')}.",
        {
            "failed_shards": ", ".join(map(str, sorted(stored.failed))),
            "tutors": len(left_out),
            "first_tutors": first_keys(left_out, "tutor_id"),
        },
        WARN,
        "Fix the cause and run the date again.",
    )
    return RowsAndRoster(rows, tutors.filter(~is_left_out), finding)


def of_the_date(
    check: Callable[..., Finding], *frames: pl.DataFrame, tutor_ids: Sequence[str] | None
) -> Finding:
    """What a check finds in the rows of a whole date, after a run of these tutors or of all.

    Rows of other tutors that are wrong are known from the run that stored them: they show, but
    do not fail a run that left them as they are.

    Args:
        check: Takes the frames.
        frames: Each with ``tutor_id``.
        tutor_ids: The tutors of the run; all when empty.
    """
    found = check(*frames)
    if found.passed or not tutor_ids:
        return found
    own = check(*(frame.filter(pl.col("tutor_id").is_in(tutor_ids)) for frame in frames))
    return replace(found, severity=WARN) if own.passed else found


def unless_failed(found: Finding, of_failed_shards: Finding | None) -> Finding:
    """What was found, or what is to be said of shards that failed where all others are right."""
    return of_failed_shards if found.passed and of_failed_shards else found


class Earlier(NamedTuple):
    """What a date is compared with.

    Attributes:
        rows: The partition of an earlier date; null where there is none to compare with.
        since: How a sentence calls that date.
    """

    rows: pl.DataFrame | None
    since: str


def last_saved(
    context: dg.AssetCheckExecutionContext,
    store: PartitionStore,
    asset: str,
    partition_key: str,
    *,
    known: Mapping[str, pl.DataFrame],
) -> Earlier:
    """The partition of the day before, or of the last date that was saved where that was not.

    A date that was blocked or broken off is no measure for the next one, whatever its partitions
    hold.

    Args:
        context: Of the run.
        store: Where the partitions are.
        asset: The asset.
        partition_key: The date that is compared.
        known: Partitions that have been read.
    """
    reference_date = date.fromisoformat(partition_key)
    for days in range(1, _LOOK_BACK_DAYS + 1):
        before = (reference_date - timedelta(days=days)).isoformat()
        if before not in partition_keys(context.run) and _is_unsaved(context.instance, before):
            continue
        since = (
            "the day before" if days == 1 else f"{before}, the last date before it that is saved"
        )
        if before in known:
            return Earlier(known[before], since)
        with suppress(OSError, StorageError, pl.exceptions.PolarsError):
            return Earlier(partition(store, asset, before).collect(), since)
        break
    return Earlier(None, "the day before")


def _is_unsaved(instance: dg.DagsterInstance, partition_key: str) -> bool:
    """Whether the platform was read for a date, and the metrics were not saved since."""
    read, saved = (
        _newest_materializations(instance, dg.AssetKey(asset), [partition_key]).get(partition_key)
        for asset in ("sessions_snapshot", METRICS_TABLE)
    )
    return read is not None and (saved is None or saved.storage_id < read.storage_id)


def first_keys(rows: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """The first of the offending keys, for the metadata of a check."""
    return rows.select(columns).unique().sort(columns).head(FIRST_KEYS)


def _newest_materializations(
    instance: dg.DagsterInstance, asset_key: dg.AssetKey, partition_keys: list[str]
) -> dict[str, TargetMaterialization]:
    newest: dict[str, TargetMaterialization] = {}
    # One query is enough where the run has just materialized each of them once.
    for wanted in (partition_keys, *([key] for key in partition_keys)):
        if set(wanted) <= newest.keys():
            continue
        records = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=asset_key, asset_partitions=wanted), limit=len(wanted)
        ).records
        for record in reversed(records):
            if record.partition_key is not None:
                newest[record.partition_key] = TargetMaterialization(
                    storage_id=record.storage_id,
                    run_id=record.run_id,
                    timestamp=record.timestamp,
                )
    return newest


def shown_metadata(finding: Finding) -> dict[str, int | float | str | dg.TableMetadataValue]:
    """The metadata of a finding and its advice, as Dagster's UI shows them."""
    advice = {ADVICE_METADATA: finding.advice} if finding.advice else {}
    return {**{name: _shown(value) for name, value in finding.metadata.items()}, **advice}


def _shown(value: int | float | str | pl.DataFrame) -> int | float | str | dg.TableMetadataValue:
    if not isinstance(value, pl.DataFrame):
        return value
    columns = [dg.TableColumn(name, type=str(dtype)) for name, dtype in value.schema.items()]
    # A table of the UI holds numbers and text.
    rows = value.with_columns(pl.col(pl.Date, pl.Enum).cast(pl.String))
    return dg.MetadataValue.table(
        [dg.TableRecord(row) for row in rows.to_dicts()], dg.TableSchema(columns)
    )
