"""Reading the platform from a lake: Parquet datasets that lie on any filesystem.

The files are listed once, and only those are read. A lake has no snapshots, so what was read
counts only if the listing of these files is still the same afterwards.

Sessions and their feedback are split by the session's id into files, a part of which fits into
memory.
"""

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal

import polars as pl

from tutormax_assets.metrics.quality import contradictory_tutors
from tutormax_assets.metrics.schemas import (
    SourceEvents,
    SourceSessions,
)
from tutormax_assets.source.contract import NEEDED_COLUMNS, lake_breaches
from tutormax_assets.source.horizon import Horizon
from tutormax_assets.source.lake_files import (
    DAY,
    INSTANTS,
    SCHEMAS,
    Lake,
    LakeChangedError,
    LakeFile,
    RowFilter,
    expect_no_breach,
    files_of_days,
    layout_breaches,
    list_files,
    open_files,
    scan_files,
    scan_location,
    unreadable,
)
from tutormax_assets.source.postgres import PlatformRows
from tutormax_assets.source.streams import ROWS_OF_A_PART, SourceError, Table, number_of_parts
from tutormax_assets.storage.shards import ALL_TUTORS, TutorRange


@dataclass(frozen=True)
class LakeView:
    """The lake as it was listed.

    Attributes:
        lake: Where it is.
        tutor_ids: Only rows of these tutors; all when empty.
        read_at: When the files were listed, in UTC.
        snapshot: SHA-256 of the listing.
        files: The files of each dataset, by path.
        as_of: The instant at which rows had to be known; None if it does not matter.
        ids_are_unique: A lake has no keys that see to it.
        is_received: After a failure, what counts is another listing.
    """

    lake: Lake
    tutor_ids: tuple[str, ...]
    read_at: datetime
    snapshot: str
    files: Mapping[str, Sequence[LakeFile]]
    as_of: datetime | None = None
    ids_are_unique: Literal[False] = False
    is_received: Literal[False] = False

    def known_at(self, instant: datetime) -> "LakeView":
        """The view without rows that were not known yet at an instant."""
        return replace(self, as_of=instant.astimezone(UTC))

    def share(self) -> "SharedLakeView":
        """The view for other processes, which go by the same listing."""
        return SharedLakeView(self.tutor_ids, self.read_at, self.snapshot, self.files, self.as_of)

    def tutors(self) -> pl.DataFrame:
        """``SourceTutors``: all of them, whichever tutors the view is about.

        Raises:
            SourceError: The lake cannot be read, has no tutors, or has one with two statuses.
        """
        files = self.files["tutors"]
        with TemporaryDirectory() as folder, _reading(self.lake, "tutors", files):
            only = RowFilter(as_of=self.as_of)
            rows = scan_files(self.lake, "tutors", files, Path(folder), only)
            found = rows.drop_nulls("tutor_id").unique().collect(engine="streaming")
        if found.is_empty() and self.as_of is None:
            raise SourceError(
                f"The lake at {self.lake} cannot be used: table tutors: found no row, expected at"
                " least one tutor. See that TUTORMAX_LAKE leads to the platform's lake."
            )
        if again := contradictory_tutors(found):
            raise SourceError(
                f"The lake at {self.lake} cannot be used: table tutors: found more than one status"
                f" of {len(again)} tutors, such as {again[0]}; expected one row per tutor."
            )
        return found

    def rows(
        self,
        folder: Path,
        *,
        tables: Collection[Table] = ("sessions", "tutor_events"),
        start: datetime,
        end: datetime,
        tutor_range: TutorRange = ALL_TUTORS,
        hashed: bool = False,
    ) -> PlatformRows:
        """Sessions with their feedback, and events, in ``[start, end)``.

        Only files of the days that these instants lie in are opened.

        Args:
            folder: Where the parts are kept. What it holds is removed first.
            tables: What is wanted; the frames of the others are empty.
            start: First instant.
            end: First instant after them.
            tutor_range: Only rows of these tutors.
            hashed: Not used: a lake has the ids at hand.

        Raises:
            SourceError: The lake cannot be read, a dataset is not as the contract has it, or files
                changed meanwhile. ``may_pass`` says whether trying again may help.
        """
        began = perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # Polars compares instants of one timezone only.
        start, end = start.astimezone(UTC), end.astimezone(UTC)
        only = RowFilter(self.tutor_ids, tutor_range, self.as_of)
        sessions: list[pl.LazyFrame] = []
        events: list[pl.LazyFrame] = []
        count: dict[str, int] = {}
        if "sessions" in tables:
            sessions = self._read_sessions(folder, start, end, only)
            count |= {name: _count(folder / name) for name in ("sessions", "student_feedback")}
        if "tutor_events" in tables:
            events = self._read_events(folder, start, end, only)
            count["tutor_events"] = _count(folder / "tutor_events")
        return PlatformRows(
            sessions or [SourceSessions.create_empty().lazy()],
            events or [SourceEvents.create_empty().lazy()],
            count,
            perf_counter() - began,
        )

    def horizon(self) -> Horizon:
        """The listing of the files: where it is another one, something has changed."""
        return Horizon(server=str(self.lake), snapshot=self.snapshot)

    def empty_tables(self, names: Iterable[str]) -> list[str]:
        """Those of the datasets that hold no row at all, whatever its day.

        Raises:
            SourceError: The lake cannot be read.
        """
        return [name for name in names if not any(self._has_rows(name))]

    def newest(
        self, table: Literal["sessions", "tutor_events"], *, before: datetime
    ) -> datetime | None:
        """The instant of the newest session, login or message response before another instant.

        Raises:
            SourceError: The lake cannot be read.
        """
        before = before.astimezone(UTC)
        files = files_of_days(self.files[table], datetime.min.replace(tzinfo=UTC), before)
        instant = pl.col(INSTANTS[table])
        for day in sorted({file.day for file in files if file.day}, reverse=True):
            of_day = [file for file in files if file.day == day]
            with TemporaryDirectory() as folder, _reading(self.lake, table, of_day):
                rows = scan_files(self.lake, table, of_day, Path(folder)).filter(instant < before)
                found: datetime | None = rows.select(instant.max()).collect().item()
            if found is not None:
                return found
        return None

    def _read_sessions(
        self, folder: Path, start: datetime, end: datetime, only: RowFilter
    ) -> list[pl.LazyFrame]:
        fetched = folder / "fetched"
        files = files_of_days(self.files["sessions"], start, end)
        with _reading(self.lake, "sessions", files):
            rows = scan_files(self.lake, "sessions", files, fetched, only)
            expected = rows.select(pl.len()).collect(engine="streaming").item()
            part = (pl.col("session_id").hash() % number_of_parts(expected)).alias("part")
            by_part = pl.PartitionBy(folder / "sessions", key=part, include_key=False)
            self._spool("sessions", rows, start, end, by_part)
        files = files_of_days(self.files["student_feedback"], start, end)
        with _reading(self.lake, "student_feedback", files):
            known = RowFilter(as_of=self.as_of)
            rows = scan_files(self.lake, "student_feedback", files, fetched, known)
            rows = rows.drop_nulls("session_id")
            if only != known:
                # Feedback may name another tutor than its session.
                ours = _scan_spool(folder / "sessions", "sessions").select("session_id")
                rows = rows.join(ours, on="session_id", how="semi")
            by_part = pl.PartitionBy(folder / "student_feedback", key=part, include_key=False)
            rows.sink_ipc(by_part, mkdir=True, engine="streaming")
        shutil.rmtree(fetched, ignore_errors=True)
        return [
            _scan_spool(of_sessions, "sessions")
            .join(
                _scan_spool(folder / "student_feedback" / of_sessions.name, "student_feedback"),
                on="session_id",
                how="left",
            )
            .select(SourceSessions.column_names())
            for of_sessions in sorted((folder / "sessions").glob("*"))
        ]

    def _read_events(
        self, folder: Path, start: datetime, end: datetime, only: RowFilter
    ) -> list[pl.LazyFrame]:
        files = files_of_days(self.files["tutor_events"], start, end)
        path = folder / "tutor_events"
        with _reading(self.lake, "tutor_events", files):
            rows = scan_files(self.lake, "tutor_events", files, folder / "fetched", only)
            by_size = pl.PartitionBy(path, max_rows_per_file=ROWS_OF_A_PART)
            self._spool("tutor_events", rows, start, end, by_size)
        shutil.rmtree(folder / "fetched", ignore_errors=True)
        return [pl.scan_ipc(file) for file in sorted(path.glob("*"))]

    def _spool(
        self, table: str, rows: pl.LazyFrame, start: datetime, end: datetime, to: pl.PartitionBy
    ) -> None:
        """Write the rows of ``[start, end)``; those in the folder of another day are refused.

        Where days are those of another timezone, rows would be missed silently.
        """
        instant = pl.col(INSTANTS[table])
        is_misplaced = instant.dt.date() != pl.col(DAY)
        _, misplaced = pl.collect_all(
            [
                rows.filter(instant >= start, instant < end)
                .drop(DAY)
                .sink_ipc(to, mkdir=True, lazy=True),
                rows.select(is_misplaced.sum()),
            ],
            engine="streaming",
        )
        if misplaced.item():
            raise SourceError(
                f"The lake at {self.lake} cannot be used: table {table}, column {INSTANTS[table]}:"
                f" found {misplaced.item()} rows in the folder of another day, expected each row in"
                f" the folder {DAY}=YYYY-MM-DD of its UTC day."
            )

    def _has_rows(self, table: str) -> Iterator[bool]:
        for file in reversed(self.files[table]):
            with TemporaryDirectory() as folder, _reading(self.lake, table, [file]):
                [opened] = open_files(self.lake, table, [file], Path(folder))
                rows = scan_location(opened.location).select(pl.len())
                yield bool(rows.collect().item())


@dataclass(frozen=True)
class SharedLakeView:
    """A view for another process, which says itself where the lake is: no password travels."""

    tutor_ids: tuple[str, ...]
    read_at: datetime
    snapshot: str
    files: Mapping[str, Sequence[LakeFile]]
    as_of: datetime | None = None

    def open(self, lake: Lake) -> LakeView:
        """The view in this process."""
        return LakeView(lake, self.tutor_ids, self.read_at, self.snapshot, self.files, self.as_of)


def open_view(lake: Lake, *, tutor_ids: Sequence[str] = ()) -> LakeView:
    """List the lake, to read some tutors or all.

    Raises:
        SourceError: The lake cannot be listed, or its folders are not as the contract has them.
    """
    read_at = datetime.now(UTC)
    files = {table: list_files(lake, table) for table in NEEDED_COLUMNS}
    clauses = [clause for table in files for clause in layout_breaches(table, files[table])]
    expect_no_breach(clauses, lake)
    listing = "\n".join(
        "\t".join((table, file.path, str(file.size), file.state))
        for table, of_table in files.items()
        for file in of_table
    )
    snapshot = sha256(listing.encode()).hexdigest()
    return LakeView(lake, tuple(tutor_ids), read_at, snapshot, files)


def breaches(lake: Lake) -> dict[str, tuple[str, ...]]:
    """What each dataset breaks of the contract: its folders, and the columns of its newest file.

    Returns:
        By dataset, clauses that say what was found and what was expected.

    Raises:
        SourceError: The lake cannot be read.
    """
    found = {}
    for table in NEEDED_COLUMNS:
        files = list_files(lake, table)
        clauses = list(layout_breaches(table, files))
        if not clauses:
            with TemporaryDirectory() as folder, _reading(lake, table, files[-1:]):
                opened = open_files(lake, table, files[-1:], Path(folder))
            columns = {f"{table}/{file.path}": columns for file, _, columns in opened}
            clauses = list(lake_breaches(table, columns))
        found[table] = tuple(clauses)
    return found


def _scan_spool(folder: Path, table: str) -> pl.LazyFrame:
    files = sorted(folder.glob("**/*.ipc"))
    return pl.scan_ipc(files) if files else pl.LazyFrame(schema=SCHEMAS[table])


def _count(folder: Path) -> int:
    rows: int = _scan_spool(folder, folder.name).select(pl.len()).collect().item()
    return rows


@contextmanager
def _reading(lake: Lake, table: str, files: Sequence[LakeFile]) -> Iterator[None]:
    """Tell what failed in the block, and whether the files are as they were listed after it."""
    try:
        yield
    except SourceError:
        _expect_unchanged(lake, table, files)
        raise
    except (OSError, pl.exceptions.PolarsError) as error:
        _expect_unchanged(lake, table, files)
        raise unreadable(lake, error) from error
    _expect_unchanged(lake, table, files)


def _expect_unchanged(lake: Lake, table: str, files: Sequence[LakeFile]) -> None:
    now = set(list_files(lake, table))
    changed = [file.path for file in files if file not in now]
    if changed:
        raise LakeChangedError(
            f"The lake at {lake} changed while it was read: found {len(changed)} files of table"
            f" {table} changed or gone, such as {table}/{changed[0]}; expected them to stay as they"
            " were listed. Run the dates again when they are written."
        )
