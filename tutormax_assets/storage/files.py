"""Parquet files on any filesystem: written whole or not at all, and read as they are now.

Rows of people are for their owner: new folders have mode 0700 and new files 0600. Below a folder
with the set-group-ID bit, as ``make_private_folder`` gives it, its group can read them as well.
"""

import errno
import grp
import io
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Literal

import polars as pl
from upath import UPath

from tutormax_assets.errors import TutormaxError


class StorageError(TutormaxError):
    """The Parquet partitions cannot be reached; the message says what to do."""


@dataclass(frozen=True)
class StoredFile:
    """A file that was written.

    Attributes:
        size_bytes: Its size.
        rows: How many rows it holds.
    """

    size_bytes: int
    rows: int


def make_private_folder(base_path: str, *, group: str | None) -> None:
    """Make the base folder of partitions or of an archive, unless it is there.

    Args:
        base_path: A path that fsspec knows; of an object store nothing is made.
        group: Name of the group that can read what is stored; none for the owner alone.

    Raises:
        StorageError: The folder cannot be made, or be given to the group.
    """
    folder = UPath(base_path)
    if not isinstance(folder, Path):
        return
    try:
        _make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)
        number = None if group is None else grp.getgrnam(group).gr_gid
        # One that another user shared with the group already is as good.
        if number is not None and not (folder.stat().st_gid == number and _is_shared(folder)):
            _share(folder, number, _SHARED_FOLDER)
    except (OSError, LookupError) as error:
        raise StorageError(
            f"{folder} cannot be made a folder of {group or 'its owner'}: {error}."
            " Check the path, the rights of this user and TUTORMAX_FILES_GROUP."
        ) from error


def write_parquet(
    path: UPath, rows: pl.LazyFrame, *, row_group_size: int | None = None
) -> StoredFile:
    """Compute and store a file so that a reader sees the old one or the new one, never a part.

    Rows are written as they are computed. Who writes has the path to itself.

    Args:
        path: Where the file comes to be.
        rows: Its rows.
        row_group_size: How many of them are read at once at least; as many as Polars chooses when
            None.
    """
    if not isinstance(path, Path):
        # An object store shows an object once it was put whole.
        with TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            _sink(rows, local, row_group_size)
            path.fs.put_file(str(local), path.path)
            return _stored_file(local)
    with _replacing(path) as temporary:
        _sink(rows, temporary, row_group_size)
    return _stored_file(path)


def _sink(rows: pl.LazyFrame, path: Path, row_group_size: int | None = None) -> None:
    rows.sink_parquet(
        path, compression=_COMPRESSION, row_group_size=row_group_size, engine="streaming"
    )


def link_file(file: Path, link: Path) -> bool:
    """Give a file another name, unless the filesystem has no hard links or has no more of them.

    Returns:
        Whether it has the name.
    """
    _make_folder(link.parent)
    try:
        link.hardlink_to(file)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    _sync(link.parent)
    return True


def write_text(path: UPath, text: str) -> None:
    """Store a text so that a reader sees the old one or the new one, never a part."""
    if not isinstance(path, Path):
        path.write_text(text, encoding="utf-8")
        return
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def open_private_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that a person asked for, to write; only its owner can read it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        # One that was there may be open to others; a device stays as it is.
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
        yield file


def write_parquet_parts(
    folder: UPath, rows: pl.LazyFrame, number: pl.Expr, names: Sequence[str]
) -> list[StoredFile]:
    """Compute rows once and store each in one of several new files, as its number says.

    Args:
        folder: Where the files come to be.
        rows: All rows of the files.
        number: Which of the names a row's file has, as ``UInt16``.
        names: The files' names, none of which is there.

    Returns:
        The files in the order of their names; those without a row are written too.
    """
    if len(names) == 1:
        return [write_parquet(folder / names[0], rows)]
    # Files of the same filesystem can be moved into the folder.
    beside = None
    if isinstance(folder, Path):
        _make_folder(folder)
        beside = folder
    with TemporaryDirectory(dir=beside, prefix=".") as temporary:
        parts = Path(temporary)
        rows.with_columns(number.alias(_NUMBER)).sink_parquet(
            pl.PartitionBy(
                parts,
                key=_NUMBER,
                include_key=False,
                file_path_provider=lambda part: names[part.partition_keys.item()],
            ),
            compression=_COMPRESSION,
            engine="streaming",
        )
        stored = []
        for name in names:
            part = parts / name
            if not part.exists():
                _sink(rows.clear(), part)
            stored.append(_stored_file(part))
            if isinstance(folder, Path):
                _restrict(part, like=folder)
                _sync(part)
                part.replace(folder / name)
            else:
                folder.fs.put_file(str(part), (folder / name).path)
    if isinstance(folder, Path):
        _sync(folder)
    return stored


# Where links are not known, not allowed, too many, or of another filesystem.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_COMPRESSION: Literal["zstd"] = "zstd"
_SHARED_FOLDER = 0o2750
_NUMBER = "number of the part"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file that takes the place of another one after the block, unless it fails."""
    new_folders = _make_folder(path.parent)
    for left_behind in path.parent.glob(f".{path.name}.*"):
        left_behind.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.touch(mode=0o600)
    try:
        yield temporary
        _restrict(temporary, like=path.parent)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # What relies on the file must not outlive it in a power failure, so its name is made to last.
    for folder in {path.parent, *(folder.parent for folder in new_folders)}:
        _sync(folder)


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; gives those that are new."""
    new_folders = [new for new in (folder, *folder.parents) if not new.exists()]
    for new in reversed(new_folders):
        # Another process may make it at the same time.
        with suppress(FileExistsError):
            new.mkdir(mode=0o700)
            if _is_shared(new.parent):
                _share(new, new.parent.stat().st_gid, _SHARED_FOLDER)
    return new_folders


def _is_shared(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_ISGID)


def _restrict(file: Path, *, like: Path) -> None:
    """Let the owner read a new file, and the group that its folder is shared with."""
    if _is_shared(like):
        _share(file, like.stat().st_gid, 0o640)
    else:
        file.chmod(0o600)


def _share(path: Path, group: int, mode: int) -> None:
    # The group first: a change of it may clear the bit.
    os.chown(path, -1, group)
    path.chmod(mode)


def _stored_file(path: Path) -> StoredFile:
    rows = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
    return StoredFile(path.stat().st_size, rows)


def read_parquet(path: UPath) -> pl.DataFrame | None:
    """The rows of a file, or none if there is no such file."""
    _forget_listings(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return pl.read_parquet(io.BytesIO(content))


def read_text(path: UPath) -> str | None:
    """The text of a file, or none if there is no such file."""
    _forget_listings(path)
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def entries(folder: UPath) -> list[UPath]:
    """What a folder holds; nothing if there is no such folder."""
    _forget_listings(folder)
    return list(folder.iterdir()) if folder.exists() else []


def _forget_listings(path: UPath) -> None:
    # fsspec keeps listings of remote folders, and another process may have written since.
    if not isinstance(path, Path):
        path.fs.invalidate_cache()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
