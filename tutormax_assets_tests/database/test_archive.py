"""The archive of old metrics: rows leave the table once they are safe, and come back as they were.

The crashes are real ones: another process is killed while it archives.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from threading import Barrier
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.database import archive, tables
from tutormax_assets.database.archive import (
    ArchivedDate,
    StoredDate,
    archive_date,
    dates_before,
    referred_rows,
    undated_rows,
    vacuum,
)
from tutormax_assets.database.archived_table import ArchiveError, archive_file
from tutormax_assets.database.connection import Timeouts, create_engine
from tutormax_assets.database.date_locks import date_lock
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.restore import RestoredDate, archived_dates, restore_date
from tutormax_assets.dates import midnight
from tutormax_assets.storage import files
from tutormax_assets_tests.conftest import add, metrics_of

DAY = date(2025, 8, 14)
KEY = ["tutor_id", "calculation_date", "window"]
AWKWARD = ["O'Brien", 'say "hi"', "a,b", "\\N", "line\n\\.\nend", " spaces ", "Ünïcødé 🎓", "NULL"]


def add_rows(
    engine: sa.Engine,
    day: date = DAY,
    *,
    tutors: int = 3,
    first: int = 1,
    timezone: str = "UTC",
    **values: Any,
) -> None:
    """Rows of two windows for each tutor, of a date."""
    add(
        engine,
        tables.tutor_performance_metrics,
        *(
            {
                "metric_id": f"{day}:{tutor}:{window}",
                "tutor_id": f"t{tutor}",
                "calculation_date": midnight(day, timezone=timezone),
                "window": window,
                "avg_rating": tutor / 7,
                "created_at": datetime(2025, 8, 15, 2, 0, 0, 123_456, tzinfo=UTC),
                "updated_at": datetime(2025, 8, 15, 2, 0, 0, 123_456, tzinfo=UTC),
                **values,
            }
            for tutor in range(first, tutors + 1)
            for window in ("30day", "7day")
        ),
    )


def execute(engine: sa.Engine, statement: str, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(statement), values)


def archived(base_path: str, day: date = DAY) -> pl.DataFrame:
    rows = files.read_parquet(archive_file(base_path, day))
    assert rows is not None
    return rows


def move(engine: sa.Engine, base_path: str, day: date = DAY, **options: Any) -> ArchivedDate:
    return archive_date(engine, base_path, day, **{"timezone": "UTC", **options})


def counts(result: ArchivedDate) -> tuple[int, int, int]:
    return result.rows_archived, result.rows_deleted, result.rows_left


@pytest.fixture(params=["local", "memory"])
def base_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, and a store that is none."""
    if request.param == "local":
        yield str(tmp_path / "archive")
        return
    path = UPath(f"memory://{uuid4().hex}")
    yield str(path)
    if path.exists():
        path.fs.rm(path.path, recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "archive")


def test_dates_before_a_day_are_found_oldest_first(engine: sa.Engine) -> None:
    for day, tutors in ((DAY, 2), (DAY - timedelta(days=40), 1), (DAY - timedelta(days=1), 3)):
        add_rows(engine, day, tutors=tutors)

    found = list(dates_before(engine, DAY, timezone="UTC"))

    assert found == [
        StoredDate(DAY - timedelta(days=40), 2),
        StoredDate(DAY - timedelta(days=1), 6),
    ]
    assert next(dates_before(engine, DAY, timezone="UTC")) == found[0]
    assert list(dates_before(engine, DAY - timedelta(days=40), timezone="UTC")) == []


# One has its clocks changed on the first of these days, at midnight; one is a day ahead.
@pytest.mark.parametrize("timezone", ["America/Havana", "Pacific/Kiritimati", "UTC"])
def test_a_day_is_that_of_the_timezone(engine: sa.Engine, folder: str, timezone: str) -> None:
    day = date(2025, 3, 9)
    start, end = (midnight(d, timezone=timezone) for d in (day, day + timedelta(days=1)))
    microsecond = timedelta(microseconds=1)
    for name, instant in {
        "before": start.astimezone(UTC) - microsecond,
        "first": start,
        "last": end.astimezone(UTC) - microsecond,
        "after": end,
    }.items():
        row = {"metric_id": name, "tutor_id": name, "calculation_date": instant, "window": "7day"}
        add(engine, tables.tutor_performance_metrics, row)

    assert list(dates_before(engine, day + timedelta(days=1), timezone=timezone)) == [
        StoredDate(day - timedelta(days=1), 1),
        StoredDate(day, 2),
    ]
    assert counts(move(engine, folder, day, timezone=timezone)) == (2, 2, 0)
    assert set(metrics_of(engine)["metric_id"]) == {"before", "after"}
    assert archived_dates(folder, "2025-03") == [day]


def test_rows_move_to_the_file_of_their_date(engine: sa.Engine, base_path: str) -> None:
    for day in (DAY - timedelta(days=1), DAY, DAY + timedelta(days=1)):
        add_rows(engine, day)
    before = metrics_of(engine)
    of_day = pl.col("calculation_date").dt.date() == DAY

    result = move(engine, base_path)

    path = UPath(base_path) / "tutor_performance_metrics/month=2025-08/2025-08-14.parquet"
    assert result == ArchivedDate(DAY, str(path), rows_archived=6, rows_deleted=6)
    assert_frame_equal(archived(base_path), before.filter(of_day))
    assert_frame_equal(metrics_of(engine), before.filter(~of_day))
    assert set(archived(base_path).columns) == set(tables.tutor_performance_metrics.c.keys())

    content = path.read_bytes()
    assert counts(move(engine, base_path)) == (0, 0, 0)
    assert path.read_bytes() == content


def test_every_value_comes_back_as_it_was(engine: sa.Engine, folder: str) -> None:
    values: list[dict[str, Any]] = [
        {"tutor_id": tutor_id, "avg_rating": 0.1 + 0.2, "performance_tier": ""}
        for tutor_id in AWKWARD
    ]
    values += [
        {"tutor_id": "floats", "engagement_score": float("nan"), "reschedule_rate": float("inf")},
        {"tutor_id": "small", "avg_rating": 5e-324, "engagement_score": -0.0},
        {"tutor_id": "large", "avg_rating": 1.7976931348623157e308, "no_show_count": 2**31 - 1},
        {"tutor_id": "old", "created_at": datetime(1, 1, 2, 3, 4, 5, 6, tzinfo=UTC)},
    ]
    for number, row in enumerate(values):
        fixed = {"metric_id": str(number), "calculation_date": midnight(DAY, timezone="UTC")}
        add(engine, tables.tutor_performance_metrics, {"window": "7day", **fixed, **row})
    before = metrics_of(engine)
    # What the database's session shows timestamps in must not matter.
    elsewhere = create_engine(
        engine.url.update_query_dict({"options": "-c timezone=Asia/Kathmandu"})
    )

    assert counts(move(elsewhere, folder)) == (12, 12, 0)
    assert_frame_equal(archived(folder), before)
    restored = restore_date(elsewhere, folder, DAY)
    elsewhere.dispose()

    assert (restored.rows_restored, restored.rows_kept) == (12, 0)
    assert_frame_equal(metrics_of(engine), before)


def test_columns_that_only_this_database_has_are_archived_too(
    engine: sa.Engine, folder: str
) -> None:
    execute(engine, 'ALTER TABLE tutor_performance_metrics ADD "odd ""name" jsonb, ADD note text')
    add_rows(engine, tutors=1)
    execute(
        engine,
        'UPDATE tutor_performance_metrics SET "odd ""name" = \'{"a": [1, null]}\', note = :note',
        note="kept",
    )

    assert counts(move(engine, folder)) == (2, 2, 0)
    assert archived(folder)['odd "name'].to_list() == ['{"a": [1, null]}'] * 2

    # A column that has gone since is no reason not to restore the others.
    execute(engine, "ALTER TABLE tutor_performance_metrics DROP note")
    assert restore_date(engine, folder, DAY).rows_restored == 2
    with engine.connect() as connection:
        query = sa.text('SELECT "odd ""name" FROM tutor_performance_metrics')
        assert connection.scalars(query).all() == [{"a": [1, None]}] * 2


def test_rows_are_deleted_in_bounded_transactions(engine: sa.Engine, folder: str) -> None:
    add_rows(engine, tutors=5)
    commits: list[int] = []
    sa.event.listen(engine, "commit", lambda _: commits.append(1))

    assert counts(move(engine, folder, batch_rows=3)) == (10, 10, 0)

    # Four batches, and the lock.
    assert len(commits) == 5


def test_new_rows_of_a_date_join_those_in_its_file(engine: sa.Engine, base_path: str) -> None:
    add_rows(engine, tutors=2)
    first = metrics_of(engine)
    move(engine, base_path)
    # The date was computed again: one tutor with other values and other ids, one tutor more.
    newer = datetime(2025, 9, 1, tzinfo=UTC)
    for tutor in ("t2", "t3"):
        row = {"metric_id": f"new {tutor}", "tutor_id": tutor, "window": "7day"}
        times = {"calculation_date": midnight(DAY, timezone="UTC"), "updated_at": newer}
        add(engine, tables.tutor_performance_metrics, {**row, **times})
    second = metrics_of(engine)

    assert counts(move(engine, base_path)) == (2, 2, 0)

    rows = archived(base_path)
    expected = pl.concat([second, first]).unique(KEY, keep="first").sort(KEY)
    assert_frame_equal(rows, expected)
    assert len(rows) == 5
    assert metrics_of(engine).is_empty()


def test_an_older_row_does_not_replace_a_newer_one_in_the_archive(
    engine: sa.Engine, folder: str
) -> None:
    add_rows(engine, tutors=1)
    move(engine, folder)
    before = archived(folder)
    # As after the table was restored from an old backup.
    older = datetime(2025, 8, 14, tzinfo=UTC)
    add_rows(engine, tutors=1, updated_at=older, sessions_completed=9)

    assert counts(move(engine, folder)) == (2, 0, 2)

    assert_frame_equal(archived(folder), before)
    assert metrics_of(engine)["sessions_completed"].to_list() == [9, 9]


def test_a_row_that_changes_between_export_and_delete_stays(
    engine: sa.Engine, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rows(engine)
    before = metrics_of(engine)
    delete = archive._delete_unchanged
    update = (
        "UPDATE tutor_performance_metrics SET avg_rating = 5, updated_at = now()"
        " WHERE tutor_id = :tutor AND \"window\" = '7day'"
    )
    writer = engine.connect()

    def change_first(*arguments: Any) -> int:
        # One is changed already; one is being changed, by a transaction that is not over.
        execute(engine, update, tutor="t1")
        writer.execute(sa.text(update), {"tutor": "t2"})
        return delete(*arguments)

    monkeypatch.setattr(archive, "_delete_unchanged", change_first)
    result = move(engine, folder)
    monkeypatch.undo()
    writer.commit()
    writer.close()

    assert counts(result) == (6, 4, 2)
    assert_frame_equal(archived(folder), before)
    left = metrics_of(engine)
    assert left.select("tutor_id", "window", "avg_rating").rows() == [
        ("t1", "7day", 5.0),
        ("t2", "7day", 5.0),
    ]

    assert counts(move(engine, folder)) == (2, 2, 0)
    assert_frame_equal(
        archived(folder), pl.concat([left, before]).unique(KEY, keep="first").sort(KEY)
    )


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "other rows":
        pl.read_parquet(path).head(4).write_parquet(path)
    elif how == "other values":
        pl.read_parquet(path).with_columns(no_show_count=pl.lit(7, pl.Int64)).write_parquet(path)
    else:
        path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("how", ["gone", "other rows", "other values", "half of it"])
def test_nothing_is_deleted_when_the_file_does_not_come_back_as_written(
    engine: sa.Engine, folder: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    add_rows(engine)
    before = metrics_of(engine)

    def write(path: UPath, rows: pl.LazyFrame) -> files.StoredFile:
        stored = files.write_parquet(path, rows)
        spoil(Path(str(path)), how)
        return stored

    monkeypatch.setattr(archive, "write_parquet", write)
    with pytest.raises(ArchiveError) as error:
        move(engine, folder)
    monkeypatch.undo()

    assert str(archive_file(folder, DAY)) in str(error.value)
    assert "The table keeps its rows." in str(error.value)
    assert_frame_equal(metrics_of(engine), before)

    if how == "half of it":
        # A file that cannot be read is not overwritten: what was in it may still be saved.
        with pytest.raises(ArchiveError, match="cannot be read or written"):
            move(engine, folder)
        archive_file(folder, DAY).unlink()
    assert move(engine, folder).rows_deleted == 6


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("nowhere://bucket", "Unsupported filesystem"),
        ("/dev/null/archive", "Not a directory"),
    ],
)
def test_an_archive_out_of_reach_is_an_error_in_a_sentence(
    engine: sa.Engine, base: str, expected: str
) -> None:
    add_rows(engine)

    with pytest.raises(ArchiveError, match=f"{expected}.*TUTORMAX_ARCHIVE says where"):
        move(engine, base)
    with pytest.raises(ArchiveError):
        restore_date(engine, base, DAY)

    assert len(metrics_of(engine)) == 6


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DROP TABLE tutor_performance_metrics CASCADE", "does not exist"),
        ("ALTER TABLE tutor_performance_metrics DROP avg_rating", "lacks avg_rating"),
        (
            "ALTER TABLE tutor_performance_metrics"
            " DROP CONSTRAINT uq_tutor_performance_metrics_tutor_date_window",
            "is not unique by tutor_id, calculation_date, window",
        ),
    ],
)
def test_a_table_that_was_not_upgraded_is_left_alone(
    engine: sa.Engine, folder: str, statement: str, expected: str
) -> None:
    execute(engine, statement)

    for call in (
        lambda: list(dates_before(engine, DAY, timezone="UTC")),
        lambda: move(engine, folder),
        lambda: restore_date(engine, folder, DAY),
    ):
        with pytest.raises(MetricsTableError, match=f"{expected}.*`tutormax db upgrade`"):
            call()
    assert not Path(folder).exists()


def held_locks(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        query = """
            SELECT count(*) FROM pg_locks
            WHERE locktype = 'advisory'
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        """
        return int(connection.exec_driver_sql(query).scalar_one())


_KILLED_PROCESS = """
import os, signal, sys
from datetime import date
from tutormax_assets.database import archive, connection
from tutormax_assets.storage import files
import sqlalchemy as sa

url, base_path, day, point, count = sys.argv[1:]
left = int(count)

def strike(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

engine = connection.create_engine(sa.make_url(url))
if point == "file written under its temporary name":
    os.fsync = strike
elif point == "file in place":
    archive.write_parquet = lambda *a: (files.write_parquet(*a), strike())
elif point == "archived, nothing deleted":
    archive._delete_unchanged = strike
elif point == "commit":
    sa.event.listen(engine, "commit", strike)
archive.archive_date(engine, base_path, date.fromisoformat(day), timezone="UTC", batch_rows=4)
"""


@pytest.mark.parametrize(
    ("point", "count", "rows_left"),
    [
        ("file written under its temporary name", 1, 10),
        ("file in place", 1, 10),
        ("archived, nothing deleted", 1, 10),
        # Before the commit of the first, the second and the third batch, and of the lock.
        ("commit", 1, 10),
        ("commit", 2, 6),
        ("commit", 3, 2),
        ("commit", 4, 0),
    ],
)
def test_a_cleanup_that_is_killed_loses_nothing_and_the_next_one_finishes(
    engine: sa.Engine, folder: str, point: str, count: int, rows_left: int
) -> None:
    add_rows(engine, tutors=5)
    before = metrics_of(engine)
    url = engine.url.render_as_string(hide_password=False)

    killed = subprocess.run(
        [sys.executable, "-c", _KILLED_PROCESS, url, folder, str(DAY), point, str(count)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, "")
    # The server has yet to see that the process is gone.
    deadline = monotonic() + 10
    while held_locks(engine) and monotonic() < deadline:
        sleep(0.01)
    table, path = metrics_of(engine), archive_file(folder, DAY)
    assert len(table) == rows_left
    kept = [table, archived(folder)] if path.exists() else [table]
    assert_frame_equal(pl.concat(kept).unique().sort(KEY), before)

    assert move(engine, folder).rows_left == 0
    assert metrics_of(engine).is_empty()
    assert_frame_equal(archived(folder), before)
    assert list(path.parent.iterdir()) == [path]


def test_two_cleanups_at_once_move_each_row_once(engine: sa.Engine, base_path: str) -> None:
    days = [DAY + timedelta(days=n) for n in range(4)]
    for day in days:
        add_rows(engine, day, tutors=4)
    before = metrics_of(engine)
    together = Barrier(2)

    def clean() -> int:
        together.wait()
        return sum(move(engine, base_path, day, batch_rows=3).rows_deleted for day in days)

    with ThreadPoolExecutor(2) as pool:
        cleanups = [pool.submit(clean) for _ in range(2)]

    assert sum(cleanup.result() for cleanup in cleanups) == len(before) == 32
    assert metrics_of(engine).is_empty()
    assert_frame_equal(pl.concat(archived(base_path, day) for day in days).sort(KEY), before)


def test_a_month_says_which_dates_it_has(engine: sa.Engine, base_path: str) -> None:
    with pytest.raises(ArchiveError, match="has no month 2025-08; it holds nothing"):
        archived_dates(base_path, "2025-08")
    for day in (date(2025, 8, 31), date(2025, 8, 1), date(2025, 9, 1)):
        add_rows(engine, day, tutors=1)
        move(engine, base_path, day)

    assert archived_dates(base_path, "2025-08") == [date(2025, 8, 1), date(2025, 8, 31)]
    with pytest.raises(ArchiveError, match="no month 2025-07; it holds 2025-08, 2025-09"):
        archived_dates(base_path, "2025-07")


def restored_counts(result: RestoredDate) -> Mapping[str, int]:
    return {
        "archived": result.rows_archived,
        "restored": result.rows_restored,
        "kept": result.rows_kept,
        "unknown": result.rows_of_unknown_tutors,
    }


def test_archived_rows_come_back_beside_those_that_are_there(
    engine: sa.Engine, base_path: str
) -> None:
    add_rows(engine, tutors=4)
    before = metrics_of(engine)
    move(engine, base_path)
    content = archive_file(base_path, DAY).read_bytes()
    # Of one tutor a row was computed again, under another id; of one an id is taken; one has left.
    day = midnight(DAY, timezone="UTC")
    for row in (
        {"metric_id": "new", "tutor_id": "t1", "calculation_date": day, "window": "7day"},
        {
            "metric_id": f"{DAY}:2:7day",
            "tutor_id": "t2",
            "calculation_date": day + timedelta(days=1),
            "window": "7day",
        },
    ):
        add(engine, tables.tutor_performance_metrics, row)
    execute(engine, "DELETE FROM tutors WHERE tutor_id = 't3'")
    there = metrics_of(engine)
    expected = {"archived": 8, "restored": 4, "kept": 2, "unknown": 2}

    asked = restore_date(engine, base_path, DAY, dry_run=True)
    assert_frame_equal(metrics_of(engine), there)
    done = restore_date(engine, base_path, DAY)

    assert asked == done
    assert restored_counts(done) == expected
    assert done.unknown_tutors == ("t3",)
    is_back = (
        (pl.col("tutor_id") != "t3")
        & ~((pl.col("tutor_id") == "t1") & (pl.col("window") == "7day"))
        & ~((pl.col("tutor_id") == "t2") & (pl.col("window") == "7day"))
    )
    assert_frame_equal(metrics_of(engine), pl.concat([there, before.filter(is_back)]).sort(KEY))
    assert archive_file(base_path, DAY).read_bytes() == content

    again = restore_date(engine, base_path, DAY)
    assert restored_counts(again) == {**expected, "restored": 0, "kept": 6}


def test_what_was_restored_is_archived_again_without_duplicates(
    engine: sa.Engine, folder: str
) -> None:
    add_rows(engine)
    move(engine, folder)
    content = archive_file(folder, DAY).read_bytes()
    restore_date(engine, folder, DAY)

    assert counts(move(engine, folder)) == (6, 6, 0)

    assert archive_file(folder, DAY).read_bytes() == content


def test_a_file_that_is_missing_cannot_be_restored(engine: sa.Engine, base_path: str) -> None:
    with pytest.raises(ArchiveError, match=r"There is no file .*/2025-08-14\.parquet"):
        restore_date(engine, base_path, DAY)


def test_rows_that_the_table_refuses_are_an_error_in_a_sentence(
    engine: sa.Engine, folder: str
) -> None:
    add_rows(engine, tutors=1)
    move(engine, folder)
    path = archive_file(folder, DAY)
    archived(folder).with_columns(window=pl.lit("x" * 21)).write_parquet(Path(str(path)))

    with pytest.raises(MetricsTableError, match=r"value too long for type character varying\(20\)"):
        restore_date(engine, folder, DAY)


def vacuums(engine: sa.Engine) -> int:
    query = sa.text(
        "SELECT vacuum_count FROM pg_stat_user_tables WHERE relname = 'tutor_performance_metrics'"
    )
    with engine.connect() as connection:
        return int(connection.scalar(query) or 0)


def test_the_table_is_vacuumed_and_analyzed(engine: sa.Engine) -> None:
    assert vacuum(engine) is None

    # PostgreSQL's statistics arrive a little later.
    deadline = monotonic() + 10
    while vacuums(engine) == 0 and monotonic() < deadline:
        sleep(0.1)
    assert vacuums(engine) == 1


def test_a_role_that_may_not_vacuum_is_told_so(engine: sa.Engine) -> None:
    role = f"limited_{uuid4().hex}"
    execute(engine, f"CREATE ROLE {role} LOGIN")
    execute(engine, f"GRANT SELECT, DELETE ON tutor_performance_metrics TO {role}")
    limited = create_engine(engine.url.set(username=role))
    try:
        refusal = vacuum(limited)
    finally:
        limited.dispose()
        execute(engine, f"DROP OWNED BY {role}")
        execute(engine, f"DROP ROLE {role}")

    assert refusal is not None
    assert "permission denied" in refusal
    assert vacuums(engine) == 0


@pytest.mark.parametrize("instant", ["-infinity", "infinity", "0044-03-15 00:00:00+00 BC"])
def test_rows_with_timestamps_that_cannot_be_read_stay(
    engine: sa.Engine, folder: str, instant: str
) -> None:
    add_rows(engine)
    for column, tutor in (("calculation_date", 1), ("updated_at", 2)):
        execute(
            engine,
            f"UPDATE tutor_performance_metrics SET {column} = :at WHERE metric_id = :id",
            at=instant,
            id=f"{DAY}:{tutor}:7day",
        )
    later = DAY + timedelta(days=1)

    assert undated_rows(engine, later, timezone="UTC") == (1 if instant == "infinity" else 2)
    assert list(dates_before(engine, later, timezone="UTC")) == [StoredDate(DAY, 4)]
    assert counts(move(engine, folder)) == (4, 4, 0)
    assert list(dates_before(engine, later, timezone="UTC")) == []
    assert restore_date(engine, folder, DAY).rows_restored == 4


REFERRING = {
    "cascade": (
        "CREATE TABLE alerts (metric_id varchar(50) REFERENCES tutor_performance_metrics"
        " ON DELETE CASCADE, note text)",
        "INSERT INTO alerts SELECT metric_id, 'seen' FROM tutor_performance_metrics"
        " WHERE tutor_id = 't1'",
    ),
    "no action": (
        "CREATE TABLE alerts (metric_id varchar(50) REFERENCES tutor_performance_metrics)",
        "INSERT INTO alerts SELECT metric_id FROM tutor_performance_metrics WHERE tutor_id = 't1'",
    ),
    "the unique key": (
        "CREATE TABLE alerts (t varchar(50), d timestamptz, w varchar(20), FOREIGN KEY (w, t, d)"
        ' REFERENCES tutor_performance_metrics ("window", tutor_id, calculation_date)'
        " ON DELETE SET NULL)",
        'INSERT INTO alerts SELECT tutor_id, calculation_date, "window"'
        " FROM tutor_performance_metrics WHERE tutor_id = 't1'",
    ),
    "partitions": (
        "CREATE TABLE alerts (metric_id varchar(50) DEFAULT 'x' REFERENCES"
        " tutor_performance_metrics ON DELETE SET DEFAULT, day int) PARTITION BY LIST (day);"
        " CREATE TABLE alerts_1 PARTITION OF alerts FOR VALUES IN (1)",
        "INSERT INTO alerts SELECT metric_id, 1 FROM tutor_performance_metrics"
        " WHERE tutor_id = 't1'",
    ),
}


@pytest.mark.parametrize("how", REFERRING)
def test_rows_that_another_table_refers_to_stay(engine: sa.Engine, folder: str, how: str) -> None:
    create, fill = REFERRING[how]
    for day in (DAY, DAY + timedelta(days=1)):
        add_rows(engine, day, tutors=1)
    execute(engine, create)
    execute(engine, fill)
    add_rows(engine, DAY + timedelta(days=1), tutors=2, first=2)
    with engine.connect() as connection:
        alerts = connection.execute(sa.text("SELECT * FROM alerts")).all()
    later = DAY + timedelta(days=2)

    assert list(dates_before(engine, later, timezone="UTC")) == [
        StoredDate(DAY + timedelta(days=1), 2)
    ]
    assert referred_rows(engine, later, timezone="UTC") == {"alerts": 4}
    assert counts(move(engine, folder)) == (0, 0, 0)
    assert counts(move(engine, folder, DAY + timedelta(days=1))) == (2, 2, 0)

    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT * FROM alerts")).all() == alerts
    assert set(metrics_of(engine)["tutor_id"]) == {"t1"}


def test_a_reference_that_is_made_in_between_keeps_its_row(
    engine: sa.Engine, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(engine, REFERRING["cascade"][0])
    add_rows(engine)
    insert = (
        "INSERT INTO alerts SELECT metric_id FROM tutor_performance_metrics WHERE tutor_id = :t"
    )
    delete = archive._delete_unchanged
    other = engine.connect()

    def refer_first(*arguments: Any) -> int:
        execute(engine, insert, t="t1")
        # Not committed, and so not to be seen.
        other.execute(sa.text(insert), {"t": "t2"})
        return delete(*arguments)

    monkeypatch.setattr(archive, "_delete_unchanged", refer_first)
    assert counts(move(engine, folder)) == (6, 2, 4)
    other.commit()
    other.close()

    assert set(metrics_of(engine)["tutor_id"]) == {"t1", "t2"}
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM alerts")) == 4


def test_nothing_is_archived_while_references_may_not_be_seen(
    engine: sa.Engine, folder: str
) -> None:
    role = f"limited_{uuid4().hex}"
    execute(engine, REFERRING["cascade"][0])
    add_rows(engine)
    execute(engine, f"CREATE ROLE {role} LOGIN")
    execute(engine, f"GRANT SELECT, UPDATE, DELETE ON tutor_performance_metrics TO {role}")
    execute(engine, f"GRANT SELECT, DELETE ON tutor_tier_reasons, tutor_tier_changes TO {role}")
    execute(engine, f"GRANT SELECT (note) ON alerts TO {role}")
    limited = create_engine(engine.url.set(username=role))
    try:
        said = "table alerts refers to .* no right to see all of its metric_id.*so grant that to"
        with pytest.raises(MetricsTableError, match=said):
            move(limited, folder)
        execute(engine, f"GRANT SELECT (metric_id) ON alerts TO {role}")
        execute(engine, "ALTER TABLE alerts ENABLE ROW LEVEL SECURITY")
        with pytest.raises(MetricsTableError, match="expected SELECT without row security"):
            referred_rows(limited, DAY, timezone="UTC")
        execute(engine, "ALTER TABLE alerts DISABLE ROW LEVEL SECURITY")
        assert move(limited, folder).rows_deleted == 6
    finally:
        limited.dispose()
        execute(engine, f"DROP OWNED BY {role}")
        execute(engine, f"DROP ROLE {role}")


COLUMNS_OF_EVERY_KIND = r"""
    ALTER TABLE tutor_performance_metrics
        ADD always_id bigint GENERATED ALWAYS AS IDENTITY,
        ADD default_id bigint GENERATED BY DEFAULT AS IDENTITY,
        ADD "100% stored" double precision GENERATED ALWAYS AS (avg_rating / 3) STORED,
        ADD moods mood[] NOT NULL DEFAULT '{good,bad}',
        ADD share double precision DEFAULT 0.1 + CAST(0.2 AS float8),
        ADD price money DEFAULT CAST(1234.5 AS money),
        ADD bytes bytea DEFAULT '\x00ff',
        ADD seen timestamptz DEFAULT '2025-08-14 12\:00\:00.000001+00',
        ADD pause interval DEFAULT '1 mon -2 days 03\:00\:00.5',
        ADD labels jsonb DEFAULT '{"a,b"\: ["\"", null]}'
"""


def all_columns(engine: sa.Engine) -> list[dict[str, Any]]:
    query = "SELECT to_jsonb(t) AS row FROM tutor_performance_metrics AS t ORDER BY metric_id"
    with engine.connect() as connection:
        return list(connection.scalars(sa.text(query)))


def test_columns_of_every_kind_come_back(engine: sa.Engine, folder: str) -> None:
    execute(engine, "CREATE TYPE mood AS ENUM ('good', 'bad')")
    add_rows(engine)
    execute(
        engine,
        COLUMNS_OF_EVERY_KIND,
    )
    before = all_columns(engine)
    strange = create_engine(
        engine.url.update_query_dict(
            {
                "options": "-c extra_float_digits=0 -c DateStyle=German -c bytea_output=escape"
                " -c IntervalStyle=sql_standard -c timezone=Asia/Kathmandu"
            }
        )
    )

    assert counts(move(strange, folder)) == (6, 6, 0)
    assert metrics_of(engine).is_empty()
    assert restore_date(strange, folder, DAY).rows_restored == 6
    strange.dispose()

    assert all_columns(engine) == before
    # Archived and restored with other settings, the rows are the same.
    assert counts(move(engine, folder)) == (6, 6, 0)


def test_rows_that_would_not_come_back_stay(engine: sa.Engine, folder: str) -> None:
    add_rows(engine, tutors=2)
    execute(
        engine,
        "ALTER TABLE tutor_performance_metrics"
        " ADD CONSTRAINT rated CHECK (avg_rating > 0.2) NOT VALID",
    )
    before = metrics_of(engine)

    result = move(engine, folder)

    assert result.refusal == (
        'new row for relation "staged_metrics" violates check constraint "rated"'
    )
    assert counts(result) == (4, 0, 4)
    assert_frame_equal(metrics_of(engine), before)


def test_archived_rows_that_lack_a_needed_column_are_refused_with_a_sentence(
    engine: sa.Engine, folder: str
) -> None:
    add_rows(engine)
    move(engine, folder)
    execute(engine, "ALTER TABLE tutor_performance_metrics ADD must int NOT NULL")

    with pytest.raises(MetricsTableError, match='null value in column "must"'):
        restore_date(engine, folder, DAY)


def test_a_date_that_is_held_elsewhere_is_left_alone(engine: sa.Engine, folder: str) -> None:
    add_rows(engine)
    with date_lock(engine, str(DAY)) as is_mine:
        assert is_mine
        result = move(engine, folder)
        assert (result.is_in_use, counts(result)) == (True, (0, 0, 0))
        with pytest.raises(MetricsTableError, match=f"A run or a cleanup of {DAY} is under way"):
            restore_date(engine, folder, DAY)
    assert not Path(folder).exists()

    assert counts(move(engine, folder)) == (6, 6, 0)


def test_a_table_that_is_locked_is_an_error_in_a_sentence(engine: sa.Engine, folder: str) -> None:
    add_rows(engine)
    with engine.begin() as other:
        other.execute(sa.text("LOCK tutor_performance_metrics"))
        with pytest.raises(MetricsTableError, match="TUTORMAX_LOCK_TIMEOUT_SECONDS"):
            move(engine, folder, timeouts=Timeouts(lock_seconds=0.05))
