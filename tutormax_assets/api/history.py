"""What the metrics table has said of a reference date, and when."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl

from tutormax_assets.database.connection import Timeouts, engine_of
from tutormax_assets.database.metrics_reading import READ_SCHEMA
from tutormax_assets.database.revisions import known_at, read_versions
from tutormax_assets.errors import UsageError
from tutormax_assets.settings import Settings

VALUES = tuple(name for name in READ_SCHEMA if name not in ("tutor_id", "window"))


class HistoryError(UsageError):
    """What is asked for is not there; the message says what is."""


@dataclass(frozen=True)
class Version:
    """A row of a reference date as the table had it for a while.

    Attributes:
        window: Its window.
        known_from: When it was saved.
        known_to: When other values replaced it; None of what holds now.
        values: Metrics and tier.
        changed: The names of the values that the version before had otherwise.
        run_id: The run that saved it, if it replaced another version.
        policy_digest: Digest of the policy by which that run judged.
    """

    window: str
    known_from: datetime
    known_to: datetime | None
    values: Mapping[str, Any]
    changed: tuple[str, ...]
    run_id: str | None
    policy_digest: str | None


def read_history(settings: Settings, tutor_id: str, reference_date: date) -> list[Version]:
    """What the table has said of a tutor on a reference date, by window, the oldest first.

    Raises:
        HistoryError: It has not said anything.
        ArchiveError: The archive cannot be read.
        MetricsTableError: The table cannot be read.
    """
    versions = _read(settings, reference_date, tutor_id)
    if versions.is_empty():
        raise HistoryError(
            f"{reference_date} has no row of tutor {tutor_id!r}: the id is unknown, or the date has"
            " not been computed for the tutor."
        )
    length = pl.col("window").str.extract(r"^(\d+)").cast(pl.Int64)
    found: list[Version] = []
    before: Mapping[str, Any] | None = None
    for row in versions.sort(length, "known_from", maintain_order=True).iter_rows(named=True):
        follows = before if before and before["window"] == row["window"] else None
        found.append(
            Version(
                row["window"],
                row["known_from"],
                row["known_to"],
                {name: row[name] for name in VALUES},
                tuple(n for n in VALUES if follows and follows[n] != row[n]),
                follows["run_id"] if follows else None,
                follows["policy_digest"] if follows else None,
            )
        )
        before = row
    return found


def table_known_at(
    settings: Settings, reference_date: date, instant: datetime | None
) -> pl.DataFrame:
    """The rows of a reference date as the table had them at an instant.

    Args:
        settings: Where everything is.
        reference_date: The date.
        instant: The instant; now when None.

    Returns:
        ``tutor_id``, ``calculation_date``, ``window``, the values and ``known_from``.

    Raises:
        HistoryError: The table had none.
        ArchiveError: The archive cannot be read.
        MetricsTableError: The table cannot be read.
    """
    versions = _read(settings, reference_date)
    rows = versions if instant is None else known_at(versions, instant)
    if instant is None:
        rows = versions.filter(pl.col("known_to").is_null())
    if rows.is_empty():
        first = versions["known_from"].min()
        since = (
            f"its first row is known from {first:%Y-%m-%d %H:%M:%S %Z}"
            if isinstance(first, datetime)
            else "it has not been computed"
        )
        raise HistoryError(f"{reference_date} had no rows then: {since}.")
    return rows.select(
        "tutor_id",
        pl.lit(reference_date).alias("calculation_date"),
        "window",
        *VALUES,
        "known_from",
    )


def parse_instant(text: str, *, timezone: str) -> datetime:
    """An instant in ISO form; without an offset it is in a timezone.

    Raises:
        HistoryError: It is none.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise HistoryError(
            f"found the instant {text!r}, expected one such as 2025-11-07T02:00 or"
            " 2025-11-07T02:00+01:00"
        ) from None
    local = found if found.tzinfo else found.replace(tzinfo=ZoneInfo(timezone))
    try:
        return local.astimezone(UTC)
    except OverflowError:
        raise HistoryError(
            f"found the instant {text}, expected one of the years 2 to 9998"
        ) from None


def _read(settings: Settings, reference_date: date, *tutor_ids: str) -> pl.DataFrame:
    with engine_of(settings) as engine:
        return read_versions(
            engine,
            settings.archive_path,
            reference_date,
            timezone=settings.timezone,
            timeouts=Timeouts.of(settings),
            tutor_ids=tutor_ids,
        )
