"""What a run is given: its options, the platform's database, its dates and the partitions."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import tenacity
from pydantic import Field, ValidationError, field_validator

from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.database.date_locks import DateLocks
from tutormax_assets.database.faults import retrying
from tutormax_assets.metrics.policy import Policy, PolicyError
from tutormax_assets.runs.instance import pool_connections
from tutormax_assets.runs.tags import partition_keys
from tutormax_assets.settings import OptionsError, Settings, SettingsError
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.storage.files import make_private_folder
from tutormax_assets.storage.store import PartitionStore


class RunOptions(dg.ConfigurableResource[None]):
    """Options of one run, set in the Launchpad or by the CLI; the defaults need nothing."""

    tutor_ids: list[str] | None = Field(
        default=None,
        description=(
            "Refresh only these tutors and leave the others' rows as they are; all when null."
        ),
    )
    read_state: str | None = Field(
        default=None,
        description=(
            "Read state that becomes valid with this run, set by `tutormax run` and the sensor"
            " late_data; null in all other runs."
        ),
    )
    include_inactive: bool = Field(
        default=False, description="Compute tutors of any status, not only active ones."
    )
    batch_size: int = Field(
        default=1_000, ge=1, description="Tutors that are written in one transaction."
    )
    max_retries: int = Field(
        default=3, ge=0, description="How often reading or writing is tried again if that may help."
    )
    retry_delay_seconds: float = Field(
        default=5,
        ge=0,
        allow_inf_nan=False,
        description="Seconds before the first retry; doubles with each further one.",
    )

    @field_validator("tutor_ids")
    @classmethod
    def _names_tutors(cls, tutor_ids: list[str] | None) -> list[str] | None:
        if tutor_ids is not None and not tutor_ids:
            raise ValueError("found no id, expected at least one, or null for all tutors")
        for tutor_id in tutor_ids or ():
            # Neither a database nor a log takes a surrogate, as bytes that are not UTF-8 become.
            if not tutor_id or re.search("[\0\ud800-\udfff]", tutor_id):
                raise ValueError(f"found the id {tutor_id!a}, expected text that is not empty")
        return tutor_ids

    def retrying(self, log: logging.Logger) -> tenacity.Retrying:
        """Calls a function again, as often as the options say, when its failure may pass."""
        return retrying(
            max_retries=self.max_retries, retry_delay_seconds=self.retry_delay_seconds, log=log
        )


def parse_options(**values: Any) -> RunOptions:
    """The options of a run.

    Raises:
        OptionsError: One of them is unusable.
    """
    if isinstance(values.get("tutor_ids"), str):
        raise OptionsError("tutor_ids is a single text; expected a list of ids.")
    try:
        return RunOptions(**values)
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}"
            for one in error.errors(include_input=False)
        ]
        raise OptionsError(f"{'; '.join(found)}.") from None


def platform_database_resource(settings: Settings) -> dg.ResourceDefinition:
    """The platform's database of a run, without a config: no password shows in the UI."""

    @dg.resource(
        config_schema={}, description="The platform's PostgreSQL, as the settings name it."
    )
    def database(_: dg.InitResourceContext) -> Iterator[PlatformDatabase]:
        with closing(PlatformDatabase(settings)) as opened:
            yield opened

    return database


def compute_resource(settings: Settings) -> dg.ResourceDefinition:
    """Where the shards of a run are computed, without a config: steps are the same for both."""

    @dg.resource(
        config_schema={},
        required_resource_keys={"database"},
        description="Computes shards of tutors in the run's process or on a Dask cluster.",
    )
    def compute(context: dg.InitResourceContext) -> Iterator[Compute]:
        with closing(Compute(settings, context.resources.database)) as opened:
            yield opened

    return compute


def date_locks_resource(settings: Settings) -> dg.ResourceDefinition:
    """The locks that a run has on its reference dates, from before its first step to its end.

    Dagster makes it ready when the run has no place in a pool yet that the run which is waited for
    may need. Where an executor makes each step a process, the dates are locked for a step at a
    time.
    """

    @dg.resource(
        config_schema={},
        required_resource_keys={"run_options", "database"},
        description="Keeps other runs of the same reference dates waiting.",
    )
    def date_locks(context: dg.InitResourceContext) -> Iterator[DateLocks | None]:
        log: Any = context.log
        try:
            make_private_folder(settings.storage_path, group=settings.files_group)
            if context.instance is not None:
                # A worker that Dagster started comes by here before its first step.
                pool_connections(context.instance)
            locks = None
            if keys := _reference_dates(context):
                locks = DateLocks(
                    context.resources.database.engine,
                    keys,
                    retrying=context.resources.run_options.retrying(log),
                    log=log,
                )
                locks.take()
        except Exception as error:
            # The run's page shows what Dagster makes of a resource that fails.
            log.error(str(error))
            raise
        try:
            yield locks
        finally:
            if locks is not None:
                locks.release()

    return date_locks


def partition_store_resource(settings: Settings) -> dg.ResourceDefinition:
    """The Parquet partitions that the settings name, as the options of the run restrict them."""

    @dg.resource(
        config_schema={},
        required_resource_keys={"run_options", "date_locks"},
        description="Parquet partitions.",
    )
    def partition_store(context: dg.InitResourceContext) -> PartitionStore:
        locks: DateLocks | None = context.resources.date_locks
        return PartitionStore(
            settings.storage_path,
            tutor_ids=context.resources.run_options.tutor_ids or (),
            renew_locks=locks.renew if locks else lambda: False,
        )

    return partition_store


class MetricsPolicy(dg.ConfigurableResource[None]):
    """Thresholds, weights and limits: the contract's, the TOML file's, then the run's overrides."""

    base: dg.ResourceDependency[Policy]
    overrides: dict[str, Any] = Field(
        default={},
        description=(
            "Settings to replace for this run, as in the TOML file, such as"
            " {late_limit_minutes: 5} or {thresholds: {avg_rating: {green: 4.7, red: 3.5}}}."
        ),
    )

    @property
    def policy(self) -> Policy:
        """The policy of this run.

        Raises:
            PolicyError: It contradicts itself, or the run overrides the windows.
        """
        if "windows" in self.overrides:
            raise PolicyError(
                "windows cannot be set for one run, because each window is an asset;"
                " set them in the TOML file that TUTORMAX_POLICY names"
            )
        return self.base.with_overrides(self.overrides)


def load_policy(settings: Settings) -> Policy:
    """The contract's policy with the overrides of the TOML file that the settings name.

    Raises:
        SettingsError: The file cannot be read.
        PolicyError: The file's policy is malformed or contradicts itself.
    """
    if settings.policy is None:
        return Policy()
    try:
        text = Path(settings.policy).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"TUTORMAX_POLICY names {settings.policy}, which cannot be read: {error.strerror}"
        ) from None
    return Policy.from_toml(text)


def newest_dates(instance: dg.DagsterInstance, asset_keys: Iterable[dg.AssetKey]) -> list[str]:
    """The newest reference date of each asset that has been materialized, ascending."""
    of_assets = (instance.get_materialized_partitions(key) for key in asset_keys)
    return sorted({max(keys) for keys in of_assets if keys})


def _reference_dates(context: dg.InitResourceContext) -> list[str]:
    """The reference dates that a run works on."""
    if context.run is None or context.instance is None:
        return []
    checked = {check.asset_key for check in context.run.asset_check_selection or ()}
    return partition_keys(context.run) or newest_dates(context.instance, checked)
