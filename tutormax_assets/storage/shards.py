"""Shards of tutors: what is computed, stored and written by itself, since no tutor needs another.

A shard is a range of tutor ids in the order of their bytes, which PostgreSQL's collation ``C``,
Polars and Python agree on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import polars as pl

TUTORS_OF_A_SHARD = 25_000
"""Tutors of a shard where the number of shards is not set."""


class TutorRange(NamedTuple):
    """Ids of tutors from ``lower`` on, up to but without ``upper``; ``None`` is no bound."""

    lower: str | None = None
    upper: str | None = None


ALL_TUTORS = TutorRange()
"""Of all tutors."""


@dataclass(frozen=True)
class Shards:
    """How tutors are divided.

    Attributes:
        bounds: The first id of each shard but the first, ascending.
    """

    bounds: tuple[str, ...] = ()

    @classmethod
    def of(cls, tutor_ids: pl.Series, *, count: int = 0) -> Self:
        """Shards of about as many of these tutors each.

        Args:
            tutor_ids: The tutors that are computed.
            count: Number of shards, if there are as many tutors; one for each
                ``TUTORS_OF_A_SHARD`` when 0.
        """
        ids = tutor_ids.unique().sort()
        wanted = min(count or -(-len(ids) // TUTORS_OF_A_SHARD), len(ids))
        places = (len(ids) * number // wanted for number in range(1, wanted))
        return cls(tuple(ids[place] for place in places))

    def __len__(self) -> int:
        return len(self.bounds) + 1

    def range_of(self, numbers: Sequence[int]) -> TutorRange:
        """The ids of neighbouring shards, given by their numbers, which begin with 0."""
        first, last = numbers[0], numbers[-1]
        return TutorRange(
            self.bounds[first - 1] if first > 0 else None,
            self.bounds[last] if last < len(self.bounds) else None,
        )

    def of_numbers(self, numbers: Sequence[int]) -> "Shards":
        """How the tutors of neighbouring shards are divided."""
        return Shards(self.bounds[numbers[0] : numbers[-1]])

    def number(self) -> pl.Expr:
        """The number of the shard of a row's ``tutor_id``."""
        bounds = pl.lit(pl.Series(self.bounds, dtype=pl.String))
        return bounds.search_sorted(pl.col("tutor_id"), side="right").cast(pl.UInt16)

    def numbers_of(self, tutor_ids: Iterable[str]) -> set[int]:
        """The numbers of the shards that these tutors are in."""
        tutors = pl.DataFrame({"tutor_id": list(tutor_ids)}, schema={"tutor_id": pl.String})
        return set(tutors.select(self.number()).to_series())


ALL_IN_ONE = Shards()
"""One shard, which holds all tutors."""


def shard_name(partition_key: str, number: int | None) -> str:
    """How a shard of a partition is called; all of it where it has no number."""
    return partition_key if number is None else f"{partition_key} shard {number}"
