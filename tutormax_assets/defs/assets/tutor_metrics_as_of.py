"""The metrics as they could be known at an instant: training data without leakage."""

import dagster as dg
from pydantic import Field

from tutormax_assets.compute.tasks.as_of import AsOfRequest, store_metrics_as_of
from tutormax_assets.dates import EACH_DATE, parse_as_of
from tutormax_assets.defs.assets import (
    OWNERS,
    PLATFORM_POOL,
    frame_metadata,
    keep_partitions,
    reference_dates,
)
from tutormax_assets.defs.assets.platform_tables import PLATFORM_TABLES
from tutormax_assets.defs.resources import MetricsPolicy, RunOptions
from tutormax_assets.metrics.schemas import TutorMetricsAsOf
from tutormax_assets.settings import Settings
from tutormax_assets.source.contract import COLUMNS_AS_OF
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.view import open_view
from tutormax_assets.storage.spool import spool_folder
from tutormax_assets.storage.store import PartitionStore

TUTOR_METRICS_AS_OF = "tutor_metrics_as_of"


class AsOfOptions(dg.Config):
    """Options of a run of ``tutor_metrics_as_of``."""

    as_of: str = Field(
        default=EACH_DATE,
        description=(
            "The instant at which rows had to be known, in ISO form, no earlier than the end of"
            f" the windows; or {EACH_DATE}: for each reference date the end of its windows."
        ),
    )


def tutor_metrics_as_of_asset(
    settings: Settings,
    daily: dg.DailyPartitionsDefinition,
    backfill_policy: dg.BackfillPolicy,
) -> dg.AssetsDefinition:
    """Build the asset of the metrics as of an instant."""

    @dg.asset(
        name=TUTOR_METRICS_AS_OF,
        deps=PLATFORM_TABLES,
        partitions_def=daily,
        backfill_policy=backfill_policy,
        pool=PLATFORM_POOL,
        group_name="training",
        owners=OWNERS,
        kinds={"polars", "parquet"},
        metadata=frame_metadata(TutorMetricsAsOf, {}),
    )
    def tutor_metrics_as_of(
        context: dg.AssetExecutionContext,
        config: AsOfOptions,
        database: dg.ResourceParam[PlatformDatabase],
        run_options: RunOptions,
        metrics_policy: MetricsPolicy,
        partition_store: dg.ResourceParam[PartitionStore],
    ) -> None:
        """The metrics and tiers of tutors of any status, as they could be known at an instant.

        Only rows that the platform had created by then are read, and only feedback that was
        submitted by then. One row per tutor and window per reference date. Nothing else is
        computed from it, and it never enters tutor_performance_metrics.
        """
        requests = {
            key: AsOfRequest(
                reference_date=day,
                as_of=parse_as_of(config.as_of, day=day, timezone=daily.timezone),
                path=partition_store.path(TUTOR_METRICS_AS_OF, key),
                tutor_ids=run_options.tutor_ids,
                policy=metrics_policy.policy,
                timezone=daily.timezone,
                number_of_shards=settings.shards,
            )
            for key, day in reference_dates(context).items()
        }
        done: set[str] = set()

        def store_all() -> None:
            with (
                spool_folder(settings.home_path) as folder,
                open_view(
                    database.source,
                    tutor_ids=partition_store.tutor_ids,
                    columns=COLUMNS_AS_OF,
                ) as view,
            ):
                for key in sorted(requests.keys() - done):
                    partition = store_metrics_as_of(view, requests[key], folder / "source")
                    context.add_asset_metadata(
                        {
                            "as_of": dg.MetadataValue.timestamp(requests[key].as_of),
                            "read_at": dg.MetadataValue.timestamp(view.read_at),
                            "source_snapshot": view.snapshot,
                            "policy_digest": metrics_policy.policy.digest,
                        },
                        partition_key=key,
                    )
                    of_date = {key: partition}
                    keep_partitions(context, partition_store, TUTOR_METRICS_AS_OF, of_date)
                    done.add(key)
                    context.log.info(f"{key}: stored as of {requests[key].as_of.isoformat()}")

        run_options.retrying(context.log)(store_all)

    return tutor_metrics_as_of
