"""What an alert says: what happened, for which dates, what failed, where to look, what to do."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date

import dagster as dg

from tutormax_assets.defs.automation.receivers import Message
from tutormax_assets.defs.automation.schedule import DEADLINE_HOUR
from tutormax_assets.defs.checks import ADVICE_METADATA
from tutormax_assets.runs.failures import error_sentence, is_blocking_check, step_failure
from tutormax_assets.runs.tags import partition_keys

MAX_LINES = 10
"""Lines of a list in a message; what is beyond is counted."""

MAX_CHARACTERS = 400
"""Characters of a reason in a message."""

_WARN = dg.AssetCheckSeverity.WARN


@dataclass
class Findings:
    """What went wrong in a run.

    Attributes:
        run: The run.
        keys: Its reference dates.
        failures: A line for each step that failed, or for the run where none did.
        checks: A line for each check that did not pass, with its dates.
        advice: What the checks that did not pass say after their first sentence.
        worst: The severity of the worst check that did not pass.
    """

    run: dg.DagsterRun
    keys: Sequence[str]
    failures: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    worst: dg.AssetCheckSeverity | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the run itself failed."""
        return self.run.status is dg.DagsterRunStatus.FAILURE


def findings_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Findings:
    """Read from a run's events what went wrong in it."""
    found = Findings(run, partition_keys(run))
    dates_of_check: dict[tuple[bool, str], list[str]] = {}
    for event in _events(instance, run, dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        evaluation = event.asset_check_evaluation_data
        if evaluation.passed:
            continue
        if found.worst in (None, _WARN):
            found.worst = evaluation.severity
        name = f"{evaluation.asset_key.to_user_string()}: {evaluation.check_name}"
        problem, advice = _problem_and_advice(evaluation)
        reason = f". {' '.join(problem.split())}" if problem else ""
        blocked = evaluation.blocking and evaluation.severity is not _WARN
        line = (
            f"check {name} ({evaluation.severity.value}{', blocking' if blocked else ''}){reason}"
        )
        is_warning = evaluation.severity is _WARN
        dates = dates_of_check.setdefault((is_warning, line), [])
        if not (found.has_failed and is_warning):
            found.advice.append(" ".join(advice.split()))
        if evaluation.partition is not None:
            dates.append(evaluation.partition)
    found.keys = found.keys or sorted({key for dates in dates_of_check.values() for key in dates})
    for (_, line), dates in sorted(dates_of_check.items(), key=lambda item: item[0][0]):
        on = f"{_dates(dates)}, " if dates and len(found.keys) > 1 else ""
        found.checks.append(on + line)
    if found.has_failed:
        found.failures = [
            f"step {event.step_key}. {first_sentence(step_failure(event))}"
            for event in _events(instance, run, dg.DagsterEventType.STEP_FAILURE)
            # The check that stopped it is in the list of checks.
            if not (found.checks and is_blocking_check(event))
        ]
        if not found.failures and not found.checks:
            found.failures = [_run_failure(instance, run)]
    return found


def message_about_runs(found: Sequence[Findings], *, ui_url: str) -> Message | None:
    """One message about runs that belong together, if anything went wrong in any of them.

    Args:
        found: What went wrong in each of them, in the order of their dates.
        ui_url: Where the UI is.
    """
    failed = [one for one in found if one.has_failed]
    warned = [one for one in found if one.checks and not one.has_failed]
    unwell = failed or warned
    if not unwell:
        return None
    job = _job(unwell[0].run)
    dates = [key for one in unwell for key in one.keys]
    of = f" for {_dates(dates)}" if dates else ""
    if failed:
        what = "failed"
    elif any(one.worst is not _WARN for one in unwell):
        what = "finished with failed checks"
    else:
        what = "finished with warnings"
    if len(found) > 1:
        what += f" in {len(unwell)} of {len(found)} runs"
    body = ["What failed:" if failed else "What the checks found:"]
    body += _list(_lines(unwell, dated=len(unwell) > 1))
    if failed and warned:
        body += ["", "What the checks found for dates that are saved:"]
        body += _list(_lines(warned, dated=True))
    all_unwell = [*failed, *warned]
    body += ["", "Where to look:"]
    body += _list(run_url(one.run.run_id, ui_url=ui_url) for one in all_unwell)
    body += ["", "What to do:"]
    body += _list(line for one in all_unwell for line in one.advice if line)
    body += [f"- {_general_advice(unwell)}"]
    return Message(
        f"tutormax: {job} {what}{of}", "\n".join(body), "failure" if failed else "warning"
    )


def message_about_single_days(
    found: Sequence[Findings], *, range_run_id: str, ui_url: str
) -> Message:
    """How the dates of a failed range run fared one by one.

    Args:
        found: What went wrong in the run of each date.
        range_run_id: The range run.
        ui_url: Where the UI is.
    """
    saved = [one for one in found if one.run.status is dg.DagsterRunStatus.SUCCESS]
    title = (
        f"tutormax: {len(saved)} of {len(found)} dates computed one by one after their range failed"
    )
    of_range = f"The range run: {run_url(range_run_id, ui_url=ui_url)}"
    rest = message_about_runs(found, ui_url=ui_url)
    lost = [key for one in found if one not in saved for key in one.keys]
    if rest is None and not lost:
        return Message(title, of_range, "success")
    body = [f"Not computed: {_dates(lost)}", ""] if lost else []
    body += [rest.body, ""] if rest else []
    return Message(title, "\n".join([*body, of_range]), "failure" if lost else "warning")


def message_about_late_dates(days: Sequence[date], *, timezone: str, ui_url: str) -> Message:
    """That metrics are not there by the deadline.

    Args:
        days: Reference dates without a materialization.
        timezone: That of the deadline.
        ui_url: Where the UI is.
    """
    dates = _dates([day.isoformat() for day in days])
    commands = " and ".join(f"tutormax run --date {day}" for day in days[-3:])
    return Message(
        f"tutormax: no metrics for {dates}",
        f"tutor_performance_metrics has no materialization for {dates}, due by"
        f" {DEADLINE_HOUR:02}:00 {timezone}. Readers of the table see the last date before it.\n\n"
        f"Where to look: {ui_url.rstrip('/')}/automation shows whether the schedule is on and"
        f" what it did, {ui_url.rstrip('/')}/runs whether a run waits or failed.\n\n"
        f"What to do: turn the schedule on if it is off, and materialize the date in the UI or"
        f" with: {commands}",
        "failure",
    )


def message_about_silence(problems: Sequence[str], *, ui_url: str) -> Message:
    """That schedules or sensors fail or do not tick.

    Args:
        problems: A sentence for each.
        ui_url: Where the UI is.
    """
    count = f"{len(problems)} schedules or sensors" if len(problems) > 1 else "a schedule or sensor"
    return Message(
        f"tutormax: {count} failing or silent",
        "\n".join(
            [
                *_list(iter(problems)),
                "",
                f"Where to look: {ui_url.rstrip('/')}/automation shows their ticks and errors.",
                "",
                "What to do: fix the cause that a failed tick names; where one does not tick, see"
                " the log of the daemon and start it again.",
            ]
        ),
        "failure",
    )


def run_url(run_id: str, *, ui_url: str) -> str:
    """Where the UI shows a run."""
    return f"{ui_url.rstrip('/')}/runs/{run_id}"


def first_sentence(text: str) -> str:
    """The first sentence of a text, cut where it is very long."""
    line = text.strip().splitlines()[0] if text.strip() else "it gave no reason"
    end = re.search(r"[.!?](?=\s)", line)
    sentence = line[: end.end()] if end else line
    return sentence if len(sentence) <= MAX_CHARACTERS else sentence[:MAX_CHARACTERS] + "…"


def _problem_and_advice(evaluation: dg.AssetCheckEvaluation) -> tuple[str, str]:
    recorded = evaluation.metadata.get(ADVICE_METADATA)
    advice = recorded.value if isinstance(recorded, dg.TextMetadataValue) else None
    return (evaluation.description or "").removesuffix(advice or "").rstrip(), advice or ""


def _events(
    instance: dg.DagsterInstance, run: dg.DagsterRun, of_type: dg.DagsterEventType
) -> Iterator[dg.DagsterEvent]:
    for record in instance.get_records_for_run(run.run_id, of_type=of_type).records:
        event = record.event_log_entry.dagster_event
        if event is not None:
            yield event


def _run_failure(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    for event in _events(instance, run, dg.DagsterEventType.RUN_FAILURE):
        error = event.job_failure_data.error if event.event_specific_data else None
        reason = error_sentence(error) if error else event.message or "it gave no reason"
        return f"the run, outside of its steps. {first_sentence(reason)}"
    return "the run, outside of its steps"


def _job(run: dg.DagsterRun) -> str:
    if not run.job_name.startswith("__"):
        return run.job_name
    what, assets = "materialization", set(run.asset_selection or ())
    if not assets:
        what, assets = "checks", {check.asset_key for check in run.asset_check_selection or ()}
    names = sorted(key.to_user_string() for key in assets)
    return f"{what} of {names[0] if len(names) == 1 else f'{len(names)} assets'}"


def _dates(keys: Sequence[str]) -> str:
    keys = sorted(set(keys))
    if len(keys) <= 3:
        return ", ".join(keys)
    days = [date.fromisoformat(key) for key in keys]
    if (days[-1] - days[0]).days == len(days) - 1:
        return f"{keys[0]} to {keys[-1]}"
    return f"{', '.join(keys[:3])} and {len(keys) - 3} more dates"


def _lines(unwell: Sequence[Findings], *, dated: bool) -> Iterator[str]:
    for one in unwell:
        for line in (*one.failures, *one.checks):
            yield f"{_dates(one.keys)}, {line}" if dated and one.keys else line


def _list(lines: Iterator[str]) -> list[str]:
    every = list(dict.fromkeys(lines))
    shown = [f"- {line}" for line in every[:MAX_LINES]]
    return shown if len(every) <= MAX_LINES else [*shown, f"- and {len(every) - MAX_LINES} more"]


def _general_advice(unwell: Sequence[Findings]) -> str:
    if not any(one.has_failed for one in unwell):
        return (
            "The metrics are in the table. The report of each check in the UI says which rows it is"
            " about."
        )
    dates = [key for one in unwell for key in one.keys]
    again = "run it again in the UI"
    if len(unwell) == 1 and len(unwell[0].keys) > 1:
        return (
            "Nothing yet, if the sensors for the single days of failed ranges are on: each date is"
            " run by itself, and one message will say which could be computed. Otherwise fix the"
            f" cause and run: tutormax backfill --from {dates[0]} --to {dates[-1]}"
        )
    if dates:
        again = f"materialize {_dates(dates)} again in the UI or with: " + " and ".join(
            f"tutormax run --date {key}" for key in dates[:3]
        )
    return (
        "What a failed step would have written is as it was before, but for the tutors that it says"
        " it saved. Fix the cause that the run or the report of its check names, then"
        f" {again}"
    )
