"""Kills runs at random points, and looks at what the run after it leaves behind.

Before each kill the source rows change, or what was computed is deleted, so that the killed run has
something to write and a half of it would show.
"""

import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

import dagster as dg
import psutil
import sqlalchemy as sa
from polars.exceptions import PolarsError
from upath import UPath

from chaos.ground import (
    END,
    OTHER_STATE,
    Command,
    Frames,
    Ground,
    differences,
    execute,
    ground,
    ground_on,
    silent_log,
)
from chaos.report import Report
from tutormax_assets.api.runs import aggregate
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.settings import load_settings
from tutormax_assets.storage.partition import delete_files

TUTORS = 40
DATES = [END - timedelta(days=n) for n in (3, 2, 1, 0)]
RANGE = DATES[-3:]
ROUNDS_PER_DAGSTER_HOME = 20

_environment = threading.Lock()

_FINAL = {
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
}
_BACKENDS = sa.text("SELECT pid FROM pg_stat_activity WHERE application_name = 'tutormax_assets'")

# What a run has said last tells where it was killed.
_PHASES = (
    (re.compile(r"Run date .*success rate"), "after the run"),
    (re.compile(r"Batch .*committed"), "after a commit"),
    (re.compile(r"Read \d+ events"), "while computing and writing"),
    (re.compile(r"Found \d+ tutors"), "while reading"),
)


@dataclass(frozen=True)
class _Plan:
    """What is started and what is killed in one round."""

    days: Sequence[date]
    commands: Sequence[Sequence[str]]
    kill: str


@dataclass
class _Lane:
    """One home, and what is right in it."""

    ground: Ground
    random: random.Random
    report: Report
    is_own_server: bool
    expected: list[Frames] = field(default_factory=list)
    """By state of the source."""
    state: int = 0
    seconds: dict[int, float] = field(default_factory=dict)
    """How long a command took last when nobody killed it, by its number of dates."""
    events: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    """Materializations and check evaluations that a run leaves of each date."""
    dagster_home: Path = Path()
    tutor_ids: list[str] = field(default_factory=list)
    rounds: int = 0


def run(
    *, kills: int, seconds: float, seed: int, lanes: int = 3, on: sa.Engine | None = None
) -> Report:
    """Kill runs and follow each kill by a run that must put everything right.

    Args:
        kills: How many.
        seconds: When to stop at the latest.
        seed: Seed of all choices; what a kill hits depends on the machine as well.
        lanes: Homes, each with a server of its own, that are worked on at once.
        on: An empty platform to use, in one lane; its server is not killed.

    Returns:
        Figures ``kills``, where they hit, and what was wrong.
    """
    deadline = time.monotonic() + seconds
    lanes = lanes if on is None else 1
    shares = [kills // lanes + (lane < kills % lanes) for lane in range(lanes)]
    names = ("kills", "rounds", "fresh runs right", "rows or files wrong")
    report = Report("kills", dict.fromkeys(names, 0))
    with ThreadPoolExecutor(lanes) as pool:
        lane_reports = [
            pool.submit(_lane, share, deadline, random.Random(f"{seed}-{lane}"), on)
            for lane, share in enumerate(shares)
            if share
        ]
        for lane_report in lane_reports:
            report.add(lane_report.result())
    return report


def _lane(kills: int, deadline: float, choice: random.Random, on: sa.Engine | None) -> Report:
    with ground() if on is None else ground_on(on) as here, silent_log():
        sample_platform.generate(
            here.engine,
            tutors=TUTORS,
            sessions_per_tutor=40,
            days=130,
            end=END,
            seed=choice.randrange(1000),
            bad_rows=0.01,
        )
        lane = _Lane(here, choice, Report("kills"), is_own_server=on is None)
        _learn(lane)
        while int(lane.report.figures.get("kills", 0)) < kills and time.monotonic() < deadline:
            _round(lane)
        return lane.report


def _learn(lane: _Lane) -> None:
    """Compute every date in both states of the source, undisturbed."""
    _new_dagster_home(lane)
    lane.tutor_ids = sorted(_scalars(lane, "SELECT tutor_id FROM tutors"))
    # The variables of this process are one for all lanes.
    with _environment, lane.ground.as_environment(DAGSTER_HOME=str(lane.dagster_home)):
        for _ in range(2):
            summaries = aggregate(load_settings(), DATES, RunOptions())
            if errors := [error for summary in summaries for error in summary.errors]:
                raise RuntimeError(f"an undisturbed run failed: {errors[0]}")
            lane.expected.append(lane.ground.frames())
            _other_state(lane)
    if not differences(lane.expected[0], lane.expected[1]):
        raise RuntimeError("the two states of the source give the same metrics")
    with _instance(lane) as instance:
        [newest] = instance.get_runs(limit=1)
        lane.events = _events(instance, newest.run_id)
    began = time.monotonic()
    _run(lane, "run", "--date", DATES[0].isoformat())
    lane.seconds[1] = time.monotonic() - began


def _round(lane: _Lane) -> None:
    if lane.rounds % ROUNDS_PER_DAGSTER_HOME == 0:
        _new_dagster_home(lane)
    lane.rounds += 1
    lane.report.count("rounds")
    _other_state(lane)
    plan = _plan(lane)
    if lane.random.random() < 0.5:
        _forget(lane, plan.days)
    is_first = not lane.dagster_home.exists()
    _kill(lane, plan, is_first=is_first)
    began = time.monotonic()
    days = plan.days
    span = ["--from", days[0].isoformat(), "--to", days[-1].isoformat()]
    fresh = _run(lane, *(["backfill", *span] if len(days) > 1 else ["run", "--date", span[1]]))
    lane.seconds[len(days)] = took = time.monotonic() - began
    where = f"round {lane.rounds} ({plan.kill}: {' | '.join(' '.join(c) for c in plan.commands)})"
    wrong = _verify(lane, days, fresh)
    lane.report.wrong += [f"{where}: {sentence}" for sentence in wrong]
    if not wrong:
        lane.report.count("fresh runs right")
    lane.report.figures["slowest fresh run, s"] = max(
        float(lane.report.figures.get("slowest fresh run, s", 0)),
        round(took, 1),
    )


def _plan(lane: _Lane) -> _Plan:
    some = lane.random.sample(lane.tutor_ids, 3)
    day = lane.random.choice(DATES)
    whole = ["run", "--date", day.isoformat()]
    filtered = [*whole, "--tutors", ",".join(some)]
    span = ["backfill", "--from", RANGE[0].isoformat(), "--to", RANGE[-1].isoformat()]
    return lane.random.choices(
        [
            _Plan([day], [whole], "kill"),
            _Plan([day], [filtered], "kill"),
            _Plan(RANGE, [span], "kill"),
            _Plan([day], [whole, lane.random.choice([whole, filtered])], "kill both"),
            _Plan([day], [whole, whole], "kill one of two"),
            _Plan([day], [whole], "kill a server process"),
            _Plan([day], [whole], "kill the server"),
        ],
        weights=[8, 2, 3, 2, 2, *([1, 1] if lane.is_own_server else [0, 0])],
    )[0]


def _kill(lane: _Lane, plan: _Plan, *, is_first: bool) -> None:
    # Making a Dagster home takes a while, and so does sharing the processor.
    takes = lane.seconds.get(len(plan.days), lane.seconds[1])
    takes *= 1 + 0.3 * is_first + 0.2 * (len(plan.commands) - 1)
    began = time.monotonic()
    victims = [
        lane.ground.start(
            *command,
            *("--retry-delay", "0.3"),
            log=lane.ground.home / f"victim-{number}.log",
            variables={"DAGSTER_HOME": str(lane.dagster_home)},
        )
        for number, command in enumerate(plan.commands)
    ]
    if plan.kill.endswith(("server", "server process")):
        _kill_server(lane, plan, victims[0], began + lane.random.uniform(0.5, 1) * takes)
        return
    for victim in victims[: 1 if plan.kill == "kill one of two" else None]:
        time.sleep(max(0.0, began + lane.random.uniform(0, takes) - time.monotonic()))
        if victim.kill():
            lane.report.count("kills")
            lane.report.count(f"killed {_phase(victim)}")
        else:
            lane.report.count("ended before the kill")
            _must_be_a_sentence(lane, victim, codes={0})
    for survivor in victims:
        if not survivor.wait(120):
            lane.report.wrong.append("a run beside a killed one hung for 120 s")
        elif survivor.code != -9:
            _must_be_a_sentence(lane, survivor, codes={0})


def _kill_server(lane: _Lane, plan: _Plan, victim: Command, at: float) -> None:
    """Kill a process of the server, or its first one, under a run that goes on."""
    pid_file = next((lane.ground.home / "postgres").resolve().glob("data/postmaster.pid"))
    postmaster = int(pid_file.read_text().split("\n")[0])
    lane.ground.engine.dispose()
    time.sleep(max(0.0, at - time.monotonic()))
    pid = postmaster
    if plan.kill == "kill a server process":
        found = [postmaster]
        # Until the run has connected there is nobody to kill.
        while victim.code is None and found == [postmaster]:
            with suppress(sa.exc.DBAPIError), lane.ground.engine.connect() as connection:
                found = [*connection.execute(_BACKENDS).scalars()] or found
                own = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
                found = [pid for pid in found if pid != own] or [postmaster]
        if found == [postmaster]:
            lane.report.count("ended before the kill")
            return
        pid = lane.random.choice(found)
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        # It may have ended, and its number may be another's.
        if process.name() == "postgres":
            process.kill()
    lane.report.count("kills")
    lane.report.count(plan.kill.replace("kill", "killed"))
    if not victim.wait(120):
        lane.report.wrong.append(f"a run hung for 120 s after: {plan.kill}")
    _must_be_a_sentence(lane, victim, codes={0, 1})
    if victim.code == 0:
        lane.report.count("went on after the server was killed")


def _must_be_a_sentence(lane: _Lane, command: Command, *, codes: set[int]) -> None:
    if command.code not in codes:
        lane.report.wrong.append(
            f"exit code {command.code} of a run beside a kill: {command.said[-600:]}"
        )
    if "Traceback" in command.said:
        lane.report.wrong.append(f"a trace instead of a sentence: {command.said[-1500:]}")


def _phase(victim: Command) -> str:
    said = victim.said
    return next((phase for pattern, phase in _PHASES if pattern.search(said)), "before reading")


def _verify(lane: _Lane, days: Sequence[date], fresh: Command) -> list[str]:
    if fresh.code != 0:
        return [f"the fresh run ended with {fresh.code}: {fresh.said[-1500:]}"]
    try:
        found = lane.ground.frames(days)
    except PolarsError as error:
        return [f"a partition cannot be read: {error}"]
    expected = _of_days(lane.expected[lane.state], days)
    wrong = differences(found, expected)
    wrong += [f"{path.name} is left behind" for path in lane.ground.leftovers()]
    lane.report.count("rows or files wrong", len(wrong))
    return wrong + _verify_records(lane, days)


def _verify_records(lane: _Lane, days: Sequence[date]) -> list[str]:
    """Whether Dagster shows the fresh run as the newest of its dates, and no other as running."""
    wrong = []
    with _instance(lane) as instance:
        runs = instance.get_runs()
        newest = runs[0]
        if newest.status != dg.DagsterRunStatus.SUCCESS:
            wrong.append(f"the fresh run is on record as {newest.status.value}")
        stale = [run for run in runs if run.status not in _FINAL]
        if stale:
            wrong.append(f"{len(stale)} killed runs are on record as {stale[0].status.value}")
            for run in stale:  # Each of them is counted once.
                instance.delete_run(run.run_id)
        lane.report.count("killed runs on record as running", len(stale))
        events = _events(instance, newest.run_id)
        for day in days:
            key = day.isoformat()
            if events.get(key) != lane.events[key]:
                wrong.append(f"events of {key} are not those of an undisturbed run")
            record = instance.fetch_materializations(
                dg.AssetRecordsFilter(dg.AssetKey(METRICS_TABLE), asset_partitions=[key]), limit=1
            ).records[0]
            if record.run_id != newest.run_id:
                wrong.append(f"the newest materialization of {key} is not of the fresh run")
    lane.report.count("dates whose records were looked at", len(days))
    return wrong


def _events(instance: dg.DagsterInstance, run_id: str) -> dict[str, set[tuple[str, ...]]]:
    """Assets that a run materialized and checks that it passed, by reference date."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for entry in instance.all_logs(
        run_id,
        of_type={
            dg.DagsterEventType.ASSET_MATERIALIZATION,
            dg.DagsterEventType.ASSET_CHECK_EVALUATION,
        },
    ):
        event = entry.get_dagster_event()
        if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
            item: tuple[str, ...] = (event.asset_key.to_user_string() if event.asset_key else "",)
        else:
            evaluation = event.asset_check_evaluation_data
            item = (evaluation.asset_key.to_user_string(), evaluation.check_name)
        found.setdefault(str(event.partition), set()).add(item)
    return found


def _instance(lane: _Lane) -> dg.DagsterInstance:
    return dg.DagsterInstance.from_config(str(lane.dagster_home))


def _new_dagster_home(lane: _Lane) -> None:
    number = lane.report.figures.get("Dagster homes", 0)
    lane.report.count("Dagster homes")
    lane.dagster_home = lane.ground.home / f"dagster-{number}"


def _other_state(lane: _Lane) -> None:
    for statement in OTHER_STATE:
        execute(lane.ground.engine, statement)
    lane.state = 1 - lane.state


def _forget(lane: _Lane, days: Sequence[date]) -> None:
    for day in days:
        execute(
            lane.ground.engine, f"DELETE FROM {METRICS_TABLE} WHERE calculation_date = :d", d=day
        )
        # Dates of a range have no folder of their own, but a listing.
        for listing in lane.ground.storage.glob(f"*/{day}.json"):
            delete_files(UPath(listing.with_suffix(".parquet")))


def _scalars(lane: _Lane, statement: str) -> list[str]:
    with lane.ground.engine.connect() as connection:
        return [str(value) for value in connection.exec_driver_sql(statement).scalars()]


def _run(lane: _Lane, *arguments: str) -> Command:
    log = lane.ground.home / "fresh.log"
    return lane.ground.run(*arguments, log=log, variables={"DAGSTER_HOME": str(lane.dagster_home)})


def _of_days(frames: Frames, days: Sequence[date]) -> Frames:
    keys = {day.isoformat() for day in days}
    rows = frames[METRICS_TABLE].filter(date=days[0]) if len(days) == 1 else None
    if rows is None:
        rows = frames[METRICS_TABLE].filter(frames[METRICS_TABLE]["date"].is_in(list(days)))
    partitions = {name: f for name, f in frames.items() if name.rpartition("/")[2] in keys}
    return {METRICS_TABLE: rows, **partitions}
