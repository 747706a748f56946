"""Where days begin, which days a run reads, and which dates can be computed."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from tutormax_assets import dates
from tutormax_assets.dates import (
    ReferenceDateError,
    horizon,
    midnight,
    parse_reference_date,
    today,
)

NEW_YORK = "America/New_York"
FIRST = date(2025, 1, 1)
NOW = datetime(2025, 11, 7, 3, 30, tzinfo=UTC)


@pytest.fixture
def _half_past_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Greenwich, that is; in New York it is still the day before."""

    def stopped(*, timezone: str) -> date:
        return NOW.astimezone(ZoneInfo(timezone)).date()

    monkeypatch.setattr(dates, "today", stopped)


@pytest.mark.parametrize(
    ("day", "timezone", "instant"),
    [
        (date(2025, 11, 7), "UTC", datetime(2025, 11, 7, tzinfo=UTC)),
        (date(2025, 11, 7), NEW_YORK, datetime(2025, 11, 7, 5, tzinfo=UTC)),
        (date(2025, 7, 1), NEW_YORK, datetime(2025, 7, 1, 4, tzinfo=UTC)),
        # The clock changes in the small hours of these days, after midnight.
        (date(2025, 3, 9), NEW_YORK, datetime(2025, 3, 9, 5, tzinfo=UTC)),
        (date(2025, 3, 10), NEW_YORK, datetime(2025, 3, 10, 4, tzinfo=UTC)),
        (date(2025, 11, 2), NEW_YORK, datetime(2025, 11, 2, 4, tzinfo=UTC)),
        (date(2025, 11, 3), NEW_YORK, datetime(2025, 11, 3, 5, tzinfo=UTC)),
        (date(2025, 11, 7), "Asia/Kolkata", datetime(2025, 11, 6, 18, 30, tzinfo=UTC)),
        # There was no midnight: the day began at 01:00.
        (date(2018, 11, 4), "America/Sao_Paulo", datetime(2018, 11, 4, 3, tzinfo=UTC)),
        (date(2023, 4, 28), "Africa/Cairo", datetime(2023, 4, 27, 22, tzinfo=UTC)),
        # There were two: the day began at the first.
        (date(2023, 11, 5), "America/Havana", datetime(2023, 11, 5, 4, tzinfo=UTC)),
        # At midnight the clock went back into the day before.
        (date(2018, 2, 18), "America/Sao_Paulo", datetime(2018, 2, 18, 3, tzinfo=UTC)),
    ],
)
def test_midnight_is_the_first_instant_of_the_day(
    day: date, timezone: str, instant: datetime
) -> None:
    begin = midnight(day, timezone=timezone).astimezone(UTC)

    assert begin == instant
    zone = ZoneInfo(timezone)
    assert begin.astimezone(zone).date() == day
    assert (begin - timedelta(microseconds=1)).astimezone(zone).date() == day - timedelta(days=1)


def test_midnight_knows_its_timezone() -> None:
    assert midnight(date(2025, 11, 7), timezone=NEW_YORK).tzinfo == ZoneInfo(NEW_YORK)


@pytest.mark.parametrize("timezone", ["UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago"])
def test_today_is_the_timezones_day(timezone: str) -> None:
    before = datetime.now(ZoneInfo(timezone)).date()
    found = today(timezone=timezone)
    after = datetime.now(ZoneInfo(timezone)).date()

    assert before <= found <= after


@pytest.mark.parametrize(
    ("days", "window_days", "expected"),
    [
        ([date(2025, 11, 7)], 90, (date(2025, 8, 9), date(2025, 11, 7))),
        ([date(2025, 11, 7)], 1, (date(2025, 11, 6), date(2025, 11, 7))),
        (
            [date(2025, 11, 7), date(2025, 11, 5), date(2025, 11, 6)],
            7,
            (date(2025, 10, 29), date(2025, 11, 7)),
        ),
        ([date(2024, 3, 1)], 1, (date(2024, 2, 29), date(2024, 3, 1))),
    ],
)
def test_horizon_spans_the_windows_of_all_days(
    days: list[date], window_days: int, expected: tuple[date, date]
) -> None:
    assert horizon(days, window_days=window_days) == expected


def test_no_days_have_no_horizon() -> None:
    with pytest.raises(ValueError, match="empty"):
        horizon([], window_days=7)


@pytest.mark.usefixtures("_half_past_three")
@pytest.mark.parametrize(
    ("value", "timezone", "expected"),
    [
        (date(2025, 11, 7), "UTC", date(2025, 11, 7)),
        (date(2025, 1, 1), "UTC", date(2025, 1, 1)),
        ("2025-11-07", "UTC", date(2025, 11, 7)),
        (date(2025, 11, 6), NEW_YORK, date(2025, 11, 6)),
        # A time without a timezone says its own date.
        (datetime(2025, 10, 1, 23, 59, 59), NEW_YORK, date(2025, 10, 1)),  # noqa: DTZ001
        (datetime(2025, 11, 7, 23, 59, 59), "UTC", date(2025, 11, 7)),  # noqa: DTZ001
        # A time with one says the date that it is here.
        (datetime(2025, 10, 1, 3, tzinfo=UTC), NEW_YORK, date(2025, 9, 30)),
        (datetime(2025, 10, 1, 4, tzinfo=UTC), NEW_YORK, date(2025, 10, 1)),
        (datetime(2025, 10, 1, 22, tzinfo=ZoneInfo(NEW_YORK)), "UTC", date(2025, 10, 2)),
        # Tomorrow over there is today here.
        (
            datetime(2025, 11, 8, 1, tzinfo=ZoneInfo("Pacific/Kiritimati")),
            "UTC",
            date(2025, 11, 7),
        ),
    ],
)
def test_a_reference_date_is_a_day_of_the_timezone(
    value: date | str, timezone: str, expected: date
) -> None:
    found = parse_reference_date(value, first=FIRST, timezone=timezone)

    assert found == expected
    assert type(found) is date


@pytest.mark.usefixtures("_half_past_three")
@pytest.mark.parametrize(
    ("value", "timezone", "message"),
    [
        (
            date(2025, 11, 8),
            "UTC",
            "2025-11-08 is in the future; the latest reference date is 2025-11-07",
        ),
        (
            date(2025, 11, 7),
            NEW_YORK,
            "2025-11-07 is in the future; the latest reference date is 2025-11-06",
        ),
        (datetime(2025, 11, 7, 12, tzinfo=UTC), NEW_YORK, "2025-11-07 is in the future"),
        (datetime(2025, 11, 7, 23, tzinfo=ZoneInfo(NEW_YORK)), "UTC", "2025-11-08 is in the fut"),
        (
            date(2024, 12, 31),
            "UTC",
            "2024-12-31 lies before the first reference date, 2025-01-01. TUTORMAX_FIRST_DATE",
        ),
        (datetime(2025, 1, 1, 4, tzinfo=UTC), NEW_YORK, "2024-12-31 lies before the first"),
        ("7/11/2025", "UTC", "'7/11/2025' is not a date; expected YYYY-MM-DD"),
        ("2025-11-31", "UTC", "'2025-11-31' is not a date; expected YYYY-MM-DD"),
    ],
)
def test_other_dates_are_refused(value: date | str, timezone: str, message: str) -> None:
    with pytest.raises(ReferenceDateError, match=message):
        parse_reference_date(value, first=FIRST, timezone=timezone)
