"""The tier of each tutor and window."""

from collections.abc import Sequence

import dagster as dg
import polars as pl

from tutormax_assets.assets import OWNERS, frame_metadata
from tutormax_assets.assets.metrics import metrics_asset_name
from tutormax_assets.metrics.schemas import TutorTiers
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
        metadata=frame_metadata(TutorTiers),
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
        return {
            key: performance_tiers(
                pl.concat(frames[key] for frames in metrics_by_window.values()), policy=policy
            )
            .sort("tutor_id", maintain_order=True)
            .pipe(TutorTiers.validate, eager=False)
            for key in context.partition_keys
        }

    return tutor_tiers
