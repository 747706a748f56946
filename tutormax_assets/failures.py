"""Why a run failed, in one sentence for each thing that did."""

import re
from typing import Protocol

import dagster as dg


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
    # Our own errors are sentences; of others the class is half of the message.
    return re.sub(r"^tutormax_assets[\w.]*: ", "", error.message.strip().splitlines()[0])


def is_blocking_check(event: dg.DagsterEvent) -> bool:
    """Whether a step failed because a check stopped it, rather than by an error of its own."""
    error = event.step_failure_data.error
    return error is not None and error.cls_name == "DagsterAssetCheckFailedError"
