"""Reference dates: the day that a partition stands for, and the instants where days begin."""

from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from tutormax_assets.errors import UsageError


class ReferenceDateError(UsageError):
    """A reference date that cannot be computed; the message says which ones can."""


class AsOfError(UsageError):
    """An instant at which rows cannot have been known; the message says which ones are possible."""


def midnight(day: date, *, timezone: str) -> datetime:
    """The instant at which a day begins in an IANA timezone."""
    return datetime.combine(day, time.min, ZoneInfo(timezone))


def today(*, timezone: str) -> date:
    """The current day in an IANA timezone."""
    return datetime.now(ZoneInfo(timezone)).date()


def horizon(days: Sequence[date], *, window_days: int) -> tuple[date, date]:
    """The days that the windows of all these reference dates lie in, from first up to last.

    Args:
        days: Reference dates, at least one.
        window_days: Length of the longest window.

    Returns:
        The first day, and the day after the last one.
    """
    return min(days) - timedelta(days=window_days), max(days)


EACH_DATE = "each-date"
"""As an instant at which rows had to be known: for each reference date where its windows end."""


def parse_as_of(value: str, *, day: date, timezone: str) -> datetime:
    """The instant at which the rows of a reference date had to be known.

    Args:
        value: ``each-date``, or an instant in ISO form; one without an offset is in the timezone.
        day: The reference date.
        timezone: IANA name.

    Raises:
        AsOfError: It is no instant, or lies in the future or before the end of the windows.
    """
    windows_end = midnight(day, timezone=timezone)
    if value == EACH_DATE:
        return windows_end
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        raise AsOfError(
            f"{value!r} is not an instant; expected {EACH_DATE}, or such as 2026-01-31T06:00."
        ) from None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=ZoneInfo(timezone))
    if instant < windows_end:
        raise AsOfError(
            f"{value} lies before {day} begins, where the windows of that date end; expected"
            f" {windows_end.isoformat()} or later, or an earlier reference date."
        )
    if instant > datetime.now(ZoneInfo(timezone)):
        raise AsOfError(f"{value} is in the future; leave it out for what is known now.")
    return instant


def parse_reference_date(value: date | str, *, first: date, timezone: str) -> date:
    """The date of a date or datetime, if it can be computed.

    Args:
        value: A date, in ISO form if it is text, or a datetime, whose date in the timezone counts.
        first: The first reference date.
        timezone: IANA name; its current day is the last reference date.

    Raises:
        ReferenceDateError: It is no date, or lies in the future or before the first reference date.
    """
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value)
        except ValueError:
            raise ReferenceDateError(f"{value!r} is not a date; expected YYYY-MM-DD.") from None
    if not isinstance(value, date):
        raise ReferenceDateError(
            f"A {type(value).__name__} is not a date; expected a date, a datetime or YYYY-MM-DD."
        )
    if isinstance(value, datetime):
        value = (value.astimezone(ZoneInfo(timezone)) if value.tzinfo else value).date()
    last = today(timezone=timezone)
    if value > last:
        raise ReferenceDateError(f"{value} is in the future; the latest reference date is {last}.")
    if value < first:
        raise ReferenceDateError(
            f"{value} lies before the first reference date, {first}. TUTORMAX_FIRST_DATE sets it."
        )
    return value
