"""Metrics as of an instant: those of the platform as it was then, and nothing else moves."""

from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tutormax_assets.api.as_of import AsOfSummary, compute_as_of
from tutormax_assets.compute.tasks.tiers import TUTOR_TIERS
from tutormax_assets.dates import AsOfError, parse_as_of
from tutormax_assets.defs.assets.tutor_metrics_as_of import TUTOR_METRICS_AS_OF
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.sample.frames import sample_frames
from tutormax_assets.sample.lake import write_lake
from tutormax_assets.source.contract import NEEDED_COLUMNS
from tutormax_assets_tests.conftest import SMALL_PLATFORM, Platform, open_platform
from tutormax_assets_tests.users import open_users

DAYS = ["2025-11-05", "2025-11-06"]


def compute(
    platform: Platform, *days: str, as_of: str = "each-date", tutor_ids: list[str] | None = None
) -> list[AsOfSummary]:
    options = RunOptions(tutor_ids=tutor_ids, max_retries=0, retry_delay_seconds=0)
    dates = [date.fromisoformat(day) for day in days]
    return compute_as_of(platform.settings, dates, options, as_of=as_of)


def as_of_rows(platform: Platform, day: str) -> pl.DataFrame:
    return platform.partition(TUTOR_METRICS_AS_OF, day).sort("tutor_id", "window")


def forget_later_rows(platform: Platform, instant: str) -> None:
    """Delete what the platform cannot have known at an instant."""
    for table in ("student_feedback", "tutor_events", "sessions", "tutors"):
        platform.execute(f"DELETE FROM {table} WHERE created_at > '{instant}'")
    platform.execute(f"DELETE FROM student_feedback WHERE submitted_at > '{instant}'")


def test_they_are_the_metrics_of_the_platform_as_it_was(
    small_platform: Platform, tmp_path: Path
) -> None:
    frames = sample_frames(**SMALL_PLATFORM)
    write_lake(
        str(tmp_path / "lake"), {one: frames[one] for one in NEEDED_COLUMNS}, file_name="0.parquet"
    )
    with open_platform(
        small_platform.url,
        tmp_path / "of_lake",
        TUTORMAX_SOURCE="parquet",
        TUTORMAX_LAKE=str(tmp_path / "lake"),
    ) as of_lake:
        assert not any(one.errors for one in compute(of_lake, *DAYS))
    summaries = compute(small_platform, *DAYS)
    late = compute(small_platform, DAYS[0], as_of="2025-11-06T12:00Z")

    assert [(one.rows, one.errors) for one in summaries] == [(90, []), (90, [])]
    assert late[0].as_of == datetime(2025, 11, 6, 12, tzinfo=UTC)
    # The others' rows of the earlier instant have been replaced.
    known_later = as_of_rows(small_platform, DAYS[0])
    assert set(known_later["as_of"]) == {datetime(2025, 11, 6, 12, tzinfo=UTC)}
    compute(small_platform, DAYS[0])
    assert not known_later.equals(as_of_rows(small_platform, DAYS[0]))
    for day in reversed(DAYS):
        forget_later_rows(small_platform, f"{day}T00:00Z")
        small_platform.run(day, include_inactive=True)
        then = small_platform.partition(TUTOR_TIERS, day).sort("tutor_id", "window")
        found = as_of_rows(small_platform, day)
        assert set(found["as_of"]) == {datetime.fromisoformat(f"{day}T00:00Z")}
        assert_frame_equal(found.select(TutorTiers.column_names()), then, check_exact=True)
        assert_frame_equal(found, as_of_rows(of_lake, day), check_exact=True)


def test_nothing_else_is_written(small_platform: Platform) -> None:
    compute(small_platform, DAYS[0], tutor_ids=["T000001"])

    assert set(as_of_rows(small_platform, DAYS[0])["tutor_id"]) == {"T000001"}
    assert small_platform.metrics().is_empty()
    assert [path.name for path in small_platform.storage.glob("*") if path.suffix == ""] == [
        TUTOR_METRICS_AS_OF
    ]


def test_labels_are_joined_with_what_was_known_before_them(small_platform: Platform) -> None:
    compute(small_platform, *DAYS)
    features = pl.scan_parquet(small_platform.storage / TUTOR_METRICS_AS_OF / "*" / "*.parquet")
    labels = pl.LazyFrame(
        {
            "tutor_id": ["T000001", "T000001", "T000002"],
            "at": [
                datetime(2025, 11, 5, 9, tzinfo=UTC),
                datetime(2025, 11, 6, 9, tzinfo=UTC),
                datetime(2025, 11, 4, 9, tzinfo=UTC),
            ],
        }
    )

    joined = (
        labels.sort("at")
        .join_asof(
            features.filter(window="30day").sort("as_of"),
            left_on="at",
            right_on="as_of",
            by="tutor_id",
        )
        .sort("tutor_id", "at")
        .collect()
    )

    assert [one and one.day for one in joined["as_of"]] == [5, 6, None]


def test_without_a_right_to_created_at_the_column_is_named(
    server_url: object, small_template: str, tmp_path: Path
) -> None:
    with open_users(server_url, template=small_template) as users:  # type: ignore[arg-type]
        users.execute("REVOKE SELECT (created_at) ON sessions FROM {reader}")
        with open_platform(users.both, tmp_path / "home") as platform:
            [summary] = compute(platform, DAYS[0])
            [nightly] = platform.run(DAYS[0])

    assert "table sessions, column created_at: found no right to read it" in str(summary.errors)
    assert nightly.all_saved


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("soon", "is not an instant; expected each-date"),
        ("2025-11-04T23:59Z", "lies before 2025-11-05 begins"),
        ("2999-01-01", "is in the future"),
    ],
)
def test_an_impossible_instant_is_refused(value: str, sentence: str) -> None:
    with pytest.raises(AsOfError, match=sentence):
        parse_as_of(value, day=date(2025, 11, 5), timezone="UTC")


def test_an_instant_without_an_offset_is_in_the_timezone() -> None:
    found = parse_as_of("2025-11-05T06:00", day=date(2025, 11, 5), timezone="Europe/Berlin")

    assert found == datetime(2025, 11, 5, 5, tzinfo=UTC)
