"""The files of a lake: listing them, and scanning those of a table in the form of the contract.

Polars scans files where they are if it can; others are fetched, a few at a time.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import dataframely as dy
import polars as pl
from upath import UPath

from tutormax_assets.metrics.schemas import (
    LOGIN,
    MESSAGE_RESPONSE,
    SourceEvents,
    SourceSessions,
    SourceTutors,
)
from tutormax_assets.source.contract import (
    COLUMNS_AS_OF,
    NEEDED_COLUMNS,
    RESPONSE_TIME,
    lake_breaches,
)
from tutormax_assets.source.streams import SourceError
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


def list_files(lake: Lake, table: str) -> tuple[LakeFile, ...]:
    """The Parquet files below the folder of a dataset, by path; those that are hidden left out."""
    found: Mapping[str, Mapping[str, Any]] = {}
    with asking(lake), suppress(FileNotFoundError):
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


def layout_breaches(table: str, files: Sequence[LakeFile]) -> Iterator[str]:
    """What of a dataset's layout is not as expected, a clause each."""
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


def files_of_days(files: Iterable[LakeFile], start: datetime, end: datetime) -> list[LakeFile]:
    """The files that may hold rows of ``[start, end)``, which is in UTC."""
    first, last = start.date(), (end - timedelta(microseconds=1)).date()
    return [file for file in files if file.day is None or first <= file.day <= last]


class _Opened(NamedTuple):
    """A file that can be scanned, and its columns."""

    file: LakeFile
    location: str
    columns: pl.Schema


def open_files(
    lake: Lake,
    table: str,
    files: Sequence[LakeFile],
    folder: Path,
    only: "RowFilter | None" = None,
) -> list[_Opened]:
    """Where the files can be scanned; what Polars cannot scan there is fetched into the folder."""
    only = only or ALL_ROWS
    base = UPath(lake.path) / table
    is_scanned_there = isinstance(base, Path) or base.protocol in _SCANNED_BY_POLARS
    target = folder / table
    if not is_scanned_there:
        target.mkdir(parents=True, exist_ok=True)

    def opened(number: int, file: LakeFile) -> _Opened:
        if is_scanned_there:
            location = str(base / file.path)
            with _of_file(lake, table, file):
                return _Opened(file, location, scan_location(location).collect_schema())
        with asking(lake):
            content = (base / file.path).read_bytes()
        location = str(target / f"{number}.parquet")
        with _of_file(lake, table, file):
            columns = pl.Schema(pl.read_parquet_schema(io.BytesIO(content)))
            wanted = [name for name in columns if name in _columns_to_read(table, only)]
            pl.read_parquet(io.BytesIO(content), columns=wanted).write_parquet(location)
        return _Opened(file, location, columns)

    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        return list(pool.map(opened, range(len(files)), files))


def scan_location(location: str | list[str]) -> pl.LazyFrame:
    """Parquet files as one frame, with the columns of the first one."""
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


def _columns_to_read(table: str, only: "RowFilter") -> set[str]:
    return {*only.needed_columns[table], *([RESPONSE_TIME] if table == "tutor_events" else [])}


class RowFilter(NamedTuple):
    """Which rows are read: whose they are, and when they had to be known."""

    tutor_ids: tuple[str, ...] = ()
    tutor_range: TutorRange = ALL_TUTORS
    as_of: datetime | None = None

    @property
    def needed_columns(self) -> Mapping[str, Sequence[str]]:
        """The columns that are read, by dataset."""
        return NEEDED_COLUMNS if self.as_of is None else COLUMNS_AS_OF

    def conditions(self, table: str, columns: pl.Schema) -> list[pl.Expr]:
        """What these rows keep, as Parquet has them: so that row groups can be skipped."""
        tutor_id, (lower, upper) = pl.col("tutor_id"), self.tutor_range
        if columns["tutor_id"] != pl.String:
            tutor_id = tutor_id.cast(pl.String)
        conditions = [tutor_id.is_in(self.tutor_ids)] if self.tutor_ids else []
        if lower is not None:
            conditions.append(tutor_id >= lower)
        if upper is not None:
            # A null comes to be the first id of all.
            conditions.append(tutor_id.is_null() | (tutor_id < upper))
        # A row without these instants is never known.
        known = set(self.needed_columns[table]) - set(NEEDED_COLUMNS[table])
        for name in sorted(known):
            instant = pl.col(name).cast(pl.Datetime("us", "UTC"))
            conditions.append(instant <= self.as_of)
        return conditions


ALL_ROWS = RowFilter()


def scan_files(
    lake: Lake,
    table: str,
    files: Sequence[LakeFile],
    folder: Path,
    only: RowFilter = ALL_ROWS,
) -> pl.LazyFrame:
    """The rows of the files as the source frames have them, with the day of their folder."""
    opened = open_files(lake, table, files, folder, only)
    found = {f"{table}/{file.path}": columns for file, _, columns in opened}
    expect_no_breach(list(lake_breaches(table, found, only.needed_columns)), lake)
    # Files of a dataset may differ in what is read alike.
    alike: dict[tuple[date | None, tuple[tuple[str, pl.DataType], ...]], list[str]] = {}
    for file, location, columns in opened:
        wanted = tuple(
            (name, columns[name]) for name in sorted(_columns_to_read(table, only) & columns.keys())
        )
        alike.setdefault((file.day, wanted), []).append(location)
    schema = SCHEMAS[table]
    scans = [
        _FRAMES[table](
            scan_location(locations)
            .filter(*only.conditions(table, pl.Schema(wanted)))
            .select(name for name, _ in wanted),
            pl.Schema(wanted),
        ).select(*schema, pl.lit(day, dtype=pl.Date).alias(DAY))
        for (day, wanted), locations in alike.items()
    ]
    rows = pl.concat(scans) if scans else pl.LazyFrame(schema=schema | {DAY: pl.Date})
    return rows if table in INSTANTS else rows.drop(DAY)


_FEEDBACK = ("feedback_id", "feedback_tutor_id", "overall_rating")

SCHEMAS: Mapping[str, dict[str, pl.DataType]] = {
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
        *(_read_as(SourceSessions, name) for name in SCHEMAS["sessions"] if name != "started"),
    ).with_columns(_keys("session_id", "tutor_id"))


def _feedback(rows: pl.LazyFrame, _: pl.Schema) -> pl.LazyFrame:
    feedback = rows.rename({"tutor_id": "feedback_tutor_id"})
    return feedback.select(
        _read_as(SourceSessions, name) for name in SCHEMAS["student_feedback"]
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


@contextmanager
def asking(lake: Lake) -> Iterator[None]:
    """Turn what the filesystem refuses in the block into a ``SourceError``."""
    try:
        yield
    # What a filesystem raises depends on which one it is.
    except Exception as error:
        raise unreadable(lake, error) from error


def unreadable(lake: Lake, error: Exception) -> SourceError:
    """The error of a lake whose filesystem refused something."""
    kind = SourceError if isinstance(error, _FOR_GOOD) else LakeUnreachableError
    return kind(
        f"The lake at {lake} cannot be read: {_first_line(error)}. TUTORMAX_LAKE says where it is;"
        " `tutormax db status` shows what is there."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def expect_no_breach(clauses: Sequence[str], lake: Lake) -> None:
    """Raise what of the lake is not as the contract has it, if anything is.

    Raises:
        SourceError: There are such clauses.
    """
    if clauses:
        raise SourceError(
            f"The lake at {lake} cannot be read: {'; '.join(clauses)}. `tutormax db status` shows"
            " what is there."
        )
