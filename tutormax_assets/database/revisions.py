"""What rows of the metrics table said before they changed: an append-only record in Parquet.

An upsert loses the values that it replaces, so they are kept beside the archive, a file for each
transaction: ``<base>/tutor_metrics_revisions/month=2025-08/2025-08-14.<unique>.parquet``. A file is
written before its transaction commits. A file whose transaction never committed describes values
that are still current; readers ignore it, because the row has the same ``known_from``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from uuid import uuid4

import polars as pl
import sqlalchemy as sa
from upath import UPath

from tutormax_assets.database.archived_table import (
    archive_file,
    local_bounds,
    reaching,
    refusals,
    transaction,
)
from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.metrics_reading import READ_SCHEMA
from tutormax_assets.database.tables import METRICS_KEY, is_a_date, tutor_performance_metrics
from tutormax_assets.storage.files import (
    entries,
    make_private_folder,
    read_parquet,
    write_parquet,
)

REVISIONS = "tutor_metrics_revisions"

_INSTANT = pl.Datetime("us", "UTC")

VERSION_SCHEMA = pl.Schema(
    {
        **READ_SCHEMA,
        "known_from": _INSTANT,
        "known_to": _INSTANT,
        "run_id": pl.String(),
        "policy_digest": pl.String(),
    }
)
"""A row of a reference date as the table had it from one instant to another."""

_ROW = ("tutor_id", "window")


@dataclass(frozen=True)
class RevisionRecord:
    """Where a run keeps the values that it replaces.

    Attributes:
        base_path: Where the archive is.
        files_group: Name of the group that can read it; none for the owner alone.
        run_id: The run; None where none is known.
        policy_digest: That of the policy by which the run judges.
    """

    base_path: str
    files_group: str | None
    run_id: str | None
    policy_digest: str | None

    def keep(self, rows: pl.DataFrame, day: date) -> None:
        """Keep values of a reference date that are about to be replaced.

        Args:
            rows: The rows as they are, with ``known_from`` and ``known_to``.
            day: The reference date.

        Raises:
            ArchiveError: They cannot be written.
        """
        folder = _folder(self.base_path, day)
        with reaching(folder):
            make_private_folder(self.base_path, group=self.files_group)
            complete = rows.with_columns(
                run_id=pl.lit(self.run_id), policy_digest=pl.lit(self.policy_digest)
            ).select(pl.col(name).cast(dtype) for name, dtype in VERSION_SCHEMA.items())
            write_parquet(folder / f"{day}.{uuid4().hex}.parquet", complete.lazy())


def read_versions(
    engine: sa.Engine,
    base_path: str,
    day: date,
    *,
    timezone: str,
    timeouts: Timeouts,
    tutor_ids: Sequence[str] = (),
) -> pl.DataFrame:
    """All that the table has said of a reference date, from its first saving until now.

    Args:
        engine: The database that holds the table.
        base_path: Where the archive is.
        day: The reference date.
        timezone: IANA timezone in which a day begins.
        timeouts: How long a statement may take, and wait for another session's lock.
        tutor_ids: Only these tutors; all when empty.

    Returns:
        ``VERSION_SCHEMA``, sorted by tutor, window and ``known_from``. Of what holds now,
        ``known_to`` is null; ``run_id`` and ``policy_digest`` are of the run that replaced the
        values. Values of tutors who were deleted since are there only if they were replaced before.

    Raises:
        ArchiveError: The archive cannot be read.
        MetricsTableError: The table cannot be read.
    """
    sources = [
        _rows_of_table(engine, day, timezone=timezone, timeouts=timeouts, tutor_ids=tutor_ids),
        _archived_rows(base_path, day),
        _revisions(base_path, day),
    ]
    rows = pl.concat(sources)
    if tutor_ids:
        rows = rows.filter(pl.col("tutor_id").is_in(list(tutor_ids)))
    following = pl.col("known_from").shift(-1).over(_ROW)
    return (
        rows.unique([*_ROW, "known_from"], keep="first", maintain_order=True)
        .sort(*_ROW, "known_from")
        .with_columns(known_to=pl.coalesce(following, "known_to"))
    )


def known_at(versions: pl.DataFrame, instant: datetime) -> pl.DataFrame:
    """The versions that the table had at an instant."""
    began = pl.col("known_from") <= instant
    return versions.filter(began, (pl.col("known_to") > instant).fill_null(True))


def superseded(archived: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """The archived rows that newer rows of the table take the place of, as versions."""
    newer = rows.select(*METRICS_KEY, known_to="updated_at")
    return (
        archived.join(newer, on=METRICS_KEY)
        .filter(pl.col("updated_at") < pl.col("known_to"))
        .with_columns(known_from="updated_at")
    )


def _rows_of_table(
    engine: sa.Engine,
    day: date,
    *,
    timezone: str,
    timeouts: Timeouts,
    tutor_ids: Sequence[str],
) -> pl.DataFrame:
    table = tutor_performance_metrics.c
    start, end = local_bounds(day, timezone=timezone)
    known_from = sa.case((is_a_date(table.updated_at), table.updated_at), else_=sa.func.now())
    query = sa.select(*(table[name] for name in READ_SCHEMA), known_from.label("updated_at")).where(
        table.calculation_date >= start, table.calculation_date < end
    )
    if tutor_ids:
        asked = sa.literal(list(tutor_ids), sa.ARRAY(sa.String))
        query = query.where(table.tutor_id == sa.any_(asked))
    with refusals(), transaction(engine, timeouts) as connection:
        found = connection.execute(query).all()
    schema = {**READ_SCHEMA, "updated_at": pl.Datetime("us", "UTC")}
    return _as_versions(pl.DataFrame(found, schema=schema, orient="row"))


def _archived_rows(base_path: str, day: date) -> pl.DataFrame:
    path = archive_file(base_path, day)
    with reaching(path):
        rows = read_parquet(path)
    return VERSION_SCHEMA.to_frame() if rows is None else _as_versions(rows)


def _as_versions(rows: pl.DataFrame) -> pl.DataFrame:
    known = rows.with_columns(
        known_from="updated_at",
        known_to=pl.lit(None),
        run_id=pl.lit(None),
        policy_digest=pl.lit(None),
    )
    return known.select(pl.col(name).cast(dtype) for name, dtype in VERSION_SCHEMA.items())


def _revisions(base_path: str, day: date) -> pl.DataFrame:
    folder = _folder(base_path, day)
    with reaching(folder):
        files = [path for path in entries(folder) if path.name.startswith(f"{day}.")]
        frames = [rows for path in sorted(files) if (rows := read_parquet(path)) is not None]
    # A transaction that was tried again was replaced by its last attempt. The cleanup, which knows
    # of no run, may have kept a version for the second time.
    return pl.concat([VERSION_SCHEMA.to_frame(), *frames]).sort(
        "known_to", "run_id", descending=[True, False], nulls_last=True
    )


def _folder(base_path: str, day: date) -> UPath:
    with reaching(base_path):
        return UPath(base_path).joinpath(REVISIONS, f"month={day:%Y-%m}")
