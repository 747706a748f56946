"""Writing ``tutor_performance_metrics``, in a real PostgreSQL."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier, Event
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal

from tutormax_assets.database import tables
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.faults import retrying
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.metrics_writing import Batch, write_metrics
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets_tests.conftest import add, metrics_of

DAY = datetime(2025, 11, 7, tzinfo=UTC)
WINDOWS = ("7day", "30day")
VALUES: dict[str, Any] = {
    "sessions_completed": 3,
    "avg_rating": 4.33,
    "first_session_success_rate": None,
    "reschedule_rate": 0.0,
    "no_show_count": 0,
    "engagement_score": 66.67,
    "learning_objectives_met_pct": 100.0,
    "response_time_avg_minutes": None,
    "performance_tier": "Strong",
}
AWKWARD = [
    "O'Brien",
    'say "hi"',
    "a,b",
    "back\\slash",
    "\\N",
    "line\nbreak",
    "line\n\\.\nend",
    " spaces ",
    "tab\there",
    "Ünïcødé 🎓",
    "NULL",
]


def tiers(tutor_ids: Sequence[str], **values: Any) -> pl.DataFrame:
    rows = [
        {
            **VALUES,
            "tutor_id": tutor_id,
            "window": window,
            "green_flags": 3,
            "red_flags": 0,
            **values,
        }
        for window in WINDOWS
        for tutor_id in tutor_ids
    ]
    return pl.DataFrame(rows, schema=pl.Schema(TutorTiers), infer_schema_length=None)


ONCE = retrying(max_retries=0, retry_delay_seconds=0, log=logging.getLogger())


def write(
    engine: sa.Engine, rows: pl.DataFrame, *, day: datetime = DAY, batch_size: int = 100
) -> list[Batch]:
    return list(
        write_metrics(
            engine,
            rows,
            calculation_date=day,
            batch_size=batch_size,
            retrying=ONCE,
            timeouts=Timeouts(),
        )
    )


def versions(engine: sa.Engine) -> dict[tuple[str, str], str]:
    """The version of each row as PostgreSQL keeps it: another one after any update."""
    version = sa.literal_column("xmin::text || ' ' || ctid::text", sa.Text)
    table = tables.tutor_performance_metrics
    with engine.connect() as connection:
        rows = connection.execute(sa.select(table.c.tutor_id, table.c.window, version))
        return {(row[0], row[1]): row[2] for row in rows}


@pytest.fixture
def tutors(engine: sa.Engine) -> list[str]:
    ids = ["t1", "t2", "t3"]
    add(engine, tables.tutors, *({"tutor_id": tutor_id} for tutor_id in ids))
    return ids


def test_new_rows_are_inserted_with_all_values(engine: sa.Engine, tutors: list[str]) -> None:
    batches = write(engine, tiers(tutors))

    assert batches == [Batch(1, 1, tutors, inserted=6)]
    assert batches[0].saved == 6
    found = metrics_of(engine)
    assert found["calculation_date"].unique().to_list() == [DAY]
    assert found["metric_id"].n_unique() == 6
    assert found["updated_at"].equals(found["created_at"])
    expected = tiers(tutors).sort("tutor_id", "window")
    names = ["tutor_id", "window", *VALUES]
    assert_frame_equal(found.select(names), expected.select(names), check_dtypes=False)


def test_writing_again_touches_no_row(engine: sa.Engine, tutors: list[str]) -> None:
    write(engine, tiers(tutors))
    before, rows = versions(engine), metrics_of(engine)

    [batch] = write(engine, tiers(tutors).reverse())

    assert (batch.inserted, batch.updated, batch.unchanged) == (0, 0, 6)
    assert versions(engine) == before
    assert_frame_equal(metrics_of(engine), rows)


def test_only_rows_whose_values_moved_are_updated(engine: sa.Engine, tutors: list[str]) -> None:
    write(engine, tiers(tutors))
    before, rows = versions(engine), metrics_of(engine)
    moved = (pl.col("tutor_id") == "t2") & (pl.col("window") == "30day")
    changed = tiers(tutors).with_columns(
        avg_rating=pl.when(moved).then(4.34).otherwise("avg_rating")
    )

    [batch] = write(engine, changed)

    assert (batch.inserted, batch.updated, batch.unchanged) == (0, 1, 5)
    after, found = versions(engine), metrics_of(engine)
    assert {key for key in after if after[key] != before[key]} == {("t2", "30day")}
    assert found.filter(moved)["avg_rating"].to_list() == [4.34]
    assert found.filter(moved)["updated_at"].item() > rows.filter(moved)["updated_at"].item()
    unmoved = ["metric_id", "created_at"]
    assert_frame_equal(found.select(unmoved), rows.select(unmoved))
    assert_frame_equal(found.filter(~moved), rows.filter(~moved))


@pytest.mark.parametrize("column", [name for name, value in VALUES.items() if value is None])
def test_a_null_becomes_a_value_and_back(engine: sa.Engine, tutors: list[str], column: str) -> None:
    write(engine, tiers(tutors))
    for value in (12.5, None):
        [batch] = write(engine, tiers(tutors, **{column: value}))
        assert (batch.updated, batch.unchanged) == (6, 0)
        assert metrics_of(engine)[column].to_list() == [value] * 6


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, [["t1"], ["t2"], ["t3"]]), (2, [["t1", "t2"], ["t3"]]), (7, [["t1", "t2", "t3"]])],
)
def test_a_batch_holds_whole_tutors(
    engine: sa.Engine, tutors: list[str], size: int, expected: list[list[str]]
) -> None:
    batches = write(engine, tiers(tutors), batch_size=size)

    assert [batch.tutor_ids for batch in batches] == expected
    assert [(batch.number, batch.of) for batch in batches] == [
        (number, len(expected)) for number in range(1, len(expected) + 1)
    ]
    assert [batch.inserted for batch in batches] == [2 * len(members) for members in expected]
    assert len(metrics_of(engine)) == 6


def test_no_tutors_are_no_batches(engine: sa.Engine) -> None:
    assert write(engine, tiers([])) == []


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE tutor_performance_metrics CASCADE",
        "ALTER TABLE tutor_performance_metrics"
        " DROP CONSTRAINT uq_tutor_performance_metrics_tutor_date_window",
        "DROP VIEW tutor_tier_since; ALTER TABLE tutor_performance_metrics"
        " ALTER performance_tier TYPE int USING sessions_completed",
        "ALTER TABLE tutor_performance_metrics DROP COLUMN avg_rating",
    ],
)
def test_a_table_of_another_form_names_the_command_that_mends_it(
    engine: sa.Engine, tutors: list[str], statement: str
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)

    with pytest.raises(MetricsTableError, match=r"cannot be written: .*`tutormax db upgrade`"):
        write(engine, tiers(tutors))


def test_two_writers_of_rows_that_are_not_there_yet_do_not_collide(engine: sa.Engine) -> None:
    tutor_ids = [f"t{number:03}" for number in range(150)]
    add(engine, tables.tutors, *({"tutor_id": tutor_id} for tutor_id in tutor_ids))
    days = [DAY + timedelta(days=turn) for turn in range(25)]
    barrier = Barrier(2)

    def writer(batch_size: int) -> list[str]:
        errors: list[str] = []
        for day in days:
            barrier.wait(timeout=30)
            batches = write(engine, tiers(tutor_ids), day=day, batch_size=batch_size)
            errors += [error for batch in batches for error in batch.errors.values()]
        return errors

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(writer, (150, 40))) == [[], []]
    assert len(metrics_of(engine)) == 2 * len(tutor_ids) * len(days)


def test_two_writers_in_opposite_orders_end_equal(engine: sa.Engine) -> None:
    # The batches of the two do not line up either.
    tutor_ids = [f"{letter}{number}" for letter in "aBcD_é" for number in range(60)]
    add(engine, tables.tutors, *({"tutor_id": tutor_id} for tutor_id in tutor_ids))
    barrier = Barrier(2)

    def writer(order: int) -> list[Batch]:
        done = []
        for turn in range(6):
            rows = tiers(tutor_ids[::order], sessions_completed=turn, avg_rating=1.0 + turn / 2)
            barrier.wait(timeout=30)
            done += write(engine, rows, batch_size=len(tutor_ids) if order > 0 else 100)
        return done

    with ThreadPoolExecutor(2) as pool:
        batches = [batch for done in pool.map(writer, (1, -1)) for batch in done]

    assert [batch.errors for batch in batches if batch.errors] == []
    found = metrics_of(engine)
    assert len(found) == 2 * len(tutor_ids)
    assert found["sessions_completed"].unique().to_list() == [5]
    assert found["avg_rating"].unique().to_list() == [3.5]


def test_ids_of_any_characters_are_kept(engine: sa.Engine) -> None:
    add(engine, tables.tutors, *({"tutor_id": tutor_id} for tutor_id in AWKWARD))

    [batch] = write(engine, tiers(AWKWARD))
    assert (batch.errors, batch.inserted) == ({}, 2 * len(AWKWARD))
    assert set(metrics_of(engine)["tutor_id"]) == set(AWKWARD)

    [batch] = write(engine, tiers(AWKWARD))
    assert batch.unchanged == 2 * len(AWKWARD)


def test_the_id_follows_from_tutor_date_and_window(engine: sa.Engine, tutors: list[str]) -> None:
    write(engine, tiers(tutors))
    first = metrics_of(engine)["metric_id"]
    with engine.begin() as connection:
        assert connection.execute(tables.tutor_performance_metrics.delete()).rowcount == 6

    write(engine, tiers(tutors, sessions_completed=9), batch_size=1)
    assert metrics_of(engine)["metric_id"].to_list() == first.to_list()

    write(engine, tiers(tutors), day=DAY - timedelta(days=1))
    ids = metrics_of(engine)["metric_id"]
    assert ids.n_unique() == len(ids) == 12
    assert f"{DAY.timestamp():.0f}_t1_30day" in first


def test_an_id_of_a_long_key_fits_and_is_unique(engine: sa.Engine) -> None:
    # The longest whose key is the id, one character more, and the longest that there can be.
    fits = "f" * (50 - len(f"{DAY.timestamp():.0f}__30day"))
    tutor_ids = [fits, fits + "f", *(f"{'é' * 49}{end}" for end in "abc")]
    add(engine, tables.tutors, *({"tutor_id": tutor_id} for tutor_id in tutor_ids))

    [batch] = write(engine, tiers(tutor_ids))

    ids = metrics_of(engine)["metric_id"]
    assert (batch.errors, ids.n_unique()) == ({}, 10)
    assert ids.str.len_chars().max() == 50
    assert ids.str.contains("__[0-9a-f]{32}$").sum() == 7
    assert ids.str.starts_with(f"{DAY.timestamp():.0f}_").all()


def test_the_id_of_a_row_that_is_there_stays(engine: sa.Engine, tutors: list[str]) -> None:
    write(engine, tiers(tutors))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE tutor_performance_metrics SET metric_id = 'old_' || metric_id"
        )
    before = metrics_of(engine)["metric_id"].to_list()

    [batch] = write(engine, tiers(tutors, no_show_count=2))

    assert (batch.updated, metrics_of(engine)["metric_id"].to_list()) == (6, before)


def test_only_tutors_who_moved_are_sent(engine: sa.Engine) -> None:
    tutor_ids = [f"t{number}" for number in range(9)]
    add(engine, tables.tutors, *({"tutor_id": tutor_id} for tutor_id in tutor_ids))
    write(engine, tiers(tutor_ids))
    moved = pl.col("tutor_id").is_in(["t2", "t4", "t8"])
    rows = tiers(tutor_ids).with_columns(
        no_show_count=pl.when(moved).then(7).otherwise("no_show_count")
    )

    batches = write(engine, rows, batch_size=2)

    assert batches == [
        Batch(1, 2, tutor_ids[:8], updated=4, unchanged=12),
        Batch(2, 2, tutor_ids[8:], updated=2),
    ]


def many(engine: sa.Engine, count: int = 3_000) -> list[str]:
    """So many tutors that two batches are written at once."""
    tutor_ids = [f"t{number:05}" for number in range(count)]
    add(engine, tables.tutors, *({"tutor_id": tutor_id} for tutor_id in tutor_ids))
    return tutor_ids


def test_batches_that_are_written_at_once_are_told_in_order(engine: sa.Engine) -> None:
    tutor_ids = many(engine)

    batches = write(engine, tiers(tutor_ids), batch_size=1_000)

    # Both writers have as many.
    assert [(batch.number, batch.of, batch.inserted) for batch in batches] == [
        (number, 4, 1_500) for number in range(1, 5)
    ]
    assert [one for batch in batches for one in batch.tutor_ids] == tutor_ids
    assert len(metrics_of(engine)) == 6_000
    [batch] = write(engine, tiers(tutor_ids), batch_size=1_000)
    assert batch == Batch(1, 1, tutor_ids, unchanged=6_000)
    changed = write(engine, tiers(tutor_ids, no_show_count=2), batch_size=1_000)
    assert [batch.updated for batch in changed] == [1_500] * 4


def test_what_fails_while_others_are_written_is_told_of_each(engine: sa.Engine) -> None:
    tutor_ids = many(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF NEW.tutor_id = 't00700' THEN RAISE 'full' USING ERRCODE = '53100'; END IF;"
            " RETURN NEW; END $$; CREATE TRIGGER look BEFORE INSERT ON tutor_performance_metrics"
            " FOR EACH ROW EXECUTE FUNCTION look()"
        )
    batches: list[Batch] = []

    writing = write_metrics(
        engine,
        tiers(tutor_ids),
        calculation_date=DAY,
        batch_size=100,
        retrying=ONCE,
        timeouts=Timeouts(),
    )
    with pytest.raises(MetricsTableError, match=r"cannot be written: full\. Free space"):
        batches.extend(writing)

    assert [batch.number for batch in batches] == list(range(1, len(batches) + 1))
    assert 8 <= len(batches) <= 10
    assert {batch.number for batch in batches if batch.errors} == {8}
    told = [one for batch in batches for one in batch.tutor_ids if not batch.errors]
    assert metrics_of(engine)["tutor_id"].unique().sort().to_list() == told


def test_a_writing_that_is_stopped_begins_no_further_batch(engine: sa.Engine) -> None:
    add(engine, tables.tutors, *({"tutor_id": tutor_id} for tutor_id in "abc"))
    over = Event()
    writing = write_metrics(
        engine,
        tiers(["a", "b", "c"]),
        calculation_date=DAY,
        batch_size=1,
        retrying=ONCE,
        timeouts=Timeouts(),
        writers=1,
        over=over,
    )

    assert next(writing).tutor_ids == ["a"]
    over.set()
    with pytest.raises(MetricsTableError, match="stopped before all rows were written"):
        next(writing)

    assert metrics_of(engine)["tutor_id"].unique().to_list() == ["a"]


def test_a_writing_that_is_broken_off_leaves_nothing_under_way(engine: sa.Engine) -> None:
    writing = write_metrics(
        engine,
        tiers(many(engine)),
        calculation_date=DAY,
        batch_size=100,
        retrying=ONCE,
        timeouts=Timeouts(),
    )
    next(iter(writing))
    writing.close()  # type: ignore[attr-defined]

    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert len(metrics_of(engine)) < 6_000


def test_two_who_write_many_new_rows_at_once_do_not_collide(engine: sa.Engine) -> None:
    tutor_ids = many(engine)
    barrier = Barrier(2)

    def writer(batch_size: int) -> list[Batch]:
        barrier.wait(timeout=30)
        return write(engine, tiers(tutor_ids), batch_size=batch_size)

    with ThreadPoolExecutor(2) as pool:
        batches = [batch for done in pool.map(writer, (700, 450)) for batch in done]

    assert [batch.errors for batch in batches if batch.errors] == []
    assert sum(batch.inserted for batch in batches) == len(metrics_of(engine)) == 6_000
    assert sum(batch.saved for batch in batches) == 12_000
