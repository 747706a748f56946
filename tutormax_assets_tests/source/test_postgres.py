"""Reading the platform, from a real PostgreSQL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from tutormax_assets.database import tables
from tutormax_assets.database.connection import describe
from tutormax_assets.metrics.schemas import SourceEvents, SourceSessions, SourceTutors
from tutormax_assets.source import id_hashes, postgres, queries, streams
from tutormax_assets.source.postgres import Source, newest, open_view, unknown_tutors
from tutormax_assets.source.streams import SourceError
from tutormax_assets_tests.conftest import add
from tutormax_assets_tests.source.reading import Rows, read

START = datetime(2025, 11, 1, tzinfo=UTC)
END = datetime(2025, 11, 7, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
NOT_UNIQUE = "ALTER TABLE student_feedback DROP CONSTRAINT student_feedback_session_id_key"
INSTANTS = {
    "before": START - MICROSECOND,
    "first": START,
    "last": END - MICROSECOND,
    "after": END,
}
# The strings that break a query, a JSON document or a list when somebody pastes them together.
AWKWARD = [
    "O'Brien",
    'say "hi"',
    "a,b",
    "back\\slash",
    "{x}",
    "Ünïcødé 🎓",
    "line\nbreak",
    "$1",
    "%s",
]


def session(session_id: str, **values: Any) -> dict[str, Any]:
    return {"session_id": session_id, "tutor_id": "t", "scheduled_start": START, **values}


def event(event_id: str, **values: Any) -> dict[str, Any]:
    at = {"tutor_id": "t", "event_timestamp": START, "event_type": "message_response"}
    return {"event_id": event_id, **at, **values}


def read_tutors(url: sa.URL, *, tutor_ids: Sequence[str] = ()) -> pl.DataFrame:
    rows = read(Source(url), tables={"tutors"}, start=START, end=END, tutor_ids=tutor_ids)
    assert (rows.sessions.is_empty(), rows.events.is_empty()) == (True, True)
    return rows.tutors


def read_sessions(url: sa.URL, **arguments: Any) -> pl.DataFrame:
    return read(Source(url), tables={"sessions"}, **arguments).sessions


def read_events(url: sa.URL, **arguments: Any) -> pl.DataFrame:
    return read(Source(url), tables={"tutor_events"}, **arguments).events


def read_tables(url: sa.URL) -> Rows:
    return read(Source(url), tables={"sessions", "tutor_events"}, start=START, end=END)


def ids(rows: pl.DataFrame) -> set[str]:
    return set(rows.to_series())


def test_only_the_window_is_read_to_the_microsecond(engine: sa.Engine) -> None:
    for name, at in INSTANTS.items():
        add(engine, tables.sessions, session(name, scheduled_start=at))
        add(engine, tables.tutor_events, event(name, event_timestamp=at))

    sessions = read_sessions(engine.url, start=START, end=END)
    events = read_events(engine.url, start=START, end=END)

    assert ids(sessions) == ids(events) == {"first", "last"}
    read = dict(sessions.select("session_id", "scheduled_start").iter_rows())
    assert read == {name: INSTANTS[name] for name in ("first", "last")}
    read = dict(events.select("event_id", "event_timestamp").iter_rows())
    assert read == {name: INSTANTS[name] for name in ("first", "last")}


@pytest.mark.parametrize("server_timezone", ["UTC", "Pacific/Apia"])
def test_the_window_is_made_of_instants_whatever_the_timezones(
    engine: sa.Engine, server_timezone: str
) -> None:
    name = sa.sql.quoted_name(str(engine.url.database), quote=True)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE \"{name}\" SET timezone = '{server_timezone}'")
    new_york = ZoneInfo("America/New_York")
    # From midnight to midnight there, over the night in which the clocks go back.
    start, end = datetime(2025, 11, 2, tzinfo=new_york), datetime(2025, 11, 3, tzinfo=new_york)
    instants = {
        "before": datetime(2025, 11, 2, 3, 59, 59, 999999, tzinfo=UTC),
        "first": datetime(2025, 11, 2, 4, tzinfo=UTC),
        "last": datetime(2025, 11, 3, 4, 59, 59, 999999, tzinfo=UTC),
        "after": datetime(2025, 11, 3, 5, tzinfo=UTC),
    }
    for key, at in instants.items():
        add(engine, tables.sessions, session(key, scheduled_start=at))
        add(engine, tables.tutor_events, event(key, event_timestamp=at))

    sessions = read_sessions(engine.url, start=start, end=end)

    assert ids(sessions) == {"first", "last"}
    assert ids(read_events(engine.url, start=start, end=end)) == {"first", "last"}
    assert sessions.schema["scheduled_start"] == pl.Datetime("us", "UTC")
    assert dict(sessions.select("session_id", "scheduled_start").iter_rows()) == {
        key: instants[key] for key in ("first", "last")
    }


def test_sessions_come_with_their_rating_whenever_it_was_submitted(engine: sa.Engine) -> None:
    add(
        engine,
        tables.sessions,
        session(
            "rated",
            session_number=1,
            actual_start=START,
            tutor_initiated_reschedule=True,
            late_start_minutes=7,
            engagement_score=0.25,
            learning_objectives_met=False,
        ),
        session("unrated", no_show=True),
    )
    add(
        engine,
        tables.student_feedback,
        {
            "feedback_id": "f",
            "session_id": "rated",
            "tutor_id": "another",
            "overall_rating": 4,
            "submitted_at": END + timedelta(days=40),
        },
    )

    rows = read_sessions(engine.url, start=START, end=END).sort("session_id").to_dicts()

    common = {"tutor_id": "t", "scheduled_start": START}
    assert rows == [
        {
            **common,
            "session_id": "rated",
            "session_number": 1,
            "started": True,
            "tutor_initiated_reschedule": True,
            "no_show": False,
            "late_start_minutes": 7,
            "engagement_score": 0.25,
            "learning_objectives_met": False,
            "feedback_id": "f",
            "feedback_tutor_id": "another",
            "overall_rating": 4,
        },
        {
            **common,
            "session_id": "unrated",
            "session_number": 2,
            "started": False,
            "tutor_initiated_reschedule": False,
            "no_show": True,
            "late_start_minutes": 0,
            "engagement_score": None,
            "learning_objectives_met": None,
            "feedback_id": None,
            "feedback_tutor_id": None,
            "overall_rating": None,
        },
    ]


def test_a_filter_takes_ids_of_any_characters(engine: sa.Engine) -> None:
    for number, tutor_id in enumerate([*AWKWARD, "another"]):
        add(engine, tables.tutors, {"tutor_id": tutor_id})
        add(engine, tables.sessions, session(f"s{number}", tutor_id=tutor_id))
        add(engine, tables.tutor_events, event(f"e{number}", tutor_id=tutor_id))
    window = {"start": START, "end": END}

    assert ids(read_tutors(engine.url)) == {*AWKWARD, "another"}
    assert ids(read_tutors(engine.url, tutor_ids=["nobody"])) == {*AWKWARD, "another"}
    sessions = read_sessions(engine.url, **window, tutor_ids=AWKWARD)
    events = read_events(engine.url, **window, tutor_ids=AWKWARD)
    assert set(sessions["tutor_id"]) == set(events["tutor_id"]) == set(AWKWARD)
    assert len(sessions) == len(events) == len(AWKWARD)
    assert read_sessions(engine.url, **window, tutor_ids=["b"]).is_empty()


def test_the_response_time_is_read_as_the_json_that_is_there(engine: sa.Engine) -> None:
    expected = {
        None: None,
        "null": None,
        "{}": None,
        '{"response_time": 3}': None,
        '{"response_time_minutes": null}': "null",
        '{"response_time_minutes": 12.50}': "12.50",
        '{"response_time_minutes": -3}': "-3",
        '{"response_time_minutes": "fast"}': '"fast"',
        '{"response_time_minutes": "12"}': '"12"',
        '{"response_time_minutes": true}': "true",
        '{"response_time_minutes": {"minutes": 1}}': '{"minutes": 1}',
        '{"response_time_minutes": [1, 2]}': "[1, 2]",
        '[{"response_time_minutes": 1}]': None,
        '["response_time_minutes"]': None,
        '"response_time_minutes"': None,
        "5": None,
        "true": None,
    }
    for metadata in expected:
        value = sa.cast(sa.literal(metadata, sa.Text), JSONB)
        values = {"metadata": value}
        add(engine, tables.tutor_events, event(str(metadata), **values))
    add(
        engine,
        tables.tutor_events,
        event("login", event_type="login", metadata={"response_time_minutes": 3}),
        event("other type", event_type="availability_change"),
    )

    rows = read_events(engine.url, start=START, end=END)

    found = dict(rows.select("event_id", "response_time_minutes").iter_rows())
    # The id of a login is not read.
    assert found == {None: None} | {str(key): value for key, value in expected.items()}


def test_empty_tables_give_empty_frames_of_the_right_types(engine: sa.Engine) -> None:
    add(engine, tables.tutors, {"tutor_id": "another"})
    for rows, schema in (
        (read_tutors(engine.url).clear(), SourceTutors),
        (read_sessions(engine.url, start=START, end=END), SourceSessions),
        (read_events(engine.url, start=START, end=END), SourceEvents),
    ):
        assert rows.is_empty()
        assert rows.schema == pl.Schema(schema)


def test_types_that_differ_a_little_are_read_as_the_contract_has_them(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE sessions ALTER session_number TYPE bigint,"
            " ALTER late_start_minutes TYPE smallint, ALTER engagement_score TYPE numeric(5, 2)"
        )
        connection.exec_driver_sql("ALTER TABLE tutors ALTER status TYPE text")
        connection.exec_driver_sql("ALTER TABLE tutor_events ALTER metadata TYPE json")
    add(engine, tables.sessions, session("s", engagement_score=0.5))

    rows = read_sessions(engine.url, start=START, end=END)

    assert rows.schema == pl.Schema(SourceSessions)
    assert rows["engagement_score"].to_list() == [0.5]
    assert read_tutors(engine.url).schema == pl.Schema(SourceTutors)
    assert read_events(engine.url, start=START, end=END).schema == pl.Schema(SourceEvents)


def test_numbers_that_do_not_fit_stay_on_their_side_of_the_contract(engine: sa.Engine) -> None:
    nullable = ("session_number", "late_start_minutes", "no_show", "tutor_initiated_reschedule")
    with engine.begin() as connection:
        for column in nullable[:2]:
            connection.exec_driver_sql(f"ALTER TABLE sessions ALTER {column} TYPE bigint")
        for column in nullable:
            connection.exec_driver_sql(f"ALTER TABLE sessions ALTER {column} DROP NOT NULL")
    most = 2**31 - 1
    values = {
        "least": (1, 0, True, False),
        "unknown": (None, None, None, None),
        "below": (-(2**40), -(2**40), False, None),
        "long": (7, 2**24, True, None),
        "largest": (most, most, None, True),
        "above": (2**40, 2**40, True, True),
    }
    read_as = values | {
        "below": (-1, -1, False, None),
        "above": (most, most, True, True),
    }
    add(engine, tables.sessions, *map(session, values))
    settings = ", ".join(f"{column} = %s" for column in nullable)
    with engine.begin() as connection:
        for name, of in values.items():
            connection.exec_driver_sql(
                f"UPDATE sessions SET {settings} WHERE session_id = %s",
                (*of, name),
            )

    found = read_sessions(engine.url, start=START, end=END).select("session_id", *nullable)

    assert {name: tuple(of) for name, *of in found.iter_rows()} == read_as


def test_a_column_of_another_type_is_named(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE sessions ALTER no_show DROP DEFAULT, ALTER no_show TYPE int USING 0"
        )

    with pytest.raises(
        SourceError, match="table sessions, column no_show: found type integer, expected boolean"
    ):
        read_sessions(engine.url, start=START, end=END)


def test_every_read_is_one_snapshot_that_cannot_write(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tutors RENAME TO kept")
        connection.exec_driver_sql(
            "CREATE VIEW tutors AS SELECT current_setting('transaction_isolation') AS tutor_id,"
            " current_setting('transaction_read_only') AS status"
        )

    assert read_tutors(engine.url).rows() == [("repeatable read", "on")]


def test_the_newest_row_before_an_instant(engine: sa.Engine) -> None:
    assert newest(Source(engine.url), "sessions", before=END) is None
    for name, at in INSTANTS.items():
        add(engine, tables.sessions, session(name, scheduled_start=at))
        add(engine, tables.tutor_events, event(name, event_timestamp=at))
    unused = event("unused", event_timestamp=END - MICROSECOND, event_type="availability_change")
    add(engine, tables.tutor_events, unused)

    assert newest(Source(engine.url), "sessions", before=END) == END - MICROSECOND
    assert newest(Source(engine.url), "tutor_events", before=END - MICROSECOND) == START
    assert newest(Source(engine.url), "tutor_events", before=START - MICROSECOND) is None


def test_unknown_tutors_are_those_not_in_tutors(engine: sa.Engine) -> None:
    add(engine, tables.tutors, *({"tutor_id": name} for name in AWKWARD))

    assert unknown_tutors(Source(engine.url), AWKWARD) == []
    assert unknown_tutors(Source(engine.url), [*AWKWARD, "z", "y", "z"]) == ["y", "z"]
    assert unknown_tutors(Source(engine.url), []) == []

    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tutors RENAME TO teachers")
    with pytest.raises(SourceError, match=r'read: relation "tutors" does not exist.* `tutormax db'):
        unknown_tutors(Source(engine.url), ["a"])


def test_what_postgresql_says_is_repeated_without_user_and_password(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tutors RENAME TO teachers")
    url = engine.url.set(password="hunter2")
    with pytest.raises(SourceError) as error:
        read_tutors(url)
    assert str(error.value) == (
        f"The platform at {describe(url)} cannot be read: table tutors: found no such table, or no"
        " right to look into its schema; expected one with the columns tutor_id, status."
        " `tutormax db status` shows what is there, `tutormax db roles` prints the rights that are"
        " needed."
    )

    with pytest.raises(SourceError, match='database "nowhere" does not exist') as error:
        read_events(url.set(database="nowhere"), start=START, end=END)
    with pytest.raises(SourceError, match="No such file or directory") as elsewhere:
        read_tutors(url.set(query={"host": "/nowhere"}))
    for shown in (str(error.value), str(elsewhere.value)):
        assert "hunter2" not in shown
        assert "postgres@" not in shown


def test_sessions_come_in_parts_that_hold_all_rows_of_a_session(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [session(f"s{number}") for number in range(40)]
    add(engine, tables.sessions, *sessions)
    with engine.begin() as connection:
        connection.exec_driver_sql(NOT_UNIQUE)
        connection.exec_driver_sql("ANALYZE sessions")
    feedback = [
        {
            "feedback_id": f"{row['session_id']}-{n}",
            "session_id": row["session_id"],
            "tutor_id": "t",
        }
        for row in sessions
        for n in (1, 2)
    ]
    add(engine, tables.student_feedback, *feedback)
    add(engine, tables.tutor_events, *(event(f"e{number}") for number in range(7)))
    monkeypatch.setattr(streams, "ROWS_OF_A_PART", 10)

    rows = read_tables(engine.url)

    assert len(rows.session_parts) > 1
    assert not rows.ids_are_unique
    assert sorted(rows.sessions["feedback_id"]) == sorted(row["feedback_id"] for row in feedback)
    assert (rows.sessions["session_id"] == rows.sessions["feedback_id"].str.head(-2)).all()
    for part in rows.session_parts:
        assert part["session_id"].is_duplicated().all()


@pytest.mark.parametrize("others", [0, 200])
def test_feedback_of_other_sessions_changes_nothing(engine: sa.Engine, others: int) -> None:
    of_window = [session(f"s{number}") for number in range(20)]
    old = [session(f"old{number}", scheduled_start=START - MICROSECOND) for number in range(others)]
    add(engine, tables.sessions, *of_window, *old)
    add(
        engine,
        tables.student_feedback,
        *(
            {
                "feedback_id": f"f-{row['session_id']}",
                "session_id": row["session_id"],
                "tutor_id": "t",
            }
            for row in [*of_window, *old]
        ),
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE sessions, student_feedback")

    rows = read_tables(engine.url)

    assert dict(rows.sessions.select("session_id", "feedback_id").iter_rows()) == {
        f"s{number}": f"f-s{number}" for number in range(20)
    }
    assert rows.feedback_rows == len(of_window)


def test_ids_are_unique_only_where_an_index_sees_to_it(engine: sa.Engine) -> None:
    assert read_tables(engine.url).ids_are_unique
    for statement in (
        "ALTER TABLE student_feedback DROP CONSTRAINT student_feedback_pkey",
        "CREATE INDEX ON student_feedback (feedback_id)",
        "CREATE UNIQUE INDEX ON student_feedback (feedback_id) WHERE overall_rating > 1",
        "CREATE UNIQUE INDEX ON student_feedback (feedback_id, tutor_id)",
    ):
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
        assert not read_tables(engine.url).ids_are_unique
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE UNIQUE INDEX ON student_feedback (feedback_id)")
    assert read_tables(engine.url).ids_are_unique


def test_all_tables_are_of_one_snapshot(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    add(engine, tables.sessions, session("before"))
    add(engine, tables.tutor_events, event("before"))
    pids = set()

    def reads_after_others_wrote(name: Any, read_table: Any) -> Any:
        def read_it(cursor: Any, **arguments: Any) -> Any:
            add(engine, tables.sessions, session(f"while {name} are read"))
            add(engine, tables.tutor_events, event(f"while {name} are read"))
            cursor.execute("SELECT pg_backend_pid()")
            pids.add(pl.DataFrame(cursor.fetch_arrow()).item())
            return read_table(cursor, **arguments)

        return read_it

    readers = {
        name: reads_after_others_wrote(name, read_table)
        for name, read_table in streams.READERS.items()
    }
    monkeypatch.setattr(postgres, "READERS", readers)

    rows = read(Source(engine.url), start=START, end=END, is_read_once=True)

    assert len(pids) == 2
    assert ids(rows.sessions) == ids(rows.events) == {"before"}


@pytest.mark.parametrize("table", ["tutors", "sessions", "student_feedback"])
def test_ids_are_read_where_two_have_the_same_hash(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    of_window = ["a", "b"] if table == "sessions" else ["a", "bb", "ccc"]
    add(engine, tables.sessions, *map(session, of_window), session("x", scheduled_start=END))
    add(
        engine,
        tables.student_feedback,
        *({"feedback_id": f"of {one}", "session_id": one, "tutor_id": "t"} for one in ("a", "x")),
    )
    if table == "tutors":
        same = "SELECT 1::bigint AS hash, id FROM unnest(ARRAY['t', 'another']) AS id"
        monkeypatch.setattr(id_hashes, "TUTOR_HASHES", same)
    else:
        monkeypatch.setattr(queries, "HASH", "length({})::bigint")
        monkeypatch.setattr(streams, "MOST_FEEDBACK_PER_SESSION", 1_000)

    with open_view(Source(engine.url)) as view:
        rows = view.rows(Path(), start=START, end=END, hashed=True)
        found = pl.concat(rows.sessions).collect().sort("session_id")

    assert rows.hashes is None
    assert rows.note.endswith(f": two rows of {table} have the same hash")
    assert found["session_id"].to_list() == of_window
    assert found["feedback_id"].drop_nulls().to_list() == ["of a"]


def test_tutors_whom_the_platform_lacks_keep_their_ids(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE sessions DROP CONSTRAINT sessions_tutor_id_fkey")
    add(engine, tables.sessions, session("s"), session("of nobody", tutor_id="nobody"))

    rows = read_tables(engine.url)

    assert sorted(rows.sessions["tutor_id"]) == ["nobody", "t"]


@pytest.mark.parametrize("broken", ["sessions", "tutor_events"])
def test_what_one_connection_is_refused_ends_the_reading(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    add(engine, tables.sessions, session("s"))

    def refused(cursor: Any, **_: Any) -> Any:
        cursor.execute("SELECT 1 / 0")

    monkeypatch.setattr(postgres, "READERS", dict(streams.READERS) | {broken: refused})

    with pytest.raises(SourceError, match="cannot be read: division by zero"):
        read_tables(engine.url)


def test_a_pooler_without_a_free_connection_keeps_nobody_waiting(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(engine, tables.sessions, session("s"))
    add(engine, tables.tutor_events, event("e"))
    is_free, opened = Event(), postgres._snapshot

    @contextmanager
    def pooled(*arguments: Any, shared: str | None = None, **options: Any) -> Iterator[Any]:
        if shared is not None:
            assert is_free.wait(30)
        with opened(*arguments, shared=shared, **options) as cursor:
            yield cursor
        is_free.set()

    monkeypatch.setattr(postgres, "_snapshot", pooled)
    monkeypatch.setattr(postgres, "_SECONDS_TO_CONNECT", 0.01)

    rows = read_tables(engine.url)

    assert ids(rows.sessions) == {"s"}
    assert ids(rows.events) == {"e"}
