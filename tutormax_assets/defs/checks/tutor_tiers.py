"""Checks of ``tutor_tiers`` and their reasons: all windows together, and against the day before."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import dagster as dg
import polars as pl

from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS
from tutormax_assets.defs.checks import (
    NOT_OF_ALL,
    WARN,
    Finding,
    Metadata,
    check_spec,
    dates_to_check,
    first_keys,
    last_saved,
    of_the_date,
    partition,
    report,
    rows_and_rosters,
    unless_failed,
)
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics.policy import window_name
from tutormax_assets.metrics.schemas import FLAGS, TIERS
from tutormax_assets.storage.store import PartitionStore

ASSET = "tutor_tiers"

_KEY = ["tutor_id", "window"]
COUNTS = ("sessions_completed", "no_show_count")

# Stands for the tutors of a tier that nobody is in, whose logarithm there is none of.
_HALF_A_TUTOR = 0.5


def tutor_tiers_checks(
    daily: dg.DailyPartitionsDefinition, *, windows: Sequence[int]
) -> dg.AssetChecksDefinition:
    """Build the checks of ``tutor_tiers``."""
    specs = _specs(daily)

    @dg.multi_asset_check(name=f"{ASSET}_checks", specs=specs, can_subset=True)
    def checks(
        context: dg.AssetCheckExecutionContext,
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
        limits = metrics_policy.policy.checks
        found = {}
        before: dict[str, pl.DataFrame] = {}
        keys = dates_to_check(context, ASSET)
        for key, (rows, roster, of_failed_shards) in rows_and_rosters(partition_store, ASSET, keys):
            left_out = partition_store.active_tutors_left_out(key)
            of_windows = partial(
                every_tutor_has_all_windows,
                windows=windows,
                what_to_do="Materialize tutor_roster and what follows from it again, in one run,"
                " for all tutors.",
            )
            shrinking = partial(counts_never_shrink, windows=windows)
            earlier = last_saved(context, partition_store, ASSET, key, known=before)
            before = {key: rows}
            found[key] = {
                "every_tutor_has_a_tier": unless_failed(
                    of_the_date(of_windows, rows, roster, tutor_ids=run_options.tutor_ids),
                    of_failed_shards
                    or active_tutors_are_computed(len(roster), left_out, reference_date=key),
                ),
                "counts_never_shrink": of_the_date(
                    shrinking, rows, tutor_ids=run_options.tutor_ids
                ),
                "tiers_are_steady": tiers_are_steady(
                    rows,
                    earlier.rows,
                    since=earlier.since,
                    windows=windows,
                    max_shift=limits.tier_shift,
                    min_tutors=limits.comparison_min_tutors,
                ),
            } | _findings_of_reasons(
                partition_store,
                key,
                rows,
                window=window_name(windows[-1]),
                max_share=limits.thin_evidence_share,
                is_of_all=not left_out,
            )
        yield from report(context, specs, found)

    return checks


def _specs(daily: dg.DailyPartitionsDefinition) -> list[dg.AssetCheckSpec]:
    spec = partial(check_spec, asset=ASSET, daily=daily)
    of_reasons = partial(check_spec, asset=TUTOR_TIER_REASONS, daily=daily)
    return [
        spec(
            "every_tutor_has_a_tier",
            "Every tutor of the roster has one row with a tier for every window.",
            blocking=True,
        ),
        spec(
            "counts_never_shrink",
            "A longer window counts at least what a shorter one does.",
            blocking=True,
        ),
        spec(
            "tiers_are_steady",
            "Tutors are in about the same tiers as on the last date before it that is saved.",
        ),
        of_reasons(
            "reasons_agree_with_tiers",
            "Reasons have the values, flags and tiers of tutor_tiers, row for row.",
            blocking=True,
        ),
        of_reasons(
            "evidence_is_sufficient",
            "Most tutors have enough sessions in the longest window to be judged by them.",
        ),
    ]


def _findings_of_reasons(
    store: PartitionStore,
    key: str,
    tiers: pl.DataFrame,
    *,
    window: str,
    max_share: float,
    is_of_all: bool,
) -> dict[str, Finding]:
    try:
        reasons = partition(store, TUTOR_TIER_REASONS, key).collect()
    except FileNotFoundError:
        missing = Finding(
            False,
            "There are no reasons: an earlier version has computed the date.",
            severity=WARN,
            advice=f"Run {key} again, for all tutors.",
        )
        return dict.fromkeys(("reasons_agree_with_tiers", "evidence_is_sufficient"), missing)
    return {
        "reasons_agree_with_tiers": of_the_date(
            reasons_agree_with_tiers, reasons, tiers, tutor_ids=store.tutor_ids
        ),
        "evidence_is_sufficient": evidence_is_sufficient(
            reasons, window=window, max_share=max_share
        )
        if is_of_all
        else NOT_OF_ALL,
    }


def reasons_agree_with_tiers(reasons: pl.DataFrame, tiers: pl.DataFrame, /) -> Finding:
    """Whether reasons have the rows, values, flags and tiers of ``tutor_tiers``.

    Args:
        reasons: ``TierReasons``.
        tiers: ``TutorTiers``.
    """
    shared = [name for name in tiers.columns if name in reasons.columns]
    counts = [
        pl.sum_horizontal((pl.col("^.*_flag$") == flag).fill_null(False)).cast(pl.UInt8)
        for flag in FLAGS
    ]
    counted = reasons.with_columns(
        **{f"{flag}_flags": count for flag, count in zip(FLAGS, counts, strict=True)}
    )
    told, judged = (frame.select(shared) for frame in (counted, tiers))
    different = pl.concat(
        one.join(other, on=shared, how="anti", nulls_equal=True)
        for one, other in ((told, judged), (judged, told))
    )
    metadata: Metadata = {"rows": len(reasons), "rows_that_differ": len(different.unique(_KEY))}
    if different.is_empty():
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"The reasons of {different['tutor_id'].n_unique()} tutors are not those of their tiers.",
        {**metadata, "first_rows": first_keys(different, *_KEY)},
        advice=f"Materialize tutor_tiers and {TUTOR_TIER_REASONS} again, in one run.",
    )


def evidence_is_sufficient(reasons: pl.DataFrame, /, *, window: str, max_share: float) -> Finding:
    """Whether most tutors have enough sessions in the longest window to be judged by them.

    Args:
        reasons: ``TierReasons``.
        window: Name of the window.
        max_share: Share of tutors with thin evidence above which the check warns.
    """
    of_window = reasons.filter(window=window)
    thin = len(of_window.filter(evidence="thin"))
    share = thin / len(of_window) if len(of_window) else 0.0
    metadata: Metadata = {"tutors_with_thin_evidence": thin, "share": round(share, 4)}
    if share <= max_share:
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"{thin} of {len(of_window)} tutors have thin evidence in the {window} window: {share:.0%},"
        f" with {max_share:.0%} expected at most.",
        metadata,
        WARN,
        "Their tiers say little: see what they rest on with `tutormax explain`; if so many new"
        " tutors are usual, raise checks.thin_evidence_share in the policy.",
    )


def every_tutor_has_all_windows(
    rows: pl.DataFrame, roster: pl.DataFrame, /, *, windows: Sequence[int], what_to_do: str
) -> Finding:
    """Whether every tutor of the roster has one row with a tier for every window.

    Args:
        rows: ``tutor_id``, ``window``, ``performance_tier``; other tutors may be among them.
        roster: ``TutorRoster``.
        windows: Lengths in days.
        what_to_do: The advice where one has not.
    """
    with_tier = rows.filter(pl.col("performance_tier").is_not_null())
    expected = roster.select("tutor_id").join(
        pl.DataFrame({"window": [window_name(days) for days in windows]}), how="cross"
    )
    missing = expected.join(with_tier, on=["tutor_id", "window"], how="anti")
    repeated = with_tier.join(roster, on="tutor_id", how="semi").filter(
        pl.struct("tutor_id", "window").is_duplicated()
    )
    tutors = {*missing["tutor_id"], *repeated["tutor_id"]}
    metadata: Metadata = {"tutors_of_the_roster": len(roster), "windows": len(windows)}
    if not tutors:
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"{len(tutors)} of {len(roster)} tutors of the roster do not have exactly one row with a"
        f" tier for each of {len(windows)} windows.",
        {
            **metadata,
            "rows_missing": len(missing),
            "rows_repeated": len(repeated),
            "first_tutors": first_keys(
                pl.concat(frame.select("tutor_id", "window") for frame in (missing, repeated)),
                "tutor_id",
                "window",
            ),
        },
        advice=what_to_do,
    )


def active_tutors_are_computed(
    computed: int, left_out: int, /, *, reference_date: str
) -> Finding | None:
    """What is to be said of a date that only runs of some tutors have computed.

    Args:
        computed: Tutors of the roster.
        left_out: Active tutors who are not in the roster.
        reference_date: The date.
    """
    if not left_out:
        return None
    return Finding(
        False,
        f"{computed} of {computed + left_out} tutors are computed: only runs of some tutors have"
        " computed this date, which counts as missing until a run of all tutors does.",
        {"tutors_of_the_roster": computed, "active_tutors_left_out": left_out},
        WARN,
        f"Run it: tutormax run --date {reference_date}",
    )


def counts_never_shrink(rows: pl.DataFrame, /, *, windows: Sequence[int]) -> Finding:
    """Whether a longer window counts at least what a shorter one does, since it contains it.

    Args:
        rows: ``TutorTiers``.
        windows: Lengths in days, shortest first.
    """
    by_window = [
        rows.filter(pl.col("window") == window_name(days)).select("tutor_id", "window", *COUNTS)
        for days in windows
    ]
    shrinking = pl.concat(
        [
            rows.select("tutor_id", "window").clear(),
            *(
                longer.join(shorter, on="tutor_id", suffix="_shorter")
                .filter(
                    pl.any_horizontal(pl.col(name) < pl.col(f"{name}_shorter") for name in COUNTS)
                )
                .select("tutor_id", "window")
                for shorter, longer in pairwise(by_window)
            ),
        ]
    )
    if shrinking.is_empty():
        return Finding(True)
    return Finding(
        False,
        f"{shrinking['tutor_id'].n_unique()} tutors have fewer sessions or no-shows in a window"
        " than in a shorter one, which it contains. The windows were not computed from the same"
        " rows.",
        {
            "tutors": shrinking["tutor_id"].n_unique(),
            "first_tutors": first_keys(shrinking, "tutor_id", "window"),
        },
        advice="Materialize metrics_* and tutor_tiers again, in one run, for all tutors.",
    )


def tiers_are_steady(
    rows: pl.DataFrame,
    before: pl.DataFrame | None,
    /,
    *,
    windows: Sequence[int],
    max_shift: float,
    min_tutors: int,
    since: str = "the day before",
) -> Finding:
    """Whether the tutors of both days are in about the same tiers as the day before.

    Args:
        rows: ``TutorTiers``.
        before: The same of an earlier date; null where there is none.
        windows: Lengths in days.
        max_shift: Population stability index of a window above which the check warns.
        min_tutors: Tutors that it takes to compare.
        since: How a sentence calls the earlier date.
    """
    if before is None:
        return Finding(True, "Not compared: the day before has not been computed.")
    names = [window_name(days) for days in windows]
    distributions = _distributions(rows, before, names)
    sizes = dict(distributions.group_by("window").agg(pl.col("tutors_now").sum()).iter_rows())
    shifts = {
        name: population_stability_index(part["tutors_before"], part["tutors_now"])
        for name in names
        if sizes[name] >= min_tutors
        for part in [distributions.filter(pl.col("window") == name)]
    }
    if not shifts:
        return Finding(
            True,
            f"Not compared: {max(sizes.values(), default=0)} tutors in both days; {min_tutors} are"
            " needed.",
        )
    metadata: Metadata = {
        "distributions": distributions,
        **{f"stability_index_{name}": round(shift, 4) for name, shift in shifts.items()},
    }
    shifted = {name: shift for name, shift in shifts.items() if shift > max_shift}
    if not shifted:
        return Finding(True, metadata=metadata)
    moved = rows.join(before, on=_KEY, suffix="_before").filter(
        pl.col("window").is_in(list(shifted)),
        pl.col("performance_tier").cast(pl.String)
        != pl.col("performance_tier_before").cast(pl.String),
    )
    said = ", ".join(f"{name} {shift:.2f}" for name, shift in shifted.items())
    return Finding(
        False,
        f"Tiers have shifted since {since}: the population stability index is {said}, with"
        f" {max_shift:g} expected at most. The numbers are saved all the same.",
        {**metadata, "first_tutors_moved": first_keys(moved, "tutor_id", "window")},
        WARN,
        "Unless the policy was changed, read what the source checks and the null shares say.",
    )


def _distributions(
    rows: pl.DataFrame, before: pl.DataFrame, windows: Sequence[str]
) -> pl.DataFrame:
    """Number of tutors by window and tier, before and now, of those who are in both."""
    counts = pl.concat(
        frame.join(other, on=_KEY, how="semi")
        .group_by("window", pl.col("performance_tier").cast(pl.String).alias("tier"))
        .len()
        .with_columns(pl.lit(day).alias("day"))
        for day, frame, other in (("now", rows, before), ("before", before, rows))
    )
    found = {(day, window, tier): count for window, tier, count, day in counts.iter_rows()}
    return pl.DataFrame(
        [
            (name, tier, found.get(("before", name, tier), 0), found.get(("now", name, tier), 0))
            for name in windows
            for tier in TIERS
        ],
        schema={
            "window": pl.String,
            "tier": pl.String,
            "tutors_before": pl.Int64,
            "tutors_now": pl.Int64,
        },
        orient="row",
    )


def population_stability_index(before: pl.Series, now: pl.Series, /) -> float:
    """How far two distributions over the same groups are apart: sum of (q - p) ln(q / p).

    0 where they are equal; by custom, little up to 0.1 and much from 0.25 on. Source: N. Siddiqi,
    Credit Risk Scorecards, 2006.

    Args:
        before: Number of members by group.
        now: The same later; an empty group counts as half a member in both.
    """
    then, later = (
        [max(count, _HALF_A_TUTOR) / max(counts.sum(), 1) for count in counts]
        for counts in (before, now)
    )
    return math.fsum((q - p) * math.log(q / p) for p, q in zip(then, later, strict=True))
