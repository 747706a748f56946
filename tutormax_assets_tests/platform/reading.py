"""What a reading of the platform gives, held in memory: for tests, whose platforms are small."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from tutormax_assets.platform import snapshot
from tutormax_assets.platform.snapshot import Source


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


def read(source: Source, **arguments: Any) -> Rows:
    with TemporaryDirectory() as folder:
        rows = snapshot.read(source, Path(folder), **arguments)
        session_parts = pl.collect_all(rows.sessions)
        sessions, events = pl.concat(session_parts), pl.concat(pl.collect_all(rows.events))
        feedback = Path(folder).glob("student_feedback/**/*.ipc")
        feedback_rows = sum(len(pl.read_ipc(file)) for file in feedback)
    assert rows.count == {
        table: len(frame)
        for table, frame in (
            ("tutors", rows.tutors),
            ("sessions", sessions.unique("session_id")),
            ("tutor_events", events),
        )
        if table in rows.count
    }
    return Rows(
        rows.tutors,
        sessions,
        events,
        rows.read_at,
        rows.snapshot,
        rows.empty_tables,
        rows.ids_are_unique,
        session_parts,
        feedback_rows,
    )
