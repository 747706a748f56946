"""Each peer comes to the product's answers, and what differs is seen."""

import pytest

from benchmarks import contestants, daily, peers
from benchmarks.answers import differences
from benchmarks.contestants import Measured
from benchmarks.peers import Task
from benchmarks.platforms import Platform, midnight

pytestmark = pytest.mark.extended

LIBRARIES = {"pandas": "pandas", "duckdb": "duckdb"}


def task_of(platform: Platform) -> Task:
    return Task(platform.conninfo, platform.end.isoformat(), cores=2)


@pytest.mark.parametrize("name", ["sql", "pandas", "duckdb", "loop", "floor", "upsert_floor"])
def test_a_peer_comes_to_our_answers_and_may_run_again(
    measured_platform: Platform, name: str
) -> None:
    if library := LIBRARIES.get(name):
        pytest.importorskip(library)
    measured_platform.renew_twin()
    for _ in range(1 if name == "floor" else 2):
        seconds = peers.named(name).measure(task_of(measured_platform))

    exactly = 0 if name in ("loop", "floor", "upsert_floor") else 0.01
    with measured_platform.connect() as connection:
        date = midnight(measured_platform.end)
        assert differences(connection, date=date, rounding=exactly) == []
    assert all(value > 0 for value in seconds.values())


def test_a_sample_is_spread_evenly_and_is_all_there_is_when_more_is_wanted() -> None:
    ids = [str(n) for n in range(10)]

    assert peers.sampled(ids, 3) == ["0", "3", "6"]
    assert peers.sampled(ids, 11) == peers.sampled(ids, None) == ids


@pytest.mark.parametrize(
    ("change", "rounding", "is_seen"),
    [
        ("sessions_completed = sessions_completed + 1", 0.01, True),
        ("avg_rating = avg_rating + 0.01", 0.01, False),
        ("avg_rating = avg_rating + 0.01", 0, True),
        ("avg_rating = avg_rating + 0.02", 0.01, True),
        ("avg_rating = NULL", 0.01, True),
        ("performance_tier = 'No tier'", 0.01, True),
        ("performance_tier = 'No tier', avg_rating = avg_rating - 0.01", 0.01, False),
        ("\"window\" = '1day'", 0.01, True),
    ],
)
def test_a_row_that_differs_is_seen(
    measured_platform: Platform, change: str, rounding: float, is_seen: bool
) -> None:
    measured_platform.renew_twin()
    peers.named("upsert_floor").measure(task_of(measured_platform))
    with measured_platform.connect() as connection:
        [tutor_id] = connection.execute(
            "UPDATE benchmark_twin SET " + change + " WHERE \"window\" = '90day' AND tutor_id = ("
            "   SELECT min(tutor_id) FROM benchmark_twin"
            "   WHERE \"window\" = '90day' AND avg_rating IS NOT NULL"
            ") RETURNING tutor_id"
        ).fetchone() or ("",)
        found = differences(connection, date=midnight(measured_platform.end), rounding=rounding)

    assert (tutor_id in {tutor for tutor, _ in found}) == is_seen
    assert len(found) <= 2


def test_a_peer_whose_answers_differ_has_no_ratio(
    measured_platform: Platform, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = contestants._in_its_process

    def tampered(platform: Platform, task: Task, name: str) -> Measured:
        measured = measure(platform, task, name)
        if name == "sql":
            with platform.connect() as connection:
                connection.execute("UPDATE benchmark_twin SET no_show_count = no_show_count + 1")
        return measured

    def ours(*_: object) -> Measured:
        # The date has run already.
        return Measured({"read_to_persisted": 1.0}, peak_rss_bytes=1, output={})

    monkeypatch.setattr(contestants, "_in_its_process", tampered)
    monkeypatch.setattr(daily, "product", ours)
    monkeypatch.setattr(Platform, "forget", lambda *_: None)
    result = daily.measure(measured_platform, peers=["sql", "floor"], repeats=1, loop_tutors=5)

    assert result["ratio_to"]["sql"] is None
    assert result["ratio_to"]["floor"] is not None
    assert result["answers_equal"] == {"sql": False, "floor": True, "oracle": True, "all": False}
    assert result["rows_differing"] == {"sql": 87, "floor": 0, "oracle": 0}
