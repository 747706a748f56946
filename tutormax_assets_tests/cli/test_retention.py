"""``tutormax cleanup`` and ``tutormax restore``, on a given database."""

import json
import os
import signal
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets import settings
from tutormax_assets.database import tables
from tutormax_assets.dates import midnight, today
from tutormax_assets_tests.cli.conftest import Invoke, tutormax, words
from tutormax_assets_tests.conftest import Platform, store

AUGUST = [date(2025, 8, 30), date(2025, 8, 31)]
SEPTEMBER = date(2025, 9, 1)


def add_metrics(platform: Platform, *days: date) -> pl.DataFrame:
    """Rows of two tutors for each date; gives what the table holds then."""
    platform.add(
        tables.tutor_performance_metrics,
        *(
            {
                "metric_id": f"{tutor_id} {day}",
                "tutor_id": tutor_id,
                "calculation_date": midnight(day, timezone="UTC"),
                "window": "7day",
            }
            for day in days
            for tutor_id in ("t1", "t2")
        ),
    )
    return platform.metrics()


def add_partition(platform: Platform, asset: str, day: date) -> Path:
    path = platform.storage / asset / f"{day}.parquet"
    store(UPath(path), pl.DataFrame({"tutor_id": ["t1"]}))
    return path


def test_a_cleanup_can_be_asked_first(platform: Platform, invoke: Invoke) -> None:
    now = today(timezone="UTC")
    rows = add_metrics(platform, *AUGUST, SEPTEMBER, now)
    file = add_partition(platform, "tutor_tiers", SEPTEMBER)
    size = sum(part.stat().st_size for part in file.iterdir())

    asked = invoke("cleanup", "--dry-run", "--json")
    assert (asked.exit_code, asked.stderr) == (0, "")
    report = json.loads(asked.stdout)
    assert report == {
        "dry_run": True,
        "metrics": {
            "before": str(now - timedelta(days=90)),
            "rows": 6,
            "rows_left": 0,
            "rows_referred": {},
            "rows_undated": 0,
            "months_restored": {},
            "refusals": {},
            "months": ["2025-08", "2025-09"],
            "dates": {str(day): 2 for day in (*AUGUST, SEPTEMBER)},
            "archive": platform.settings.archive_path,
        },
        "parquet": {
            "before": str(now - timedelta(days=30)),
            "partitions": 1,
            "size_bytes": size,
            "by_asset": {"tutor_tiers": [str(SEPTEMBER)]},
        },
        "runs": {"before": None, "deleted": 0, "trimmed": 0, "runless_events": 0},
    }
    shown = words(invoke("cleanup", "--dry-run").stdout)
    assert "What would go" in shown
    assert "Rows 6" in shown
    assert "Dates 3 (2025-08-30 to 2025-09-01)" in shown
    assert "Rows of 2025-08 4" in shown
    assert "Parquet partitions 1 (0.0 MB)" in shown
    assert_frame_equal(platform.metrics(), rows)
    assert file.exists()

    done = invoke("cleanup", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {**report, "dry_run": False}
    assert "INFO Archived 2 metrics of 2025-08-30 in " in done.stderr
    assert set(platform.metrics()["calculation_date"].dt.date()) == {now}
    assert not file.exists()

    again = invoke("cleanup")
    assert again.exit_code == 0
    assert "What went" in again.stdout
    assert "Rows 0" in words(again.stdout)
    assert "Dates 0" in words(again.stdout)


def test_the_retention_is_an_option(platform: Platform, invoke: Invoke) -> None:
    now = today(timezone="UTC")
    add_metrics(platform, now - timedelta(days=3), now - timedelta(days=2))

    result = invoke("cleanup", "--retention-days", "2", "--json")

    assert json.loads(result.stdout)["metrics"]["rows"] == 2
    for wrong in ("0", "x", "1000000"):
        assert invoke("cleanup", "--retention-days", wrong).exit_code == 2


def test_a_month_comes_back(platform: Platform, invoke: Invoke) -> None:
    rows = add_metrics(platform, *AUGUST, SEPTEMBER)
    invoke("cleanup")
    add_metrics(platform, AUGUST[0])
    platform.execute("DELETE FROM tutors WHERE tutor_id = 't2'")
    there = platform.metrics()
    expected = {
        "dry_run": True,
        "month": "2025-08",
        "stays_until": str(today(timezone="UTC") + timedelta(days=30)),
        "dates": 2,
        "rows_archived": 4,
        "rows_restored": 1,
        "rows_kept": 1,
        "rows_of_unknown_tutors": 2,
        "unknown_tutors": ["t2"],
    }

    asked = invoke("restore", "--month", "2025-08", "--dry-run", "--json")
    assert (asked.exit_code, json.loads(asked.stdout)) == (0, expected)
    assert_frame_equal(platform.metrics(), there)

    done = invoke("restore", "--month", "2025-08")
    assert done.exit_code == 0
    shown = words(done.stdout)
    assert "What came back of 2025-08" in shown
    assert "Rows restored 1" in shown
    assert "Rows that were there 1" in shown
    assert "Rows of unknown tutors 2" in shown
    assert "Unknown tutors t2" in shown
    is_back = pl.col("metric_id") == f"t1 {AUGUST[1]}"
    restored = pl.concat([there, rows.filter(is_back)])
    assert_frame_equal(platform.metrics(), restored)

    # It stays until its day, or until it is released.
    stays = json.loads(invoke("cleanup", "--json").stdout)["metrics"]
    assert (stays["rows"], stays["months_restored"]) == (0, {"2025-08": expected["stays_until"]})
    assert_frame_equal(platform.metrics(), restored)
    assert invoke("restore", "--month", "2025-08", "--keep-days", "3").exit_code == 0
    until = today(timezone="UTC") + timedelta(days=3)
    shown = words(invoke("cleanup", "--dry-run").stdout)
    assert f"Restored 2025-08 stays until {until}" in shown
    release = ["cleanup", "--release-month", "2025-08", "--json"]
    assert json.loads(invoke(*release, "--dry-run").stdout)["metrics"]["rows"] == 2
    assert json.loads(invoke(*release).stdout)["metrics"]["rows"] == 2
    assert platform.metrics().is_empty()
    result = invoke(*release)
    assert result.exit_code == 1
    assert "No month 2025-08 is restored; restored are none." in words(result.stderr)
    assert invoke("cleanup", "--release-month", "2025-8").exit_code == 2


def test_rows_that_stay_are_counted_and_explained(platform: Platform, invoke: Invoke) -> None:
    add_metrics(platform, *AUGUST, SEPTEMBER)
    platform.execute(
        "CREATE TABLE alerts AS SELECT metric_id FROM tutor_performance_metrics WHERE tutor_id='t1'"
    )
    platform.execute(
        "ALTER TABLE alerts ADD FOREIGN KEY (metric_id) REFERENCES tutor_performance_metrics"
        " ON DELETE CASCADE"
    )
    platform.execute(
        "ALTER TABLE tutor_performance_metrics ADD CONSTRAINT late"
        " CHECK (calculation_date <> '2025-08-31Z') NOT VALID"
    )

    platform.execute(
        'INSERT INTO tutor_performance_metrics (metric_id, tutor_id, calculation_date, "window",'
        " sessions_completed, no_show_count) VALUES ('x', 't1', '-infinity', '7day', 0, 0)"
    )

    asked = invoke("cleanup", "--dry-run")
    assert asked.exit_code == 0
    assert "Rows that stay 1, timestamps cannot be read" in words(asked.stdout)
    assert "Rows that stay 3, alerts refers to them" in words(asked.stdout)
    done = invoke("cleanup", "--json")

    assert done.exit_code == 1
    metrics = json.loads(done.stdout)["metrics"]
    assert (metrics["rows"], metrics["rows_left"], metrics["rows_referred"]) == (
        2,
        1,
        {"alerts": 3},
    )
    assert 'violates check constraint "late"' in metrics["refusals"]["2025-08-31"]
    assert "WARNING 3 metrics stay in the table: alerts refers to them" in done.stderr
    assert metrics["rows_undated"] == 1
    assert "WARNING 1 metrics stay in the table: a timestamp of theirs is infinite" in done.stderr
    platform.execute("DELETE FROM tutor_performance_metrics WHERE metric_id = 'x'")
    assert "ERROR 1 metrics of 2025-08-31 stay in the table, since they could not be" in done.stderr
    assert platform.metrics()["metric_id"].to_list() == [
        "t1 2025-08-30",
        "t1 2025-08-31",
        "t1 2025-09-01",
        "t2 2025-08-31",
    ]


@pytest.mark.parametrize("month", ["2025-8", "2025-13", "08-2025", "2025-08-01", "x", ""])
def test_what_is_no_month_is_wrong_use(platform: Platform, invoke: Invoke, month: str) -> None:
    result = invoke("restore", "--month", month)

    assert result.exit_code == 2
    assert f"--month '{month}' is not a month; expected YYYY-MM." in words(result.stderr)


def test_a_month_that_is_not_in_the_archive_is_an_error(platform: Platform, invoke: Invoke) -> None:
    result = invoke("restore", "--month", "2025-08")
    assert result.exit_code == 1
    assert "has no month 2025-08; it holds nothing." in words(result.stderr)

    add_metrics(platform, SEPTEMBER)
    invoke("cleanup")
    result = invoke("restore", "--month", "2025-08")
    assert result.exit_code == 1
    assert "has no month 2025-08; it holds 2025-09." in words(result.stderr)


def test_an_archive_out_of_reach_is_an_error(
    platform: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = add_metrics(platform, SEPTEMBER)
    monkeypatch.setitem(settings._FILESYSTEMS, "nowhere", ("json", ""))
    monkeypatch.setenv("TUTORMAX_ARCHIVE", "nowhere://bucket")

    for command in (["cleanup"], ["restore", "--month", "2025-09"]):
        result = invoke(*command)
        assert result.exit_code == 1
        assert "The table keeps its rows. TUTORMAX_ARCHIVE says where" in words(result.stderr)
    assert_frame_equal(platform.metrics(), rows)


def test_a_table_that_was_not_upgraded_is_an_error(platform: Platform, invoke: Invoke) -> None:
    platform.execute("DROP TABLE tutor_performance_metrics CASCADE")

    result = invoke("cleanup", "--dry-run")

    assert result.exit_code == 1
    assert "does not exist, so its rows cannot be archived. Run `tutormax db upgrade`" in words(
        result.stderr
    )


def test_a_run_whose_cleanup_fails_shows_its_summary_first(
    small_platform: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(settings._FILESYSTEMS, "nowhere", ("json", ""))
    monkeypatch.setenv("TUTORMAX_ARCHIVE", "nowhere://bucket")
    add_metrics(small_platform, SEPTEMBER)
    arguments = ["run", "--tutors", "T000001", "--include-inactive", "--cleanup", "--json"]

    result = invoke(*arguments)

    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["successful"] == 1
    assert result.stderr.endswith(f"Error: {report['error']}\n")
    assert "TUTORMAX_ARCHIVE says where" in words(result.stderr)


_KILLED_COMMAND = """
import os, signal, sys
from tutormax_assets.cli import app
from tutormax_assets.database import archive

def strike(*_):
    os.kill(os.getpid(), signal.SIGKILL)

archive._delete_unchanged = strike
app(["cleanup"])
"""


def test_a_command_that_is_killed_between_export_and_delete_is_finished_by_the_next(
    platform: Platform,
) -> None:
    rows = add_metrics(platform, *AUGUST, SEPTEMBER)

    killed = subprocess.run(
        [sys.executable, "-c", _KILLED_COMMAND],
        env=dict(os.environ),
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert_frame_equal(platform.metrics(), rows)
    files = list(Path(platform.settings.archive_path).rglob("*.parquet"))
    assert [file.name for file in files] == ["2025-08-30.parquet"]

    finished = tutormax("cleanup", "--json")
    assert finished.returncode == 0
    assert json.loads(finished.stdout)["metrics"]["rows"] == 6
    assert platform.metrics().is_empty()
    files = sorted(Path(platform.settings.archive_path).rglob("*.parquet"))
    archived = pl.concat(pl.read_parquet(file, hive_partitioning=False) for file in files)
    assert_frame_equal(archived.sort("tutor_id", "calculation_date"), rows)
