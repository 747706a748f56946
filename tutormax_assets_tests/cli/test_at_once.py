"""Several ``tutormax`` at the same date at once, each a process of its own."""

import subprocess
from contextlib import ExitStack, suppress
from datetime import UTC, date, datetime
from itertools import pairwise

import polars as pl

from tutormax_assets.database import tables
from tutormax_assets_tests.api.test_aggregator import newest_runs, span_of_steps
from tutormax_assets_tests.cli.conftest import DAY, SECONDS, date_is_taken, start, until_it_waits
from tutormax_assets_tests.conftest import Platform


def add_session(platform: Platform, number: int) -> None:
    platform.add(
        tables.sessions,
        {
            "session_id": f"added {number}",
            "tutor_id": f"T{number % 30 + 1:06}",
            "scheduled_start": datetime(2025, 11, 5, 12, tzinfo=UTC),
            "actual_start": datetime(2025, 11, 5, 12, tzinfo=UTC),
        },
    )


def test_they_end_as_if_one_had_run(small_platform: Platform) -> None:
    """A run, a filtered one and a range, while the platform changes."""
    before = "2025-11-06"
    with ExitStack() as stack:
        with date_is_taken(small_platform):
            processes = [
                stack.enter_context(start(*arguments))
                for arguments in (
                    ("run", "--date", DAY),
                    ("run", "--date", DAY, "--tutors", "T000001", "--include-inactive"),
                    ("backfill", "--from", before, "--to", DAY),
                )
            ]
            for process in processes:
                until_it_waits(process)
        added = 0
        while any(process.poll() is None for process in processes):
            added += 1
            add_session(small_platform, added)
            with suppress(subprocess.TimeoutExpired):
                running = [process for process in processes if process.poll() is None]
                (running or processes)[0].wait(0.2)
        logs = [process.communicate(timeout=SECONDS)[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0], logs
    spans = sorted(map(span_of_steps, newest_runs(small_platform, 3)))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    metrics = small_platform.metrics().with_columns(pl.col("calculation_date").dt.date())
    for day in (before, DAY):
        saved = metrics.filter(calculation_date=date.fromisoformat(day))
        tiers = small_platform.partition("tutor_tiers", day).sort("tutor_id", "window")
        assert len(saved) >= 3 * 29
        for column in ("tutor_id", "sessions_completed"):
            assert saved[column].to_list() == tiers[column].to_list()
        held = small_platform.partition("sessions_snapshot", day)
        completed = held.filter(pl.col("started") & ~pl.col("no_show")).group_by("tutor_id").len()
        longest = saved.filter(window="90day").join(completed, on="tutor_id", how="left")
        assert longest["sessions_completed"].to_list() == longest["len"].fill_null(0).to_list()
    assert not [path for path in small_platform.storage.rglob("*") if path.name.startswith(".")]
