"""Partitions of assets as they lie in the storage: where they are, and which are too old."""

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import date

import dagster as dg
import sqlalchemy as sa
from upath import UPath

from tutormax_assets.database.date_locks import date_lock
from tutormax_assets.storage.files import StorageError, entries
from tutormax_assets.storage.partition import delete_files, is_listed, stored_files
from tutormax_assets.storage.rows import is_folder_of_partition
from tutormax_assets.storage.store import partition_path

_PAGE = ".html"


@dataclass(frozen=True)
class PartitionFolder:
    """A partition of an asset, as it lies in the storage."""

    asset_key: dg.AssetKey
    partition_key: str
    path: UPath
    size_bytes: int


def partitions_before(
    base_path: str, asset_keys: Collection[dg.AssetKey], before: date
) -> list[PartitionFolder]:
    """The stored partitions whose reference date lies before a day.

    Those of these assets, and those of windows that the policy does not have any more.

    Returns:
        The oldest first, and those of one date in the order of the assets.

    Raises:
        StorageError: The storage cannot be reached.
    """
    found = []
    try:
        for asset_key in sorted({*asset_keys, *_window_assets(base_path)}):
            folders = set()
            for entry in entries(UPath(base_path).joinpath(*asset_key.path)):
                key = entry.stem
                if not _is_date(key) or key >= before.isoformat():
                    continue
                if entry.suffix == _PAGE:
                    with suppress(FileNotFoundError):  # Another cleanup was faster.
                        size = entry.stat().st_size
                        found.append(PartitionFolder(asset_key, key, entry, size))
                elif is_folder_of_partition(entry):
                    folders.add(key)
            for key in folders:
                path = partition_path(base_path, asset_key.to_user_string(), key)
                if asset_key not in asset_keys and not is_listed(path):
                    continue
                with suppress(FileNotFoundError):  # Another cleanup was faster.
                    size = sum(map(_size, stored_files(path)))
                    found.append(PartitionFolder(asset_key, key, path, size))
    # What a filesystem raises depends on which one it is.
    except Exception as error:
        raise StorageError(
            f"The Parquet partitions at {base_path} cannot be listed: {error}."
            " TUTORMAX_STORAGE says where they are; check that it is reachable."
        ) from error
    return sorted(found, key=lambda partition: (partition.partition_key, partition.asset_key))


def delete_partition(engine: sa.Engine, partition: PartitionFolder) -> bool:
    """Delete a partition unless a run computes its date; one that is gone already is fine.

    Does not wait: the running run may need the pool slot that this caller holds.

    Returns:
        Whether it is gone.

    Raises:
        StorageError: It cannot be deleted.
    """
    with date_lock(engine, partition.partition_key) as is_mine:
        if not is_mine:
            return False
        try:
            if partition.path.suffix == _PAGE:
                partition.path.unlink(missing_ok=True)
            else:
                delete_files(partition.path)
        except Exception as error:
            raise StorageError(
                f"{partition.path} cannot be deleted: {error}."
                " Check the rights of the user that runs this."
            ) from error
    return True


def _window_assets(base_path: str) -> list[dg.AssetKey]:
    """The folders that are named as the assets of windows are."""
    found = (entry.name for entry in entries(UPath(base_path)))
    return [dg.AssetKey(name) for name in found if re.fullmatch(r"metrics_\d+day", name)]


def _size(file: UPath) -> int:
    """What a file takes; of one that several partitions share, the share of one."""
    found = file.stat()
    return int(found.st_size) // max(getattr(found, "st_nlink", 1), 1)


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
