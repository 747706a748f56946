"""``tutormax run`` and ``tutormax backfill``."""

import json
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tutormax_assets.database import tables
from tutormax_assets.dates import today
from tutormax_assets_tests.cli.conftest import Invoke, words
from tutormax_assets_tests.conftest import PASSWORD, Platform

DAY = "2025-11-07"


def test_a_run_prints_its_summary_and_logs_to_stderr(
    small_platform: Platform, invoke: Invoke
) -> None:
    result = invoke("run", "--date", DAY)

    assert result.exit_code == 0
    shown = words(result.stdout)
    for line in (
        "Daily aggregation summary",
        "Run date 2025-11-07",
        "Total tutors 29",
        "Successful 29",
        "Failed 0",
        "Metrics saved 87",
        "Success rate 100.0%",
    ):
        assert line in shown
    assert re.search(r"Runtime \d+\.\d\ds", shown)
    log = result.stderr.splitlines()
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) ", line) for line in log
    )
    said = [line.split(" ", 2)[2] for line in log]
    assert "INFO Found 29 tutors to process" in said
    assert (
        "INFO Batch 1/1 of 2025-11-07 committed (29 tutors: 87 inserted, 0 updated, 0 unchanged)"
        in said
    )
    assert "WARNING Set aside 5 of student_feedback: tutor_id is not the session's tutor" in said
    summary = "INFO Run date 2025-11-07: 29 tutors, 29 successful, 0 failed, 87 "
    assert any(line.startswith(summary) for line in said)
    assert len(small_platform.metrics()) == 87


def test_json_is_the_only_thing_on_stdout_and_verbose_says_what_dagster_does(
    small_platform: Platform, invoke: Invoke
) -> None:
    result = invoke(
        "run",
        "--date",
        DAY,
        "--json",
        "--verbose",
        "--tutors",
        " T000002 ,T000001,",
        "--include-inactive",
    )

    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert summary.pop("total_runtime_seconds") > 0
    keys = ["source_table", "column", "reason"]
    set_aside = pl.concat(
        small_platform.partition(asset, DAY)
        for asset in ("sessions_set_aside", "tutor_events_set_aside")
    )
    assert_frame_equal(
        pl.DataFrame(summary.pop("set_aside")),
        set_aside.group_by(keys).agg(pl.len().cast(pl.Int64).alias("values")),
        check_row_order=False,
    )
    assert summary == {
        "run_date": "2025-11-07T00:00:00+00:00",
        "total_tutors": 2,
        "successful": 2,
        "failed": 0,
        "total_metrics_saved": 6,
        "success_rate": 100.0,
        "errors": [],
        "warnings": summary["warnings"],
    }
    for warning in summary["warnings"]:
        assert f"WARNING {warning}" in result.stderr
    assert 'DEBUG Started execution of step "platform_snapshot".' in result.stderr


@pytest.mark.parametrize("chosen", [("--tutors", "a"), ("--tutor", "a")])
def test_all_tutors_and_chosen_ones_exclude_each_other(
    invoke: Invoke, chosen: tuple[str, str]
) -> None:
    result = invoke("run", "--full", *chosen)

    assert result.exit_code == 2
    assert "--full reads all tutors; leave it out, or --tutors and --tutor." in result.stderr


def test_a_quiet_run_that_succeeds_says_nothing_and_cleans_up(
    small_platform: Platform, invoke: Invoke
) -> None:
    small_platform.add(
        tables.tutor_performance_metrics,
        *(
            {
                "metric_id": str(days),
                "tutor_id": "T000001",
                "calculation_date": datetime.now(UTC) - timedelta(days=days),
                "window": "7day",
            }
            for days in (2, 40)
        ),
    )

    arguments = ["--cleanup", "--retention-days", "30", "--tutors", "T000001", "--include-inactive"]

    result = invoke("run", "--quiet", *arguments)

    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    cleanup = json.loads(invoke("run", "--quiet", "--json", *arguments).stdout)["cleanup"]
    assert cleanup["dry_run"] is False
    rows = small_platform.metrics()
    assert set(rows["metric_id"]) & {"2", "40"} == {"2"}
    assert rows["calculation_date"].max() == datetime.combine(
        today(timezone="UTC"), datetime.min.time(), UTC
    )


def test_tutors_who_fail_are_listed_and_the_exit_code_says_so(
    small_platform: Platform, invoke: Invoke
) -> None:
    small_platform.execute(
        'ALTER TABLE tutor_performance_metrics ADD CONSTRAINT "[bold]odd"'
        " CHECK (tutor_id <> 'T000002')"
    )
    arguments = [
        "run",
        "--date",
        DAY,
        "--batch-size",
        "1",
        "--max-retries",
        "0",
        "--retry-delay",
        "0",
        "--tutors",
        "T000001,T000002",
        "--include-inactive",
    ]

    result = invoke(*arguments, "--quiet")

    assert (result.exit_code, result.stdout) == (1, "")
    assert "ERROR Batch 2/2 of 2025-11-07: 1 of 1 tutors left out " in result.stderr
    assert "INFO" not in result.stderr
    assert len(small_platform.metrics()) == 3

    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "Error T000002" in words(result.stdout)
    assert 'violates check constraint "[bold]odd"' in words(result.stdout)
    assert "Success rate 50.0%" in words(result.stdout)


def test_a_database_that_refuses_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    url = f"postgresql://reader:{PASSWORD}@/platform?host=/nowhere"
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", url)

    result = invoke("run", "--date", DAY, "--json", "--max-retries", "0")

    assert result.exit_code == 1
    [error] = json.loads(result.stdout)["errors"]
    assert error["tutor_id"] == "SYSTEM"
    assert "The platform at /nowhere/platform cannot be reached" in error["error"]
    assert error["error"] in result.stderr
    for command in (["db", "status"], ["db", "upgrade"], ["generate"]):
        other = invoke(*command)
        assert other.exit_code == 1
        assert "Error: PostgreSQL says: " in other.stderr
        for shown in (result.output, other.output):
            assert "Traceback" not in shown
            assert PASSWORD not in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--date", "2999-01-01"], "--date 2999-01-01 is in the future; the latest"),
        (["run", "--date", "2023-12-31"], "--date 2023-12-31 lies before the first reference date"),
        (["run", "--date", "07.11.2025"], "--date '07.11.2025' is not a date; expected YYYY-MM-DD"),
        (["run", "--date", "2025-02-30"], "--date '2025-02-30' is not a date; expected YYYY-MM-DD"),
        (["run", "--date", ""], "--date '' is not a date; expected YYYY-MM-DD"),
        (["run", "--verbose", "--quiet"], "--verbose and --quiet exclude each other"),
        (["run", "--retention-days", "9"], "--retention-days is the age up to which --cleanup kee"),
        (["run", "--tutors", " , "], "--tutors names no tutor; expected ids separated by commas"),
        (
            ["run", "--batch-size", "0"],
            "'--batch-size': Input should be greater than or equal to 1",
        ),
        (["backfill", "--from", "2025-11-07", "--to", "2025-11-06"], "--to 2025-11-06 lies before"),
        (["backfill", "--from", "x"], "--from 'x' is not a date"),
        (["backfill", "--from", "2025-11-07", "--to", "2999-01-01"], "--to 2999-01-01 is in the"),
        (["backfill"], "Missing option '--from'"),
    ],
)
def test_wrong_use_is_said_in_a_sentence_before_anything_starts(
    arguments: list[str], expected: str, invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert expected in words(result.stderr)
    as_json = invoke(*arguments, "--json")
    assert as_json.exit_code == 2
    assert expected in words(json.loads(as_json.stdout)["error"].replace("Invalid value for ", ""))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"POSTGRES_HOST": "db", "POSTGRES_PASSWORD": PASSWORD}, "POSTGRES_PORT, POSTGRES_USER, P"),
        ({"TUTORMAX_DATABASE_URL": f"mysql://u:{PASSWORD}@h/d"}, "begins with 'mysql'; expected p"),
        ({"TUTORMAX_TIMEZONE": "Mars"}, "TUTORMAX_TIMEZONE: 'Mars' is not an IANA timezone"),
        ({"TUTORMAX_POLICY": "none.toml"}, "TUTORMAX_POLICY names none.toml, which cannot be read"),
        ({"TUTORMAX_POLICY": "bad.toml"}, "weights: login 2 + session 0.4 + punctual 0.2 is 2.6"),
    ],
)
def test_a_wrong_environment_is_said_in_a_sentence(
    variables: dict[str, str],
    expected: str,
    small_platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
    invoke: Invoke,
) -> None:
    home = small_platform.settings.home_path
    (home / "bad.toml").write_text("weights = {login = 2}", encoding="utf-8")
    if "POSTGRES_HOST" in variables:
        monkeypatch.delenv("TUTORMAX_DATABASE_URL")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    result = invoke("run", "--date", DAY)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert expected in words(result.stderr)
    assert PASSWORD not in result.stderr
    assert small_platform.metrics().is_empty()


def test_a_backfill_computes_each_date(small_platform: Platform, invoke: Invoke) -> None:
    result = invoke("backfill", "--from", "2025-11-06", "--to", DAY)

    assert result.exit_code == 0
    shown = words(result.stdout)
    assert "Backfill summary" in shown
    for day in ("2025-11-06", DAY):
        assert f"{day} 29 29 0 87" in words(shown.replace("┃", " "))
    dates = small_platform.metrics()["calculation_date"].dt.date().unique().sort().to_list()
    assert dates == [date(2025, 11, 6), date(2025, 11, 7)]


def test_a_backfill_reports_as_json_and_by_its_exit_code(
    small_platform: Platform, invoke: Invoke
) -> None:
    small_platform.add(tables.tutors, {"tutor_id": " Doe, Jane "})
    named = ["--tutors", "nobody, T000001", "--tutor", " Doe, Jane ", "--tutor", "Doe, Jane"]

    result = invoke("backfill", "--from", DAY, "--to", DAY, *named, "--include-inactive", "--json")

    assert result.exit_code == 1
    report = json.loads(result.stdout)
    shown = invoke("backfill", "--from", DAY, "--to", DAY, *named, "--include-inactive").stdout
    reason = report["summaries"][0]["errors"][0]["error"]
    assert f"Failed: {DAY}, 2 tutors: {reason}" in shown.splitlines()
    assert {name: report[name] for name in ("from", "to", "dates", "failed_dates")} == {
        "from": DAY,
        "to": DAY,
        "dates": 1,
        "failed_dates": 1,
    }
    [summary] = report["summaries"]
    # Known tutors are computed, and the others are named.
    assert set(small_platform.metrics()["tutor_id"]) == {"T000001", " Doe, Jane "}
    assert (summary["total_tutors"], summary["successful"], summary["failed"]) == (4, 2, 2)
    assert [error["tutor_id"] for error in summary["errors"]] == ["Doe, Jane", "nobody"]
    for error in summary["errors"]:
        assert error["error"] == "The tutor is not in the platform's tutors. Check the id."


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--tutors", "nobody,Doe, Jane"],
            "Error: None of the tutors is in the platform's tutors: 'Doe', 'Jane', 'nobody'.",
        ),
        (["--tutor", ""], "Error: tutor_ids: found the id '', expected text that is not empty."),
        (["--tutor", "Zo\udce9"], "tutor_ids: found the id 'Zo\\udce9', expected text that is"),
    ],
)
def test_only_unknown_tutors_are_wrong_use_and_leave_no_run_behind(
    arguments: list[str],
    expected: str,
    small_platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "own"))

    result = invoke("run", "--date", DAY, *arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert expected in words(result.stderr)
    assert not (tmp_path / "own").exists()
