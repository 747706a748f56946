"""Checks of ``metrics_7day`` and its siblings: the numbers of one window."""

from collections.abc import Iterator
from functools import partial

import dagster as dg
import polars as pl

from tutormax_assets.compute.tasks.windows import metrics_asset_name
from tutormax_assets.defs.checks import (
    WARN,
    Finding,
    Metadata,
    check_spec,
    dates_to_check,
    first_keys,
    last_saved,
    of_the_date,
    report,
    rows_and_rosters,
    unless_failed,
)
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics.policy import window_name
from tutormax_assets.metrics.schemas import WindowSums
from tutormax_assets.storage.store import PartitionStore


def window_metrics_checks(
    daily: dg.DailyPartitionsDefinition, *, days: int
) -> dg.AssetChecksDefinition:
    """Build the checks of the metrics of one window, such as ``metrics_30day``."""
    asset = metrics_asset_name(days)

    spec = partial(check_spec, asset=asset, daily=daily)
    specs = [
        spec(
            "values_in_range",
            "Columns, types, window and values are those of WindowSums.",
            blocking=True,
        ),
        spec(
            "one_row_per_tutor",
            "Every tutor of the roster has one row, and nobody else has.",
            blocking=True,
        ),
        spec(
            "null_shares_are_steady",
            "No column has lost many values since the last date before it that is saved.",
        ),
    ]

    @dg.multi_asset_check(
        name=f"{asset}_checks",
        specs=specs,
        can_subset=True,
    )
    def checks(
        context: dg.AssetCheckExecutionContext,
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
        limits = metrics_policy.policy.checks
        found = {}
        before: dict[str, pl.DataFrame] = {}
        keys = dates_to_check(context, asset)
        for key, (rows, roster, of_failed_shards) in rows_and_rosters(partition_store, asset, keys):
            earlier = last_saved(context, partition_store, asset, key, known=before)
            before = {key: rows}
            found[key] = {
                "values_in_range": values_in_range(rows, window=window_name(days)),
                "one_row_per_tutor": unless_failed(
                    of_the_date(one_row_per_tutor, rows, roster, tutor_ids=run_options.tutor_ids),
                    of_failed_shards,
                ),
                "null_shares_are_steady": null_shares_are_steady(
                    rows,
                    earlier.rows,
                    since=earlier.since,
                    max_rise=limits.null_share_rise,
                    min_tutors=limits.comparison_min_tutors,
                ),
            }
        yield from report(context, specs, found)

    return checks


def values_in_range(rows: pl.DataFrame, /, *, window: str) -> Finding:
    """Whether columns, types and values are those of ``WindowSums``.

    Args:
        rows: The metrics of one window.
        window: What the column ``window`` has to say.
    """
    expected = pl.Schema(WindowSums)
    if rows.schema != expected:
        types = pl.DataFrame(
            [
                (name, str(rows.schema.get(name)), str(expected.get(name)))
                for name in dict.fromkeys([*expected, *rows.columns])
                if rows.schema.get(name) != expected.get(name)
            ],
            schema={"column": pl.String, "found": pl.String, "expected": pl.String},
            orient="row",
        )
        return Finding(
            False,
            "Columns or types are not those of this version.",
            {"columns": types},
            advice="Run the date again, for all tutors.",
        )
    metadata: Metadata = {"rows": len(rows), "rows_out_of_range": 0}
    if (rows["window"] == window).all() and WindowSums.is_valid(rows):
        return Finding(True, metadata=metadata)
    _, failure = WindowSums.filter(rows)
    other_window = rows.filter(pl.col("window") != window)
    broken = pl.DataFrame(
        [
            *failure.counts().items(),
            *([("window", len(other_window))] if len(other_window) else []),
        ],
        schema={"rule": pl.String, "rows": pl.Int64},
        orient="row",
    )
    offending = pl.concat([failure.invalid(), other_window])
    metadata["rows_out_of_range"] = offending["tutor_id"].n_unique()
    return Finding(
        False,
        f"{metadata['rows_out_of_range']} of {len(rows)} rows break"
        f" {', '.join(broken['rule'])}. Numbers like these cannot come from the source.",
        {**metadata, "rules": broken, "first_tutors": first_keys(offending, "tutor_id")},
        advice="Run the date again, for all tutors; if it stays, report it as a defect of the"
        " metrics.",
    )


def one_row_per_tutor(rows: pl.DataFrame, roster: pl.DataFrame, /) -> Finding:
    """Whether every tutor of the roster has one row, and nobody else has.

    Args:
        rows: ``WindowSums`` of one window.
        roster: ``TutorRoster``.
    """
    metadata: Metadata = {"tutors_of_the_roster": len(roster), "rows": len(rows)}
    expected = roster["tutor_id"].unique().sort()
    if rows["tutor_id"].sort().equals(expected):
        return Finding(True, metadata=metadata)
    tutors = pl.concat(
        [
            roster.join(rows, on="tutor_id", how="anti").select(
                "tutor_id", pl.lit("missing").alias("problem")
            ),
            rows.join(roster, on="tutor_id", how="anti").select(
                "tutor_id", pl.lit("not in the roster").alias("problem")
            ),
            rows.filter(pl.col("tutor_id").is_duplicated()).select(
                "tutor_id", pl.lit("more than one row").alias("problem")
            ),
        ]
    ).unique()
    counts = tutors.group_by("problem").len("tutors").sort("problem")
    return Finding(
        False,
        f"The rows are not those of the {len(roster)} tutors of the roster: "
        + ", ".join(f"{count} {problem}" for problem, count in counts.iter_rows())
        + ".",
        {**metadata, "problems": counts, "first_tutors": first_keys(tutors, "tutor_id", "problem")},
        advice="Materialize tutor_roster and what follows from it again, in one run.",
    )


def null_shares_are_steady(
    rows: pl.DataFrame,
    before: pl.DataFrame | None,
    /,
    *,
    max_rise: float,
    min_tutors: int,
    since: str = "the day before",
) -> Finding:
    """Whether no column has lost many of its values since the day before.

    Tutors who are in both are compared, so that neither a filtered run nor a new group of tutors
    looks like a loss.

    Args:
        rows: ``WindowSums`` of one window.
        before: The same of an earlier date; null where there is none.
        max_rise: Rise of a column's share of nulls above which the check warns.
        min_tutors: Tutors that it takes to compare.
        since: How a sentence calls the earlier date.
    """
    if before is None:
        return Finding(True, "Not compared: the day before has not been computed.")
    columns = [name for name in WindowSums.column_names() if name in before.columns]
    now = rows.join(before, on="tutor_id", how="semi")
    then = before.join(rows, on="tutor_id", how="semi")
    metadata: Metadata = {"tutors_in_both": len(now)}
    if len(now) < min_tutors:
        return Finding(
            True,
            f"Not compared: {len(now)} tutors in both days; {min_tutors} are needed.",
            metadata,
        )
    shares = pl.DataFrame(
        {
            "column": columns,
            "share_before": [then[name].null_count() / len(then) for name in columns],
            "share_now": [now[name].null_count() / len(now) for name in columns],
        }
    )
    rises = shares["share_now"] - shares["share_before"]
    metadata["largest_rise"] = round(float(rises.max() or 0), 4)  # type: ignore[arg-type]
    risen = shares.filter(pl.col("share_now") - pl.col("share_before") > max_rise)
    if risen.is_empty():
        return Finding(True, metadata=metadata)
    said = ", ".join(
        f"{name} from {then_:.0%} to {now_:.0%}" for name, then_, now_ in risen.iter_rows()
    )
    lost = then.join(now, on="tutor_id", suffix="_now").filter(
        pl.any_horizontal(
            pl.col(name).is_not_null() & pl.col(f"{name}_now").is_null() for name in risen["column"]
        )
    )
    return Finding(
        False,
        f"Without a value since {since}: {said}; a rise of {max_rise:.0%} is expected at most.",
        {**metadata, "null_shares": shares, "first_tutors": first_keys(lost, "tutor_id")},
        WARN,
        "Compare the rows read and set aside of both days; if the source lost rows, see to what"
        " loads it and run the date again.",
    )
