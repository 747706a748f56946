"""The store of partitions: where each lies, and what a run reads and keeps of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from time import perf_counter

import polars as pl
from upath import UPath

from tutormax_assets.storage.files import StorageError
from tutormax_assets.storage.partition import (
    STATE_SUFFIX,
    Partition,
    list_partition,
    merge_partition,
    open_partition,
)
from tutormax_assets.storage.rows import Part

TUTORS_LEFT_OUT, _TUTOR_ROSTER = "tutors_left_out", "tutor_roster"


def partition_path(base_path: str, asset: str, partition_key: str) -> UPath:
    """The folder of a partition of an asset."""
    return UPath(base_path) / asset / f"{partition_key}.parquet"


def state_path(base_path: str, partition_key: str) -> UPath:
    """The file that says what a reference date was read from, beside the date's roster."""
    return partition_path(base_path, _TUTOR_ROSTER, partition_key).with_suffix(STATE_SUFFIX)


class PartitionStore:
    """Keeps each partition of an asset as the folder ``<base_path>/<asset>/<partition>.parquet``.

    A run that is filtered to some tutors reads only those tutors and replaces only their rows. The
    process that computes a shard stores its file; a partition that is kept lists the files, and
    with that becomes what others read.

    Attributes:
        tutor_ids: The tutors that the run is filtered to; all when empty.
    """

    def __init__(
        self,
        base_path: str,
        *,
        tutor_ids: Iterable[str] = (),
        renew_locks: Callable[[], bool] = lambda: False,
    ) -> None:
        """Say where the partitions are.

        Args:
            base_path: Folder or URL.
            tutor_ids: The tutors that the run is filtered to; all when empty.
            renew_locks: Renews the run's locks on its reference dates, and says whether they were
                lost for a while.
        """
        self.base_path = base_path
        self.tutor_ids = tuple(tutor_ids)
        self._renew_locks = renew_locks
        self._kept: dict[UPath, tuple[Part, ...]] = {}

    def path(self, asset: str, partition_key: str) -> UPath:
        """The folder of a partition."""
        return partition_path(self.base_path, asset, partition_key)

    def partitions(self, asset: str, partition_keys: Iterable[str]) -> dict[str, Partition]:
        """Partitions of an asset by their keys, restricted to the tutors of the run.

        Raises:
            FileNotFoundError: A partition has not been materialized.
            StorageError: Another run has written what this one had kept.
        """
        self._check_locks()
        return {
            key: open_partition(self.path(asset, key), tutor_ids=self.tutor_ids)
            for key in partition_keys
        }

    def partition(self, asset: str, partition_key: str) -> Partition:
        """A partition of an asset, as ``partitions`` opens it."""
        return self.partitions(asset, [partition_key])[partition_key]

    def stored_partition(self, asset: str, partition_key: str) -> Partition:
        """A partition of any date, restricted to the run's tutors.

        Another run may be computing it. Shards that failed are named whichever the tutors.

        Raises:
            FileNotFoundError: The partition has not been materialized.
            StorageError: Its listing is damaged.
        """
        whole = self.whole_partition(asset, partition_key)
        return replace(whole, tutor_ids=self.tutor_ids)

    def whole_partition(self, asset: str, partition_key: str) -> Partition:
        """A partition of an asset with all of its tutors, whichever the run is filtered to.

        Raises:
            FileNotFoundError: The partition has not been materialized.
        """
        return open_partition(self.path(asset, partition_key))

    def is_stored(self, asset: str, partition_key: str) -> bool:
        """Whether a partition of an asset has been materialized and can be opened."""
        try:
            self.whole_partition(asset, partition_key)
        except OSError:
            return False
        return True

    def rows_of_others(self, asset: str, partition_key: str) -> pl.LazyFrame | None:
        """The stored rows of tutors that a filtered run leaves as they are, if there are any."""
        try:
            rows = self.whole_partition(asset, partition_key).rows().scan()
        except FileNotFoundError:
            return None
        return rows.filter(~pl.col("tutor_id").is_in(self.tutor_ids)) if self.tutor_ids else None

    def active_tutors_left_out(self, partition_key: str) -> int:
        """Number of active tutors that no run of a date has computed yet; 0 if not known."""
        try:
            left_out = self.whole_partition(TUTORS_LEFT_OUT, partition_key)
        except FileNotFoundError:
            # An earlier version computed the date.
            return 0
        return left_out.rows().scan().filter(status="active").collect().height

    def active_tutors_of_others(self, partition_key: str) -> int:
        """Number of other tutors than the run's: in a date's roster, or not computed yet."""
        others = self.rows_of_others(_TUTOR_ROSTER, partition_key)
        in_roster = 0 if others is None else others.collect().height
        return in_roster + self.active_tutors_left_out(partition_key)

    def keep(self, partitions: Mapping[str, Partition]) -> dict[str, Partition]:
        """Make partitions those that are read, with the stored rows of other tutors.

        Args:
            partitions: By key, with the files of what the run has computed.

        Returns:
            Them as they are kept; their ``seconds`` include the keeping.

        Raises:
            StorageError: The storage cannot be written, or another run has written what this one
                had kept.
        """
        return {key: self._keep(partition) for key, partition in partitions.items()}

    def _keep(self, partition: Partition) -> Partition:
        started = perf_counter()
        self._check_locks()
        if self.tutor_ids:
            partition = merge_partition(partition, only=self.tutor_ids)
        list_partition(partition)
        self._kept[partition.path] = partition.parts
        return partition.with_seconds(perf_counter() - started)

    def _check_locks(self) -> None:
        if not self._renew_locks():
            return
        for path, parts in self._kept.items():
            if _listed_parts(path) != parts:
                raise StorageError(
                    f"{path} was written by another run while this one had lost its connection to"
                    " the platform. What the other run saved stays; run the date again if need be."
                )


def _listed_parts(path: UPath) -> tuple[Part, ...] | None:
    try:
        return open_partition(path).parts
    except FileNotFoundError:
        return None
