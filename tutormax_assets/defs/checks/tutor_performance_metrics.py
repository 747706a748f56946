"""Checks of ``tutor_performance_metrics``: what PostgreSQL holds, read back."""

from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from functools import partial

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
    # Nothing is downstream: what they block is that the run counts as a success.
    spec = partial(check_spec, asset=METRICS_TABLE, daily=daily, blocking=True)
    specs = [
        spec("rows_are_as_computed", "The table's rows equal tutor_tiers, row for row."),
        spec(
            "every_tutor_has_all_windows",
            "Every tutor of the roster is there with each window once.",
        ),
    ]

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
        days = {key: date.fromisoformat(key) for key in dates_to_check(context, METRICS_TABLE)}
        retrying = run_options.retrying(context.log)
        table = read_metrics(
            database.engine,
            calculation_dates=[
                midnight(reference_date, timezone=daily.timezone)
                for reference_date in days.values()
            ],
            retrying=retrying,
            timeouts=database.timeouts,
        )
        others = count_rows_at_other_times(
            database.engine,
            days=[
                (
                    midnight(reference_date, timezone=daily.timezone),
                    midnight(reference_date + timedelta(days=1), timezone=daily.timezone),
                )
                for reference_date in days.values()
            ],
            retrying=retrying,
            timeouts=database.timeouts,
        )
        found = {}
        for (key, reference_date), rows, at_other_times in zip(
            days.items(), table, others, strict=True
        ):
            computed, roster = pl.collect_all(
                [
                    partition(partition_store, "tutor_tiers", key),
                    partition(partition_store, "tutor_roster", key),
                ]
            )
            # Rows of tutors who are not computed any more stay in the table.
            tutors = pl.concat([computed.select("tutor_id"), roster.select("tutor_id")])
            stored = rows.join(tutors, on="tutor_id", how="semi")
            # Rows of a tutor who was deleted went with the tutor: asked after the rows were read.
            missing = sorted({*tutors["tutor_id"]} - {*stored["tutor_id"]})
            deleted = retrying(view.unknown_tutors, database.source, missing)
            computed, roster = (
                frame.filter(~pl.col("tutor_id").is_in(deleted)) for frame in (computed, roster)
            )
            query = (
                f"SELECT * FROM {METRICS_TABLE} WHERE calculation_date"  # noqa: S608 - only shown
                f" = '{midnight(reference_date, timezone=daily.timezone).isoformat()}'"
            )
            found[key] = {
                name: of_the_date(check, *frames, tutor_ids=run_options.tutor_ids)
                for name, check, frames in (
                    (
                        "rows_are_as_computed",
                        partial(rows_are_as_computed, query=query, at_other_times=at_other_times),
                        (computed, stored),
                    ),
                    (
                        "every_tutor_has_all_windows",
                        partial(
                            every_tutor_has_all_windows, windows=windows, what_to_do=_advice(key)
                        ),
                        (stored, roster),
                    ),
                )
            }
            for finding in found[key].values():
                finding.metadata["tutors_deleted_since"] = len(deleted)
        yield from report(context, specs, found)

    return checks


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
    # A key that is there twice is what every_tutor_has_all_windows finds.
    once = stored.unique(_KEY, keep="first", maintain_order=True)
    different = expected.join(once, on=_KEY, suffix="_stored").filter(
        pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name}_stored")) for name in values)
    )
    rows = pl.concat(
        [
            expected.join(once, on=_KEY, how="anti").select(
                *_KEY, pl.lit("missing in the table").alias("problem")
            ),
            different.select(*_KEY, pl.lit("other values").alias("problem")),
            once.join(expected, on=_KEY, how="anti").select(
                *_KEY,
                pl.when(pl.col("window").str.contains(WINDOW_OF_A_POLICY))
                .then(pl.lit("not computed"))
                .otherwise(pl.lit("of another service"))
                .alias("problem"),
            ),
        ]
    )
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
