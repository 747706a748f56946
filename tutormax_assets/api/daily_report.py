"""The daily report of a reference date, made anew from what is stored."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import date
from typing import Any

import dagster as dg
import sqlalchemy as sa

from tutormax_assets.compute.tasks.tiers import TUTOR_TIERS
from tutormax_assets.database.connection import Timeouts, engine_of, limit_transaction
from tutormax_assets.dates import midnight
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.errors import UsageError
from tutormax_assets.report.content import DailyReport, ReportSource
from tutormax_assets.report.record import DateRecord, newest_record
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.settings import Settings
from tutormax_assets.storage.store import PartitionStore


class ReportError(UsageError):
    """There is nothing to report on; the message says why."""


def collect_report(
    settings: Settings, reference_date: date, *, with_names: bool = False
) -> DailyReport:
    """Collect the report of a reference date.

    Args:
        settings: Where everything is.
        reference_date: The date.
        with_names: Read the names of the tutors that the page shows, to show them.

    Raises:
        ReportError: The date has not been computed.
        PolicyError: The policy is refused.
        sqlalchemy.exc.DBAPIError: The names cannot be read.
    """
    key = str(reference_date)
    store = PartitionStore(settings.storage_path)
    if not store.is_stored(TUTOR_TIERS, key):
        raise ReportError(f"{key} has not been computed. Run `tutormax run --date {key}`.")
    timeouts = Timeouts.of(settings)
    instant = midnight(reference_date, timezone=settings.timezone)
    with _instance(settings) as instance, engine_of(settings) as engine:
        record = DateRecord() if instance is None else newest_record(instance, TUTOR_TIERS, key)
        source = ReportSource(store, engine, timeouts, load_policy(settings), instance)
        found = source.collect(reference_date, record, calculation_date=instant)
        if not with_names:
            return found
        return replace(found, names=_names(engine, timeouts, _tutor_ids(found)))


def _instance(settings: Settings) -> AbstractContextManager[dg.DagsterInstance | None]:
    if not (settings.dagster_home_path / "dagster.yaml").exists():
        return nullcontext()
    return dagster_instance(settings)


def _tutor_ids(found: DailyReport) -> set[str]:
    return {
        *(mover.tutor_id for mover in found.movers.rows),
        *(row.tutor_id for listing in found.at_risk.values() for row in listing.rows),
        *(tutor_id for tutor_id, _ in found.errors.rows),
    }


_NAMES = sa.text("SELECT tutor_id, name FROM tutors WHERE tutor_id = ANY(:tutor_ids)")


def _names(engine: sa.Engine, timeouts: Timeouts, tutor_ids: set[str]) -> Mapping[str, str]:
    values: dict[str, Any] = {"tutor_ids": sorted(tutor_ids)}
    with engine.begin() as connection:
        limit_transaction(connection, timeouts)
        return {row.tutor_id: row.name for row in connection.execute(_NAMES, values)}
