"""What the table said before: reruns, filtered runs, killed runs, the archive and back."""

import json
import stat
from datetime import UTC, date, datetime
from io import StringIO
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal

from tutormax_assets.database.archive import archive_date
from tutormax_assets.database.metrics_reading import MetricsTableError
from tutormax_assets.database.restore import restore_date
from tutormax_assets.database.revisions import REVISIONS, RevisionRecord
from tutormax_assets_tests.cli.conftest import Invoke, words
from tutormax_assets_tests.conftest import Platform

DAY = date(2025, 11, 7)
VALUES = ["tutor_id", "window", "sessions_completed", "avg_rating", "performance_tier"]


def now(platform: Platform) -> datetime:
    with platform.engine.connect() as connection:
        instant = connection.scalar(sa.text("SELECT clock_timestamp()"))
    assert isinstance(instant, datetime)
    return instant


def values(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select(VALUES).sort("tutor_id", "window")


def known_at(invoke: Invoke, instant: datetime) -> pl.DataFrame:
    # Without an offset it is in the timezone of the settings.
    local = instant.astimezone(UTC).replace(tzinfo=None).isoformat()
    result = invoke("table", "--date", str(DAY), "--known-at", local)
    assert result.exit_code == 0, result.stderr
    return values(pl.read_csv(StringIO(result.stdout), infer_schema_length=None))


def test_each_instant_has_the_rows_that_the_table_had(
    small_platform: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[tuple[datetime, pl.DataFrame]] = []

    def remember() -> None:
        told.append((now(small_platform), values(small_platform.metrics())))

    def check() -> None:
        for instant, rows in told:
            assert_frame_equal(known_at(invoke, instant), rows, check_dtypes=False)

    revisions = Path(small_platform.settings.archive_path, REVISIONS)
    small_platform.run(str(DAY))
    remember()
    one = told[0][1]["tutor_id"][0]
    small_platform.execute(f"UPDATE sessions SET actual_start = NULL WHERE tutor_id = '{one}'")
    small_platform.run(str(DAY), tutor_ids=[one])
    remember()
    small_platform.execute("UPDATE student_feedback SET overall_rating = 1")

    with monkeypatch.context() as patch:
        # As a process that is killed before it commits.
        patch.setattr(RevisionRecord, "keep", _keep_and_fail)
        small_platform.run(str(DAY))
    assert_frame_equal(values(small_platform.metrics()), told[-1][1])
    remember()
    small_platform.run(str(DAY))
    remember()
    files = sorted(revisions.rglob("*.parquet"))
    small_platform.run(str(DAY))
    remember()
    # Nothing moved, so nothing was kept.
    assert sorted(revisions.rglob("*.parquet")) == files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    check()

    engine, archive = small_platform.engine, small_platform.settings.archive_path
    archive_date(engine, archive, DAY, timezone="UTC")
    check()
    small_platform.execute("UPDATE student_feedback SET overall_rating = 5")
    small_platform.run(str(DAY))
    remember()
    archive_date(engine, archive, DAY, timezone="UTC")
    restore_date(engine, archive, DAY)
    remember()
    check()

    result = invoke("history", one, "--date", str(DAY), "--json")
    versions = [
        version for version in json.loads(result.stdout)["versions"] if version["window"] == "90day"
    ]
    assert [version["known_to"] for version in versions] == [
        *(version["known_from"] for version in versions[1:]),
        None,
    ]
    assert "sessions_completed" in versions[1]["changed"]
    assert versions[0]["run_id"] is None
    assert versions[1]["run_id"]
    assert len(versions[1]["policy_digest"]) == 16

    text = words(invoke("history", one, "--date", str(DAY)).stdout)
    assert f"{one} on {DAY} 7day: from " in text
    assert "avg_rating: " in text
    output = tmp_path / "rows.parquet"
    assert invoke("table", "--date", str(DAY), "--output", str(output)).exit_code == 0
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert_frame_equal(values(pl.read_parquet(output)), told[-1][1], check_dtypes=False)


def _keep_and_fail(record: RevisionRecord, rows: pl.DataFrame, day: date) -> None:
    _KEEP(record, rows, day)
    raise MetricsTableError("killed")


_KEEP = RevisionRecord.keep


def test_values_that_cannot_be_kept_are_not_replaced(
    small_platform: Platform, invoke: Invoke
) -> None:
    small_platform.run(str(DAY))
    before = small_platform.metrics()
    Path(small_platform.settings.archive_path).write_text("a file where the folder should be")
    small_platform.execute("UPDATE student_feedback SET overall_rating = 1")

    [summary] = small_platform.run(str(DAY))

    assert not summary.all_saved
    assert "cannot be kept" in summary.errors[0]["error"]
    assert "TUTORMAX_ARCHIVE" in summary.errors[0]["error"]
    assert_frame_equal(small_platform.metrics(), before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["table", "--known-at", "yesterday"], "found the instant 'yesterday', expected one"),
        (["table", "--output", "rows.xlsx"], "found rows.xlsx, expected a .csv or .parquet"),
        (["table", "--date", "2025-11-07"], "2025-11-07 had no rows then: it has not been"),
        (["history", "nobody", "--date", "2025-11-07"], "2025-11-07 has no row of tutor 'nobody'"),
    ],
)
def test_wrong_use_is_told(
    platform: Platform, invoke: Invoke, arguments: list[str], said: str
) -> None:
    result = invoke(*arguments)

    assert (result.exit_code, said in words(result.stderr)) == (2, True), result.stderr
