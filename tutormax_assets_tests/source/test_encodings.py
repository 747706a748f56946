"""Platforms whose database is not in UTF-8."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.dialects.postgresql import JSONB

from tutormax_assets.database import tables
from tutormax_assets.database.connection import create_engine
from tutormax_assets.database.tables import metrics_metadata, source_metadata
from tutormax_assets.source.postgres import Source, unknown_tutors
from tutormax_assets.source.streams import SourceError
from tutormax_assets.storage.shards import TutorRange
from tutormax_assets_tests.cli.conftest import Invoke, invoke, words
from tutormax_assets_tests.conftest import add, new_database, open_platform
from tutormax_assets_tests.source.reading import read

__all__ = ["invoke"]

START = datetime(2025, 11, 1, tzinfo=UTC)
END = datetime(2025, 11, 7, tzinfo=UTC)
DAY = "2025-11-07"


@contextmanager
def database_of(server_url: sa.URL, encoding: str) -> Iterator[sa.Engine]:
    """An engine on a database of another encoding, with all tables."""
    options = sql.SQL(" ENCODING {} LOCALE 'C' LOCALE_PROVIDER libc").format(sql.Literal(encoding))
    with new_database(server_url, template="template0", options=options) as url:
        engine = create_engine(url)
        source_metadata.create_all(engine)
        metrics_metadata.create_all(engine)
        yield engine
        engine.dispose()


def add_tutor(engine: sa.Engine, tutor_id: str) -> None:
    """A tutor with a session and an event that carries the id in its metadata."""
    row = {"tutor_id": tutor_id}
    text = json.dumps({"response_time_minutes": 3, "said": tutor_id}, ensure_ascii=False)
    metadata = sa.cast(sa.literal(text, sa.Text), JSONB)
    add(engine, tables.tutors, row)
    add(engine, tables.sessions, {"session_id": f"s {tutor_id}", "scheduled_start": START, **row})
    event = {"event_id": f"e {tutor_id}", "event_timestamp": START, "metadata": metadata, **row}
    add(engine, tables.tutor_events, {**event, "event_type": "message_response"})


@pytest.mark.parametrize(
    ("encoding", "tutor_ids"),
    [
        ("LATIN1", {"Zoé", "Ærø", "plain"}),
        ("WIN1252", {"Zoé", "€ 1", "plain"}),
        ("EUC_JP", {"日本", "ｱ", "plain"}),
        ("SQL_ASCII", {"Zoé", "日本", "plain"}),
    ],
)
def test_a_database_of_another_encoding_is_read_and_filtered(
    encoding: str, tutor_ids: set[str], server_url: sa.URL
) -> None:
    # No encoding but UTF-8 has it, and none at all has it in the table.
    nobody = "Ŧ"
    with database_of(server_url, encoding) as engine:
        for tutor_id in tutor_ids:
            add_tutor(engine, tutor_id)
        source = Source(engine.url)

        for asked, expected in (
            ([], tutor_ids),
            ([*tutor_ids - {"plain"}, nobody], tutor_ids - {"plain"}),
            ([nobody], set()),
        ):
            rows = read(source, tutor_ids=asked, start=START, end=END)
            assert set(rows.tutors["tutor_id"]) == tutor_ids
            for of_table in (rows.sessions, rows.events):
                assert set(of_table["tutor_id"]) == expected
        assert unknown_tutors(source, [*tutor_ids, nobody]) == [nobody]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_run_on_a_database_of_another_encoding(
    encoding: str, server_url: sa.URL, tmp_path: Path, invoke: Invoke, shared_dagster_home: Path
) -> None:
    with (
        database_of(server_url, encoding) as engine,
        open_platform(
            engine.url, tmp_path / "home", DAGSTER_HOME=str(shared_dagster_home)
        ) as platform,
    ):
        for tutor_id in ("Zoé", "plain"):
            add_tutor(engine, tutor_id)

        result = invoke("run", "--date", DAY, "--tutors", "Zoé", "--json")

        assert result.exit_code == 0
        assert json.loads(result.stdout)["errors"] == []
        assert set(platform.metrics()["tutor_id"]) == {"Zoé"}
        assert "3 rows" in words(invoke("db", "status").stdout)


@pytest.mark.parametrize("encoding", ["WIN1252", "EUC_JP"])
def test_shards_are_ranges_in_the_order_of_utf8_whatever_the_bytes_of_the_database(
    encoding: str, server_url: sa.URL
) -> None:
    # Their bytes are in another order in these encodings.
    lower, upper = {"WIN1252": ("é", "€"), "EUC_JP": ("日", "ｱ")}[encoding]
    codec = {"WIN1252": "cp1252", "EUC_JP": "euc_jp"}[encoding]
    assert lower < upper
    assert lower.encode(codec) > upper.encode(codec)
    with database_of(server_url, encoding) as engine:
        for tutor_id in (lower, upper):
            add_tutor(engine, tutor_id)
        for tutor_range, expected in (
            (TutorRange(None, upper), {lower}),
            (TutorRange(upper, None), {upper}),
        ):
            rows = read(Source(engine.url), start=START, end=END, tutor_range=tutor_range)
            assert set(rows.sessions["tutor_id"]) == expected
            assert set(rows.events["tutor_id"]) == expected


def test_text_that_is_not_utf8_in_a_database_without_an_encoding_is_a_sentence(
    server_url: sa.URL,
) -> None:
    with database_of(server_url, "SQL_ASCII") as engine:
        add_tutor(engine, "Zoé")
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "ALTER TABLE sessions DROP CONSTRAINT sessions_tutor_id_fkey;"
                "UPDATE sessions SET tutor_id = convert_from('\\xe9'::bytea, 'SQL_ASCII')"
            )
        with pytest.raises(
            SourceError,
            match=r"cannot be read: invalid byte sequence .* Its encoding is SQL_ASCII",
        ):
            read(Source(engine.url), start=START, end=END)
