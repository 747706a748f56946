"""Reading the platform, wherever its source tables are."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

import polars as pl

from tutormax_assets.database.connection import Timeouts, source_url
from tutormax_assets.errors import UsageError
from tutormax_assets.settings import Settings, SettingsError
from tutormax_assets.source import lake, postgres
from tutormax_assets.source.contract import NEEDED_COLUMNS
from tutormax_assets.source.horizon import Horizon
from tutormax_assets.source.lake_files import Lake
from tutormax_assets.source.postgres import PlatformRows, Source
from tutormax_assets.source.streams import Table
from tutormax_assets.storage.shards import ALL_TUTORS, TutorRange

AnySource = Source | Lake
"""Where the source tables are read: a PostgreSQL database, or a lake."""


class UnknownTutorsError(UsageError):
    """None of the tutors that a run is about is in the platform's tutors."""


class View(Protocol):
    """The platform at one instant, whichever source it is read from."""

    @property
    def read_at(self) -> datetime:
        """That instant, in UTC."""
        ...

    @property
    def snapshot(self) -> str:
        """What the source calls it."""
        ...

    @property
    def ids_are_unique(self) -> bool:
        """Whether the source sees to it that a session, and a feedback, is there once."""
        ...

    @property
    def is_received(self) -> bool:
        """Whether it came from another process and may be read again after a failure."""
        ...

    def share(self) -> "SharedView | None":
        """The view for other processes, which open it with ``open_shared_view``.

        None if only this process can read it.
        """
        ...

    def known_at(self, instant: datetime) -> "View":
        """The view without rows that were not known yet at an instant.

        It has to be opened with ``COLUMNS_AS_OF``.
        """
        ...

    def tutors(self) -> pl.DataFrame:
        """``SourceTutors``: all of them, whichever tutors the view is about."""
        ...

    def rows(
        self,
        folder: Path,
        *,
        tables: Collection[Table] = ...,
        start: datetime,
        end: datetime,
        tutor_range: TutorRange = ALL_TUTORS,
        hashed: bool = False,
    ) -> PlatformRows:
        """Sessions with their feedback, and events, in ``[start, end)``.

        The folder is where a source may keep them; ``hashed`` says that hashes of ids will do.
        """
        ...

    def horizon(self) -> Horizon:
        """Distinguishes the rows of the view from later ones; raises UnknownChangesError."""
        ...

    def empty_tables(self, names: Iterable[str]) -> list[str]:
        """Those of the source tables that hold no row at all, whatever its date."""
        ...


SharedView = postgres.SharedView | lake.SharedLakeView
"""A view for another process, whichever source it is read from."""


def open_shared_view(shared: SharedView, source: AnySource) -> View:
    """A view of another process, read from the source that this process has.

    Raises:
        SettingsError: The other process has another kind of source.
    """
    if isinstance(shared, postgres.SharedView) and isinstance(source, Source):
        return shared.open(source)
    if isinstance(shared, lake.SharedLakeView) and isinstance(source, Lake):
        return shared.open(source)
    found, expected = (
        ("postgres", "parquet") if isinstance(source, Source) else ("parquet", "postgres")
    )
    raise SettingsError(f"TUTORMAX_SOURCE is {found} here; expected {expected}, as elsewhere")


def source_of(settings: Settings) -> AnySource:
    """The source that the settings name.

    Raises:
        SettingsError: The URL of the database cannot be parsed or is not PostgreSQL's.
        EmbeddedServerError: The embedded server does not start.
    """
    if settings.lake_path is not None:
        return Lake(settings.lake_path)
    return Source(source_url(settings), Timeouts.of(settings))


def where_to_look(source: AnySource, table: str, *, instant: str) -> str:
    """What shows a person the newest row of a table: a query, or a folder of the lake."""
    if isinstance(source, Lake):
        return f"the newest day=YYYY-MM-DD of {source}/{table}"
    return f"SELECT max({instant}) FROM {table}"  # noqa: S608 - only shown


@contextmanager
def open_view(
    source: AnySource,
    *,
    tutor_ids: Sequence[str] = (),
    columns: Mapping[str, Sequence[str]] = NEEDED_COLUMNS,
) -> Iterator[View]:
    """A view of the platform for as long as the block lasts, of some tutors or of all.

    Args:
        source: Where the platform is read.
        tutor_ids: Only sessions and events of these tutors; all when empty.
        columns: The columns that are read, by table.

    Raises:
        SourceError: The platform cannot be read, or a table is not as the contract has it. Its
            class or its cause tells whether to try again.
    """
    if isinstance(source, Lake):
        yield lake.open_view(source, tutor_ids=tutor_ids)
        return
    with postgres.open_view(source, tutor_ids=tutor_ids, columns=columns) as view:
        yield view


def newest(
    source: AnySource, table: Literal["sessions", "tutor_events"], *, before: datetime
) -> datetime | None:
    """The instant of the newest session, login or message response before another instant.

    Returns:
        The instant in UTC, or none where there is no such row.

    Raises:
        SourceError: The platform cannot be read.
    """
    if isinstance(source, Lake):
        return lake.open_view(source).newest(table, before=before)
    return postgres.newest(source, table, before=before)


def unknown_tutors(source: AnySource, tutor_ids: Sequence[str]) -> list[str]:
    """Those of the ids that are not in the platform's tutors, sorted.

    Raises:
        SourceError: The platform cannot be read.
    """
    if not tutor_ids:
        return []
    if isinstance(source, Lake):
        return sorted(set(tutor_ids) - (set(lake.open_view(source).tutors()["tutor_id"]) - {""}))
    return postgres.unknown_tutors(source, tutor_ids)
