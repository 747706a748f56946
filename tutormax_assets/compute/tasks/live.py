"""Live numbers: the metrics of windows that end now."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import perf_counter

import polars as pl

from tutormax_assets.compute.tasks.reading import tiers_until
from tutormax_assets.compute.tasks.roster import choose_roster
from tutormax_assets.database.live_metrics import replace_live_metrics
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.view import open_view
from tutormax_assets.storage.spool import spool_folder


@dataclass(frozen=True)
class LiveReport:
    """What a refresh of the live numbers has done.

    Attributes:
        calculated_at: The instant at which the windows end: that of the platform's snapshot.
        tiers: ``TutorTiers`` of the tutors.
        rows_changed: Rows of the table that were written or deleted.
        unknown: Ids that were asked for and are not in the platform's tutors.
        inactive: Ids that were asked for and are left out since they are not active.
        seconds: How long it took.
    """

    calculated_at: datetime
    tiers: pl.DataFrame
    rows_changed: int
    unknown: Sequence[str]
    inactive: Sequence[str]
    seconds: float


def refresh_live_metrics(
    database: PlatformDatabase,
    home_path: Path,
    *,
    policy: Policy,
    tutor_ids: Sequence[str] = (),
) -> LiveReport:
    """Compute the metrics of active tutors up to now, and replace their rows in the table.

    Args:
        database: The platform, and where the table is.
        home_path: Folder of everything local.
        policy: Windows, thresholds and weights.
        tutor_ids: Only these tutors; all when empty.

    Raises:
        SourceError: The platform cannot be read. Its cause tells whether to try again.
        MetricsTableError: The table cannot be written, likewise.
    """
    started = perf_counter()
    with (
        spool_folder(home_path) as folder,
        open_view(database.source, tutor_ids=tutor_ids) as view,
    ):
        chosen = choose_roster(view.tutors(), tutor_ids=tutor_ids or None, include_inactive=False)
        calculated_at = view.read_at
        tiers = tiers_until(
            view, folder / "source", chosen.tutors, instant=calculated_at, policy=policy
        )
    rows = replace_live_metrics(
        database.engine,
        tiers,
        calculated_at=calculated_at,
        of_all_tutors=not tutor_ids,
        timeouts=database.timeouts,
    )
    seconds = perf_counter() - started
    return LiveReport(calculated_at, tiers, rows, chosen.unknown, chosen.inactive, seconds)
