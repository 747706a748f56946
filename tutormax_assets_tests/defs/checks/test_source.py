"""What is asked of the rows of any source table."""

from datetime import date, timedelta

import polars as pl
import pytest

from tutormax_assets.defs.checks import ERROR, FIRST_KEYS, WARN, Finding
from tutormax_assets.defs.checks.source import (
    day_volume_is_usual,
    few_rows_set_aside,
    shortest_window_is_whole,
    source_is_fresh,
)
from tutormax_assets.metrics.schemas import SetAside
from tutormax_assets.sample.frames import sample_frames
from tutormax_assets_tests.conftest import GOLDEN

DAY = date(2025, 11, 7)
NO_ROWS_READ = {"source_table": pl.String, "date": pl.Date, "rows": pl.Int64}


def read(*rows: tuple[str, int, int]) -> pl.DataFrame:
    """Rows read: table, days before the reference date, count."""
    return pl.DataFrame(
        [(table, DAY - timedelta(days=days), count) for table, days, count in rows],
        schema=NO_ROWS_READ,
        orient="row",
    )


def set_aside(*rows: tuple[str, str, int]) -> pl.DataFrame:
    """Values set aside: table, key of the row, days before the reference date."""
    return pl.DataFrame(
        [
            (table, key, "t", DAY - timedelta(days=days), "late_start_minutes", "negative")
            for table, key, days in rows
        ],
        schema=pl.Schema(SetAside),
        orient="row",
    )


def shares(rows_read: pl.DataFrame, rows_set_aside: pl.DataFrame) -> Finding:
    return few_rows_set_aside(
        rows_read,
        rows_set_aside,
        reference_date=DAY,
        windows=[7, 30],
        warn_share=0.01,
        error_share=0.05,
        min_rows=100,
    )


def test_no_rows_are_few_enough() -> None:
    assert shares(read(), set_aside()).passed


def test_a_share_at_the_limit_passes_and_shows_the_reasons() -> None:
    finding = shares(read(("sessions", 1, 100)), set_aside(("sessions", "a", 1)))

    assert finding.passed
    assert finding.metadata["rows_set_aside"] == 1
    reasons = finding.metadata["by_reason"]
    assert isinstance(reasons, pl.DataFrame)
    assert reasons.rows() == [("sessions", "late_start_minutes", "negative", 1)]


def test_a_share_above_the_limit_warns() -> None:
    finding = shares(
        read(("sessions", 1, 100)), set_aside(("sessions", "a", 1), ("sessions", "b", 1))
    )

    assert (finding.passed, finding.severity) == (False, WARN)
    assert finding.description is not None
    assert finding.description.startswith("2 of 100 rows of sessions in the 7day window break")
    assert "2.0%, with 1.0% expected at most" in finding.description
    assert finding.metadata["see_the_rest"] == "tutormax set-aside --date 2025-11-07"


def test_a_share_far_above_fails_and_names_the_first_keys_only() -> None:
    keys = [f"s{number:03}" for number in range(20)]
    finding = shares(read(("sessions", 1, 200)), set_aside(*(("sessions", key, 1) for key in keys)))

    assert (finding.passed, finding.severity) == (False, ERROR)
    first = finding.metadata["first_rows"]
    assert isinstance(first, pl.DataFrame)
    assert first["row_key"].to_list() == keys[:FIRST_KEYS]
    assert first.columns == ["source_table", "row_key", "column", "reason"]
    assert "set_aside_error_share" in str(finding.description)


def test_of_few_rows_a_share_never_fails() -> None:
    finding = shares(
        read(("sessions", 1, 99)), set_aside(*(("sessions", f"{n}", 1) for n in range(99)))
    )

    assert (finding.passed, finding.severity) == (False, WARN)


def test_a_row_with_several_broken_values_counts_once() -> None:
    assert shares(
        read(("sessions", 1, 100)), set_aside(("sessions", "a", 1), ("sessions", "a", 1))
    ).passed


def test_the_window_with_the_largest_share_decides() -> None:
    rows_read = read(("sessions", 1, 100), ("sessions", 20, 10_000))
    bad_week = set_aside(*(("sessions", f"{n}", 1) for n in range(10)))

    finding = shares(rows_read, bad_week)

    assert (finding.passed, finding.severity) == (False, ERROR)
    assert "10 of 100 rows of sessions in the 7day window" in str(finding.description)
    table = finding.metadata["share_by_window"]
    assert isinstance(table, pl.DataFrame)
    assert table.select("window", "rows_read", "rows_set_aside").rows() == [
        ("7day", 100, 10),
        ("30day", 10_100, 10),
    ]


def test_a_table_that_fails_comes_before_one_that_warns_more() -> None:
    finding = shares(
        read(("sessions", 1, 200), ("student_feedback", 1, 10)),
        set_aside(
            *(("sessions", f"{n}", 1) for n in range(20)),
            *(("student_feedback", f"{n}", 1) for n in range(10)),
        ),
    )

    assert finding.severity is ERROR
    assert "rows of sessions" in str(finding.description)


@pytest.mark.parametrize(
    ("age", "passed", "severity"),
    [(1, True, ERROR), (3, True, ERROR), (4, False, WARN), (7, False, WARN), (8, False, ERROR)],
)
def test_the_age_of_the_newest_row(age: int, passed: bool, severity: object) -> None:
    newest = DAY - timedelta(days=age)
    finding = source_is_fresh(
        newest, what="sessions", reference_date=DAY, warn_days=3, error_days=7, look_at="SELECT 1"
    )

    assert finding.passed is passed
    assert finding.severity is severity
    assert finding.metadata["days_before_reference_date"] == age
    if not passed:
        assert f"of {newest}, {age} days before the reference date" in str(finding.description)
        assert finding.metadata["see_in_the_platform"] == "SELECT 1"


def test_without_an_error_limit_an_old_row_warns() -> None:
    finding = source_is_fresh(
        date(2025, 1, 1), what="ratings", reference_date=DAY, warn_days=3, look_at=""
    )
    assert (finding.passed, finding.severity) == (False, WARN)


def test_no_row_at_all_warns() -> None:
    finding = source_is_fresh(
        None,
        what="sessions",
        reference_date=DAY,
        warn_days=3,
        error_days=7,
        since=date(2025, 8, 9),
        look_at="",
    )

    assert (finding.passed, finding.severity) == (False, WARN)
    assert str(finding.description).startswith(
        "There are no sessions before 2025-11-07 from 2025-08-09 on."
    )


def volume(counts: dict[int, int]) -> Finding:
    """Counts by days before the reference date."""
    by_day = pl.DataFrame(
        [(DAY - timedelta(days=days), rows) for days, rows in counts.items()],
        schema={"date": pl.Date, "rows": pl.Int64},
        orient="row",
    )
    return day_volume_is_usual(
        by_day,
        what="sessions",
        reference_date=DAY,
        min_share=0.5,
        min_deviations=5,
        min_weeks=4,
    )


WEEKS = {1 + 7 * week: 100 + week for week in range(1, 9)}


@pytest.mark.parametrize(("rows", "passed"), [(104, True), (60, True), (40, False), (170, False)])
def test_the_newest_day_against_its_weekday(rows: int, passed: bool) -> None:
    finding = volume({1: rows, **WEEKS})

    assert finding.passed is passed
    assert finding.metadata["median"] == 104.5
    if not passed:
        assert finding.severity is WARN
        assert str(finding.description).startswith(f"2025-11-06 has {rows} sessions; the median")


def test_other_weekdays_do_not_count() -> None:
    assert volume({1: 100, **WEEKS, **{days: 0 for days in (2, 3, 9, 10)}}).passed


def test_one_odd_week_does_not_move_the_median() -> None:
    assert volume({1: 100, **WEEKS, 15: 100_000}).passed


def test_a_newest_day_without_rows_is_no_row() -> None:
    finding = volume(WEEKS)
    assert (finding.passed, finding.metadata["rows"]) == (False, 0)


def test_a_weekday_that_never_has_rows_is_usual() -> None:
    assert volume({days: 50 for days in range(2, 60) if days % 7 != 1}).passed


def test_a_few_rows_more_or_less_are_chance() -> None:
    assert volume({1: 0, **{1 + 7 * week: 5 for week in range(1, 9)}}).passed


@pytest.mark.parametrize("counts", [{}, {1: 5}, {1: 5, 8: 900, 15: 900, 22: 900}])
def test_too_few_weeks_are_not_compared(counts: dict[int, int]) -> None:
    finding = volume(counts)
    assert finding.passed
    assert str(finding.description).startswith("Not compared: ")


def daily(counts: dict[int, int]) -> pl.DataFrame:
    """Counts by days before the reference date."""
    return pl.DataFrame(
        [(DAY - timedelta(days=days), rows) for days, rows in counts.items()],
        schema={"date": pl.Date, "rows": pl.Int64},
        orient="row",
    )


def of_window(
    rows: pl.DataFrame, other: pl.DataFrame, *, day: date = DAY, days: int = 7
) -> Finding:
    first = day - timedelta(days=90)
    within = pl.col("date").is_between(first, day, closed="left")
    return shortest_window_is_whole(
        rows.filter(within),
        other.filter(within),
        what="logins",
        reference_date=day,
        days=days,
        max_loss=0.5,
    )


# 60 on each weekday, 5 on each day of a weekend: DAY is a Friday.
USUAL = {days: 5 if days % 7 in (5, 6) else 60 for days in range(1, 91)}


@pytest.mark.parametrize(("lost", "passed"), [(2, True), (3, False), (5, False), (7, False)])
def test_a_window_that_has_lost_most_of_its_rows_fails(lost: int, passed: bool) -> None:
    left = daily({days: rows for days, rows in USUAL.items() if days > lost})

    finding = of_window(left, daily(USUAL))

    assert finding.passed is passed
    assert finding.metadata["usual_rows"] == 310
    if not passed:
        assert finding.severity is ERROR
        assert str(finding.description).startswith("The 7 days before 2025-11-07 have ")
        assert "310 are expected from the weeks before" in str(finding.description)
        assert "raise checks.window_loss_error_share in the policy" in str(finding.description)


def test_rows_that_are_lost_evenly_fail_as_well() -> None:
    thinned = daily({days: rows // 3 if days <= 7 else rows for days, rows in USUAL.items()})
    assert not of_window(thinned, daily(USUAL)).passed


def test_holidays_take_from_all_sources() -> None:
    quiet = daily({days: rows // 5 if days <= 14 else rows for days, rows in USUAL.items()})
    assert of_window(quiet, quiet).passed
    assert of_window(quiet, daily(USUAL)).passed is False


@pytest.mark.parametrize("days", [1, 3, 7, 14, 30])
def test_a_weekend_is_no_loss_in_a_window_of_any_length(days: int) -> None:
    for day in range(7):
        shifted = daily({back: USUAL[(back + day) % 84 + 1] for back in range(1, 91)})
        assert of_window(shifted, daily({}), days=days).passed


@pytest.mark.parametrize(
    "counts",
    [
        {},
        {days: rows for days, rows in USUAL.items() if days <= 27},
        {days: 1 for days in range(8, 91)},
        {days: rows * 10 if days <= 7 else rows for days, rows in USUAL.items()},
    ],
    ids=["empty", "young", "tiny", "more"],
)
def test_little_to_compare_with_and_more_than_usual_pass(counts: dict[int, int]) -> None:
    assert of_window(daily(counts), daily(USUAL)).passed


def by_day(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    dates = rows.select(pl.col(column).dt.date().alias("date"))
    return dates.group_by("date").agg(pl.len().cast(pl.Int64).alias("rows"))


def volumes(sessions: pl.DataFrame, events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    logins = events.filter(event_type="login")
    return by_day(sessions, "scheduled_start"), by_day(logins, "event_timestamp")


@pytest.mark.parametrize(
    ("tutors", "sessions_per_tutor", "seed"), [(1, 60, 1), (7, 30, 2), (40, 25, 3), (300, 30, 4)]
)
def test_no_generated_platform_of_any_size_looks_as_if_rows_were_lost(
    tutors: int, sessions_per_tutor: int, seed: int
) -> None:
    frames = sample_frames(
        tutors=tutors, sessions_per_tutor=sessions_per_tutor, days=120, end=DAY, seed=seed
    )
    sessions, logins = volumes(frames["sessions"], frames["tutor_events"])
    for back in range(0, 60, 3):
        day = DAY - timedelta(days=back)
        assert of_window(sessions, logins, day=day).passed
        assert of_window(logins, sessions, day=day).passed


def test_the_golden_rows_do_not_look_as_if_rows_were_lost() -> None:
    sessions, logins = volumes(
        *(pl.read_parquet(GOLDEN / f"{name}.parquet") for name in ("sessions", "tutor_events"))
    )
    newest: date = sessions["date"].max()  # type: ignore[assignment]
    for back in range(10):
        day = newest + timedelta(days=1 - back)
        assert of_window(sessions, logins, day=day).passed
        assert of_window(logins, sessions, day=day).passed
