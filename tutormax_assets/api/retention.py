"""Retention from Python: clean up what is too old, and restore an archived month."""

import logging
from collections.abc import Collection, Iterator
from datetime import date

from tutormax_assets.database.connection import Timeouts, engine_of
from tutormax_assets.database.restore import RestoredDate, archived_dates, keep_month, restore_date
from tutormax_assets.definitions import kept_in_storage
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.runs.instance import (
    dagster_instance,
)
from tutormax_assets.runs.retention import (
    CleanupReport,
    Retention,
    clean_up,
    observation_of_restored_date,
)
from tutormax_assets.settings import Settings

logger = logging.getLogger(LOGGER)


def cleanup(
    settings: Settings,
    *,
    retention_days: int | None = None,
    released_months: Collection[str] = (),
    dry_run: bool = False,
) -> CleanupReport:
    """Remove what is too old: metrics into the archive, Parquet partitions and runs for good.

    Args:
        settings: Where everything is, and how long it is kept.
        retention_days: Age in days up to which metrics stay, in place of the settings'.
        released_months: Restored months, as ``YYYY-MM``, that go like any other from now on.
        dry_run: Only look.

    Raises:
        OptionsError: ``retention_days`` is not from 1 to 36,500.
        ArchiveError: The archive cannot be written, or not read back; its rows are in the table. Or
            a released month is not restored.
        MetricsTableError: The table is missing or not as this version expects it.
        StorageError: The Parquet partitions cannot be reached.
    """
    retention = Retention.as_of_today(
        settings, kept_in_storage(load_policy(settings)), retention_days=retention_days
    )
    with engine_of(settings) as engine, dagster_instance(settings) as instance:
        return clean_up(
            retention,
            engine,
            instance,
            log=logger,
            released_months=released_months,
            dry_run=dry_run,
        )


def restore(
    settings: Settings, month: str, *, until: date, dry_run: bool = False
) -> Iterator[RestoredDate]:
    """Bring archived metrics of a month back into the table, one date after the other.

    Args:
        settings: Where everything is.
        month: The month as ``YYYY-MM``.
        until: The first day on which a cleanup archives the month again.
        dry_run: Only look.

    Raises:
        ArchiveError: The archive does not hold the month, or a file cannot be read.
        MetricsTableError: The table is missing or refuses the rows of a date.
    """
    days = archived_dates(settings.archive_path, month)
    if not dry_run:
        # Before the rows: a cleanup on another machine must not take them at once.
        keep_month(settings.archive_path, month, until)
    timeouts = Timeouts.of(settings)
    with engine_of(settings) as engine, dagster_instance(settings) as instance:
        for day in days:
            restored = restore_date(
                engine, settings.archive_path, day, timeouts=timeouts, dry_run=dry_run
            )
            if restored.rows_restored and not dry_run:
                instance.report_runless_asset_event(observation_of_restored_date(restored))
            yield restored
