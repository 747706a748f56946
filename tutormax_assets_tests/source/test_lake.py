"""Reading the platform from a lake: as PostgreSQL gives it, and what is refused."""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote
from uuid import uuid4
from zoneinfo import ZoneInfo

import polars as pl
import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.database.faults import may_pass
from tutormax_assets.metrics.schemas import SourceEvents, SourceSessions, SourceTutors
from tutormax_assets.sample.frames import sample_frames
from tutormax_assets.sample.lake import write_lake
from tutormax_assets.settings import SettingsError
from tutormax_assets.source import lake as lakes
from tutormax_assets.source import lake_files, streams
from tutormax_assets.source.lake import breaches, open_view
from tutormax_assets.source.lake_files import Lake, LakeChangedError, LakeUnreachableError
from tutormax_assets.source.postgres import Source
from tutormax_assets.source.streams import SourceError
from tutormax_assets.source.view import newest, open_shared_view, unknown_tutors
from tutormax_assets.storage.files import write_parquet
from tutormax_assets.storage.shards import Shards, TutorRange
from tutormax_assets_tests.conftest import SMALL_PLATFORM, Platform
from tutormax_assets_tests.source.reading import Rows, read

START = datetime(2025, 11, 1, tzinfo=UTC)
END = datetime(2025, 11, 4, tzinfo=UTC)
WINDOW: dict[str, Any] = {"start": START, "end": END}
TABLES = ("tutors", "sessions", "student_feedback", "tutor_events")
BROKEN = b"This is no Parquet file."
SESSION: Mapping[str, Any] = {
    "session_id": "s",
    "tutor_id": "t",
    "session_number": 2,
    "scheduled_start": START,
    "actual_start": START,
    "tutor_initiated_reschedule": False,
    "no_show": False,
    "late_start_minutes": 0,
    "engagement_score": 0.5,
    "learning_objectives_met": True,
}
FEEDBACK: Mapping[str, Any] = {
    "feedback_id": "f",
    "session_id": "s",
    "tutor_id": "t",
    "overall_rating": 4,
}
EVENT: Mapping[str, Any] = {
    "event_id": "e",
    "tutor_id": "t",
    "event_type": "message_response",
    "event_timestamp": START,
    "metadata": '{"response_time_minutes": 12.5}',
}


def datasets(**replaced: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """A row in each dataset, unless a dataset is given."""
    return {
        "tutors": pl.DataFrame({"tutor_id": ["t"], "status": ["active"]}),
        "sessions": pl.DataFrame([SESSION]),
        "student_feedback": pl.DataFrame([FEEDBACK]),
        "tutor_events": pl.DataFrame([EVENT]),
    } | replaced


def rows_of(row: Mapping[str, Any], *changes: Mapping[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([{**row, **change} for change in changes], infer_schema_length=None)


@pytest.fixture(params=["local", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, and a store that is none."""
    if request.param == "local":
        yield str(tmp_path / "env=test" / "lake")
        return
    base = UPath(f"memory://{uuid4().hex}/lake")
    yield str(base)
    if base.exists():
        base.fs.rm(base.path, recursive=True)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """A lake with a row in each dataset."""
    path = str(tmp_path / "lake")
    write_lake(path, datasets(), file_name="0.parquet")
    return Lake(path)


def written(path: str, **replaced: pl.DataFrame) -> Lake:
    write_lake(path, datasets(**replaced), file_name="0.parquet")
    return Lake(path)


def store(lake: Lake, path: str, rows: pl.DataFrame) -> None:
    write_parquet(UPath(lake.path) / path, rows.lazy())


def refusal(lake: Lake, **arguments: Any) -> str:
    with pytest.raises(SourceError) as error:
        read(lake, **{**WINDOW, **arguments})
    assert not may_pass(error.value)
    return str(error.value)


def assert_same_rows(found: Rows, expected: Rows) -> None:
    for name, schema in (
        ("tutors", SourceTutors),
        ("sessions", SourceSessions),
        ("events", SourceEvents),
    ):
        rows = getattr(found, name)
        assert rows.schema == pl.Schema(schema)
        assert_frame_equal(rows.sort(pl.all()), getattr(expected, name).sort(pl.all()))


def test_a_lake_gives_the_rows_that_postgresql_gives(small_platform: Platform, path: str) -> None:
    write_lake(path, small_lake(), file_name="0.parquet")
    source, lake = Source(small_platform.url), Lake(path)
    window: dict[str, Any] = {
        "start": datetime(2025, 9, 3, tzinfo=UTC),
        "end": datetime(2025, 11, 7, 13, 30, tzinfo=ZoneInfo("Asia/Kolkata")),
    }
    tutors = read(source, **window).tutors["tutor_id"].sort()
    shards = Shards.of(tutors, count=3)

    whole = read(lake, **window)
    assert_same_rows(whole, read(source, **window))
    assert not whole.ids_are_unique
    assert len(whole.snapshot) == 64
    for only in (
        {"tutor_ids": [tutors[3], tutors[11], "nobody"]},
        {"tutor_range": shards.range_of([1])},
        {"tutor_range": TutorRange(None, tutors[4]), "tutor_ids": [tutors[0], tutors[9]]},
    ):
        found = read(lake, **window, **only)
        assert 0 < len(found.sessions) < len(whole.sessions)
        assert_same_rows(found, read(source, **window, **only))


def small_lake() -> dict[str, pl.DataFrame]:
    frames = sample_frames(**SMALL_PLATFORM)
    return {table: frames[table] for table in TABLES}


def test_only_the_days_of_the_window_are_opened(path: str) -> None:
    instants = {
        "before": START - timedelta(microseconds=1),
        "first": START,
        "last": END - timedelta(microseconds=1),
        "after": END,
    }
    lake = written(
        path,
        sessions=rows_of(
            SESSION,
            *({"session_id": name, "scheduled_start": at} for name, at in instants.items()),
        ),
        student_feedback=rows_of(
            FEEDBACK, *({"session_id": name, "feedback_id": name} for name in instants)
        ),
        tutor_events=rows_of(
            EVENT, *({"event_id": name, "event_timestamp": at} for name, at in instants.items())
        ),
    )
    for table in TABLES[1:]:
        for day in (START.date() - timedelta(days=1), END.date()):
            (UPath(path) / table / f"day={day}" / "0.parquet").write_bytes(BROKEN)

    rows = read(lake, **WINDOW)

    assert set(rows.sessions["session_id"]) == {"first", "last"}
    assert set(rows.sessions["feedback_id"]) == {"first", "last"}
    assert set(rows.events["event_id"]) == {"first", "last"}
    assert rows.sessions.schema["scheduled_start"] == pl.Datetime("us", "UTC")
    at_six = timedelta(hours=6)
    assert "found parquet: File out of spec" in refusal(lake, start=START, end=END + at_six)
    assert "sessions/day=2025-10-31/0.parquet" in refusal(lake, start=START - at_six, end=END)


def test_what_is_no_data_is_left_out(lake: Lake) -> None:
    base = Path(lake.path)
    for name in (
        "sessions/_SUCCESS",
        "sessions/_temporary/0/part.parquet",
        "sessions/day=2025-11-01/.part.parquet.crc",
        "sessions/day=2025-11-01/_part.parquet",
        "sessions/day=2025-11-01/readme.txt",
        "sessions/day=__HIVE_DEFAULT_PARTITION__/0.parquet",
        "tutors/_delta_log/0.json",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(BROKEN)
    deeper = base / "sessions/day=2025-11-01/hour=00/0.parquet"
    rows_of(SESSION, {"session_id": "deeper"}).lazy().sink_parquet(deeper, mkdir=True)

    assert set(read(lake, **WINDOW).sessions["session_id"]) == {"s", "deeper"}


def test_feedback_may_be_in_one_piece(lake: Lake, tmp_path: Path) -> None:
    expected = read(lake, **WINDOW)
    files = Path(lake.path) / "student_feedback"
    (files / "day=2025-11-01" / "0.parquet").rename(files / "all.parquet")
    store(lake, "student_feedback/more.parquet", rows_of(FEEDBACK, {"session_id": "of another"}))

    assert_same_rows(read(lake, **WINDOW), expected)


def test_types_that_differ_a_little_are_read_as_the_contract_has_them(path: str) -> None:
    lake = written(
        path,
        tutors=datasets()["tutors"].cast(pl.Categorical),
        sessions=rows_of(SESSION, {}).cast(
            {
                "tutor_id": pl.Enum(["t"]),
                "session_number": pl.UInt64,
                "scheduled_start": pl.Datetime("ns", "America/New_York"),
                "actual_start": pl.Datetime("ms", "UTC"),
                "late_start_minutes": pl.Int8,
                "engagement_score": pl.Decimal(5, 2),
            }
        ),
    )
    # Another file of the day has other types, one more column, and columns without a value.
    other = {"session_id": "other", "engagement_score": 0.1, "learning_objectives_met": None}
    more = rows_of(SESSION, {**other, "actual_start": None})
    more = more.cast({"engagement_score": pl.Float32, "session_number": pl.Int16})
    store(lake, "sessions/day=2025-11-01/1.parquet", more.with_columns(extra=pl.lit(1)))

    rows = read(lake, **WINDOW)

    assert rows.tutors.rows() == [("t", "active")]
    assert rows.sessions.schema == pl.Schema(SourceSessions)
    first, second = rows.sessions.sort("session_id", descending=True).to_dicts()
    assert (first["session_number"], first["scheduled_start"]) == (2, START)
    assert (first["started"], second["started"]) == (True, False)
    assert (first["engagement_score"], first["tutor_id"]) == (0.5, "t")
    # As PostgreSQL makes a real a double.
    assert second["engagement_score"] == 0.10000000149011612
    assert second["learning_objectives_met"] is None


def test_numbers_that_do_not_fit_stay_on_their_side(path: str) -> None:
    numbers = {"a": -(2**40), "b": -1, "c": 0, "d": 2**31 - 1, "e": 2**31, "f": 2**62, "g": None}
    lake = written(
        path,
        sessions=rows_of(
            SESSION,
            *(
                {"session_id": key, "session_number": number, "late_start_minutes": number}
                for key, number in numbers.items()
            ),
        ),
    )

    rows = read(lake, **WINDOW).sessions.sort("session_id")

    most = 2**31 - 1
    for column in ("session_number", "late_start_minutes"):
        assert rows[column].to_list() == [-1, -1, 0, most, most, most, None]
    largest = pl.DataFrame({"session_number": [2**64 - 1]}, schema={"session_number": pl.UInt64})
    rows_of(SESSION, {}).with_columns(largest["session_number"]).pipe(
        lambda frame: store(lake, "sessions/day=2025-11-01/0.parquet", frame)
    )
    assert read(lake, **WINDOW).sessions["session_number"].to_list() == [most]


def test_decimals_become_the_nearest_double(path: str) -> None:
    scores = [Decimal(number) / 10_000 for number in range(0, 10_000, 7)]
    frame = rows_of(SESSION, *({"session_id": f"{score}"} for score in scores))
    score = pl.Series("engagement_score", scores, pl.Decimal(38, 18))

    rows = read(written(path, sessions=frame.with_columns(score)), **WINDOW).sessions

    for session_id, found in rows.select("session_id", "engagement_score").iter_rows():
        assert found == float(session_id)


METADATA = {
    None: None,
    "{}": None,
    '{"response_time": 3}': None,
    '{"response_time_minutes": 12.50}': "12.50",
    '\n{ "response_time_minutes" :-3 }': "-3",
    '{"response_time_minutes": 1.5e1}': "1.5e1",
    '{"response_time_minutes": 0.1208899598058064}': "0.1208899598058064",
    '{"thread": "x", "response_time_minutes": 0.12088995980580641}': "0.12088995980580641",
    '{"response_time_minutes": null}': "null",
    '{"response_time_minutes": "fast"}': '"fast"',
    '{"response_time_minutes": "12"}': '"12"',
    '{"response_time_minutes": true}': "true",
    '{"response_time_minutes": {"minutes": 1}}': '{"minutes": 1}',
    '{"response_time_minutes": [1, 2]}': "[1, 2]",
    '{"inner": {"response_time_minutes": 1}}': None,
    '[{"response_time_minutes": 1}]': None,
    '["response_time_minutes"]': None,
    '"response_time_minutes"': None,
    "5": None,
    "not JSON": '"not JSON"',
    '{"response_time_minutes": 012}': '"not JSON"',
    "": '"not JSON"',
    "[" * 100_000: '"not JSON"',
}


def test_the_response_time_is_read_as_the_json_that_is_there(path: str) -> None:
    events = [{"event_id": str(text), "metadata": text} for text in METADATA]
    login = {"event_type": "login", "event_id": "login", "metadata": "not JSON"}
    other = {"event_type": "availability_change", "event_id": "other"}
    lake = written(path, tutor_events=rows_of(EVENT, *events, login, other))

    rows = read(lake, **WINDOW).events

    found = dict(rows.select("event_id", "response_time_minutes").iter_rows())
    assert found == {None: None} | {str(text): value for text, value in METADATA.items()}
    assert set(rows.filter(pl.col("event_id").is_null())["event_type"]) == {"login"}


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (pl.Float64, [12.5, 1 / 3, float("nan")], ["12.5", "0.3333333333333333", "NaN"]),
        (pl.Float32, [12.5, 0.1, None], ["12.5", "0.10000000149011612", None]),
        (pl.Int16, [12, -3, None], ["12", "-3", None]),
        (pl.Decimal(6, 2), [Decimal("12.50"), Decimal("0.1"), None], ["12.50", "0.10", None]),
        (pl.Null, [None, None, None], [None, None, None]),
    ],
)
@pytest.mark.parametrize("as_struct", [True, False])
def test_the_response_time_may_be_a_number_of_its_own(
    as_struct: bool, dtype: pl.DataType, values: list[Any], expected: list[Any], tmp_path: Path
) -> None:
    minutes = pl.Series("response_time_minutes", values, dtype)
    events = rows_of(EVENT, *({"event_id": f"{n}"} for n in range(3))).drop("metadata")
    with_minutes = events.with_columns(minutes)
    if as_struct:
        struct = pl.struct(pl.lit("x").alias("thread"), "response_time_minutes")
        with_minutes = with_minutes.select(*events.columns, struct.alias("metadata"))

    rows = read(written(str(tmp_path), tutor_events=with_minutes), **WINDOW).events

    assert rows.sort("event_id")["response_time_minutes"].to_list() == expected


def test_a_struct_need_not_have_the_response_time(tmp_path: Path) -> None:
    events = rows_of(EVENT, {"metadata": {"thread": "x"}}, {"metadata": None})

    rows = read(written(str(tmp_path), tutor_events=events), **WINDOW).events

    assert rows["response_time_minutes"].to_list() == [None, None]


def test_a_row_without_its_key_is_a_strangers(path: str) -> None:
    lake = written(
        path,
        tutors=pl.DataFrame({"tutor_id": ["t", None], "status": ["active", None]}),
        sessions=rows_of(SESSION, {}, {"session_id": None}, {"session_id": "n", "tutor_id": None}),
        student_feedback=rows_of(
            FEEDBACK, {"feedback_id": None}, {"session_id": None, "feedback_id": "lost"}
        ),
        tutor_events=rows_of(EVENT, {"event_id": None, "tutor_id": None}),
    )

    rows = read(lake, **WINDOW)

    assert rows.tutors.rows() == [("t", "active")]
    found = rows.sessions.select("session_id", "tutor_id", "feedback_id").sort(pl.all()).rows()
    assert found == [("", "t", None), ("n", "", None), ("s", "t", "")]
    assert rows.events.select("event_id", "tutor_id").rows() == [("", "")]


@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical, pl.Enum(["b", "", "c", "a"])])
def test_a_range_of_tutors_goes_by_the_text_of_their_ids(
    dtype: pl.DataType, tmp_path: Path
) -> None:
    tutor_ids = ["b", None, "a", "c"]
    keys = [{"session_id": f"{tutor_id}", "tutor_id": tutor_id} for tutor_id in tutor_ids]
    sessions = rows_of(SESSION, *keys).with_columns(pl.col("tutor_id").cast(dtype))
    lake = written(str(tmp_path), sessions=sessions)

    for (lower, upper), expected in {
        (None, "b"): {"", "a"},
        ("a", "c"): {"a", "b"},
        ("b", None): {"b", "c"},
    }.items():
        rows = read(lake, **WINDOW, tutor_range=TutorRange(lower, upper))
        assert set(rows.sessions["tutor_id"]) == expected


NAIVE = pl.col("scheduled_start").dt.replace_time_zone(None)


@pytest.mark.parametrize(
    ("table", "change", "clause"),
    [
        (
            "sessions",
            pl.exclude("no_show"),
            "table sessions, column no_show: found no such column in"
            " sessions/day=2025-11-01/0.parquet, expected a boolean",
        ),
        (
            "sessions",
            pl.all().exclude("scheduled_start"),
            "table sessions, column scheduled_start: found no such column in"
            " sessions/day=2025-11-01/0.parquet, expected a timestamp with a timezone",
        ),
        (
            "sessions",
            pl.col("no_show").cast(pl.Int64),
            "table sessions, column no_show: found type Int64 in"
            " sessions/day=2025-11-01/0.parquet, expected a boolean",
        ),
        (
            "sessions",
            NAIVE,
            "table sessions, column scheduled_start: found type Datetime(time_unit='us',"
            " time_zone=None) in sessions/day=2025-11-01/0.parquet, expected a timestamp with a"
            " timezone",
        ),
        (
            "sessions",
            pl.col("late_start_minutes").cast(pl.Float64),
            "table sessions, column late_start_minutes: found type Float64 in"
            " sessions/day=2025-11-01/0.parquet, expected an integer",
        ),
        (
            "sessions",
            pl.lit("0.5").alias("engagement_score"),
            "table sessions, column engagement_score: found type String in"
            " sessions/day=2025-11-01/0.parquet, expected a floating-point number or a decimal",
        ),
        (
            "student_feedback",
            pl.lit(7).alias("session_id"),
            "table student_feedback, column session_id: found type Int32 in"
            " student_feedback/day=2025-11-01/0.parquet, expected text",
        ),
        (
            "tutors",
            pl.lit(True).alias("status"),
            "table tutors, column status: found type Boolean in tutors/0.parquet, expected text",
        ),
        (
            "tutor_events",
            pl.exclude("metadata"),
            "table tutor_events, column metadata: found no such column in"
            " tutor_events/day=2025-11-01/0.parquet, expected JSON text, or a struct with a number"
            " response_time_minutes",
        ),
        (
            "tutor_events",
            pl.struct(response_time_minutes=pl.lit("12")).alias("metadata"),
            "table tutor_events, column metadata: found type"
            " Struct({'response_time_minutes': String}) in"
            " tutor_events/day=2025-11-01/0.parquet, expected JSON text, or a struct with a number"
            " response_time_minutes",
        ),
    ],
)
def test_a_breach_names_table_column_file_found_and_expected(
    path: str, table: str, change: pl.Expr, clause: str
) -> None:
    lake = written(path)
    [file] = (UPath(path) / table).glob("**/*.parquet")
    rows = datasets()[table]
    left = rows.select(change)
    write_parquet(file, (rows.with_columns(change) if len(left.columns) == 1 else left).lazy())

    assert refusal(lake) == (
        f"The lake at {path} cannot be read: {clause}. `tutormax db status` shows what is there."
    )
    assert breaches(lake) == {name: (clause,) if name == table else () for name in TABLES}


def test_a_response_time_of_its_own_is_a_number(lake: Lake) -> None:
    events = pl.DataFrame([EVENT]).rename({"metadata": "response_time_minutes"})
    store(lake, "tutor_events/day=2025-11-01/0.parquet", events)

    assert "column response_time_minutes: found type String in tutor_events/" in refusal(lake)


@pytest.mark.parametrize(
    ("old", "new", "clause"),
    [
        (
            "sessions",
            "visits",
            "table sessions: found no Parquet file in sessions/, expected files in folders"
            " day=YYYY-MM-DD",
        ),
        (
            "tutor_events/day=2025-11-01",
            "tutor_events/date=2025-11-01",
            "table tutor_events: found tutor_events/date=2025-11-01/0.parquet, expected files in"
            " folders day=YYYY-MM-DD",
        ),
        (
            "sessions/day=2025-11-01",
            "sessions/day=20251101",
            "table sessions: found sessions/day=20251101/0.parquet, expected files in folders"
            " day=YYYY-MM-DD",
        ),
        (
            "sessions/day=2025-11-01/0.parquet",
            "sessions/0.parquet",
            "table sessions: found sessions/0.parquet, expected files in folders day=YYYY-MM-DD",
        ),
        (
            "tutors/0.parquet",
            "tutors/day=2025-11-01/0.parquet",
            "table tutors: found tutors/day=2025-11-01/0.parquet, expected files that are not"
            " partitioned",
        ),
    ],
)
def test_folders_of_another_kind_are_refused(lake: Lake, old: str, new: str, clause: str) -> None:
    base = Path(lake.path)
    (base / new).parent.mkdir(parents=True, exist_ok=True)
    (base / old).rename(base / new)

    assert refusal(lake) == (
        f"The lake at {lake} cannot be read: {clause}. `tutormax db status` shows what is there."
    )
    [found] = [clauses for clauses in breaches(lake).values() if clauses]
    assert found == (clause,)


def test_feedback_is_partitioned_as_a_whole_or_not_at_all(lake: Lake) -> None:
    store(lake, "student_feedback/0.parquet", pl.DataFrame([FEEDBACK]))

    assert "table student_feedback: found student_feedback/0.parquet, expected" in refusal(lake)


@pytest.mark.parametrize("table", ["sessions", "tutor_events"])
def test_days_of_another_timezone_are_refused(lake: Lake, table: str) -> None:
    folder = Path(lake.path) / table
    (folder / "day=2025-11-01").rename(folder / "day=2025-11-02")

    assert refusal(lake) == (
        f"The lake at {lake} cannot be used: table {table}, column {lake_files.INSTANTS[table]}:"
        " found 1 rows in the folder of another day, expected each row in the folder"
        " day=YYYY-MM-DD of its"
        " UTC day."
    )


def test_tutors_come_once(lake: Lake) -> None:
    store(lake, "tutors/1.parquet", datasets()["tutors"])
    assert read(lake, **WINDOW).tutors.rows() == [("t", "active")]
    store(lake, "tutors/1.parquet", pl.DataFrame({"tutor_id": ["t"], "status": ["inactive"]}))

    assert refusal(lake) == (
        f"The lake at {lake} cannot be used: table tutors: found more than one status of 1 tutors,"
        " such as t; expected one row per tutor."
    )


def test_datasets_without_rows(path: str) -> None:
    frames = {table: frame.clear() for table, frame in datasets().items()}
    with_a_tutor = {**frames, "tutors": datasets()["tutors"]}
    write_lake(path, with_a_tutor, file_name="0.parquet")
    lake = Lake(path)
    for table in ("sessions", "tutor_events"):
        file = UPath(path) / table / "0.parquet"
        store(lake, f"{table}/day=2025-11-01/0.parquet", frames[table])
        file.unlink()

    rows = read(lake, **WINDOW)

    assert rows.sessions.schema == pl.Schema(SourceSessions)
    assert rows.events.schema == pl.Schema(SourceEvents)
    assert (len(rows.sessions), len(rows.events)) == (0, 0)
    assert rows.empty_tables == ("sessions", "student_feedback", "tutor_events")
    store(lake, "tutors/0.parquet", frames["tutors"])
    assert refusal(lake) == (
        f"The lake at {path} cannot be used: table tutors: found no row, expected at least one"
        " tutor. See that TUTORMAX_LAKE leads to the platform's lake."
    )


def test_a_window_without_rows_does_not_make_datasets_empty(path: str) -> None:
    lake = written(path)
    later: dict[str, Any] = {"start": END, "end": END + timedelta(days=1)}

    rows = read(lake, **later)

    assert (len(rows.sessions), len(rows.events), rows.empty_tables) == (0, 0, ())
    assert set(read(lake, **later, tutor_ids=["nobody"]).tutors["tutor_id"]) == {"t"}


def test_the_newest_row_before_an_instant(path: str) -> None:
    later = START + timedelta(days=1, hours=2)
    lake = written(
        path,
        sessions=rows_of(SESSION, {}, {"scheduled_start": later}),
        tutor_events=rows_of(
            EVENT, {}, {"event_timestamp": later, "event_type": "availability_change"}
        ),
    )

    assert newest(lake, "sessions", before=END) == later
    assert newest(lake, "sessions", before=later) == START
    assert newest(lake, "sessions", before=START) is None
    assert newest(lake, "tutor_events", before=END) == START


def test_unknown_tutors_are_those_not_in_tutors(path: str) -> None:
    lake = written(path)

    assert unknown_tutors(lake, ["t", "z", "y", "z"]) == ["y", "z"]
    assert unknown_tutors(Lake("/nowhere"), []) == []


def test_sessions_come_in_parts_that_hold_all_rows_of_a_session(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "ROWS_OF_A_PART", 10)
    monkeypatch.setattr(lakes, "ROWS_OF_A_PART", 10)
    keys = [f"s{number}" for number in range(40)]
    again = [{"session_id": key} for key in keys for _ in range(2)]
    lake = written(
        path,
        sessions=rows_of(SESSION, *again[::2]),
        student_feedback=rows_of(FEEDBACK, *again),
        tutor_events=rows_of(EVENT, *again).drop("session_id"),
    )

    rows = read(lake, **WINDOW)

    assert len(rows.session_parts) > 1
    assert len(rows.sessions) == 80
    for part in rows.session_parts:
        assert part["session_id"].is_duplicated().all()


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    "change",
    [
        Path.unlink,
        lambda file: file.write_bytes(BROKEN),
        lambda file: os.utime(file, ns=(0, 0)),
        lambda file: rows_of(SESSION, {}, {}).write_parquet(file),
    ],
)
def test_a_file_that_changes_meanwhile_ends_the_reading_which_may_be_tried_again(
    lake: Lake, tmp_path: Path, change: Change
) -> None:
    view = open_view(lake)
    change(Path(lake.path) / "sessions/day=2025-11-01/0.parquet")

    with pytest.raises(LakeChangedError) as error:
        view.rows(tmp_path / "spool", **WINDOW)

    assert may_pass(error.value)
    assert str(error.value) == (
        f"The lake at {lake} changed while it was read: found 1 files of table sessions changed or"
        " gone, such as sessions/day=2025-11-01/0.parquet; expected them to stay as they were"
        " listed. Run the dates again when they are written."
    )


def test_a_file_that_comes_meanwhile_is_not_read(lake: Lake, tmp_path: Path) -> None:
    view = open_view(lake)
    new = rows_of(SESSION, {"session_id": "new"})
    store(lake, "sessions/day=2025-11-01/1.parquet", new)

    rows = view.rows(tmp_path / "spool", **WINDOW)

    assert rows.count["sessions"] == 1
    after = open_view(lake)
    assert after.rows(tmp_path / "spool", **WINDOW).count["sessions"] == 2
    assert after.snapshot != view.snapshot
    assert open_view(lake).snapshot == after.snapshot
    assert view.read_at < after.read_at


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (ConnectionResetError("reset by peer\ndetails"), True, "reset by peer"),
        (TimeoutError(), True, "TimeoutError"),
        (RuntimeError("no route"), True, "no route"),
        (PermissionError("Forbidden."), False, "Forbidden"),
    ],
)
def test_a_filesystem_that_does_not_answer(
    error: Exception, expected: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "find", fails)

    with pytest.raises(SourceError) as refused:
        open_view(Lake("memory://lake"))

    assert (may_pass(refused.value), isinstance(refused.value, LakeUnreachableError)) == (
        expected,
        expected,
    )
    assert str(refused.value) == (
        f"The lake at memory://lake cannot be read: {said}. TUTORMAX_LAKE says where it is;"
        " `tutormax db status` shows what is there."
    )


@contextmanager
def bucket(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as S3 does the bucket of that name: the address, and the ranges asked for."""
    ranges: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = unquote(self.path).removeprefix(f"/{folder.name}/")
            content = (folder / key).read_bytes()
            ranges.append(self.headers["Range"])
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            begin = int(first) if first else max(len(content) - int(last), 0)
            end = min(int(last), len(content) - 1) if first else len(content) - 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end}/{len(content)}")
            self.send_header("Content-Length", f"{end - begin + 1}")
            self.send_header("Last-Modified", self.date_time_string())
            self.send_header("ETag", "state")
            self.end_headers()
            self.wfile.write(content[begin : end + 1])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", ranges
        finally:
            server.shutdown()
            thread.join()


def test_an_object_store_is_asked_for_ranges(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(lake, **WINDOW)
    listed = lake_files.list_files
    # The packages that list real stores are extras.
    monkeypatch.setattr(lakes, "list_files", lambda _, table: listed(lake, table))
    with bucket(Path(lake.path).parent) as (address, ranges):
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "somewhere",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        rows = read(Lake(f"s3://{Path(lake.path).parent.name}/lake"), **WINDOW)

    assert_same_rows(rows, expected)
    assert all(ranges)
    assert len(ranges) >= 8


def test_a_lake_is_shown_without_what_is_secret() -> None:
    lake = Lake("sftp://user:hunter2@host:22/lake?key=hunter2")

    assert str(lake) == "sftp://host:22/lake"


def test_a_protocol_that_nobody_knows() -> None:
    with pytest.raises(SourceError, match="at nowhere://x cannot be read: Unsupported filesys"):
        open_view(Lake("nowhere://x"))


def test_a_shared_view_is_opened_at_the_lake_of_who_opens_it(lake: Lake, tmp_path: Path) -> None:
    view = open_view(lake, tutor_ids=["t"])

    sent = pickle.dumps(view.share())
    assert lake.path.encode() not in sent
    opened = open_shared_view(pickle.loads(sent), lake)
    assert opened == view
    assert opened.rows(tmp_path / "spool", **WINDOW).count["sessions"] == 1
    with pytest.raises(SettingsError, match="TUTORMAX_SOURCE is postgres here; expected parquet"):
        open_shared_view(pickle.loads(sent), Source(sa.make_url("postgresql://elsewhere/x")))
