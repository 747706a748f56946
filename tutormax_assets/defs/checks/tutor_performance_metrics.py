"""Checks of ``tutor_performance_metrics``: what PostgreSQL holds, read back."""

from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta
from functools import partial
from typing import NamedTuple

import dagster as dg
import polars as pl

from tutormax_assets.database.metrics_reading import count_rows_at_other_times, read_metrics
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.dates import midnight
from tutormax_assets.defs.assets import PLATFORM_POOL
from tutormax_assets.defs.checks import (
    ERROR,
    WARN,
    Finding,
    Metadata,
    check_spec,
    dates_to_check,
    first_keys,
    of_the_date,
    partition,
    report,
)
from tutormax_assets.defs.checks.tutor_tiers import every_tutor_has_all_windows
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.schema.old_rows import WINDOW_OF_A_POLICY
from tutormax_assets.source import view
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.store import PartitionStore

_KEY = ["tutor_id", "window"]


def tutor_performance_metrics_checks(
    daily: dg.DailyPartitionsDefinition, *, windows: Sequence[int]
) -> dg.AssetChecksDefinition:
    """Build the checks of ``tutor_performance_metrics``."""
    specs = _specs(daily)

    @dg.multi_asset_check(
        name=f"{METRICS_TABLE}_checks",
        specs=specs,
        can_subset=True,
        pool=PLATFORM_POOL,
    )
    def checks(
        context: dg.AssetCheckExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        run_options: RunOptions,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
        keys = dates_to_check(context, METRICS_TABLE)
        days = [_instants(key, timezone=daily.timezone) for key in keys]
        retrying, timeouts = run_options.retrying(context.log), database.timeouts
        table = read_metrics(
            database.engine,
            calculation_dates=[begin for begin, _ in days],
            retrying=retrying,
            timeouts=timeouts,
        )
        others = count_rows_at_other_times(
            database.engine, days=days, retrying=retrying, timeouts=timeouts
        )
        found = {}
        for key, (begin, _), rows, at_other_times in zip(keys, days, table, others, strict=True):
            frames = _read(partition_store, key, rows)
            missing = sorted({*frames.tutors} - {*frames.stored["tutor_id"]})
            # Rows of a tutor who was deleted went with the tutor: asked after the rows were read.
            deleted = retrying(view.unknown_tutors, database.source, missing)
            computed, roster = (
                frame.filter(~pl.col("tutor_id").is_in(deleted))
                for frame in (frames.computed, frames.roster)
            )
            as_computed = partial(
                rows_are_as_computed, query=_query(begin), at_other_times=at_other_times
            )
            complete = partial(
                every_tutor_has_all_windows, windows=windows, what_to_do=_advice(key)
            )
            of = partial(of_the_date, tutor_ids=run_options.tutor_ids)
            found[key] = {
                "rows_are_as_computed": of(as_computed, computed, frames.stored),
                "every_tutor_has_all_windows": of(complete, frames.stored, roster),
            }
            for finding in found[key].values():
                finding.metadata["tutors_deleted_since"] = len(deleted)
        yield from report(context, specs, found)

    return checks


def _specs(daily: dg.DailyPartitionsDefinition) -> list[dg.AssetCheckSpec]:
    # Nothing is downstream: what they block is that the run counts as a success.
    spec = partial(check_spec, asset=METRICS_TABLE, daily=daily, blocking=True)
    return [
        spec("rows_are_as_computed", "The table's rows equal tutor_tiers, row for row."),
        spec(
            "every_tutor_has_all_windows",
            "Every tutor of the roster is there with each window once.",
        ),
    ]


def _instants(partition_key: str, *, timezone: str) -> tuple[datetime, datetime]:
    """The instants at which a reference date begins and ends."""
    day = date.fromisoformat(partition_key)
    return midnight(day, timezone=timezone), midnight(day + timedelta(days=1), timezone=timezone)


class _Frames(NamedTuple):
    computed: pl.DataFrame
    roster: pl.DataFrame
    stored: pl.DataFrame
    tutors: pl.Series


def _read(store: PartitionStore, partition_key: str, rows: pl.DataFrame) -> _Frames:
    """The computed rows of a date, its roster, and the table's rows of those tutors."""
    computed, roster = pl.collect_all(
        [partition(store, asset, partition_key) for asset in ("tutor_tiers", "tutor_roster")]
    )
    # Rows of tutors who are not computed any more stay in the table.
    tutors = pl.concat([computed.select("tutor_id"), roster.select("tutor_id")])
    stored = rows.join(tutors, on="tutor_id", how="semi")
    return _Frames(computed, roster, stored, tutors["tutor_id"])


def _query(calculation_date: datetime) -> str:
    return (
        f"SELECT * FROM {METRICS_TABLE} WHERE calculation_date"  # noqa: S608 - only shown
        f" = '{calculation_date.isoformat()}'"
    )


def _advice(partition_key: str) -> str:
    return (
        "The summary of the materialization says why a tutor could not be written; run these again:"
        f" tutormax run --date {partition_key} --tutors ID,ID. Rows that come twice are of a table"
        " without its unique key: tutormax db upgrade."
    )


def rows_are_as_computed(
    computed: pl.DataFrame, stored: pl.DataFrame, /, *, query: str, at_other_times: int = 0
) -> Finding:
    """Whether the table holds what was computed, row for row and value for value.

    Rows beside those that were computed are a warning: of a window that an earlier policy had, or
    written by something else, such as the replaced service.

    Args:
        computed: ``TutorTiers``.
        stored: The table's rows of the same date and tutors.
        query: Shows the rows of the date.
        at_other_times: Rows that the table holds of the same day at another time than midnight.
    """
    values = [name for name in stored.columns if name not in _KEY]
    expected = computed.select(*_KEY, *values).with_columns(
        pl.col("performance_tier").cast(pl.String)
    )
    metadata: Metadata = {
        "rows_computed": len(expected),
        "rows_in_the_table": len(stored),
        "rows_at_other_times": at_other_times,
        "failed_tutors": 0,
    }
    if not at_other_times and expected.sort(_KEY).equals(
        stored.select(expected.columns).sort(_KEY)
    ):
        return Finding(True, metadata=metadata)
    rows = _differences(expected, stored)
    wrong = rows.filter(~pl.col("problem").is_in(["not computed", "of another service"]))
    metadata["failed_tutors"] = wrong["tutor_id"].n_unique()
    if rows.is_empty() and not at_other_times:
        return Finding(True, metadata=metadata)
    counts = rows.group_by("problem").len("rows").sort("problem")
    return Finding(
        False,
        " ".join(_problems(rows, counts, at_other_times)),
        {
            **metadata,
            "problems": counts,
            "first_rows": first_keys(rows, *_KEY, "problem"),
            "see_the_table": query,
        },
        WARN if wrong.is_empty() else ERROR,
        " ".join(_advice_about(counts, is_wrong=not wrong.is_empty(), other_times=at_other_times)),
    )


def _differences(expected: pl.DataFrame, stored: pl.DataFrame) -> pl.DataFrame:
    """The keys of rows that differ, each with its ``problem``."""
    # A key that is there twice is what every_tutor_has_all_windows finds.
    once = stored.unique(_KEY, keep="first", maintain_order=True)
    different = expected.join(once, on=_KEY, suffix="_stored").filter(
        pl.any_horizontal(
            pl.col(name).ne_missing(pl.col(f"{name}_stored"))
            for name in expected.columns
            if name not in _KEY
        )
    )
    missing = expected.join(once, on=_KEY, how="anti")
    further = once.join(expected, on=_KEY, how="anti")
    of_a_policy = pl.col("window").str.contains(WINDOW_OF_A_POLICY)
    service = pl.when(of_a_policy).then(pl.lit("not computed"))
    return pl.concat(
        [
            missing.select(*_KEY, pl.lit("missing in the table").alias("problem")),
            different.select(*_KEY, pl.lit("other values").alias("problem")),
            further.select(*_KEY, service.otherwise(pl.lit("of another service")).alias("problem")),
        ]
    )


def _problems(rows: pl.DataFrame, counts: pl.DataFrame, at_other_times: int) -> Iterator[str]:
    if not counts.is_empty():
        said = ", ".join(f"{count} {problem}" for problem, count in counts.iter_rows())
        tutors = rows["tutor_id"].n_unique()
        yield f"{len(rows)} rows of {tutors} tutors are not as computed: {said}."
    if at_other_times:
        yield f"{at_other_times} rows of the day have another time than midnight."


def _advice_about(counts: pl.DataFrame, *, is_wrong: bool, other_times: int) -> Iterator[str]:
    problems = set(counts["problem"])
    if is_wrong:
        yield (
            "The summary of the materialization says why tutors could not be written; if it names"
            " none, something else writes to the table. Fix the cause and rerun the date."
        )
    if other_times or "of another service" in problems:
        yield (
            "Another service writes to the table: stop it, then run `tutormax db upgrade`, which"
            " converts its rows or sets them aside."
        )
    if "not computed" in problems:
        yield (
            "Rows that were not computed are of windows that the policy no longer has: delete"
            " them, or leave them if their readers know."
        )
