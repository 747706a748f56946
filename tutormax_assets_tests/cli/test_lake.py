"""``tutormax`` with a lake as source."""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from tutormax_assets.definitions import build_definitions
from tutormax_assets.settings import load_settings
from tutormax_assets.source.contract import NEEDED_COLUMNS
from tutormax_assets_tests.cli.conftest import DAY, Invoke, words
from tutormax_assets_tests.conftest import Platform

GENERATED = ["--tutors", "8", "--sessions-per-tutor", "30", "--days", "100", "--end", DAY]


@pytest.fixture
def lake(
    platform: Platform,
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A generated lake that the environment names, beside a database that holds its tutors."""
    lake = tmp_path / "lake"
    assert invoke("generate", *GENERATED).exit_code == 0
    assert invoke("generate", *GENERATED, "--lake", str(lake)).exit_code == 0
    assert invoke("db", "upgrade").exit_code == 0
    platform.execute("TRUNCATE sessions, student_feedback, tutor_events")
    monkeypatch.setenv("TUTORMAX_SOURCE", "parquet")
    monkeypatch.setenv("TUTORMAX_LAKE", str(lake))
    return lake


def test_a_run_reads_the_lake_alone(lake: Path, platform: Platform, invoke: Invoke) -> None:
    result = invoke("db", "status")
    assert result.exit_code == 0
    assert f"Source tables: {lake} (from TUTORMAX_LAKE)" in result.stdout
    assert "sessions: as expected" in result.stdout

    result = invoke("run", "--date", DAY)

    assert result.exit_code == 0
    metrics = platform.metrics()
    assert metrics["tutor_id"].n_unique() > 5
    assert metrics["sessions_completed"].sum() > 100
    assert invoke("backfill", "--from", "2025-11-06", "--to", DAY, "--quiet").exit_code == 0
    assert invoke("run", "--date", DAY, "--tutors", "T000001", "-q").exit_code == 0


def test_a_lake_is_generated_once(lake: Path, invoke: Invoke) -> None:
    result = invoke("generate", *GENERATED, "--lake", str(lake))
    assert result.exit_code == 1
    assert (
        f"Error: The lake at {lake} already holds tutors, sessions, student_feedback, tutor_events;"
        " use an empty path. Nothing was written."
    ) in words(result.stderr)
    result = invoke("generate", "--append", "--lake", str(lake))
    assert result.exit_code == 2
    assert "--append and --lake exclude each other" in result.stderr


def test_what_breaks_the_contract_ends_run_and_status_in_a_sentence(
    lake: Path,
    invoke: Invoke,
) -> None:
    file = lake / "sessions" / "day=2025-11-06" / "000000008.parquet"
    pl.read_parquet(file, memory_map=False).drop("no_show").write_parquet(file)
    clause = (
        "table sessions, column no_show: found no such column in"
        " sessions/day=2025-11-06/000000008.parquet, expected a boolean"
    )

    result = invoke("db", "status")
    assert result.exit_code == 1
    assert clause in result.stdout
    result = invoke("run", "--date", DAY)
    assert result.exit_code == 1
    assert f"The lake at {lake} cannot be read: {clause}." in result.stderr


def test_tutors_of_the_lake_have_to_be_in_the_database(
    lake: Path,
    platform: Platform,
    invoke: Invoke,
) -> None:
    platform.execute("DELETE FROM tutors WHERE tutor_id = 'T000003'")

    result = invoke("db", "status")
    assert result.exit_code == 1
    assert (
        "table tutors: found no row of 1 of the lake's 8 tutors, such as T000003; expected all of"
        " them, for tutor_performance_metrics refers to them: load them into this database"
    ) in result.stdout
    result = invoke("run", "--date", DAY)
    assert result.exit_code == 1
    assert "Error T000003" in result.stdout
    assert "or in the lake only" in words(result.stdout)
    assert platform.metrics()["tutor_id"].n_unique() == 7


def test_a_lake_without_a_path_is_no_source(
    platform: Platform,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUTORMAX_SOURCE", "parquet")
    for command in (["db", "status"], ["run"]):
        result = invoke(*command)
        assert result.exit_code == 2
        assert "TUTORMAX_SOURCE is parquet but TUTORMAX_LAKE is not set" in words(result.stderr)


def test_the_demo_reads_no_lake(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_SOURCE", "parquet")
    monkeypatch.setenv("TUTORMAX_LAKE", str(tmp_path))

    result = invoke("demo")

    assert result.exit_code == 2
    assert "TUTORMAX_SOURCE is parquet, and the demo reads the platform" in words(result.stderr)


def test_a_lake_that_is_not_there_is_named(
    platform: Platform,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TUTORMAX_SOURCE", "parquet")
    monkeypatch.setenv("TUTORMAX_LAKE", str(tmp_path / "nowhere"))

    result = invoke("db", "status")

    assert result.exit_code == 1
    assert "table tutors: found no Parquet file in tutors/, expected" in result.stdout


def test_the_ui_says_what_holds_the_source_tables(lake: Path) -> None:
    graph = build_definitions(load_settings()).resolve_asset_graph()

    for table in NEEDED_COLUMNS:
        assert graph.get(dg.AssetKey(table)).kinds == {"parquet"}
