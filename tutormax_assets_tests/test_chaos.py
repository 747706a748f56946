"""The harness that breaks the product on purpose: its faulty proxy, and short runs of its cases."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa
from upath import UPath

from chaos import bad_input, ground, kills, late, late_partitions, load, oracle
from chaos.ground import END, differences
from chaos.lane import fill, lane
from chaos.proxy import ALWAYS, Proxy
from chaos.report import Report, percentile
from chaos.servers import servers
from tutormax_assets.database.connection import create_engine
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.storage.partition import delete_files
from tutormax_assets_tests.conftest import Platform


@pytest.fixture
def proxy(server_url: sa.URL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with Proxy(Path(str(server_url.query["host"])), tmp_path_factory.mktemp("p") / "s") as proxy:
        yield proxy


@pytest.fixture
def through(proxy: Proxy, database: sa.URL) -> Iterator[sa.Engine]:
    """An engine whose connections lead through the proxy."""
    engine = create_engine(proxy.url(database))
    yield engine
    engine.dispose()


def students(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM students").scalar_one())


def insert_student(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO students (student_id, name) VALUES ('a', 'b')")


def test_the_proxy_forwards_until_a_fault_strikes(proxy: Proxy, through: sa.Engine) -> None:
    insert_student(through)
    assert (students(through), proxy.connections, proxy.strikes) == (1, 1, 0)


def test_the_proxy_refuses_as_often_as_it_is_told(proxy: Proxy, through: sa.Engine) -> None:
    proxy.refuse(times=2)
    for _ in range(2):
        with pytest.raises(sa.exc.OperationalError, match="server closed the connection"):
            students(through)
    assert (students(through), proxy.connections, proxy.strikes) == (0, 3, 2)


def test_nobody_listens_while_the_proxy_is_down(proxy: Proxy, through: sa.Engine) -> None:
    assert students(through) == 0
    with proxy.down(), pytest.raises(sa.exc.OperationalError, match="Connection refused"):
        students(through)
    assert students(through) == 0


@pytest.mark.parametrize("direction", ["bytes_from_server", "bytes_to_server"])
def test_the_proxy_cuts_in_the_midst_of_rows(
    proxy: Proxy, through: sa.Engine, direction: str
) -> None:
    query = sa.text("SELECT length(:long), repeat('x', 100000)")
    proxy.cut_after(**{direction: 50_000}, times=2)
    for _ in range(2):
        with through.connect() as connection, pytest.raises(sa.exc.OperationalError):
            connection.execute(query, {"long": "y" * 100_000})
    with through.connect() as connection:
        assert connection.execute(query, {"long": "y" * 100_000}).one()[0] == 100_000
    assert proxy.strikes == 2


@pytest.mark.parametrize("is_forwarded", [True, False])
def test_the_proxy_swallows_the_commit_of_the_transaction_that_is_named(
    proxy: Proxy, through: sa.Engine, engine: sa.Engine, is_forwarded: bool
) -> None:
    proxy.swallow_commit(of="INSERT INTO students", is_forwarded=is_forwarded)
    with through.begin() as connection:
        connection.exec_driver_sql("SELECT 1")
    with pytest.raises(sa.exc.OperationalError):
        insert_student(through)
    assert students(engine) == is_forwarded


def test_the_proxy_lets_a_client_wait_for_ever(proxy: Proxy, database: sa.URL) -> None:
    proxy.black_hole(bytes_to_server=1, times=ALWAYS)
    # The driver gives up after the time that the client sets.
    engine = create_engine(proxy.url(database).update_query_dict({"connect_timeout": "2"}))
    with pytest.raises(sa.exc.OperationalError, match="timeout"):
        engine.connect()
    proxy.disarm()
    assert students(engine) == 0
    engine.dispose()


@pytest.fixture
def computed(computed_platform: Platform) -> ground.Frames:
    """What a run leaves behind."""
    return of(computed_platform).frames()


def of(platform: Platform) -> ground.Ground:
    return ground.Ground(platform.settings.home_path, platform.engine)


def test_a_ground_tells_what_is_not_as_it_was(
    computed_platform: Platform, computed: ground.Frames
) -> None:
    assert len(computed) == 15
    assert differences(of(computed_platform).frames([END]), computed) == []

    computed_platform.execute(f"UPDATE {METRICS_TABLE} SET avg_rating = 1.5 WHERE metric_id IN "
        f"(SELECT metric_id FROM {METRICS_TABLE} WHERE avg_rating > 2 LIMIT 2)")  # fmt: skip
    delete_files(UPath(computed_platform.storage) / "tutor_roster" / f"{END}.parquet")
    (computed_platform.storage / "tutor_tiers" / ".2025.parquet.part").touch()
    (computed_platform.storage / "tutor_tiers" / f"{END}.parquet" / "0000-old.parquet").touch()
    found = of(computed_platform).frames()

    rows = len(computed[METRICS_TABLE])
    assert differences(found, computed) == [
        f"tutor_performance_metrics has {rows} rows, expected {rows}; 2 of them are not expected,"
        " 2 are missing",
        f"tutor_roster/{END} is missing",
    ]
    assert {path.name for path in of(computed_platform).leftovers()} == {
        ".2025.parquet.part",
        "0000-old.parquet",
    }


def test_the_oracle_agrees_with_a_run_and_sees_what_is_not_right(
    computed_platform: Platform, computed: ground.Frames
) -> None:
    expected = oracle.answer(computed_platform.engine, END)
    report = Report("bad_input")
    assert len(expected.aside) == len(computed[f"sessions_set_aside/{END}"]) + len(
        computed[f"tutor_events_set_aside/{END}"]
    )
    assert bad_input._compare(of(computed_platform), report, expected) == []
    assert report.figures["numbers compared"] == 8 * len(computed[METRICS_TABLE])

    computed_platform.execute(
        f"UPDATE {METRICS_TABLE} SET no_show_count = 5, performance_tier = 'none'"
        f" WHERE metric_id = (SELECT min(metric_id) FROM {METRICS_TABLE})"
    )
    [path] = (computed_platform.storage / "sessions_set_aside" / f"{END}.parquet").iterdir()
    pl.read_parquet(path, memory_map=False)[1:].write_parquet(path)
    broken, number, tier = bad_input._compare(of(computed_platform), report, expected)
    assert broken.startswith("1 values are broken and were used, such as ('s")
    assert "no_show_count of" in number
    assert tier.startswith("tier of (")


@pytest.mark.extended
def test_killed_runs_leave_nothing_that_the_next_run_does_not_put_right(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kills, "DATES", kills.DATES[-2:])
    monkeypatch.setattr(kills, "RANGE", kills.RANGE[-2:])
    report = kills.run(kills=1, seconds=600, seed=20, on=engine)

    assert report.wrong == []
    assert int(report.figures["kills"]) >= 1
    assert report.figures["fresh runs right"] == report.figures["rounds"]


def test_what_arrives_late_leaves_nothing_for_a_run_of_all_tutors(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "DATES", late.DATES[-1:])
    report = late.run(steps=2, seconds=600, seed=7, on=engine)

    assert report.wrong == []
    assert report.figures["steps"] == 2
    assert int(report.figures["changes"]) > 0
    assert int(report.figures["tutors read for these"]) > 0


def test_partitions_that_move_and_go_leave_nothing_for_a_run_of_all_tutors() -> None:
    report = Report("late")
    with (
        servers("one") as (server,),
        lane("partitions", report, seed=1) as one,
    ):
        server.start()
        fill(server.url)
        one.lead_to(server.url)
        late_partitions.take_steps(one, late_partitions.UNIQUE_IDS[:1])

    assert report.wrong == []
    assert report.figures["partitions: changed tutors"] == 1
    assert report.figures["frames compared with a full run"] == 30


@pytest.mark.extended
def test_customers_wait_for_no_run_and_are_counted_once(engine: sa.Engine) -> None:
    report = load.run(
        seconds=600,
        seed=3,
        tutors=60,
        sessions_per_tutor=20,
        dates=3,
        baseline_seconds=0.5,
        rounds=1,
        ways=[load.BACKFILL],
        on=engine,
    )

    assert report.wrong == []
    figures = report.figures
    assert figures["rows lost"] == figures["rows counted twice or too early"] == 0
    assert int(figures["of them, written meanwhile"]) > 0
    assert figures["dates compared row by row"] == 3
    assert int(figures["confirmed before a snapshot"]) > 0
    assert figures["waits for a lock of a run"] == figures["of them, failed"] == 0
    assert int(figures["looks at locks"]) > 0


def test_a_row_that_is_not_counted_is_seen() -> None:
    rows = pl.DataFrame({"tutor_id": ["a", "a", "b"], "session_number": [1, 1, 2]})
    assert load._more(rows, rows).filter(load._more(rows, rows) != 0).is_empty()
    assert load._more(rows[:1], rows).sort().to_list() == [-1, -1]
    assert load._more(pl.concat([rows, rows[2:]]), rows).sort().to_list() == [0, 1]


def test_reports_of_a_case_add_up() -> None:
    report = Report("kills", {"kills": 1, "slowest, s": 2.5}, ["one"])
    report.add(Report("kills", {"kills": 2, "slowest, s": 1.5, "rounds": 3}, ["two"]))
    assert report.figures == {"kills": 3, "slowest, s": 2.5, "rounds": 3}
    assert report.wrong == ["one", "two"]


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50.0), (0.99, 99.0), (1, 100.0)])
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == expected
    assert percentile([7.0], share) == 7.0
