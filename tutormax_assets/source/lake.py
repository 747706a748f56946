"""Reading the platform from a lake: Parquet datasets that lie on any filesystem.

The files are listed once, and only those are read. A lake has no snapshots, so what was read
counts only if the listing of these files is still the same afterwards.

Sessions and their feedback are split by the session's id into files, a part of which fits into
memory. Polars scans files where they are if it can; others are fetched, a few at a time.
"""

import io
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import dataframely as dy
import polars as pl
from upath import UPath

from tutormax_assets.metrics.quality import contradictory_tutors
from tutormax_assets.metrics.schemas import (
    LOGIN,
    MESSAGE_RESPONSE,
    SourceEvents,
    SourceSessions,
    SourceTutors,
)
from tutormax_assets.source.contract import NEEDED_COLUMNS, RESPONSE_TIME, lake_breaches
from tutormax_assets.source.postgres import PlatformRows
from tutormax_assets.source.streams import ROWS_OF_A_PART, SourceError, Table, number_of_parts
from tutormax_assets.storage.shards import ALL_TUTORS, TutorRange

INSTANTS: Mapping[str, str] = {
    "sessions": "scheduled_start",
    "tutor_events": "event_timestamp",
}
"""The column whose UTC day a dataset is partitioned by."""

DAY = "day"
"""Name of the partitions, as in ``day=2026-11-22``."""

WITHOUT_DAY = "__HIVE_DEFAULT_PARTITION__"
"""In place of the day of rows whose instant is null, which no window holds."""

_LAYOUTS = {
    "tutors": "files that are not partitioned",
    "sessions": f"files in folders {DAY}=YYYY-MM-DD",
    "student_feedback": f"files in folders {DAY}=YYYY-MM-DD, or none of them in such a folder",
    "tutor_events": f"files in folders {DAY}=YYYY-MM-DD",
}
# What a filesystem knows of a file that changes when the file does; the first that it has counts.
_STATES = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
_FOR_GOOD = (
    FileNotFoundError,
    ImportError,
    NotADirectoryError,
    PermissionError,
    ValueError,
    pl.exceptions.PolarsError,
)
# Of object stores Polars reads those columns only that are asked for.
_SCANNED_BY_POLARS = ("s3", "s3a", "gs", "gcs")
_OPENED_AT_ONCE = 4
_MOST = 2**31 - 1
_ONLY_A_RESPONSE_TIME = (
    rf'^\s*\{{\s*"{RESPONSE_TIME}"\s*:\s*(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*\}}\s*$'
)


class LakeUnreachableError(SourceError):
    """The filesystem of the lake does not answer as it should."""

    may_pass = True


class LakeChangedError(SourceError):
    """Files of the lake were changed or removed while they were read."""

    may_pass = True
    affects_every_date = False


@dataclass(frozen=True)
class Lake:
    """Where the lake is."""

    path: str

    def __str__(self) -> str:
        """The lake as a person may see it: no user, no password, no options."""
        if "://" not in self.path:
            return self.path
        parts = urlsplit(self.path)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class LakeFile(NamedTuple):
    """A file of a dataset.

    Attributes:
        path: Below the folder of the dataset.
        day: Of its partition, if the dataset is partitioned.
        size: Bytes.
        state: What the filesystem says of its version.
    """

    path: str
    day: date | None
    size: int
    state: str


@dataclass(frozen=True)
class LakeView:
    """The lake as it was listed.

    Attributes:
        lake: Where it is.
        tutor_ids: Only rows of these tutors; all when empty.
        read_at: When the files were listed, in UTC.
        snapshot: SHA-256 of the listing.
        files: The files of each dataset, by path.
        ids_are_unique: A lake has no keys that see to it.
        is_received: After a failure, what counts is another listing.
    """

    lake: Lake
    tutor_ids: tuple[str, ...]
    read_at: datetime
    snapshot: str
    files: Mapping[str, Sequence[LakeFile]]
    ids_are_unique: Literal[False] = False
    is_received: Literal[False] = False

    def share(self) -> "SharedLakeView":
        """The view for other processes, which go by the same listing."""
        return SharedLakeView(self.tutor_ids, self.read_at, self.snapshot, self.files)

    def tutors(self) -> pl.DataFrame:
        """``SourceTutors``: all of them, whichever tutors the view is about.

        Raises:
            SourceError: The lake cannot be read, has no tutors, or has one with two statuses.
        """
        files = self.files["tutors"]
        with TemporaryDirectory() as folder, _reading(self.lake, "tutors", files):
            rows = _scanned(self.lake, "tutors", files, Path(folder)).drop_nulls("tutor_id")
            found = rows.unique().collect(engine="streaming")
        if found.is_empty():
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
    ) -> PlatformRows:
        """Sessions with their feedback, and events, in ``[start, end)``.

        Only files of the days that these instants lie in are opened.

        Args:
            folder: Where the parts are kept. What it holds is removed first.
            tables: What is wanted; the frames of the others are empty.
            start: First instant.
            end: First instant after them.
            tutor_range: Only rows of these tutors.

        Raises:
            SourceError: The lake cannot be read, a dataset is not as the contract has it, or files
                changed meanwhile. ``may_pass`` says whether trying again may help.
        """
        began = perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # Polars compares instants of one timezone only.
        start, end = start.astimezone(UTC), end.astimezone(UTC)
        only = _Tutors(self.tutor_ids, tutor_range)
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
        files = _of_days(self.files[table], datetime.min.replace(tzinfo=UTC), before)
        instant = pl.col(INSTANTS[table])
        for day in sorted({file.day for file in files if file.day}, reverse=True):
            of_day = [file for file in files if file.day == day]
            with TemporaryDirectory() as folder, _reading(self.lake, table, of_day):
                rows = _scanned(self.lake, table, of_day, Path(folder)).filter(instant < before)
                found: datetime | None = rows.select(instant.max()).collect().item()
            if found is not None:
                return found
        return None

    def _read_sessions(
        self, folder: Path, start: datetime, end: datetime, only: "_Tutors"
    ) -> list[pl.LazyFrame]:
        fetched = folder / "fetched"
        files = _of_days(self.files["sessions"], start, end)
        with _reading(self.lake, "sessions", files):
            rows = _scanned(self.lake, "sessions", files, fetched, only)
            expected = rows.select(pl.len()).collect(engine="streaming").item()
            part = (pl.col("session_id").hash() % number_of_parts(expected)).alias("part")
            by_part = pl.PartitionBy(folder / "sessions", key=part, include_key=False)
            self._spool("sessions", rows, start, end, by_part)
        files = _of_days(self.files["student_feedback"], start, end)
        with _reading(self.lake, "student_feedback", files):
            rows = _scanned(self.lake, "student_feedback", files, fetched).drop_nulls("session_id")
            if only != _EVERY_TUTOR:
                # Feedback may name another tutor than its session.
                ours = _spooled(folder / "sessions", "sessions").select("session_id")
                rows = rows.join(ours, on="session_id", how="semi")
            by_part = pl.PartitionBy(folder / "student_feedback", key=part, include_key=False)
            rows.sink_ipc(by_part, mkdir=True, engine="streaming")
        shutil.rmtree(fetched, ignore_errors=True)
        return [
            _spooled(of_sessions, "sessions")
            .join(
                _spooled(folder / "student_feedback" / of_sessions.name, "student_feedback"),
                on="session_id",
                how="left",
            )
            .select(SourceSessions.column_names())
            for of_sessions in sorted((folder / "sessions").glob("*"))
        ]

    def _read_events(
        self, folder: Path, start: datetime, end: datetime, only: "_Tutors"
    ) -> list[pl.LazyFrame]:
        files = _of_days(self.files["tutor_events"], start, end)
        path = folder / "tutor_events"
        with _reading(self.lake, "tutor_events", files):
            rows = _scanned(self.lake, "tutor_events", files, folder / "fetched", only)
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
                [opened] = _opened(self.lake, table, [file], Path(folder))
                rows = _scan(opened.location).select(pl.len())
                yield bool(rows.collect().item())


@dataclass(frozen=True)
class SharedLakeView:
    """A view for another process, which says itself where the lake is: no password travels."""

    tutor_ids: tuple[str, ...]
    read_at: datetime
    snapshot: str
    files: Mapping[str, Sequence[LakeFile]]

    def open(self, lake: Lake) -> LakeView:
        """The view in this process."""
        return LakeView(lake, self.tutor_ids, self.read_at, self.snapshot, self.files)


def open_view(lake: Lake, *, tutor_ids: Sequence[str] = ()) -> LakeView:
    """List the lake, to read some tutors or all.

    Raises:
        SourceError: The lake cannot be listed, or its folders are not as the contract has them.
    """
    read_at = datetime.now(UTC)
    files = {table: _listed(lake, table) for table in NEEDED_COLUMNS}
    clauses = [clause for table in files for clause in _layout_breaches(table, files[table])]
    _expect_no(clauses, lake)
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
        files = _listed(lake, table)
        clauses = list(_layout_breaches(table, files))
        if not clauses:
            with TemporaryDirectory() as folder, _reading(lake, table, files[-1:]):
                opened = _opened(lake, table, files[-1:], Path(folder))
            columns = {f"{table}/{file.path}": columns for file, _, columns in opened}
            clauses = list(lake_breaches(table, columns))
        found[table] = tuple(clauses)
    return found


def _listed(lake: Lake, table: str) -> tuple[LakeFile, ...]:
    """The Parquet files below the folder of a dataset, by path; those that are hidden left out."""
    found: Mapping[str, Mapping[str, Any]] = {}
    with _asking(lake), suppress(FileNotFoundError):
        folder = (UPath(lake.path) / table).absolute()
        # fsspec keeps listings of remote folders.
        folder.fs.invalidate_cache()
        found = folder.fs.find(folder.path, detail=True)
    files = []
    for name, details in sorted(found.items()):
        path = name.removeprefix(f"{folder.path}/")
        first, *_ = steps = path.split("/")
        is_hidden = any(step.startswith(("_", ".")) for step in steps)
        if is_hidden or not path.endswith(".parquet"):
            continue
        state = next((str(details[key]) for key in _STATES if key in details), "")
        files.append(LakeFile(path, _day(first), details["size"] or 0, state))
    return tuple(files)


def _day(folder: str) -> date | None:
    name, _, value = folder.partition("=")
    if (name, value) == (DAY, WITHOUT_DAY):
        return date.min
    try:
        day = date.fromisoformat(value)
    except ValueError:
        return None
    return day if name == DAY and day.isoformat() == value else None


def _layout_breaches(table: str, files: Sequence[LakeFile]) -> Iterator[str]:
    expected = f"expected {_LAYOUTS[table]}"
    if not files:
        yield f"table {table}: found no Parquet file in {table}/, {expected}"
        return
    days = [file for file in files if file.day is not None]
    others = [file for file in files if file.day is None]
    odd = next((file for file in others if "=" in file.path), None)
    if odd is None and table in INSTANTS and others:
        odd = others[0]
    elif odd is None and table == "tutors" and days:
        odd = days[0]
    elif odd is None and days and others:
        odd = others[0]
    if odd is not None:
        yield f"table {table}: found {table}/{odd.path}, {expected}"


def _of_days(files: Iterable[LakeFile], start: datetime, end: datetime) -> list[LakeFile]:
    """The files that may hold rows of ``[start, end)``, which is in UTC."""
    first, last = start.date(), (end - timedelta(microseconds=1)).date()
    return [file for file in files if file.day is None or first <= file.day <= last]


class _Opened(NamedTuple):
    """A file that can be scanned, and its columns."""

    file: LakeFile
    location: str
    columns: pl.Schema


def _opened(lake: Lake, table: str, files: Sequence[LakeFile], folder: Path) -> list[_Opened]:
    """Where the files can be scanned; what Polars cannot scan there is fetched into the folder."""
    base = UPath(lake.path) / table
    is_scanned_there = isinstance(base, Path) or base.protocol in _SCANNED_BY_POLARS
    target = folder / table
    if not is_scanned_there:
        target.mkdir(parents=True, exist_ok=True)

    def opened(number: int, file: LakeFile) -> _Opened:
        if is_scanned_there:
            location = str(base / file.path)
            with _of_file(lake, table, file):
                return _Opened(file, location, _scan(location).collect_schema())
        with _asking(lake):
            content = (base / file.path).read_bytes()
        location = str(target / f"{number}.parquet")
        with _of_file(lake, table, file):
            columns = pl.Schema(pl.read_parquet_schema(io.BytesIO(content)))
            wanted = [name for name in columns if name in _wanted(table)]
            pl.read_parquet(io.BytesIO(content), columns=wanted).write_parquet(location)
        return _Opened(file, location, columns)

    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        return list(pool.map(opened, range(len(files)), files))


def _scan(location: str | list[str]) -> pl.LazyFrame:
    return pl.scan_parquet(location, glob=False, hive_partitioning=False, extra_columns="ignore")


@contextmanager
def _of_file(lake: Lake, table: str, file: LakeFile) -> Iterator[None]:
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise SourceError(
            f"The lake at {lake} cannot be read: {table}/{file.path}: found {_first_line(error)},"
            " expected a Parquet file."
        ) from error


def _wanted(table: str) -> set[str]:
    return {*NEEDED_COLUMNS[table], *([RESPONSE_TIME] if table == "tutor_events" else [])}


class _Tutors(NamedTuple):
    """Whose rows are read."""

    tutor_ids: tuple[str, ...] = ()
    tutor_range: TutorRange = ALL_TUTORS

    def conditions(self, columns: pl.Schema) -> list[pl.Expr]:
        """What a row of theirs keeps, as Parquet has it: so that row groups can be skipped."""
        tutor_id, (lower, upper) = pl.col("tutor_id"), self.tutor_range
        if columns["tutor_id"] != pl.String:
            tutor_id = tutor_id.cast(pl.String)
        conditions = [tutor_id.is_in(self.tutor_ids)] if self.tutor_ids else []
        if lower is not None:
            conditions.append(tutor_id >= lower)
        if upper is not None:
            # A null comes to be the first id of all.
            conditions.append(tutor_id.is_null() | (tutor_id < upper))
        return conditions


_EVERY_TUTOR = _Tutors()


def _scanned(
    lake: Lake,
    table: str,
    files: Sequence[LakeFile],
    folder: Path,
    only: _Tutors = _EVERY_TUTOR,
) -> pl.LazyFrame:
    """The rows of the files as the source frames have them, with the day of their folder."""
    opened = _opened(lake, table, files, folder)
    found = {f"{table}/{file.path}": columns for file, _, columns in opened}
    _expect_no(list(lake_breaches(table, found)), lake)
    # Files of a dataset may differ in what is read alike.
    alike: dict[tuple[date | None, tuple[tuple[str, pl.DataType], ...]], list[str]] = {}
    for file, location, columns in opened:
        wanted = tuple((name, columns[name]) for name in sorted(_wanted(table) & columns.keys()))
        alike.setdefault((file.day, wanted), []).append(location)
    schema = _SCHEMAS[table]
    scans = [
        _FRAMES[table](
            _scan(locations)
            .filter(*only.conditions(pl.Schema(wanted)))
            .select(name for name, _ in wanted),
            pl.Schema(wanted),
        ).select(*schema, pl.lit(day, dtype=pl.Date).alias(DAY))
        for (day, wanted), locations in alike.items()
    ]
    rows = pl.concat(scans) if scans else pl.LazyFrame(schema=schema | {DAY: pl.Date})
    return rows if table in INSTANTS else rows.drop(DAY)


_FEEDBACK = ("feedback_id", "feedback_tutor_id", "overall_rating")
_SCHEMAS: Mapping[str, dict[str, pl.DataType]] = {
    "tutors": dict(pl.Schema(SourceTutors)),
    "sessions": {
        name: dtype for name, dtype in pl.Schema(SourceSessions).items() if name not in _FEEDBACK
    },
    "student_feedback": {
        name: pl.Schema(SourceSessions)[name] for name in ("session_id", *_FEEDBACK)
    },
    "tutor_events": dict(pl.Schema(SourceEvents)),
}


def _tutors(rows: pl.LazyFrame, _: pl.Schema) -> pl.LazyFrame:
    return rows.select(_read_as(SourceTutors, "tutor_id"), _read_as(SourceTutors, "status"))


def _sessions(rows: pl.LazyFrame, _: pl.Schema) -> pl.LazyFrame:
    return rows.select(
        pl.col("actual_start").is_not_null().alias("started"),
        *(_read_as(SourceSessions, name) for name in _SCHEMAS["sessions"] if name != "started"),
    ).with_columns(_keys("session_id", "tutor_id"))


def _feedback(rows: pl.LazyFrame, _: pl.Schema) -> pl.LazyFrame:
    feedback = rows.rename({"tutor_id": "feedback_tutor_id"})
    return feedback.select(
        _read_as(SourceSessions, name) for name in _SCHEMAS["student_feedback"]
    ).with_columns(_keys("feedback_id"))


def _events(rows: pl.LazyFrame, columns: pl.Schema) -> pl.LazyFrame:
    is_response = pl.col("event_type").cast(pl.String) == MESSAGE_RESPONSE
    response_time = pl.when(is_response).then(_response_time(columns, is_response))
    return (
        rows.with_columns(response_time.alias(RESPONSE_TIME))
        .select(_read_as(SourceEvents, name) for name in SourceEvents.column_names())
        .filter(pl.col("event_type").is_in([LOGIN, MESSAGE_RESPONSE]))
        .with_columns(
            *_keys("tutor_id"),
            # As of PostgreSQL: nothing of a login can be broken, so its id is of no use.
            pl.when(pl.col("event_type") == MESSAGE_RESPONSE)
            .then(pl.col("event_id").fill_null(""))
            .alias("event_id"),
        )
    )


_FRAMES: Mapping[str, Callable[[pl.LazyFrame, pl.Schema], pl.LazyFrame]] = {
    "tutors": _tutors,
    "sessions": _sessions,
    "student_feedback": _feedback,
    "tutor_events": _events,
}


def _read_as(schema: type[dy.Schema], name: str) -> pl.Expr:
    """A column in the type that the source frame has it in."""
    value, dtype = pl.col(name), pl.Schema(schema)[name]
    if dtype == pl.Int32:
        # What does not fit stays on the same side of whatever the contract asks.
        value = value.cast(pl.Int128).clip(-1, _MOST)
    return value.cast(dtype)


def _keys(*names: str) -> list[pl.Expr]:
    # A lake has no NOT NULL either; a row without its key is one whose key nobody knows.
    return [pl.col(name).fill_null("") for name in names]


def _response_time(columns: pl.Schema, is_response: pl.Expr) -> pl.Expr:
    """The JSON literal of the response time, from wherever the files have it."""
    metadata = columns.get("metadata")
    if metadata is None:
        return _as_literal(pl.col(RESPONSE_TIME), columns[RESPONSE_TIME])
    if isinstance(metadata, pl.Struct):
        time = pl.Schema(metadata).get(RESPONSE_TIME, pl.Null())
        named = RESPONSE_TIME in pl.Schema(metadata)
        field = pl.col("metadata").struct.field(RESPONSE_TIME) if named else pl.lit(None)
        return _as_literal(field, time)
    text = pl.when(is_response).then(pl.col("metadata").cast(pl.String))
    number = text.str.extract(_ONLY_A_RESPONSE_TIME)
    # Most metadata is no more than that, and Python reads the rest a tenth as fast.
    rest = pl.when(number.is_null()).then(text)
    return pl.coalesce(number, rest.map_elements(_literal, return_dtype=pl.String))


def _as_literal(number: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    return (number.cast(pl.Float64) if dtype.is_float() else number).cast(pl.String)


def _literal(metadata: str) -> str | None:
    """The JSON literal of the response time; one that is no number where there is no JSON."""
    try:
        members = json.loads(metadata)
    except (ValueError, RecursionError):
        return json.dumps("not JSON")
    if not isinstance(members, dict) or RESPONSE_TIME not in members:
        return None
    return json.dumps(members[RESPONSE_TIME])


def _spooled(folder: Path, table: str) -> pl.LazyFrame:
    files = sorted(folder.glob("**/*.ipc"))
    return pl.scan_ipc(files) if files else pl.LazyFrame(schema=_SCHEMAS[table])


def _count(folder: Path) -> int:
    rows: int = _spooled(folder, folder.name).select(pl.len()).collect().item()
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
        raise _unreadable(lake, error) from error
    _expect_unchanged(lake, table, files)


@contextmanager
def _asking(lake: Lake) -> Iterator[None]:
    try:
        yield
    # What a filesystem raises depends on which one it is.
    except Exception as error:
        raise _unreadable(lake, error) from error


def _expect_unchanged(lake: Lake, table: str, files: Sequence[LakeFile]) -> None:
    now = set(_listed(lake, table))
    changed = [file.path for file in files if file not in now]
    if changed:
        raise LakeChangedError(
            f"The lake at {lake} changed while it was read: found {len(changed)} files of table"
            f" {table} changed or gone, such as {table}/{changed[0]}; expected them to stay as they"
            " were listed. Run the dates again when they are written."
        )


def _expect_no(clauses: Sequence[str], lake: Lake) -> None:
    if clauses:
        raise SourceError(
            f"The lake at {lake} cannot be read: {'; '.join(clauses)}. `tutormax db status` shows"
            " what is there."
        )


def _unreadable(lake: Lake, error: Exception) -> SourceError:
    kind = SourceError if isinstance(error, _FOR_GOOD) else LakeUnreachableError
    return kind(
        f"The lake at {lake} cannot be read: {_first_line(error)}. TUTORMAX_LAKE says where it is;"
        " `tutormax db status` shows what is there."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
