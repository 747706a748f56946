"""Ids in place of the 64-bit hashes that rows of the platform were read with.

A tutor's id is known by its hash from the platform's tutors. The ids of other rows are looked up,
in the same snapshot, of those rows only that something is wrong with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import dataframely as dy
import polars as pl
from adbc_driver_postgresql import dbapi

from tutormax_assets.source.queries import TUTOR_HASHES, ids_query, unknown_tutors_query
from tutormax_assets.source.streams import Table, expect_unique, fetch_frame


@dataclass(frozen=True)
class IdHashes:
    """How to find the ids of rows that were read.

    Attributes:
        tutors: ``hash`` and ``id`` of each tutor of the platform, and of the empty id, which
            stands for no tutor.
        fetch: The ``hash`` and ``id`` that a query finds.
    """

    tutors: pl.DataFrame
    fetch: Callable[[str], pl.DataFrame]

    def resolve(
        self, table: Table, good: pl.DataFrame, set_aside: pl.DataFrame
    ) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Put ids in place of hashes.

        Args:
            table: The table that was read.
            good: Rows with the hash of ``tutor_id``.
            set_aside: ``SetAside`` with hashes as ``tutor_id`` and ``row_key``.

        Returns:
            Both, with the ids.

        Raises:
            SourceError: The platform cannot be read.
        """
        hashes = pl.concat([good["tutor_id"], set_aside["tutor_id"]])
        tutors = self._tutors_of(table, hashes)
        good_ids, aside_ids = tutors.head(len(good)), tutors.tail(len(set_aside))
        keyed = [
            rows.with_columns(row_key=self._row_keys(str(of_table), rows["row_key"]))
            for (of_table,), rows in set_aside.with_columns(tutor_id=aside_ids).group_by(
                "source_table", maintain_order=True
            )
        ]
        none = set_aside.clear().cast({"tutor_id": pl.String, "row_key": pl.String})
        return good.with_columns(tutor_id=good_ids), pl.concat([none, *keyed])

    def _tutors_of(self, table: Table, hashes: pl.Series) -> pl.Series:
        found = _replace(hashes, self.tutors)
        if not found.null_count():
            return found
        # Without a foreign key, a table may name tutors who are not in the platform's tutors.
        unknown = hashes.filter(found.is_null()).unique().to_list()
        others = self.fetch(unknown_tutors_query(table, unknown))
        return _replace(hashes, pl.concat([self.tutors, others]))

    def _row_keys(self, source_table: str, hashes: pl.Series) -> pl.Series:
        wanted: Sequence[int] = hashes.unique().to_list()
        return _replace(hashes, self.fetch(ids_query(source_table, wanted)))


def _replace(hashes: pl.Series, ids: pl.DataFrame) -> pl.Series:
    ids = ids.unique("hash", keep="first")
    return hashes.replace_strict(ids["hash"], ids["id"], default=None, return_dtype=pl.String)


class _Ids(dy.Schema):
    hash = dy.Int64()
    id = dy.String()


def fetch_ids(cursor: dbapi.Cursor, query: str) -> pl.DataFrame:
    """The ``hash`` and ``id`` that a query finds.

    Raises:
        SourceError: The columns are others.
    """
    return fetch_frame(cursor, query, _Ids)


def tutor_hashes(cursor: dbapi.Cursor, bound: Callable[[str], str]) -> pl.DataFrame:
    """The hashes and ids of those tutors whose rows are read.

    Args:
        cursor: Of a connection.
        bound: Puts its values into a query.

    Raises:
        HashesNotUniqueError: Two of them have the same hash.
    """
    found = fetch_ids(cursor, bound(TUTOR_HASHES))
    expect_unique("tutors", found["hash"])
    return found
