"""Faults between a run and its database: one that passes must be survived, one that stays told of.

The connections lead through ``chaos.proxy``, or the server itself ends them or holds its locks.
"""

import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chaos.ground import (
    END,
    OTHER_STATE,
    Frames,
    Ground,
    differences,
    execute,
    ground,
    silent_log,
)
from chaos.proxy import ALWAYS, Proxy
from chaos.report import Report
from tutormax_assets.api.runs import aggregate
from tutormax_assets.api.summary import AggregationSummary
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.settings import load_settings

TUTORS = 60
# A range would be run again date by date, which is no retry.
DAYS = [END]

# Retried 3 times after these: a fault that strikes once is over by then.
OPTIONS = RunOptions(max_retries=3, retry_delay_seconds=0.05)
LOCK_TIMEOUT_SECONDS = 1

# A run whose every try fails has to end; starting Python is a part of it.
PATIENCE_SECONDS = 60.0

_RUNS_BACKENDS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = 'tutormax_assets' AND pid <> pg_backend_pid()
"""


@dataclass
class _Stage:
    """The ground, the faulty way to it and what is right."""

    ground: Ground
    proxy: Proxy
    random: random.Random
    report: Report
    through: dict[str, str]
    """Settings that lead through the proxy."""
    expected: list[Frames] = field(default_factory=list)
    state: int = 0
    seconds: float = 0
    connections: int = 0
    """How long a run takes and how many connections it makes when nothing strikes."""

    def spared(self) -> int:
        """How many connections of a run are made before the one that is struck."""
        return self.random.randrange(self.connections)


def run(*, faults: int, seconds: float, seed: int) -> Report:
    """Run dates under one passing fault each, then under faults that stay.

    Args:
        faults: How many passing faults.
        seconds: When to stop at the latest.
        seed: Seed of what strikes and when.

    Returns:
        How many struck, how many runs were right by their own retries, and what was wrong.
    """
    deadline = time.monotonic() + seconds
    with ground() as here, Proxy(_socket(here), here.home / "proxy") as proxy:
        sample_platform.generate(
            here.engine, tutors=TUTORS, sessions_per_tutor=40, days=130, end=END, seed=seed
        )
        url = proxy.url(here.engine.url).set(password="any")
        variables = {
            "TUTORMAX_DATABASE_URL": url.render_as_string(hide_password=False),
            "TUTORMAX_LOCK_TIMEOUT_SECONDS": str(LOCK_TIMEOUT_SECONDS),
        }
        figures = dict.fromkeys(("faults tried", "survived by retries", "rows or files wrong"), 0)
        stage = _Stage(here, proxy, random.Random(seed), Report("faults", {**figures}), variables)
        with silent_log():
            _learn(stage)
            rounds = 0
            while stage.report.figures["faults tried"] < faults and time.monotonic() < deadline:  # type: ignore[operator]
                _round(stage, list(_PASSING)[rounds % len(_PASSING)])
                rounds += 1
            for name in _LASTING:
                _last(stage, name)
        return stage.report


def _learn(stage: _Stage) -> None:
    for _ in range(2):
        began, connections = time.monotonic(), stage.proxy.connections
        summaries = _aggregate(stage)
        stage.seconds = time.monotonic() - began
        stage.connections = stage.proxy.connections - connections
        if not all(summary.all_saved for summary in summaries):
            raise RuntimeError(f"an undisturbed run failed: {summaries[0].errors}")
        stage.expected.append(stage.ground.frames(DAYS))
        _other_state(stage)
    if not differences(*stage.expected):
        raise RuntimeError("the two states of the source give the same metrics")


def _aggregate(stage: _Stage) -> list[AggregationSummary]:
    with stage.ground.as_environment(**stage.through):
        return aggregate(load_settings(), DAYS, OPTIONS)


def _other_state(stage: _Stage) -> None:
    for statement in OTHER_STATE:
        execute(stage.ground.engine, statement)
    stage.state = 1 - stage.state


def _round(stage: _Stage, kind: str) -> None:
    _other_state(stage)
    if stage.random.random() < 0.5:
        execute(stage.ground.engine, f"DELETE FROM {METRICS_TABLE}")
    struck_before = stage.proxy.strikes
    with _PASSING[kind](stage) as struck:
        summaries = _aggregate(stage)
    stage.proxy.disarm()
    if not (struck or stage.proxy.strikes > struck_before):
        return  # The run was over before.
    stage.report.count("faults tried")
    stage.report.count(f"tried: {kind}")
    errors = [error["error"] for summary in summaries for error in summary.errors]
    if errors:
        stage.report.count(f"not survived: {kind}")
        stage.report.wrong.append(f"{kind} was not survived: {errors[0][:400]}")
        _fresh_run_is_right(stage, kind)
        return
    wrong = differences(stage.ground.frames(DAYS), stage.expected[stage.state])
    stage.report.count("rows or files wrong", len(wrong))
    stage.report.wrong += [f"after {kind}: {sentence}" for sentence in wrong]
    if not wrong:
        stage.report.count("survived by retries")


def _fresh_run_is_right(stage: _Stage, after: str) -> None:
    stage.proxy.disarm()
    errors = [error for summary in _aggregate(stage) for error in summary.errors]
    wrong = [f"it failed: {errors[0]}"] if errors else []
    wrong += differences(stage.ground.frames(DAYS), stage.expected[stage.state])
    wrong += [f"{path.name} is left behind" for path in stage.ground.leftovers()]
    stage.report.count("rows or files wrong", len(wrong))
    stage.report.wrong += [f"the run after {after}: {sentence}" for sentence in wrong]


def _some_bytes(stage: _Stage, most: int) -> int:
    # As often within the first kilobyte, where a connection is made, as within the last ones.
    return round(math.exp(stage.random.uniform(0, math.log(most))))


@contextmanager
def _cut_from_server(stage: _Stage) -> Iterator[list[int]]:
    size = _some_bytes(stage, stage.proxy.most_from_server)
    stage.proxy.cut_after(bytes_from_server=size, spare=stage.spared())
    yield []


@contextmanager
def _cut_to_server(stage: _Stage) -> Iterator[list[int]]:
    size = _some_bytes(stage, stage.proxy.most_to_server)
    stage.proxy.cut_after(bytes_to_server=size, spare=stage.spared())
    yield []


@contextmanager
def _refuse(stage: _Stage) -> Iterator[list[int]]:
    times = stage.random.randint(1, OPTIONS.max_retries)
    stage.proxy.refuse(times=times, spare=stage.spared())
    yield []


@contextmanager
def _commit_unheard(stage: _Stage) -> Iterator[list[int]]:
    stage.proxy.swallow_commit(of="staged_metrics")
    yield []


@contextmanager
def _commit_lost(stage: _Stage) -> Iterator[list[int]]:
    stage.proxy.swallow_commit(of="staged_metrics", is_forwarded=False)
    yield []


@contextmanager
def _terminate(stage: _Stage) -> Iterator[list[int]]:
    """The server ends the run's connections, as an administrator or a restart does."""
    struck: list[int] = []
    over = threading.Event()
    at = stage.random.uniform(0, stage.seconds)

    def strike() -> None:
        over.wait(at)
        # Until the run has a connection there is nothing to end.
        while not struck and not over.wait(0.005):
            with stage.ground.engine.begin() as connection:
                struck.extend(connection.exec_driver_sql(_RUNS_BACKENDS).scalars())

    with _in_background(strike, over):
        stage.ground.engine.dispose()
        yield struck


@contextmanager
def _lock(stage: _Stage) -> Iterator[list[int]]:
    """Somebody alters a table and holds its lock longer than a run waits for it at once."""
    over = threading.Event()
    struck: list[int] = []
    table = stage.random.choice(["sessions", "student_feedback", "tutor_events", METRICS_TABLE])

    with stage.ground.engine.begin() as connection:
        connection.exec_driver_sql(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        locked = time.monotonic()

        def release() -> None:
            over.wait(1.5 * LOCK_TIMEOUT_SECONDS)
            struck.append(round(time.monotonic() - locked))
            connection.rollback()

        with _in_background(release, over):
            yield struck


@contextmanager
def _in_background(action: Callable[[], None], over: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=action)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


_PASSING: dict[str, Callable[[_Stage], AbstractContextManager[list[int]]]] = {
    "cut while the server sends": _cut_from_server,
    "cut while the run sends": _cut_to_server,
    "connections refused": _refuse,
    "commit whose answer is lost": _commit_unheard,
    "commit that is lost": _commit_lost,
    "ended by the server": _terminate,
    "a table locked for a while": _lock,
}


@contextmanager
def _down(stage: _Stage) -> Iterator[None]:
    with stage.proxy.down():
        yield


@contextmanager
def _always_cut(stage: _Stage) -> Iterator[None]:
    stage.proxy.cut_after(bytes_from_server=2_000, times=ALWAYS)
    yield


@contextmanager
def _always_locked(stage: _Stage) -> Iterator[None]:
    with stage.ground.engine.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE")
        yield


@contextmanager
def _read_only(stage: _Stage) -> Iterator[None]:
    name = stage.ground.engine.url.database
    setting = f'ALTER DATABASE "{name}" SET default_transaction_read_only'
    execute(stage.ground.engine, f"{setting} = on")
    try:
        yield
    finally:
        execute(stage.ground.engine, f"SET transaction_read_only = off; {setting} = off")
        stage.ground.engine.dispose()


@contextmanager
def _without_a_column(stage: _Stage) -> Iterator[None]:
    execute(stage.ground.engine, "ALTER TABLE sessions RENAME COLUMN no_show TO absent")
    try:
        yield
    finally:
        execute(stage.ground.engine, "ALTER TABLE sessions RENAME COLUMN absent TO no_show")


_LASTING: dict[str, tuple[Callable[[_Stage], AbstractContextManager[None]], str]] = {
    "the server is down": (_down, "refused"),
    "every connection is cut": (_always_cut, "cannot be"),
    "a table stays locked": (_always_locked, "lock timeout"),
    "the server is read-only": (_read_only, "read-only"),
    "a column is missing": (_without_a_column, "no_show"),
}
"""By name, a fault that stays, and what the sentence about it holds."""


def _last(stage: _Stage, name: str) -> None:
    """The real command, under a fault that stays: one sentence, exit code 1, in bounded time."""
    _other_state(stage)
    fault, telling = _LASTING[name]
    log = stage.ground.home / "lasting.log"
    began = time.monotonic()
    with fault(stage):
        command = stage.ground.start(
            "run",
            *("--date", END.isoformat(), "--max-retries", "2", "--retry-delay", "0.1"),
            log=log,
            variables=stage.through,
        )
        has_ended = command.wait(PATIENCE_SECONDS)
    stage.report.count("lasting faults tried")
    took = time.monotonic() - began
    said = command.said
    wrong = []
    if not has_ended:
        wrong.append(f"the run had not ended after {PATIENCE_SECONDS:g} s")
    elif command.code != 1:
        wrong.append(f"exit code {command.code}, expected 1: {said[-400:]}")
    if "Traceback" in said:
        wrong.append(f"a trace instead of a sentence: {said[-600:]}")
    if telling not in " ".join(said.split()):
        wrong.append(f"nothing was said of {telling!r}: {said[-600:]}")
    if not wrong:
        stage.report.count("told in a sentence")
    stage.report.figures[f"{name}, s"] = round(took, 1)
    stage.report.wrong += [f"{name}: {sentence}" for sentence in wrong]
    _fresh_run_is_right(stage, name)


def _socket(here: Ground) -> Path:
    return Path(str(here.engine.url.query["host"]))
