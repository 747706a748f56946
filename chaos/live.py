"""Customers write while live numbers are watched: how soon a session shows, and what that costs.

The rows of the generated platform end before the shortest window, so that the live number of
sessions of a tutor is the number that customers have written. Customers, server and watcher share
the cores of one machine.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import polars as pl
import psutil
import psycopg
import sqlalchemy as sa
from upath import UPath

from chaos.ground import Command, Ground, execute, ground, ground_on, query
from chaos.load import customers, steady_tutors
from chaos.report import Report, percentile
from chaos.writers import FIRST_NUMBER, Transaction
from tutormax_assets.compute.tasks.tiers import TUTOR_TIERS
from tutormax_assets.database.connection import conninfo
from tutormax_assets.database.tables import tutor_live_metrics
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.storage.partition import scan_partition

LIMIT_SECONDS = 60
"""What is promised: the p99 from the commit of a session to the live number that counts it."""

INSERTS = 0.7
"""Share of the customers' transactions that insert a session."""

_LOOK_SECONDS = 0.1
_DAYS = 2
_WINDOW = min(Policy().windows)
_LONGEST_WINDOW = max(Policy().windows)
# A check of the daily job blocks a date without a login in its last week.
_FRESH_EVENT = """
    INSERT INTO tutor_events (event_id, tutor_id, event_type, event_timestamp)
    SELECT 'fresh', min(tutor_id), 'login', now() - interval '2 days' FROM tutors
"""
_INSTANTS = {"sessions": "scheduled_start", "tutor_events": "event_timestamp"}


@dataclass
class _Seen:
    """What the table showed over time.

    Attributes:
        at: By tutor, when each further session was counted first, as seconds since 1970.
        refreshes: How many instants the table has had.
        wrong: What must not happen in it.
    """

    at: dict[str, list[float]] = field(default_factory=dict)
    refreshes: int = 0
    wrong: list[str] = field(default_factory=list)


def run(
    *,
    seconds: float,
    seed: int,
    tutors: int = 5_000,
    sessions_per_tutor: int = 50,
    sessions_an_hour: float = 50_000,
    live_seconds: float = 30,
    kills: int = 5,
    on: sa.Engine | None = None,
) -> Report:
    """Let customers write alone, then with a watcher, then with watchers that are killed.

    Args:
        seconds: How long all of it takes, about.
        seed: Seed of the platform, of the customers and of the kills.
        tutors: Size of the platform.
        sessions_per_tutor: Sessions that it has already, for each tutor.
        sessions_an_hour: Sessions that customers write.
        live_seconds: Seconds between two refreshes.
        kills: How often the watcher is killed in the last part, at random.
        on: An empty platform to use; one on a server of its own when left out.

    Returns:
        Seconds from commit to live number, CPU seconds of the server, and what was wrong.
    """
    report = Report("live")
    variables = {"TUTORMAX_LIVE_SECONDS": str(live_seconds)}
    with ground(**variables) if on is None else ground_on(on, **variables) as here:
        today = datetime.now(UTC).date()
        sample_platform.generate(
            here.engine,
            tutors=tutors,
            sessions_per_tutor=sessions_per_tutor,
            days=_LONGEST_WINDOW,
            end=today - timedelta(days=_WINDOW + 1),
            seed=seed,
        )
        steady = steady_tutors(here)
        with (
            customers(
                here,
                report,
                steady,
                rate=sessions_an_hour / 3600 / INSERTS,
                seed=seed,
                first_day=today - timedelta(days=_DAYS),
                days=_DAYS,
            ) as made,
            _looks(here) as seen,
        ):
            _measure(here, report, "alone", 0.2 * seconds)
            with _watcher(here, "watched") as watcher:
                _wait_for(seen, refreshes=1)
                begin = time.time()
                _measure(here, report, "watched", 0.5 * seconds)
                memory = psutil.Process(watcher.process.pid).memory_info().rss
                report.figures["watched: memory, MiB"] = memory >> 20
                end = time.time()
                # What was committed last is waited for, too.
                _wait_for(seen, refreshes=seen.refreshes + 2)
            killed_at = time.time()
            _kill_watchers(here, report, 0.3 * seconds, kills=kills, choice=random.Random(seed))
        report.figures["refreshes"] = seen.refreshes
        report.wrong += seen.wrong
        _report_seconds(here, report, seen, made, "watched", begin, end)
        _report_seconds(here, report, seen, made, "killed", killed_at, time.time())
        _compare(here, report)
    if float(report.figures["watched: p99, s"]) >= LIMIT_SECONDS:
        report.wrong.append(
            f"the p99 from commit to live number was {report.figures['watched: p99, s']} s,"
            f" expected less than {LIMIT_SECONDS}"
        )
    return report


@contextmanager
def _watcher(here: Ground, name: str) -> Iterator[Command]:
    """``tutormax live --watch`` while the block lasts."""
    command = here.start("live", "--watch", log=here.home / f"{name}.log")
    try:
        yield command
        if command.code is not None:
            raise RuntimeError(f"the watcher ended with {command.code}: {command.said[-500:]}")
    finally:
        command.kill()


def _kill_watchers(
    here: Ground, report: Report, seconds: float, *, kills: int, choice: random.Random
) -> None:
    """Kill one watcher after another, while a second one and single commands refresh as well."""
    deadline = time.monotonic() + seconds
    with _watcher(here, "second"):
        while int(report.figures.get("kills", 0)) < kills and time.monotonic() < deadline:
            watcher = here.start("live", "--watch", log=here.home / "killed.log")
            once = here.start("live", log=here.home / "once.log")
            time.sleep(choice.uniform(0.5, 1.5) * seconds / kills)
            report.count("kills", int(watcher.kill()))
            once.wait(60)
            if once.code != 0:
                report.wrong.append(f"`tutormax live` ended with {once.code}: {once.said}")


@contextmanager
def _looks(here: Ground) -> Iterator[_Seen]:
    """Look at the table while the block lasts."""
    seen = _Seen()
    over = threading.Event()
    thread = threading.Thread(target=_look, args=(here, seen, over))
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _look(here: Ground, seen: _Seen, over: threading.Event) -> None:
    address = conninfo(here.engine.url.update_query_dict({"application_name": "chaos_reader"}))
    newest = None
    counts: dict[str, tuple[int, datetime]] = {}
    with psycopg.connect(address, autocommit=True) as connection:
        while not over.wait(_LOOK_SECONDS):
            row = connection.execute("SELECT max(calculated_at) FROM tutor_live_metrics").fetchone()
            if row is None or row[0] is None or row[0] == newest:
                continue
            newest = row[0]
            seen.refreshes += 1
            found = connection.execute(
                "SELECT tutor_id, sessions_completed, calculated_at FROM tutor_live_metrics"
                ' WHERE "window" = %s',
                [window_name(_WINDOW)],
            ).fetchall()
            now = time.time()
            for tutor_id, sessions, at in found:
                _, before = counts.get(tutor_id, (0, at))
                if at < before:
                    seen.wrong.append(f"{tutor_id} went back from {before} to {at}")
                counts[tutor_id] = sessions, at
                times = seen.at.setdefault(tutor_id, [])
                times += [now] * (sessions - len(times))


def _wait_for(seen: _Seen, *, refreshes: int) -> None:
    deadline = time.monotonic() + 300
    while seen.refreshes < refreshes:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the table had {seen.refreshes} refreshes, expected {refreshes}")
        time.sleep(_LOOK_SECONDS)


def _measure(here: Ground, report: Report, name: str, seconds: float) -> None:
    """Let time pass, and report the CPU seconds that the server takes a minute."""
    with here.engine.connect() as connection:
        backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        postmaster = psutil.Process(backend).parent()
    assert postmaster is not None
    began, cpu = time.monotonic(), _cpu_seconds(postmaster)
    wal = _wal_bytes(here)
    time.sleep(seconds)
    minutes = (time.monotonic() - began) / 60
    spent = (_cpu_seconds(postmaster) - cpu) / minutes
    report.figures[f"{name}: CPU s a minute of the server"] = round(spent, 2)
    written = (_wal_bytes(here) - wal) / minutes / (1 << 20)
    report.figures[f"{name}: WAL, MiB a minute"] = round(written, 1)


def _cpu_seconds(postmaster: psutil.Process) -> float:
    """CPU seconds of a server so far: of its processes, and of those that have ended."""
    times = postmaster.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for process in postmaster.children():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return float(total)


def _wal_bytes(here: Ground) -> int:
    found = query(here.engine.url, "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn AS bytes")
    return int(found.item())


def _report_seconds(
    here: Ground,
    report: Report,
    seen: _Seen,
    made: list[Transaction],
    name: str,
    begin: float,
    end: float,
) -> None:
    """Report the seconds from the commit of each session to the first look that counted it."""
    tutors = dict(
        query(
            here.engine.url,
            f"SELECT session_number, tutor_id FROM sessions WHERE session_number >= {FIRST_NUMBER}",
        ).iter_rows()
    )
    place: dict[str, int] = {}
    waits = []
    unseen = 0
    for one in sorted((one for one in made if one.number), key=lambda one: one.done_at):
        tutor_id = tutors[one.number]
        number = place.get(tutor_id, 0)
        place[tutor_id] = number + 1
        if not begin <= one.done_at < end:
            continue
        times = seen.at.get(tutor_id, [])
        if number < len(times):
            waits.append(times[number] - one.done_at)
        else:
            unseen += 1
    report.figures[f"{name}: sessions"] = len(waits)
    for share, title in ((0.5, "p50"), (0.99, "p99"), (1, "max")):
        report.figures[f"{name}: {title}, s"] = round(percentile(waits, share), 2)
    if name == "watched" and unseen:
        report.wrong.append(f"{unseen} committed sessions were not counted two refreshes later")


def _compare(here: Ground, report: Report) -> None:
    """Compare the table with the daily job on a platform that is moved to the table's instant."""
    execute(here.engine, _FRESH_EVENT)
    last = here.run("live", log=here.home / "last.log")
    if last.code != 0:
        report.wrong.append(f"`tutormax live` ended with {last.code}: {last.said}")
        return
    columns = [column.name for column in tutor_live_metrics.columns]
    names = ", ".join(f'"{name}"' for name in columns)
    rows = query(here.engine.url, f"SELECT {names} FROM tutor_live_metrics")
    instants = rows["calculated_at"].unique().to_list()
    if len(instants) != 1:
        report.wrong.append(f"the table has rows of {len(instants)} instants, expected 1")
        return
    day = instants[0].date()
    for table, column in _INSTANTS.items():
        execute(
            here.engine,
            f"UPDATE {table} SET {column} = {column} - (:at - date_trunc('day', :at, 'UTC'))",
            at=instants[0],
        )
    computed = here.run("run", "--date", str(day), "--full", log=here.home / "run.log")
    if computed.code != 0:
        report.wrong.append(f"`tutormax run` ended with {computed.code}: {computed.said}")
        return
    path = UPath(here.storage) / TUTOR_TIERS / f"{day}.parquet"
    shown = [name for name in columns if name != "calculated_at"]
    expected, found = (
        frame.select(pl.col(shown).cast(pl.String))
        for frame in (scan_partition(path).collect(), rows)
    )
    wrong = len(expected.join(found, on=shown, how="anti", nulls_equal=True))
    wrong += len(found.join(expected, on=shown, how="anti", nulls_equal=True))
    report.figures["rows compared"] = len(expected)
    report.figures["rows wrong"] = wrong
    if wrong or not len(expected):
        report.wrong.append(f"{wrong} of {len(expected)} live rows differ from the daily job's")
