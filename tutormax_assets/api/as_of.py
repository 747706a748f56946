"""Computes the metrics of reference dates as they could be known at an instant."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import partial
from typing import Any

import dagster as dg

from tutormax_assets.api.runs import JobRunner, job_runner, known_only, run_failure
from tutormax_assets.api.summary import SYSTEM
from tutormax_assets.dates import parse_as_of
from tutormax_assets.definitions import AS_OF_JOB_NAME
from tutormax_assets.defs.assets.tutor_metrics_as_of import TUTOR_METRICS_AS_OF
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.settings import Settings


@dataclass
class AsOfSummary:
    """What became of a reference date.

    Attributes:
        reference_date: The date.
        as_of: The instant at which rows had to be known.
        rows: Number of rows that are stored, one per tutor and window.
        path: Where they are stored.
        errors: Why they are not.
    """

    reference_date: date
    as_of: datetime
    rows: int = 0
    path: str = ""
    errors: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The summary in JSON's types."""
        return {
            "reference_date": self.reference_date.isoformat(),
            "as_of": self.as_of.isoformat(),
            "rows": self.rows,
            "path": self.path,
            "errors": self.errors,
        }


def compute_as_of(
    settings: Settings,
    days: Sequence[date],
    options: RunOptions,
    *,
    as_of: str,
    source: str = "Python API",
) -> list[AsOfSummary]:
    """Compute the metrics of consecutive reference dates as of an instant, and store them.

    They are Parquet only; what the nightly job has stored stays as it is.

    Args:
        settings: Where everything is.
        days: Consecutive reference dates, ascending.
        options: Options of the run.
        as_of: ``each-date``, or an instant in ISO form.
        source: What started the runs, for their tags.

    Returns:
        One summary per date.

    Raises:
        AsOfError: The instant is not possible for one of the dates.
        UnknownTutorsError: None of the tutors is known.
        KeyboardInterrupt: Someone stopped the process; what ran until then is on record.
    """
    instants = {day: parse_as_of(as_of, day=day, timezone=settings.timezone) for day in days}
    options, _ = known_only(settings, options)
    with job_runner(settings, AS_OF_JOB_NAME, source=source) as runner:
        run = partial(_compute_dates, runner, options, as_of, instants)
        return runner.run_in_chunks(run, days)


def _compute_dates(
    runner: JobRunner,
    options: RunOptions,
    as_of: str,
    instants: dict[date, datetime],
    days: Sequence[date],
) -> tuple[dg.ExecuteInProcessResult, list[AsOfSummary]]:
    result = runner.run(
        days,
        {
            "ops": {TUTOR_METRICS_AS_OF: {"config": {"as_of": as_of}}},
            "resources": {"run_options": {"config": options.model_dump()}},
        },
    )
    stored = {
        event.partition: event.step_materialization_data.materialization.metadata
        for event in result.get_asset_materialization_events()
    }
    summaries = []
    for day in days:
        summary = AsOfSummary(day, instants[day])
        metadata: Any = stored.get(day.isoformat())
        if metadata is None:
            error = run_failure(result) or "it was not computed"
            summary.errors.append({"tutor_id": SYSTEM, "error": error})
        else:
            summary.rows = metadata["dagster/partition_row_count"].value
            summary.path = metadata["path"].value
        summaries.append(summary)
    return result, summaries
