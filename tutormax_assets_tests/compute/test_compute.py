"""Shards are computed in this process or by Dask's workers, and callers see no difference."""

import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from tutormax_assets.compute import DaskError, KilledShardError, ShardsError
from tutormax_assets.compute.shard_map import Compute
from tutormax_assets.settings import Settings, load_settings
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets_tests.compute.clusters import ROOT, DaskCluster, until
from tutormax_assets_tests.compute.squares import Square, begun, squared

# One process runs them all, so that there is one cluster.
pytestmark = pytest.mark.xdist_group("cluster")

if TYPE_CHECKING:
    from tutormax_assets.compute.dask import Cluster

LOG = logging.getLogger("tutormax_assets.compute_tests")


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    # A shard is blamed at once, so that what the run does about it is what is tested.
    with closing(DaskCluster(tmp_path_factory.mktemp("dask"), allowed_failures=0)) as cluster:
        cluster.start_scheduler()
        yield cluster


@pytest.fixture
def cluster(shared_cluster: DaskCluster, monkeypatch: pytest.MonkeyPatch) -> DaskCluster:
    """A scheduler and two workers, and an environment that leads there."""
    shared_cluster.repair(2)
    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", shared_cluster.address)
    return shared_cluster


@pytest.fixture
def idle_scheduler(shared_cluster: DaskCluster, monkeypatch: pytest.MonkeyPatch) -> DaskCluster:
    """A scheduler without workers, and an environment that leads there."""
    shared_cluster.repair(0)
    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", shared_cluster.address)
    return shared_cluster


class ComputeOfEnvironment(Compute):
    """Goes by what the environment says when it is used."""

    def __init__(self) -> None:
        super().__init__(Settings(), PlatformDatabase(Settings()))

    def _connect(self, log: logging.Logger) -> "Cluster | None":
        self._settings = load_settings()
        return super()._connect(log)


@pytest.fixture
def compute() -> Iterator[Compute]:
    with closing(ComputeOfEnvironment()) as compute:
        yield compute


@pytest.fixture(params=["local", "dask"])
def anywhere(request: pytest.FixtureRequest) -> str:
    if request.param == "dask":
        request.getfixturevalue("cluster")
    return str(request.param)


def tasks(number: int, **of_all: object) -> dict[str, Square]:
    return {f"{root:04}": Square(root, **of_all) for root in range(number)}  # type: ignore[arg-type]


def collect(compute: Compute, todo: dict[str, Square], found: dict[str, int]) -> None:
    """Keep what comes before an error."""
    for name, report in compute.map(squared, todo, log=LOG):
        found[name] = report.area


def areas(compute: Compute, todo: dict[str, Square]) -> dict[str, int]:
    return {name: report.area for name, report in compute.map(squared, todo, log=LOG)}


@pytest.mark.parametrize(
    ("anywhere", "groups"),
    [("local", [[0, 1, 2, 3, 4]]), ("dask", [[0, 1], [2, 3, 4]])],
    indirect=["anywhere"],
)
@pytest.mark.usefixtures("anywhere")
def test_as_many_groups_are_read_as_can_be_at_once(
    compute: Compute, groups: list[list[int]]
) -> None:
    assert [list(group) for group in compute.groups(range(5), log=LOG)] == groups
    assert [list(group) for group in compute.groups(range(1), log=LOG)] == [[0]]


@pytest.mark.usefixtures("anywhere")
def test_reports_come_in_the_order_of_the_tasks(compute: Compute) -> None:
    todo = dict(reversed(tasks(9).items()))

    found = areas(compute, todo)

    assert list(found.items()) == [(name, task.root**2) for name, task in todo.items()]
    assert areas(compute, {}) == {}


@pytest.mark.usefixtures("anywhere")
def test_a_shard_that_fails_keeps_no_other_from_being_computed(
    compute: Compute, caplog: pytest.LogCaptureFixture
) -> None:
    todo = tasks(8)
    for name in ("0001", "0002", "0004", "0006"):
        todo[name] = Square(todo[name].root, goes_wrong="raises")
    found: dict[str, int] = {}

    with pytest.raises(ShardsError) as error:
        collect(compute, todo, found)

    assert found == {"0000": 0, "0003": 9, "0005": 25, "0007": 49}
    assert str(error.value) == (
        "4 of 8 shards failed: 0001: no square of 1; 0002: no square of 2; 0004: no square of 4;"
        " and 1 more, which the log names. The others are kept; fix the cause and run the date"
        " again."
    )
    assert list(error.value.errors) == ["0001", "0002", "0004", "0006"]
    assert error.value.__cause__ is error.value.errors["0001"]
    failures = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert sorted(failures)[-1] == "Shard 0006 failed: no square of 6"


@pytest.mark.usefixtures("anywhere")
def test_an_error_that_cannot_be_pickled_is_told_all_the_same(compute: Compute) -> None:
    todo = tasks(4)
    todo["0001"] = Square(1, goes_wrong="unpicklable")

    with pytest.raises(ShardsError, match=r"0001: .*cannot travel"):
        areas(compute, todo)


@pytest.mark.usefixtures("anywhere")
def test_a_single_task_raises_its_own_error(compute: Compute) -> None:
    with pytest.raises(ValueError, match=r"^no square of 7\nsecond line$"):
        areas(compute, {"all": Square(7, goes_wrong="raises")})


@pytest.mark.parametrize("anywhere", ["local"], indirect=True)
@pytest.mark.usefixtures("anywhere")
def test_locally_the_process_of_the_run_computes(compute: Compute) -> None:
    reports = [report for _, report in compute.map(squared, tasks(3), log=LOG)]

    assert {report.process for report in reports} == {os.getpid()}


@pytest.mark.usefixtures("cluster")
def test_both_workers_compute_and_the_log_says_which_cluster(
    compute: Compute, cluster: DaskCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = tmp_path / "gate"
    todo = tasks(2, gate=gate)
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO):
        run = pool.submit(lambda: list(compute.map(squared, todo, log=LOG)))
        until(lambda: all(begun(task).exists() for task in todo.values()), what="both tasks")
        gate.touch()
        reports = run.result()

    assert {report.process for _, report in reports} == {worker.pid for worker in cluster.workers}
    first, *lines = (r.getMessage() for r in caplog.records if r.name == LOG.name)
    assert [first, *sorted(lines)] == [
        f"Dask scheduler {cluster.address}: 2 workers with 2 threads",
        "0000: 0 is squared",
        "0001: 1 is squared",
    ]


def test_two_runs_at_once_share_no_task(cluster: DaskCluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    todo = tasks(2, gate=gate)

    def run() -> dict[str, int]:
        with closing(ComputeOfEnvironment()) as compute:
            return areas(compute, todo)

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run), pool.submit(run)]
        until(lambda: begun(todo["0000"]).exists(), what="a task")
        gate.touch()

        assert [run.result() for run in runs] == [{"0000": 0, "0001": 1}] * 2
    assert len(cluster.workers) == 2


def test_a_worker_that_is_killed_costs_time_and_nothing_else(
    compute: Compute, cluster: DaskCluster, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    todo = tasks(5, gate=gate)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(areas, compute, todo)
        until(lambda: len(list(tmp_path.glob("gate.*"))) == 2, what="two tasks")
        cluster.workers[0].kill()
        gate.touch()

        assert run.result() == {name: task.root**2 for name, task in todo.items()}
    assert {int(file.read_text()) for file in tmp_path.glob("gate.*")} <= {cluster.workers[1].pid}


def test_a_shard_that_kills_its_workers_is_named_and_its_neighbours_are_computed(
    compute: Compute, cluster: DaskCluster
) -> None:
    todo = tasks(7)
    todo["0002"] = Square(2, goes_wrong="kills its worker")
    found: dict[str, int] = {}

    with pytest.raises(ShardsError) as error:
        collect(compute, todo, found)

    assert list(found) == [name for name in todo if name != "0002"]
    assert list(error.value.errors) == ["0002"]
    assert isinstance(error.value.__cause__, KilledShardError)
    assert "0002: 1 worker that computed it died, as happens where memory runs out" in str(
        error.value
    )
    until(lambda: all(worker.poll() is not None for worker in cluster.workers), what="two deaths")


def test_without_workers_a_run_fails_in_time_and_with_one_it_goes_on(
    compute: Compute, idle_scheduler: DaskCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_DASK_NO_WORKERS_TIMEOUT_SECONDS", "1")
    with pytest.raises(
        DaskError, match=r"no worker for 1 s .* (Under way: 0000|Waiting: 0000, 0001, 0002)\.$"
    ):
        areas(compute, tasks(3))
    compute.close()

    monkeypatch.setenv("TUTORMAX_DASK_NO_WORKERS_TIMEOUT_SECONDS", "60")
    idle_scheduler.start_worker()
    assert areas(compute, tasks(3)) == {"0000": 0, "0001": 1, "0002": 4}


def test_all_workers_gone_in_the_midst_ends_the_run(
    compute: Compute, cluster: DaskCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_DASK_NO_WORKERS_TIMEOUT_SECONDS", "1")
    todo = {"done": Square(3), **tasks(4, gate=tmp_path / "gate")}
    found: dict[str, int] = {}

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(collect, compute, todo, found)
        until(lambda: len(list(tmp_path.glob("gate.*"))) == 2, what="two tasks")
        for worker in cluster.workers:
            worker.kill()
        with pytest.raises(DaskError, match="has had no worker for 1 s"):
            running.result()
    assert found == {"done": 9}


def test_threads_beside_those_of_polars_are_warned_of(
    compute: Compute, idle_scheduler: DaskCluster, caplog: pytest.LogCaptureFixture
) -> None:
    idle_scheduler.start_worker(threads=2)
    idle_scheduler.start_worker(threads=2, environment={"POLARS_MAX_THREADS": "1"})
    idle_scheduler.wait_for(2)

    assert len(areas(compute, tasks(5))) == 5
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [warning.partition(",")[0] for warning in warnings] == [
        "1 Dask workers have several threads"
    ]
    idle_scheduler.repair(0)


def test_a_worker_of_another_version_is_refused(
    compute: Compute, cluster: DaskCluster, tmp_path: Path
) -> None:
    cluster.start_worker(source=_changed_source(tmp_path))
    cluster.wait_for(3)

    with pytest.raises(DaskError) as error:
        areas(compute, tasks(3))

    assert re.fullmatch(
        r"tcp://127\.0\.0\.1:\d+ has source \w{12}, expected \w{12}\. Install the same version for"
        r" the run, the scheduler and all workers\.",
        str(error.value),
    )


def test_a_worker_of_another_version_that_joins_later_computes_nothing(
    compute: Compute, cluster: DaskCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = tmp_path / "gate"
    todo = tasks(8, gate=gate)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(lambda: dict(compute.map(squared, todo, log=LOG)))
        until(lambda: len(list(tmp_path.glob("gate.*"))) == 2, what="two tasks")
        cluster.start_worker(source=_changed_source(tmp_path))
        until(lambda: "is given no shard: source " in caplog.text, what="a refusal")
        gate.touch()
        reports = run.result()

    assert [report.area for report in reports.values()] == [root**2 for root in range(8)]
    assert {report.process for report in reports.values()} == {w.pid for w in cluster.workers[:2]}


def _changed_source(folder: Path) -> Path:
    source = folder / "other"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tutormax_assets", source / "tutormax_assets", ignore=ignored)
    with (source / "tutormax_assets" / "partitions.py").open("a", encoding="utf-8") as file:
        file.write("\n# Changed.\n")
    return source


@pytest.mark.usefixtures("cluster")
def test_an_iterator_that_is_closed_cancels_what_is_queued(
    compute: Compute, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    todo = {"first": Square(3), **tasks(6, gate=gate)}

    reports = compute.map(squared, todo, log=LOG)
    assert next(reports)[0] == "first"
    until(lambda: list(tmp_path.glob("gate.*")), what="a task")
    reports.close()
    gate.touch()

    assert areas(compute, tasks(3)) == {"0000": 0, "0001": 1, "0002": 4}
    assert [file.name for file in tmp_path.glob("gate.*")] == ["gate.0"]


@pytest.mark.usefixtures("cluster")
def test_an_interrupt_ends_the_wait_for_workers(compute: Compute, tmp_path: Path) -> None:
    todo = tasks(2, gate=tmp_path / "gate")
    # In the background of a shell it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        until(lambda: len(list(tmp_path.glob("gate.*"))) == 2, what="two tasks")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        areas(compute, todo)
    signal.signal(signal.SIGINT, before)
    thread.join()
    (tmp_path / "gate").touch()


def test_a_scheduler_that_cannot_be_reached_is_named(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutormax_assets.compute.dask.ANSWER_SECONDS", 1)
    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", "tcp://127.0.0.1:1")

    with pytest.raises(DaskError) as error:
        areas(compute, tasks(2))

    assert str(error.value).startswith("No connection to the Dask scheduler at tcp://127.0.0.1:1: ")
    assert str(error.value).endswith(
        "See that it runs there, and that TUTORMAX_DASK_ADDRESS and TUTORMAX_DASK_TLS_* fit it."
    )


def test_what_does_not_speak_as_a_scheduler_is_not_waited_for(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutormax_assets.compute.dask.ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", f"tcp://127.0.0.1:{port}")

        with pytest.raises(DaskError, match=f":{port}: what listens there does not answer as a D"):
            areas(compute, tasks(2))


def test_without_the_extra_a_sentence_says_how_to_install_it(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", "tcp://127.0.0.1:8786")
    monkeypatch.delitem(sys.modules, "tutormax_assets.compute.dask", raising=False)
    monkeypatch.setitem(sys.modules, "distributed", None)

    with pytest.raises(DaskError, match=r"pip install 'tutormax-assets\[dask\]'$"):
        areas(compute, tasks(2))


def test_with_tls_only_who_has_a_certificate_gets_in(
    compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _certificate(tmp_path / "ours")
    strangers = _certificate(tmp_path / "theirs")
    options = ["--tls-ca-file", files["CA_FILE"], "--tls-cert", files["CERT"], "--tls-key"]
    with closing(DaskCluster(tmp_path, tls=[*options, files["KEY"]])) as cluster:
        cluster.start_scheduler()
        cluster.start_worker()
        monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", cluster.address)
        for name, file in files.items():
            monkeypatch.setenv(f"TUTORMAX_DASK_TLS_{name}", file)
        assert areas(compute, tasks(2)) == {"0000": 0, "0001": 1}
        compute.close()

        # Nobody answers from here on.
        monkeypatch.setattr("tutormax_assets.compute.dask.ANSWER_SECONDS", 3)
        for name, file in strangers.items():
            monkeypatch.setenv(f"TUTORMAX_DASK_TLS_{name}", file)
        with pytest.raises(DaskError, match="No connection to the Dask scheduler at tls://"):
            areas(compute, tasks(2))

        for name in strangers:
            monkeypatch.delenv(f"TUTORMAX_DASK_TLS_{name}")
        monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", cluster.address.replace("tls", "tcp"))
        with pytest.raises(DaskError, match="No connection to the Dask scheduler at tcp://"):
            areas(compute, tasks(2))


def _certificate(folder: Path) -> dict[str, str]:
    folder.mkdir()
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    names = {name: folder / f"{name}.pem" for name in ("CA_FILE", "CERT", "KEY")}
    authority.cert_pem.write_to_path(names["CA_FILE"])
    issued.cert_chain_pems[0].write_to_path(names["CERT"])
    issued.private_key_pem.write_to_path(names["KEY"])
    return {name: str(file) for name, file in names.items()}


def test_a_scheduler_that_dies_ends_the_run(
    compute: Compute, cluster: DaskCluster, tmp_path: Path
) -> None:
    todo = {"done": Square(3), **tasks(4, gate=tmp_path / "gate")}
    found: dict[str, int] = {}

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(collect, compute, todo, found)
        until(lambda: len(list(tmp_path.glob("gate.*"))) == 2, what="two tasks")
        assert cluster.scheduler is not None
        cluster.stop(cluster.scheduler)
        with pytest.raises(DaskError, match="was lost, or the run was cancelled there"):
            running.result()
    (tmp_path / "gate").touch()
    assert found == {"done": 9}
    for worker in cluster.workers:
        cluster.stop(worker)
    cluster.start_scheduler()
