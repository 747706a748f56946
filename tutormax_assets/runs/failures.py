"""Why a run failed, in one sentence for each thing that did."""

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import dagster as dg

from tutormax_assets.errors import affects_every_date
from tutormax_assets.runs.memory import is_out_of_memory, out_of_memory

_INTERRUPTED = "DagsterExecutionInterruptedError"


class RecordedError(Protocol):
    """What is read here of an error that Dagster recorded; its class is private."""

    @property
    def message(self) -> str:
        """The error's class and text, with line ends."""
        ...

    @property
    def cls_name(self) -> str | None:
        """Name of the error's class."""
        ...

    @property
    def cause(self) -> "RecordedError | None":
        """The error that it was raised from."""
        ...


def step_failure(event: dg.DagsterEvent) -> str:
    """The reason that a failed step gives: its description, or the first line of its error."""
    failure = event.step_failure_data
    if failure.user_failure_data is not None and failure.user_failure_data.description:
        return failure.user_failure_data.description
    if failure.error is None:
        return event.message or "it gave no reason"
    return error_sentence(failure.error)


def error_sentence(error: RecordedError) -> str:
    """The first line of what the code raised; what that was raised from in turn is detail."""
    # Dagster wraps what the code raised.
    while error.cause and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    if error.cls_name == _INTERRUPTED:
        return "It was interrupted. No partition is half-written; run the dates again."
    # Our own errors are sentences; of others the class is half of the message.
    sentence = re.sub(r"^tutormax_assets[\w.]*: ", "", error.message.strip().splitlines()[0])
    if is_out_of_memory(error.cls_name, error.message):
        return out_of_memory(sentence.rstrip("."))
    return sentence


def is_of_every_date(events: Iterable[dg.DagsterEvent]) -> bool:
    """Whether a run failed for a reason that each of its dates by itself would fail for, too.

    The platform cannot be reached, read or written at all. That a statement took too long is no
    such reason, since a single date reads less.

    Args:
        events: Those of the run, of which the failures count.
    """
    return any(affects_every_date(error.cls_name) for error in _errors(events))


def is_interrupted(events: Iterable[dg.DagsterEvent]) -> bool:
    """Whether a run failed because someone stopped its process, with Ctrl-C or SIGTERM."""
    return any(error.cls_name == _INTERRUPTED for error in _errors(events))


def is_blocking_check(event: dg.DagsterEvent) -> bool:
    """Whether a step failed because a check stopped it, rather than by an error of its own."""
    error = event.step_failure_data.error
    return error is not None and error.cls_name == "DagsterAssetCheckFailedError"


def _errors(events: Iterable[dg.DagsterEvent]) -> Iterator[RecordedError]:
    """The errors of the failures among these events, each before what it was raised from."""
    for event in events:
        error: RecordedError | None = None
        if event.event_type is dg.DagsterEventType.STEP_FAILURE:
            error = event.step_failure_data.error
        elif event.event_type is dg.DagsterEventType.RUN_FAILURE and event.event_specific_data:
            error = event.job_failure_data.error
        while error is not None:
            yield error
            error = error.cause
