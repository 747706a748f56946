"""Killing ``tutormax run`` and the process above it, and running it out of memory."""

import re
import subprocess
import sys
from contextlib import ExitStack

import dagster as dg
import pytest

from tutormax_assets.runs.instance import dagster_home, dagster_instance
from tutormax_assets.runs.killed_runs import PROCESS_TAG
from tutormax_assets_tests.cli.conftest import DAY, SECONDS, date_is_taken, start, until_it_waits
from tutormax_assets_tests.conftest import Platform, captured_log


def runs_by_pid(instance: dg.DagsterInstance) -> dict[int, dg.DagsterRun]:
    return {int(run.tags[PROCESS_TAG].rsplit("-", 2)[1]): run for run in instance.get_runs()}


def failure_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    [record] = instance.get_records_for_run(
        run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE
    ).records
    event = record.event_log_entry.dagster_event
    assert event is not None
    return event.message or ""


@pytest.fixture
def own_platform(small_platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Platform:
    """With a Dagster home of its own."""
    home = small_platform.settings.home_path / "dagster"
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    settings = small_platform.settings.model_copy(update={"dagster_home": home})
    with dagster_instance(settings):
        return Platform(settings, small_platform.engine)


def test_a_killed_run_is_told_of_by_its_parent_or_by_the_next_run(own_platform: Platform) -> None:
    with date_is_taken(own_platform), ExitStack() as stack:
        child_dies, parent_dies = (
            stack.enter_context(start("run", "--date", DAY)) for _ in range(2)
        )
        child, orphan = map(until_it_waits, (child_dies, parent_dies))
        child.kill()
        _, said = child_dies.communicate(timeout=SECONDS)
        parent_dies.kill()
        orphan.wait(SECONDS)

        with dagster_instance(own_platform.settings) as instance:
            runs = runs_by_pid(instance)
            assert runs.keys() == {child.pid, orphan.pid}
            assert runs[orphan.pid].status is dg.DagsterRunStatus.STARTED
            reason = failure_of(instance, runs[child.pid])
    assert child_dies.returncode == 1
    assert re.match(
        r"The run was ended by SIGKILL, as the kernel does when memory runs out; it held up to \d+"
        r" MiB\. The limit of memory is .*TUTORMAX_MAX_DATES_PER_RUN.*--tutors",
        reason,
    )
    assert f"Error: {reason}\n" == said

    with captured_log() as log:
        [summary] = own_platform.run(DAY)
    assert summary.all_saved
    with dagster_instance(own_platform.settings) as instance:
        killed = instance.get_run_by_id(runs[orphan.pid].run_id)
        assert killed is not None
        assert killed.status is dg.DagsterRunStatus.FAILURE
        told = f"The process {orphan.pid} on .* that executed it was killed"
        assert re.match(told, failure_of(instance, killed))
    assert any(re.search(f"No alert is sent.*{DAY}.*{told}", line) for line in log)
    assert list((dagster_home(own_platform.settings) / "processes").iterdir()) == []


def test_a_run_that_is_terminated_ends_in_a_sentence_and_starts_no_other(
    own_platform: Platform,
) -> None:
    with (
        date_is_taken(own_platform),
        start("backfill", "--from", "2025-11-06", "--to", DAY, "--tutors", "T000001") as process,
    ):
        until_it_waits(process)
        process.terminate()
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    waiting = "waiting until it has ended\n"
    # Whether its log was shown by then is a matter of time.
    assert said.rpartition(waiting)[2] == (
        f"Error: It was interrupted. Saved: no date. Not saved: 2025-11-06 to {DAY}."
        f" Continue with: tutormax backfill --from 2025-11-06 --to {DAY} --tutors T000001\n"
    )
    with dagster_instance(own_platform.settings) as instance:
        [run] = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.FAILURE


def test_a_run_without_memory_says_how_much_it_may_have(own_platform: Platform) -> None:
    with start("run", "--date", DAY, address_space=150 << 20) as process:
        _, said = process.communicate(timeout=SECONDS)

    assert process.returncode == 1
    assert re.match(
        r"Error: The run was given up in the midst, as libraries do that get no memory; it held up"
        r" to \d+ MiB\. The limit of memory is ulimit -v 150 MiB\. Raise it; or let a run need",
        said.splitlines()[-1],
    )
    assert own_platform.metrics().is_empty()


@pytest.mark.parametrize(("child", "code"), [("sys.exit(7)", 7), ("pass", 0), ("1 / 0", 1)])
def test_the_exit_code_is_that_of_the_command(child: str, code: int) -> None:
    command = (
        "import sys\n"
        "from tutormax_assets.cli.supervision import in_a_child\n"
        f"def command():\n    {child}\n"
        "in_a_child(command)"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)
    assert "Error: The run" not in done.stderr
