"""What a reading of the platform gives, held in memory: for tests, whose platforms are small."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import polars as pl

from tutormax_assets.metrics.schemas import SourceTutors
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


def read(
    source: AnySource,
    *,
    tables: Collection[str] = ("tutors", "sessions", "tutor_events"),
    tutor_ids: Sequence[str] = (),
    **arguments: Any,
) -> Rows:
    with TemporaryDirectory() as folder, open_view(source, tutor_ids=tutor_ids) as view:
        tutors = view.tutors() if "tutors" in tables else SourceTutors.create_empty()
        wanted = [table for table in get_args(Table) if table in tables]
        rows = view.rows(Path(folder), tables=wanted, **arguments)
        empty_tables = view.empty_tables(table for table, count in rows.count.items() if not count)
        session_parts = pl.collect_all(rows.sessions)
        sessions, events = pl.concat(session_parts), pl.concat(pl.collect_all(rows.events))
        files = Path(folder).glob("student_feedback/**/*.ipc")
        feedback_rows = sum(len(pl.read_ipc(file)) for file in files)
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
