"""Refreshes the live numbers, once or for as long as somebody watches."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import dagster as dg
import sqlalchemy as sa

from tutormax_assets.compute.tasks.live import LiveReport, refresh_live_metrics
from tutormax_assets.database.faults import may_pass, reason
from tutormax_assets.defs.assets.live_metrics import LIVE_METRICS, RECORD_SECONDS, live_metadata
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.errors import TutormaxError
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.settings import Settings
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.view import UnknownTutorsError

logger = logging.getLogger(LOGGER)


def compute_live_metrics(settings: Settings, *, tutor_ids: Sequence[str] = ()) -> LiveReport:
    """Compute the metrics up to now of active tutors, and replace them in the table.

    Args:
        settings: Where everything is.
        tutor_ids: Only these tutors; all when empty.

    Raises:
        UnknownTutorsError: None of the tutors is known.
        SourceError: The platform cannot be read.
        MetricsTableError: The table cannot be written.
        PolicyError: The policy of the settings is refused.
    """
    policy = load_policy(settings)
    with closing(PlatformDatabase(settings)) as database:
        report = refresh_live_metrics(
            database, settings.home_path, policy=policy, tutor_ids=tutor_ids
        )
    _expect_known(report, tutor_ids)
    return report


def watch_live_metrics(
    settings: Settings, *, tutor_ids: Sequence[str] = ()
) -> Iterator[LiveReport]:
    """Refresh the live numbers again and again, each ``live_seconds`` after the last began.

    A failure that may pass is logged, and the next refresh tries again. Where all tutors are
    refreshed, a materialization of ``live_metrics`` is put on record every ``RECORD_SECONDS``.

    Args:
        settings: Where everything is.
        tutor_ids: Only these tutors; all when empty.

    Raises:
        UnknownTutorsError: None of the tutors is known.
        SourceError: The platform cannot be read, and trying again does not help.
        MetricsTableError: The table cannot be written, likewise.
        PolicyError: The policy of the settings is refused.
    """
    policy = load_policy(settings)
    record_at = time.monotonic()
    with closing(PlatformDatabase(settings)) as database:
        while True:
            started = time.monotonic()
            try:
                report = refresh_live_metrics(
                    database, settings.home_path, policy=policy, tutor_ids=tutor_ids
                )
            except TutormaxError as error:
                if not may_pass(error):
                    raise
                logger.warning("%s", reason(error))
            else:
                _expect_known(report, tutor_ids)
                yield report
                if not tutor_ids and time.monotonic() >= record_at:
                    _record(settings, report)
                    record_at = time.monotonic() + RECORD_SECONDS
            time.sleep(max(0.0, started + settings.live_seconds - time.monotonic()))


def _expect_known(report: LiveReport, tutor_ids: Sequence[str]) -> None:
    if tutor_ids and len(report.unknown) == len(set(tutor_ids)):
        raise UnknownTutorsError(
            f"Not in the platform's tutors: {', '.join(report.unknown)}. Check the ids."
        )


def _record(settings: Settings, report: LiveReport) -> None:
    """Put a materialization on record; the numbers do not need it."""
    try:
        with dagster_instance(settings) as instance:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(LIVE_METRICS, metadata=live_metadata(report))
            )
    except (sa.exc.DBAPIError, OSError) as error:
        logger.warning("The refresh is not on record in Dagster: %s", reason(error))
