"""What a reading of the platform gives, held in memory: for tests, whose platforms are small."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import polars as pl
from polars.testing import assert_frame_equal, assert_series_equal

from tutormax_assets.metrics.schemas import SourceTutors
from tutormax_assets.source.postgres import PlatformRows
from tutormax_assets.source.streams import Table
from tutormax_assets.source.view import AnySource, open_view


@dataclass(frozen=True)
class Rows:
    """As ``PlatformRows``, each table as one frame."""

    tutors: pl.DataFrame
    sessions: pl.DataFrame
    events: pl.DataFrame
    read_at: datetime
    snapshot: str
    empty_tables: tuple[str, ...]
    ids_are_unique: bool
    session_parts: list[pl.DataFrame]
    feedback_rows: int


def assert_same_rows(hashed: PlatformRows, sessions: pl.DataFrame, events: pl.DataFrame) -> None:
    """Rows that were read with hashes of ids are the same once their ids are looked up."""
    assert hashed.hashes is not None
    cases: list[tuple[Table, str, str]] = [
        ("sessions", "sessions", "session_id"),
        ("sessions", "student_feedback", "feedback_id"),
        ("tutor_events", "tutor_events", "event_id"),
    ]
    for table, source_table, key in cases:
        parts, expected = (
            (hashed.sessions, sessions) if table == "sessions" else (hashed.events, events)
        )
        rows = pl.concat(pl.collect_all(parts)).drop_nulls(key)
        aside = rows.select("tutor_id", row_key=key, source_table=pl.lit(source_table))
        good, aside = hashed.hashes.resolve(table, rows, aside)
        assert_series_equal(good["tutor_id"], aside["tutor_id"])
        others = [name for name in rows.columns if not name.endswith("_id")]
        found = good.select("tutor_id", pl.lit(aside["row_key"]).alias(key), *others)
        wanted = expected.drop_nulls(key).select(found.columns)
        assert_frame_equal(found, wanted, check_row_order=False)


def read(
    source: AnySource,
    *,
    tables: Collection[str] = ("tutors", "sessions", "tutor_events"),
    tutor_ids: Sequence[str] = (),
    is_read_once: bool = False,
    **arguments: Any,
) -> Rows:
    with TemporaryDirectory() as folder, open_view(source, tutor_ids=tutor_ids) as view:
        tutors = view.tutors() if "tutors" in tables else SourceTutors.create_empty()
        wanted = [table for table in get_args(Table) if table in tables]
        rows = view.rows(Path(folder), tables=wanted, **arguments)
        empty_tables = view.empty_tables(table for table, count in rows.count.items() if not count)
        session_parts = pl.collect_all(rows.sessions)
        sessions, events = pl.concat(session_parts), pl.concat(pl.collect_all(rows.events))
        if not is_read_once:
            hashed = view.rows(Path(folder), tables=wanted, hashed=True, **arguments)
            assert hashed.count == rows.count
            if hashed.hashes is not None:
                assert_same_rows(hashed, sessions, events)
    feedback_rows = rows.count.get("student_feedback", 0)
    assert rows.count == {
        table: count
        for table, count in (
            ("sessions", sessions["session_id"].n_unique()),
            ("student_feedback", feedback_rows),
            ("tutor_events", len(events)),
        )
        if table in rows.count
    }
    return Rows(
        tutors,
        sessions,
        events,
        view.read_at,
        view.snapshot,
        tuple(empty_tables),
        view.ids_are_unique,
        session_parts,
        feedback_rows,
    )
