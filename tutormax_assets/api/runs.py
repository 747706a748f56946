"""Runs of the job in this process, and their summaries."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar

import dagster as dg

from tutormax_assets.api.summary import (
    ALL_TUTORS,
    CHANGED_TUTORS,
    CHOSEN_TUTORS,
    MOST_ERRORS_SHOWN,
    NOTHING,
    SYSTEM,
    AggregationSummary,
)
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.dates import midnight
from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.defs.assets import PLATFORM_POOL
from tutormax_assets.defs.assets.platform_snapshot import (
    SET_ASIDE_BY_RUN_METADATA,
    SET_ASIDE_METADATA,
)
from tutormax_assets.defs.assets.tutor_performance_metrics import SUMMARY_METADATA
from tutormax_assets.defs.automation.alerts import tell_of_runs
from tutormax_assets.defs.automation.metrics import publish_metrics
from tutormax_assets.defs.checks import is_blocked_by, sentence
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.defs.refresh import plan_refresh
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.runs.failures import (
    error_sentence,
    is_blocking_check,
    is_interrupted,
    is_of_every_date,
    step_failure,
)
from tutormax_assets.runs.instance import (
    dagster_home,
    dagster_instance,
    make_pool,
)
from tutormax_assets.runs.killed_runs import PROCESS_TAG, end_killed_runs, this_process
from tutormax_assets.runs.private_dagster import runs_of_code_location
from tutormax_assets.runs.tags import ATTENDED_TAG, RANGE_END_TAG, RANGE_START_TAG, SOURCE_TAG
from tutormax_assets.settings import Settings
from tutormax_assets.source.streams import SourceError
from tutormax_assets.source.view import UnknownTutorsError, source_of, unknown_tutors
from tutormax_assets.storage.files import StorageError

_UNKNOWN_TUTOR = "The tutor is not in the platform's tutors. Check the id."


logger = logging.getLogger(LOGGER)

# Dagster configures Python's logging anew for each run, and two threads that do so at once can
# wait for each other for ever. Processes need no such lock.
_one_run_of_this_process = threading.Lock()


class DateSummary(Protocol):
    """What a run says of a reference date."""

    @property
    def errors(self) -> list[dict[str, str]]:
        """What failed, each with its ``tutor_id``, or ``SYSTEM``, and ``error``."""
        ...


S = TypeVar("S", bound=DateSummary)

_Result = dg.ExecuteInProcessResult

_Outcome = tuple[_Result, list[S]]


def steps(settings: Settings, dates: int) -> int:
    """Number of steps in which so many consecutive reference dates are computed."""
    job = build_definitions(settings).resolve_job_def(JOB_NAME)
    return len(job.nodes) * -(-dates // (settings.max_dates_per_run or dates))


def aggregate(
    settings: Settings,
    days: Sequence[date],
    options: RunOptions,
    *,
    source: str = "Python API",
    changed_only: bool = False,
) -> list[AggregationSummary]:
    """Run the job for consecutive reference dates, many in one run, and log each summary.

    When a run of several dates fails, each of them is run by itself, so that one date that cannot
    be computed does not lose the others; unless it failed for a reason that has nothing to do with
    the dates, such as a database that is down.

    One alert reports the runs that count if anything went wrong in them, and earlier runs whose
    process was killed before it could report them.

    Args:
        settings: Where everything is.
        days: Consecutive reference dates, ascending.
        options: Options of the run. Tutors who are not in the platform's tutors are left out of it
            and named in the errors of each summary.
        source: What started the runs, for their tags.
        changed_only: Whether a run of a single stored date reads only the tutors whose rows have
            changed in the platform. It reads all of them if the changes cannot be determined.

    Returns:
        One summary per date.

    Raises:
        UnknownTutorsError: None of the tutors is known; no run is on record.
        KeyboardInterrupt: Someone stopped the process; what ran until then is on record.
    """
    options, unknown = known_only(settings, options)
    summaries = []
    with job_runner(settings, JOB_NAME, source=source) as runner:
        scope = _find_scope(settings, runner.instance, days, options, changed_only=changed_only)
        if scope.read == NOTHING:
            return [scope.mark(AggregationSummary(midnight(days[0], timezone=settings.timezone)))]
        run = partial(_aggregate_dates, runner, settings, scope.options)
        summaries = runner.run_in_chunks(run, days)
    for summary in summaries:
        scope.mark(summary)
        _add_unknown(summary, unknown)
        logger.info("%s", summary)
        for tutor_id, error in summary.first_errors():
            logger.error("%s: %s", tutor_id, error)
    return summaries


def _add_unknown(summary: AggregationSummary, unknown: Sequence[str]) -> None:
    summary.total_tutors += len(unknown)
    summary.failed += len(unknown)
    summary.errors += [{"tutor_id": one, "error": _UNKNOWN_TUTOR} for one in unknown]


def _run_dates(
    run: Callable[[Sequence[date]], _Outcome[S]], days: Sequence[date]
) -> tuple[list[S], list[str]]:
    """Run dates at once, and one by one if that fails for a reason that not all of them have.

    Returns:
        The summaries, and the ids of the runs that count.
    """
    result, summaries = run(days)
    if (
        len(days) == 1
        or not any(_failed_as_a_whole(summary) for summary in summaries)
        or is_of_every_date(result.all_events)
    ):
        return summaries, [result.run_id]
    logger.warning("The run of %s to %s failed; running each date by itself", days[0], days[-1])
    of_days = [run([day]) for day in days]
    return [summary for _, [summary] in of_days], [result.run_id for result, _ in of_days]


def known_only(settings: Settings, options: RunOptions) -> tuple[RunOptions, list[str]]:
    """The options without tutors who are not in the platform's tutors, and those tutors.

    Raises:
        UnknownTutorsError: None of the tutors is known.
    """
    if options.tutor_ids is None:
        return options, []
    try:
        unknown = unknown_tutors(source_of(settings), options.tutor_ids)
    except SourceError:
        # The run meets it too: it tries again, and puts it on record.
        return options, []
    known = [one for one in dict.fromkeys(options.tutor_ids) if one not in set(unknown)]
    if not known:
        shown = ", ".join(map(repr, unknown[:MOST_ERRORS_SHOWN]))
        more = len(unknown) - MOST_ERRORS_SHOWN
        raise UnknownTutorsError(
            f"None of the tutors is in the platform's tutors: {shown}"
            f"{f' and {more} more' if more > 0 else ''}. Check the ids; on the command line,"
            " --tutor takes an id with a comma or outer spaces as it is."
        )
    return RunOptions(**{**options.model_dump(), "tutor_ids": known}), unknown


class _Scope(NamedTuple):
    """The tutors of a run.

    Attributes:
        options: Options of the run, which name them.
        read: As ``AggregationSummary`` has it.
        search_seconds: Likewise.
    """

    options: RunOptions
    read: str
    search_seconds: float = 0

    def mark(self, summary: AggregationSummary) -> AggregationSummary:
        """The summary, with the scope noted in it."""
        summary.read, summary.search_seconds = self.read, self.search_seconds
        return summary


def _find_scope(
    settings: Settings,
    instance: dg.DagsterInstance,
    days: Sequence[date],
    options: RunOptions,
    *,
    changed_only: bool,
) -> _Scope:
    """The scope of a run: chosen tutors, those that have changed, or all."""
    if options.tutor_ids is not None:
        return _Scope(options, CHOSEN_TUTORS)
    if not changed_only:
        return _Scope(options, ALL_TUTORS)
    started = perf_counter()
    [day] = days
    found, read = _find_changed(settings, instance, day, options)
    return _Scope(found, read, perf_counter() - started)


def _find_changed(
    settings: Settings, instance: dg.DagsterInstance, day: date, options: RunOptions
) -> tuple[RunOptions, str]:
    """The options of a run that brings a date up to date, and which tutors it reads."""
    try:
        refresh = plan_refresh(settings, instance, day, include_inactive=options.include_inactive)
    except (SourceError, StorageError):
        # The run meets it too, and puts it on record.
        return options, ALL_TUTORS
    if refresh.tutor_ids is None:
        if refresh.why:
            logger.info("%s", refresh.why)
        return options, ALL_TUTORS
    if not refresh.tutor_ids:
        logger.info("%s: nothing has changed since %s", day, refresh.why)
        return options, NOTHING
    logger.info("%s: %d tutors have changed since %s", day, len(refresh.tutor_ids), refresh.why)
    given = {"tutor_ids": list(refresh.tutor_ids), "read_state": refresh.read_state}
    return RunOptions(**{**options.model_dump(), **given}), CHANGED_TUTORS


def end_killed_process(settings: Settings, pid: int, reason: str) -> None:
    """Put the runs of a process of this host that is gone on record as failed, and alert.

    Args:
        settings: Where everything is.
        pid: The process.
        reason: Why it is gone.
    """
    home = dagster_home(settings)
    with dagster_instance(settings) as instance:
        ended = end_killed_runs(instance, home, logger, pid=pid, reason=reason)
        tell_of_runs(instance, ended, settings, logger)


@dataclass
class JobRunner:
    """Runs a job in this process and puts its runs on record.

    Attributes:
        instance: Where runs are on record.
    """

    instance: dg.DagsterInstance
    _job: dg.JobDefinition
    _settings: Settings
    _tags: Mapping[str, str]
    _run_ids: list[str] = field(default_factory=list)

    def run(self, days: Sequence[date], run_config: Mapping[str, Any]) -> _Result:
        """Run the job for consecutive reference dates.

        Raises:
            KeyboardInterrupt: Someone stopped the process; what ran until then is on record.
        """
        keys = [day.isoformat() for day in days]
        tags = {**self._tags, "dagster/max_retries": "0"}
        if len(keys) > 1:
            tags |= {RANGE_START_TAG: keys[0], RANGE_END_TAG: keys[-1]}
        with _one_run_of_this_process:
            result = self._job.execute_in_process(
                instance=self.instance,
                run_config={**run_config, "loggers": {"line": {}}},
                raise_on_error=False,
                partition_key=keys[0] if len(keys) == 1 else None,
                tags=tags,
            )
        if is_interrupted(result.all_events):
            # Dagster catches what Ctrl-C and SIGTERM raise, to put it on record.
            raise KeyboardInterrupt
        return result

    def run_in_chunks(
        self, run: Callable[[Sequence[date]], _Outcome[S]], days: Sequence[date]
    ) -> list[S]:
        """The summaries of dates, many of which are run at once, and one by one if that fails.

        Args:
            run: Runs consecutive dates.
            days: Consecutive reference dates, ascending.
        """
        summaries: list[S] = []
        for chunk in _chunks(days, self._settings.max_dates_per_run or len(days)):
            done, run_ids = _run_dates(run, chunk)
            summaries += done
            self._run_ids += run_ids
        return summaries

    def tell(self) -> None:
        """Send one alert about the runs that count, if anything went wrong in them.

        Metrics are published whatever became of the runs.
        """
        tell_of_runs(self.instance, self._run_ids, self._settings, logger)
        publish_metrics(self.instance, self._settings, logger, job_name=JOB_NAME)


@contextmanager
def job_runner(settings: Settings, job_name: str, *, source: str) -> Iterator[JobRunner]:
    """A runner of a job; runs whose process was killed earlier are put on record first.

    Args:
        settings: Where everything is.
        job_name: The job.
        source: What started the runs, for their tags.
    """
    home = dagster_home(settings)
    with (
        dagster_instance(settings) as instance,
        runs_of_code_location(instance, code_location=settings.code_location, job_name=job_name),
        this_process(home) as process,
    ):
        make_pool(instance, PLATFORM_POOL)
        tell_of_runs(instance, end_killed_runs(instance, home, logger), settings, logger)
        job = build_definitions(settings).resolve_job_def(job_name)
        # Its failure is dealt with here, so that neither the sensors nor the daemon need to.
        tags = {ATTENDED_TAG: "true", SOURCE_TAG: source, PROCESS_TAG: process}
        runner = JobRunner(instance, job, settings, tags)
        try:
            yield runner
        finally:
            runner.tell()


def _aggregate_dates(
    runner: JobRunner, settings: Settings, options: RunOptions, days: Sequence[date]
) -> _Outcome[AggregationSummary]:
    started = perf_counter()
    result = runner.run(days, {"resources": {"run_options": {"config": options.model_dump()}}})
    seconds = perf_counter() - started
    return result, _summaries(result, days, timezone=settings.timezone, seconds=seconds)


def _summaries(
    result: dg.ExecuteInProcessResult, days: Sequence[date], *, timezone: str, seconds: float
) -> list[AggregationSummary]:
    """What a run says of each of its reference dates."""
    saved = {
        event.partition: event.step_materialization_data.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey(METRICS_TABLE)
    } | {
        # Of a date whose writing was broken off.
        event.partition: event.asset_observation_data.asset_observation.metadata
        for event in result.get_asset_observation_events()
        if event.asset_key == dg.AssetKey(METRICS_TABLE)
    }
    set_aside = _set_aside(result)
    blocked = _blocking_findings(result)
    warnings = _warnings(result)
    error = run_failure(result) or " ".join(blocked.values()) or None
    summaries = []
    for day in days:
        summary = AggregationSummary(run_date=midnight(day, timezone=timezone))
        summary.total_runtime_seconds = seconds / len(days)
        summary.set_aside = set_aside.get(day.isoformat(), [])
        summary.warnings = warnings.get(day.isoformat(), [])
        if day.isoformat() in saved:
            values: Any = saved[day.isoformat()][SUMMARY_METADATA].value
            for name in ("total_tutors", "successful", "failed", "total_metrics_saved", "errors"):
                setattr(summary, name, values[name])
            # What was saved may be wrong, or not known to be right.
            said = blocked.get(day.isoformat(), None if blocked else error)
        else:
            said = blocked.get(day.isoformat(), error)
        # Those of the table's step are in its summary.
        if said is not None and (not summary.errors or _is_of_another_step(result)):
            summary.errors.append({"tutor_id": SYSTEM, "error": said})
        summaries.append(summary)
    return summaries


def _set_aside(result: dg.ExecuteInProcessResult) -> dict[str | None, list[dict[str, Any]]]:
    """What each snapshot says that it could not use, by partition key."""
    reasons: dict[str | None, list[dict[str, Any]]] = {}
    for event in result.get_asset_materialization_events():
        metadata = event.step_materialization_data.materialization.metadata
        found = metadata.get(SET_ASIDE_BY_RUN_METADATA, metadata.get(SET_ASIDE_METADATA))
        if isinstance(found, dg.TableMetadataValue):
            of_table = [dict(record.data) for record in found.records]
            reasons.setdefault(event.partition, []).extend(of_table)
    return reasons


def _blocking_findings(result: dg.ExecuteInProcessResult) -> dict[str | None, str]:
    """What the checks say that blocked a date, by partition key."""
    said: dict[str | None, list[str]] = {}
    for evaluation in result.get_asset_check_evaluations():
        if is_blocked_by(evaluation):
            said.setdefault(evaluation.partition, []).append(sentence(evaluation))
    return {key: " ".join(sentences) for key, sentences in said.items()}


def _warnings(result: dg.ExecuteInProcessResult) -> dict[str | None, list[str]]:
    """What the checks say that warned of a date, by partition key."""
    said: dict[str | None, list[str]] = {}
    for evaluation in result.get_asset_check_evaluations():
        if not evaluation.passed and not is_blocked_by(evaluation):
            said.setdefault(evaluation.partition, []).append(sentence(evaluation))
    return said


def run_failure(result: dg.ExecuteInProcessResult) -> str | None:
    """Why a run failed, in a sentence; None of one that did not, or that a check blocked."""
    if result.success:
        return None
    failures = result.get_step_failure_events()
    for event in failures:
        if not is_blocking_check(event):
            return step_failure(event)
    if failures:
        return None
    error = result.get_run_failure_event().job_failure_data.error
    return "the run failed before its first step" if error is None else error_sentence(error)


def _is_of_another_step(result: dg.ExecuteInProcessResult) -> bool:
    """Whether a step failed that is neither the table's nor one of checks."""
    return any(
        event.step_key != METRICS_TABLE and not is_blocking_check(event)
        for event in result.get_step_failure_events()
    )


def _failed_as_a_whole(summary: DateSummary) -> bool:
    return any(error["tutor_id"] == SYSTEM for error in summary.errors)


def _chunks(days: Sequence[date], size: int) -> Iterator[Sequence[date]]:
    return (days[start : start + size] for start in range(0, len(days), size))
