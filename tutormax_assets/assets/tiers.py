"""The tier of each tutor and window."""

from collections.abc import Sequence

import dagster as dg
import polars as pl

from tutormax_assets.assets import OWNERS, frame_metadata
from tutormax_assets.assets.distribution import distribution_image
from tutormax_assets.assets.metrics import metrics_asset_name
from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, LOWER_IS_BETTER
from tutormax_assets.metrics.schemas import TIERS, TutorTiers, WindowMetrics
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets.resources import MetricsPolicy
from tutormax_assets.storage import FramesByDate


def tutor_tiers_asset(
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
    *,
    windows: Sequence[int],
) -> dg.AssetsDefinition:
    """Build the asset ``tutor_tiers``."""

    @dg.asset(
        ins={metrics_asset_name(days): dg.AssetIn() for days in windows},
        partitions_def=daily,
        backfill_policy=backfill_policy,
        group_name="metrics",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(TutorTiers, _lineage(windows)),
    )
    def tutor_tiers(
        context: dg.AssetExecutionContext,
        metrics_policy: MetricsPolicy,
        **metrics_by_window: FramesByDate,
    ) -> FramesByDate:
        """The metrics of all windows with their flags and the tier that follows.

        One row per tutor and window per reference date.
        """
        policy = metrics_policy.policy
        tiers: FramesByDate = {}
        for key in context.partition_keys:
            frame = (
                performance_tiers(
                    pl.concat(metrics_by_window[metrics_asset_name(days)][key] for days in windows),
                    policy=policy,
                )
                .sort("tutor_id", maintain_order=True)
                .pipe(TutorTiers.validate, eager=False)
                .collect()
            )
            counts = tier_counts(frame)
            context.add_asset_metadata(
                {
                    "tier_distribution": dg.MetadataValue.md(distribution_image(counts)),
                    "tutors_by_tier": _table(counts),
                },
                partition_key=key,
            )
            tiers[key] = frame.lazy()
        return tiers

    return tutor_tiers


def tier_counts(tiers: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Number of tutors in each tier by window, tiers without a tutor included.

    Args:
        tiers: ``TutorTiers``.
    """
    counted = tiers.group_by("window", "performance_tier").len()
    found = {(window, tier): count for window, tier, count in counted.iter_rows()}
    windows = tiers["window"].unique(maintain_order=True)
    return {window: {tier: found.get((window, tier), 0) for tier in TIERS} for window in windows}


def _table(counts: dict[str, dict[str, int]]) -> dg.TableMetadataValue:
    return dg.MetadataValue.table(
        [
            dg.TableRecord(
                {"tier": tier, **{window: tiers[tier] for window, tiers in counts.items()}}
            )
            for tier in TIERS
        ],
        dg.TableSchema(
            [dg.TableColumn("tier", "string"), *(dg.TableColumn(w, "int") for w in counts)]
        ),
    )


def _lineage(windows: Sequence[int]) -> dict[str, list[tuple[str, str]]]:
    def from_windows(*columns: str) -> list[tuple[str, str]]:
        return [(metrics_asset_name(days), column) for days in windows for column in columns]

    flagged = from_windows(*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
    return {
        **{column: from_windows(column) for column in WindowMetrics.column_names()},
        "green_flags": flagged,
        "red_flags": flagged,
        "performance_tier": flagged,
    }
