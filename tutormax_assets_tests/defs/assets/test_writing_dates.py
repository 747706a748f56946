"""Dates of a range are written two at a time, and what became of each is told."""

import logging
from collections.abc import Generator, Iterator
from datetime import date
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.defs.assets import tutor_performance_metrics as writing

KEYS = ["2025-11-05", "2025-11-06", "2025-11-07", "2025-11-08"]


class Table:
    """Stands in for the writing of a date: the first date waits for the second one."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.begun: list[str] = []
        self.is_stopped = False
        self.second_is_over = Event()

    def stop(self) -> None:
        self.is_stopped = True

    def map(self, _: object, tasks: Any, *, log: logging.Logger) -> Iterator[tuple[str, Any]]:
        key = next(iter(tasks))
        self.begun.append(key)
        if key == KEYS[0]:
            assert self.second_is_over.wait(10)
        try:
            if key in self.refused:
                raise MetricsTableError(f"no room for {key}")
            yield key, SimpleNamespace(failure=None)
        finally:
            if key == KEYS[1]:
                self.second_is_over.set()


def outcomes(table: Table) -> Generator[writing._Written, None, None]:
    plans = (
        writing._PlanOfDate(
            key, date.fromisoformat(key), cast("Any", SimpleNamespace(tasks={key: None}))
        )
        for key in KEYS
    )
    log = logging.getLogger("tutormax_assets")
    return writing._write_dates(cast("Any", table), plans, at_once=2, log=log)


def written(table: Table) -> list[tuple[str, str | None]]:
    return [(one.of.key, None if one.error is None else str(one.error)) for one in outcomes(table)]


def test_who_stops_a_run_waits_for_no_further_attempt() -> None:
    table = Table()
    found = outcomes(table)

    next(found)
    assert not table.is_stopped
    found.close()

    assert table.is_stopped


def test_all_dates_are_written_in_their_order() -> None:
    assert written(Table()) == [(key, None) for key in KEYS]


@pytest.mark.parametrize("refused", [KEYS[1:2], KEYS[:2]])
def test_after_a_date_that_is_broken_off_no_other_is_begun_and_each_reason_is_logged(
    refused: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    table = Table(*refused)

    with caplog.at_level(logging.ERROR, "tutormax_assets"):
        found = written(table)

    assert [key for key, error in found if error is not None] == refused
    assert sorted(table.begun) == KEYS[:2]
    assert sorted(caplog.messages) == [
        f"{key} was broken off: no room for {key}" for key in refused
    ]
