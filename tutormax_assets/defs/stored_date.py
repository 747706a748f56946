"""A stored reference date: whether it can be brought up to date, and what has changed since."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import chain
from typing import Any

import dagster as dg
import polars as pl

from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS, TUTOR_TIERS
from tutormax_assets.compute.tasks.windows import WINDOW_EDGES, metrics_asset_name
from tutormax_assets.database.connection import Timeouts, engine_of
from tutormax_assets.database.faults import retrying
from tutormax_assets.database.metrics_reading import (
    READ_SCHEMA,
    MetricsTableError,
    read_metrics,
)
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.dates import midnight
from tutormax_assets.defs.assets.platform_snapshot import SNAPSHOT_ASSETS
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.report.content import DAILY_REPORT, report_path
from tutormax_assets.runs.read_state import ReadState, load_state
from tutormax_assets.settings import Settings
from tutormax_assets.source.changed_tutors import Changes, find_changed_tutors
from tutormax_assets.source.horizon import UnknownChangesError
from tutormax_assets.source.view import View
from tutormax_assets.storage.files import StorageError
from tutormax_assets.storage.store import PartitionStore

NO_STATE = "the stored date has no read state"
"""Why changes since a date was read cannot be determined where nothing says what was read."""


@dataclass(frozen=True)
class StoredDate:
    """A stored reference date, and its relation to the platform.

    Attributes:
        settings: Where everything is.
        instance: Where runs are on record.
        day: The reference date.
        policy: The policy of the settings.
    """

    settings: Settings
    instance: dg.DagsterInstance
    day: date
    policy: Policy

    @property
    def store(self) -> PartitionStore:
        """The partitions of the settings."""
        return PartitionStore(self.settings.storage_path)

    @property
    def assets(self) -> tuple[str, ...]:
        """The assets whose partitions a run of the date stores."""
        windows = map(metrics_asset_name, self.policy.windows)
        return (
            *SNAPSHOT_ASSETS,
            *windows,
            WINDOW_EDGES,
            TUTOR_TIERS,
            TUTOR_TIER_REASONS,
            TUTOR_TIER_CHANGES,
        )

    def is_there(self) -> bool:
        """Whether tiers of the date are stored."""
        return self.store.is_stored(TUTOR_TIERS, str(self.day))

    def state(self, conditions: str) -> ReadState:
        """The read state of the date, if it is valid and matches the stored rows.

        Raises:
            UnknownChangesError: It is not, or does not.
        """
        state = load_state(self.settings.storage_path, str(self.day))
        if state is None:
            raise UnknownChangesError(NO_STATE)
        if state.computed_with != conditions:
            raise UnknownChangesError(
                f"the stored date was computed with {state.computed_with}, expected {conditions}"
            )
        for problem in chain(self._problems_of_runs(state), self._problems_of_rows()):
            raise UnknownChangesError(problem)
        return state

    def changes(self, view: View, state: ReadState) -> Changes:
        """The changes from the read of the date up to a view of the platform.

        Raises:
            UnknownChangesError: They cannot be determined.
            SourceError: The platform cannot be read.
        """
        if state.horizon is None:
            raise UnknownChangesError(state.unknown)
        window = timedelta(days=max(self.policy.windows))
        return find_changed_tutors(
            view,
            state.horizon,
            rows_read(self.store, self.day),
            start=midnight(self.day - window, timezone=self.settings.timezone),
            end=midnight(self.day, timezone=self.settings.timezone),
            most_transactions=self.settings.refresh_max_transactions,
        )

    def expect_rows(self, tutors: pl.DataFrame) -> None:
        """Check that the metrics table holds the tiers of all tutors in the platform.

        Args:
            tutors: ``SourceTutors``.

        Raises:
            UnknownChangesError: It does not.
        """
        if others := len(self.rows_not_in_table(tutors)):
            raise UnknownChangesError(
                f"{METRICS_TABLE} lacks {others} rows of it, or has other values in them"
            )

    def rows_not_in_table(self, tutors: pl.DataFrame) -> pl.DataFrame:
        """``tutor_id`` and ``window`` of stored tiers that the metrics table does not hold as such.

        Args:
            tutors: ``SourceTutors``; rows of deleted tutors have left the table.

        Raises:
            UnknownChangesError: The table cannot be read.
        """
        saved = self.scan(TUTOR_TIERS).select(
            pl.col(name).cast(dtype) for name, dtype in READ_SCHEMA.items()
        )
        once = retrying(max_retries=0, retry_delay_seconds=0, log=logging.getLogger(__name__))
        try:
            with engine_of(self.settings) as engine:
                [found] = read_metrics(
                    engine,
                    calculation_dates=[midnight(self.day, timezone=self.settings.timezone)],
                    retrying=once,
                    timeouts=Timeouts.of(self.settings),
                )
        except MetricsTableError as error:
            raise UnknownChangesError(str(error)) from error
        return (
            saved.join(tutors.lazy(), on="tutor_id", how="semi")
            .join(found.lazy(), on=list(READ_SCHEMA), how="anti", nulls_equal=True)
            .select("tutor_id", "window")
            .collect()
        )

    def tutors_of_other_status(self, roster: pl.DataFrame, others: pl.DataFrame) -> set[str]:
        """Tutors that joined, left, or have another status than the stored one."""
        found: set[str] = set()
        for asset, tutors in (("tutor_roster", roster), ("tutors_left_out", others)):
            stored = self.scan(asset).collect()
            if stored.sort("tutor_id").equals(tutors.sort("tutor_id")):
                continue
            for one, other in ((stored, tutors), (tutors, stored)):
                apart = one.join(other, on=["tutor_id", "status"], how="anti", nulls_equal=True)
                found.update(apart["tutor_id"])
        return found

    def _problems_of_runs(self, state: ReadState) -> Iterator[str]:
        wanted = dg.RunsFilter(run_ids=list(dict.fromkeys(state.run_ids)))
        status = {run.run_id: run.status for run in self.instance.get_runs(wanted)}
        for run_id in dict.fromkeys(state.run_ids):
            name = f"run {run_id[:8]}, which stored rows of it,"
            if run_id not in status:
                yield f"{name} is not on record any more"
            elif status[run_id] != dg.DagsterRunStatus.SUCCESS:
                yield f"{name} has not succeeded"
            else:
                saved = self._materialized_by(run_id)
                for asset in (*self.assets, METRICS_TABLE, DAILY_REPORT):
                    if asset not in saved:
                        yield f"{name} did not compute {asset}"
                if _value(saved[METRICS_TABLE], "failed"):
                    yield f"{name} has not saved the rows of all tutors"

    def _materialized_by(self, run_id: str) -> dict[str, dg.AssetMaterialization]:
        """The materializations of the date in a run, by asset."""
        records = self.instance.get_records_for_run(
            run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION
        ).records
        found = [record.asset_materialization for record in records]
        return {
            one.asset_key.to_user_string(): one
            for one in found
            if one is not None and one.partition == str(self.day)
        }

    def _problems_of_rows(self) -> Iterator[str]:
        """Problems of the stored partitions."""
        for asset in self.assets:
            try:
                if self.store.whole_partition(asset, str(self.day)).failed:
                    yield f"{asset} lacks shards that could not be computed"
            except (OSError, StorageError) as error:
                yield f"{asset} is damaged or not there: {error}"
        if not report_path(self.settings.storage_path, self.day).exists():
            yield "there is no report"
        wanted = dg.AssetRecordsFilter(
            asset_key=dg.AssetKey(TUTOR_TIERS), asset_partitions=[str(self.day)]
        )
        # Another run than those that have read may have computed them since.
        [tiers] = self.instance.fetch_materializations(wanted, limit=1).records
        if _value(tiers.asset_materialization, "policy_digest") != self.policy.digest:
            yield "the tiers were computed with another policy"

    def scan(self, asset: str) -> pl.LazyFrame:
        """The rows of one of its partitions."""
        return self.store.whole_partition(asset, str(self.day)).rows().scan()


def rows_read(store: PartitionStore, day: date) -> pl.DataFrame:
    """By ``tutor_id``, how many ``sessions``, ``feedback`` and ``events`` are stored.

    A feedback is stored as the rating of its session, or set aside.
    """

    def scan(asset: str) -> pl.LazyFrame:
        return store.whole_partition(asset, str(day)).rows().scan()

    sessions = scan("sessions_snapshot").select(
        "tutor_id", sessions=1, feedback=pl.col("overall_rating").is_not_null().cast(pl.Int64)
    )
    set_aside = scan("sessions_set_aside").filter(source_table="student_feedback")
    feedback = set_aside.select("tutor_id", feedback=1)
    events = scan("tutor_events_snapshot").select("tutor_id", events=1)
    return (
        pl.concat([sessions, feedback, events], how="diagonal_relaxed")
        .group_by("tutor_id")
        .agg(pl.col("sessions", "feedback", "events").sum().cast(pl.Int64))
        .collect()
    )


def _value(materialization: dg.AssetMaterialization | None, name: str) -> Any:
    entry = None if materialization is None else materialization.metadata.get(name)
    return None if entry is None else entry.value
