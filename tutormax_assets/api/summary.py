"""Summaries: the outcome of a reference date, and of each of its tutors."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

MOST_ERRORS_SHOWN = 100
"""Errors of a date that are logged and printed one by one."""


SYSTEM = "SYSTEM"
"""Stands in place of a tutor's id in the error of a run that failed as a whole."""

ALL_TUTORS, CHOSEN_TUTORS, CHANGED_TUTORS = "all tutors", "chosen tutors", "changed tutors"
NOTHING = "nothing"


@dataclass
class AggregationResult:
    """What became of one tutor.

    Attributes:
        tutor_id: The tutor.
        success: Whether all windows are in the table.
        metrics_saved: Ids of the tutor's rows for the date.
        error: Why the tutor was not saved.
        windows_processed: The windows of those rows, such as ``30day``.
    """

    tutor_id: str
    success: bool
    metrics_saved: list[str] = field(default_factory=list)
    error: str | None = None
    windows_processed: list[str] = field(default_factory=list)


@dataclass
class AggregationSummary:
    """What became of a reference date.

    Attributes:
        run_date: The instant that the reference date stands for.
        total_tutors: Tutors that the run was about.
        successful: Tutors that are in the table with all windows.
        failed: Tutors that are not.
        total_metrics_saved: Rows of those tutors that the table holds now.
        total_runtime_seconds: Seconds from the start of the run to its end.
        errors: ``tutor_id`` and ``error`` of each failure; the id is ``SYSTEM`` where the run
            failed as a whole.
        results: One result per tutor.
        warnings: What the checks say that warned of the date.
        read: Which tutors were read: ``all tutors``, ``chosen tutors``, ``changed tutors``, or
            ``nothing`` where none had changed.
        search_seconds: How long it took to find the tutors who had changed.
        set_aside: ``source_table``, ``column``, ``reason`` and number of the ``values`` that break
            the source contract and were not used.
    """

    run_date: datetime
    total_tutors: int = 0
    successful: int = 0
    failed: int = 0
    total_metrics_saved: int = 0
    total_runtime_seconds: float = 0.0
    errors: list[dict[str, str]] = field(default_factory=list)
    results: list[AggregationResult] = field(default_factory=list)
    set_aside: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # Names and arguments are those of the replaced service.
    read: str = field(default=ALL_TUTORS, init=False)
    search_seconds: float = field(default=0.0, init=False)

    @property
    def success_rate(self) -> float:
        """Successful tutors in percent of all, to two decimals; 0 when there are none."""
        if self.total_tutors == 0:
            return 0.0
        return round(100 * self.successful / self.total_tutors, 2)

    @property
    def is_unchanged(self) -> bool:
        """Whether the date was up to date, so that nothing was read or written."""
        return self.read == NOTHING

    @property
    def values_set_aside(self) -> int:
        """Number of values that were not used."""
        return sum(reason["values"] for reason in self.set_aside)

    @property
    def all_saved(self) -> bool:
        """Whether nothing failed."""
        return not self.errors

    def first_errors(self) -> Iterator[tuple[str, str]]:
        """Yield the subject and message of the first errors, then how many remain."""
        for error in self.errors[:MOST_ERRORS_SHOWN]:
            yield error["tutor_id"], error["error"]
        more = len(self.errors) - MOST_ERRORS_SHOWN
        if more > 0:
            yield f"and {more} more", "the run in the Dagster UI shows all of them, as does --json"

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON can hold it, without the results by tutor.

        Of a date that was brought up to date by those who had changed it says so.
        """
        refreshed = {"read": self.read, "search_seconds": round(self.search_seconds, 3)}
        return {
            "run_date": self.run_date.isoformat(),
            "total_tutors": self.total_tutors,
            "successful": self.successful,
            "failed": self.failed,
            "total_metrics_saved": self.total_metrics_saved,
            "total_runtime_seconds": round(self.total_runtime_seconds, 2),
            "success_rate": self.success_rate,
            "errors": self.errors,
            "warnings": self.warnings,
            "set_aside": self.set_aside,
            **(refreshed if self.read in (CHANGED_TUTORS, NOTHING) else {}),
        }

    def __str__(self) -> str:
        """The summary in one line, as the log shows it."""
        return (
            f"Run date {self.run_date.date()}: {self.total_tutors} tutors, "
            f"{self.successful} successful, {self.failed} failed, "
            f"{self.total_metrics_saved} metrics saved, success rate {self.success_rate}%, "
            f"{self.values_set_aside} values set aside, "
            f"runtime {self.total_runtime_seconds:.2f}s"
        )
