"""Customers write while a month is backfilled: how long they wait, and what is counted.

Server, customers and job share the cores of one machine, so a part of what customers wait is for
the processor. The job is run at the lowest priority as well (``nice``), which tells that part from
the waits in the database.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta

import dagster as dg
import polars as pl
import psycopg
import sqlalchemy as sa
from upath import UPath

from chaos.ground import END, ROOT, Ground, execute, ground, ground_on, query
from chaos.report import Report, percentile
from chaos.writers import APPLICATION_NAME, FIRST_NUMBER, Customers, Transaction
from tutormax_assets.database.connection import conninfo
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.storage.partition import scan_partition

SAMPLE_SECONDS = 0.02
WINDOW_DAYS = 90

P99_LIMIT = 5
"""What is promised to customers: their p99 during a backfill, as a multiple of that without."""

BACKFILL, NICED, BY_DATE = WAYS = ("backfill", "niced", "by date")
"""As one run that reads once for all dates; the same at the lowest priority; a run for each date,
which reads for each."""

# Few rows pass the filter, since `pg_blocking_pids` halts the lock tables for a moment.
_WAITING = """
    SELECT waiting.pid, locks.locktype, waiting.query, waiting.state_change,
        array_agg(DISTINCT holder.application_name) AS holders
    FROM (
        SELECT * FROM pg_stat_activity
        WHERE application_name = %s AND wait_event_type = 'Lock'
    ) AS waiting
    JOIN pg_locks AS locks ON locks.pid = waiting.pid AND NOT locks.granted
    CROSS JOIN LATERAL unnest(pg_blocking_pids(waiting.pid)) AS blocking (pid)
    JOIN pg_stat_activity AS holder ON holder.pid = blocking.pid
    GROUP BY 1, 2, 3, 4
"""

_VISIBLE = """
    SELECT t.tutor_id, t.session_number, (t.scheduled_start AT TIME ZONE 'UTC')::date
        AS scheduled_date, f.overall_rating
    FROM sessions AS t
    LEFT JOIN student_feedback AS f ON f.session_id = t.session_id
        AND pg_visible_in_snapshot(f.xmin::text::xid8, current_setting('chaos.at')::pg_snapshot)
    WHERE pg_visible_in_snapshot(t.xmin::text::xid8, current_setting('chaos.at')::pg_snapshot)
"""


@dataclass
class _Period:
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class _Counted:
    """What a backfill counted of the customers' sessions.

    Attributes:
        read_at: When it read, seconds since 1970.
        numbers: The session numbers that it found.
    """

    read_at: float
    numbers: set[int]


@dataclass
class _Waits:
    """What the customers' transactions were seen to wait for.

    Attributes:
        samples: How often it was looked.
        of_ours: Statements that waited for a lock of a run; each counts once.
        of_keys: Those of them that change a key which the metrics table refers to.
    """

    samples: int = 0
    of_ours: set[tuple[int, str]] = field(default_factory=set)
    of_keys: set[tuple[int, str]] = field(default_factory=set)


def run(
    *,
    seconds: float,
    seed: int,
    tutors: int = 2_000,
    sessions_per_tutor: int = 50,
    dates: int = 30,
    baseline_seconds: float = 20,
    rounds: int = 2,
    rate: float = 100,
    ways: Sequence[str] = WAYS,
    on: sa.Engine | None = None,
) -> Report:
    """Let customers write, and alternately nothing else happens or a range is backfilled.

    Args:
        seconds: No further round is begun after so many.
        seed: Seed of the platform and of the customers.
        tutors: Size of the platform.
        sessions_per_tutor: Sessions that it has already, for each tutor.
        dates: Reference dates of a backfill.
        baseline_seconds: Length of the periods without a backfill.
        rounds: How often each way of running the job is measured.
        rate: Transactions of customers a second.
        ways: How the job is run.
        on: An empty platform to use; one on a server of its own when left out.

    Returns:
        Latencies in milliseconds, waits for locks, rows expected, lost and counted twice.
    """
    report = Report("load")
    deadline = time.monotonic() + seconds
    with ground() if on is None else ground_on(on) as here:
        sample_platform.generate(
            here.engine,
            tutors=tutors,
            sessions_per_tutor=sessions_per_tutor,
            days=120 + dates,
            end=END,
            seed=seed,
        )
        steady = steady_tutors(here)
        periods: list[_Period] = []
        counted: list[_Counted] = []
        with (
            customers(here, report, steady, rate=rate, seed=seed) as made,
            _waits(here) as waits,
        ):
            for _ in range(rounds):
                for way in ways:
                    if periods and time.monotonic() > deadline:
                        break
                    periods.append(_baseline(baseline_seconds))
                    periods.append(_backfill(here, report, way, dates=dates))
                    counted.append(_compare_counts(here, report, steady, dates=dates))
        _report_latencies(report, periods, made)
        report.figures["looks at locks"] = waits.samples
        report.figures["waits for a lock of a run"] = len(waits.of_ours - waits.of_keys)
        report.figures["of them, changes of a tutor's key"] = len(waits.of_keys)
        if waits.of_ours - waits.of_keys:
            report.wrong.append(f"customers waited for a run: {sorted(waits.of_ours)[:3]}")
        _compare_confirmed(report, counted, made)
    return report


def steady_tutors(here: Ground) -> pl.Series:
    """Every other active tutor: those whose rows customers never change."""
    ids = query(here.engine.url, "SELECT tutor_id FROM tutors WHERE lower(status) = 'active'")
    return ids["tutor_id"].sort().gather_every(2)


@contextmanager
def customers(
    here: Ground,
    report: Report,
    steady: pl.Series,
    *,
    rate: float,
    seed: int,
    first_day: date = END - timedelta(days=WINDOW_DAYS),
    days: int = WINDOW_DAYS,
) -> Iterator[list[Transaction]]:
    """Let customers write while the block lasts; what they did is in the list afterwards."""
    ids = query(here.engine.url, "SELECT tutor_id FROM tutors WHERE lower(status) = 'active'")
    busy = ids.filter(~pl.col("tutor_id").is_in(steady.implode()))["tutor_id"]
    students = query(here.engine.url, "SELECT student_id FROM students ORDER BY 1 LIMIT 1000")
    writers = Customers(
        conninfo=conninfo(
            here.engine.url.update_query_dict({"application_name": APPLICATION_NAME})
        ),
        steady_tutors=steady.to_list(),
        busy_tutors=busy.sort().to_list(),
        students=students["student_id"].to_list(),
        first_day=first_day.isoformat(),
        days=days,
        rate=rate,
        seed=seed,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "chaos.writers"],
        cwd=ROOT,
        env=here.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    made: list[Transaction] = []
    output = ""
    try:
        assert process.stdin is not None
        process.stdin.write(writers.to_json() + "\n")
        process.stdin.flush()
        assert process.stdout is not None
        begin = float(process.stdout.readline())
        time.sleep(max(0.0, begin - time.monotonic()))
        yield made
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    made += [Transaction(**transaction) for transaction in json.loads(output)]
    errors = [transaction.error for transaction in made if transaction.error]
    report.figures["transactions of customers"] = len(made)
    report.figures["of them, failed"] = len(errors)
    if errors:
        report.wrong.append(f"{len(errors)} transactions of customers failed, such as: {errors[0]}")


@contextmanager
def _waits(here: Ground) -> Iterator[_Waits]:
    """Look at the locks while the block lasts."""
    waits = _Waits()
    over = threading.Event()

    def look() -> None:
        address = conninfo(here.engine.url.update_query_dict({"application_name": "chaos_locks"}))
        with psycopg.connect(address, autocommit=True) as connection:
            while not over.wait(SAMPLE_SECONDS):
                rows = connection.execute(_WAITING, [APPLICATION_NAME]).fetchall()
                waits.samples += 1
                for pid, _, statement, since, holders in rows:
                    if "tutormax_assets" in holders:
                        waits.of_ours.add((pid, since.isoformat()))
                        if statement.startswith("UPDATE tutors"):
                            waits.of_keys.add((pid, since.isoformat()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield waits
    finally:
        over.set()
        thread.join()


def _baseline(seconds: float) -> _Period:
    begin = time.monotonic()
    time.sleep(seconds)
    return _Period("alone", begin, time.monotonic())


def _backfill(here: Ground, report: Report, way: str, *, dates: int) -> _Period:
    """Backfill into an empty table."""
    execute(here.engine, f"TRUNCATE {METRICS_TABLE}")
    begin = time.monotonic()
    command = here.start(
        "backfill",
        *("--from", (END - timedelta(days=dates - 1)).isoformat(), "--to", END.isoformat()),
        log=here.home / "backfill.log",
        nice=19 if way == NICED else 0,
        variables={"TUTORMAX_MAX_DATES_PER_RUN": str(1 if way == BY_DATE else dates)},
    )
    command.wait(600)
    period = _Period(way, begin, time.monotonic())
    if command.code != 0:
        report.wrong.append(f"a backfill ended with {command.code}: {command.said[-800:]}")
    return period


def _snapshots(here: Ground, dates: int) -> Iterator[tuple[str, str, float]]:
    """Of each date: its key, the snapshot that it was read in, and when, in seconds since 1970."""
    with dg.DagsterInstance.from_config(str(here.home / "dagster")) as instance:
        for n in range(dates):
            key = (END - timedelta(days=n)).isoformat()
            [record] = instance.fetch_materializations(
                dg.AssetRecordsFilter(dg.AssetKey("sessions_snapshot"), asset_partitions=[key]),
                limit=1,
            ).records
            materialization = record.asset_materialization
            assert materialization is not None
            metadata = materialization.metadata
            yield key, str(metadata["source_snapshot"].value), float(str(metadata["read_at"].value))


def _report_latencies(report: Report, periods: list[_Period], made: list[Transaction]) -> None:
    p99 = {}
    for name in dict.fromkeys(period.name for period in periods):
        of_name = [period for period in periods if period.name == name]
        inside = [
            transaction
            for transaction in made
            if any(period.begin <= transaction.due < period.end for period in of_name)
        ]
        writes = [1000 * t.latency for t in inside if t.kind == "write"]
        keys = [1000 * t.latency for t in inside if t.kind == "key"]
        report.figures[f"{name}: seconds"] = round(sum(p.end - p.begin for p in of_name), 1)
        report.figures[f"{name}: transactions"] = len(inside)
        for share, title in ((0.5, "p50"), (0.99, "p99"), (1, "max")):
            report.figures[f"{name}: {title}, ms"] = round(percentile(writes, share), 1)
        if keys:
            report.figures[f"{name}: max of key changes, ms"] = round(max(keys), 1)
        p99[name] = percentile(writes, 0.99)
        if name == "alone":
            continue
        multiple = p99[name] / p99["alone"]
        report.figures[f"{name}: p99 as multiple of alone"] = round(multiple, 1)
        # Of fewer transactions the slowest one percent is a handful.
        if multiple > P99_LIMIT and len(writes) >= 1_000:
            report.wrong.append(
                f"the p99 of customers was {multiple:.1f} times that without a job ({name}),"
                f" expected at most {P99_LIMIT}"
            )


def _compare_counts(here: Ground, report: Report, steady: pl.Series, *, dates: int) -> _Counted:
    """Compare the Parquet of each date with the rows that its snapshot saw, row by row."""
    visible: dict[str, pl.DataFrame] = {}
    counted = _Counted(0, set())
    of_steady = pl.col("tutor_id").is_in(steady.implode())
    for key, snapshot, read_at in _snapshots(here, dates):
        if snapshot not in visible:
            visible[snapshot] = _visible(here, snapshot).filter(of_steady)
        day = date.fromisoformat(key)
        in_window = pl.col("scheduled_date").is_between(
            day - timedelta(days=WINDOW_DAYS), day, closed="left"
        )
        expected = visible[snapshot].filter(in_window)
        path = UPath(here.storage) / "sessions_snapshot" / f"{key}.parquet"
        found = scan_partition(path).select(expected.columns).filter(of_steady).collect()
        more = _more(found, expected)
        of_customers = pl.col("session_number") >= FIRST_NUMBER
        report.count("rows expected", len(expected))
        report.count("of them, written meanwhile", len(expected.filter(of_customers)))
        report.count("rows lost", -int(more.filter(more < 0).sum()))
        report.count("rows counted twice or too early", int(more.filter(more > 0).sum()))
        if day == END:
            numbers = found.filter(of_customers)["session_number"]
            counted = _Counted(read_at, set(numbers))
    report.count("dates compared row by row", dates)
    report.count("snapshots they were read in", len(visible))
    if report.figures["rows lost"] or report.figures["rows counted twice or too early"]:
        report.wrong.append("rows were lost, or counted without being there")
    return counted


def _visible(here: Ground, snapshot: str) -> pl.DataFrame:
    with here.engine.connect() as connection:
        connection.execute(sa.select(sa.func.set_config("chaos.at", snapshot, False)))
        cursor = connection.connection.cursor()
        with cursor.copy(f"COPY ({_VISIBLE}) TO STDOUT (FORMAT csv)") as copy:
            csv = b"".join(copy)
    schema = {
        "tutor_id": pl.String(),
        "session_number": pl.Int32(),
        "scheduled_date": pl.Date(),
        "overall_rating": pl.Int32(),
    }
    return pl.read_csv(csv, has_header=False, schema=schema)


def _more(found: pl.DataFrame, expected: pl.DataFrame) -> pl.Series:
    """How often more than expected each row comes, where it comes more or less often."""
    counts = pl.concat([expected.with_columns(more=pl.lit(-1)), found.with_columns(more=pl.lit(1))])
    return counts.group_by(expected.columns).agg(pl.col("more").sum())["more"]


def _compare_confirmed(report: Report, counted: list[_Counted], made: list[Transaction]) -> None:
    """Look for the sessions whose commit the customer had seen before the snapshot was taken."""
    for backfill in counted:
        confirmed = {t.number for t in made if t.number and t.done_at < backfill.read_at}
        report.count("confirmed before a snapshot", len(confirmed))
        report.count("of them, not counted", len(confirmed - backfill.numbers))
    if report.figures["of them, not counted"]:
        report.wrong.append("rows whose commit was confirmed before the snapshot were not counted")
