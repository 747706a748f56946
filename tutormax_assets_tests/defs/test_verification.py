"""The weekly verification: rows that differ without a change in the platform are wrong."""

from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from tutormax_assets.definitions import VERIFICATION_JOB_NAME, build_definitions
from tutormax_assets.defs.automation.messages import findings_of
from tutormax_assets.defs.checks import refreshes
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets_tests.conftest import SMALL_PLATFORM_END, Platform

DAY = str(SMALL_PLATFORM_END)


@pytest.fixture
def verified_platform(computed_platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Platform:
    """A platform whose last date is computed; its transaction ids are those of no other test."""
    monkeypatch.setattr(refreshes, "today", lambda timezone: date.fromisoformat(DAY))
    computed_platform.run(DAY)
    return computed_platform


def verify(platform: Platform) -> tuple[dg.AssetCheckEvaluation, list[str]]:
    """The evaluation, and what an alert about the run says of checks."""
    job = build_definitions(platform.settings).resolve_job_def(VERIFICATION_JOB_NAME)
    with dagster_instance(platform.settings) as instance:
        result = job.execute_in_process(instance=instance)
        [evaluation] = result.get_asset_check_evaluations()
        run = instance.get_run_by_id(result.run_id)
        assert run is not None
        return evaluation, findings_of(instance, run).checks


def of_date(evaluation: dg.AssetCheckEvaluation) -> dict[str, Any]:
    table: Any = evaluation.metadata["dates"]
    [record] = table.records
    return dict(record.data)


def test_changed_tutors_are_left_out_and_all_others_are_right(verified_platform: Platform) -> None:
    verified_platform.execute("DELETE FROM sessions WHERE tutor_id = 'T000003'")

    evaluation, said = verify(verified_platform)

    assert (evaluation.passed, said) == (True, [])
    assert evaluation.metadata["wrong_rows"].value == 0
    found = of_date(evaluation)
    assert found["tutors"] + found["changed_tutors"] >= 28
    assert found["changed_tutors"] >= 1
    assert (found["wrong_rows"], found["not_compared"]) == (0, "")


def test_rows_that_no_run_has_computed_are_wrong(verified_platform: Platform) -> None:
    [file] = (verified_platform.storage / "tutor_tiers" / f"{DAY}.parquet").glob("*.parquet")
    make_wrong(file)
    verified_platform.execute(
        "UPDATE tutor_performance_metrics SET avg_rating = 1.5 WHERE tutor_id = 'T000005'"
    )

    evaluation, said = verify(verified_platform)

    assert not evaluation.passed
    # Three rows of the tutor in the table, and one more in the Parquet.
    assert evaluation.metadata["wrong_rows"].value == 4
    assert evaluation.severity is dg.AssetCheckSeverity.ERROR
    assert f"4 rows of 2 tutors on {DAY} differ from a full computation" in said[0]
    assert verified_platform.partition("tutor_tiers", DAY)["no_show_count"].max() == 77


def make_wrong(file: Path) -> None:
    rows = pl.read_parquet(file, memory_map=False)
    is_one = (pl.col("tutor_id") == "T000004") & (pl.col("window") == "7day")
    count = pl.when(is_one).then(77).otherwise("no_show_count").cast(rows["no_show_count"].dtype)
    rows.with_columns(count.alias("no_show_count")).write_parquet(file)


def test_a_date_that_cannot_be_compared_is_named(verified_platform: Platform) -> None:
    (verified_platform.storage / "tutor_roster" / f"{DAY}.state").unlink()

    evaluation, _ = verify(verified_platform)

    assert evaluation.passed
    assert evaluation.description == "Not compared: the stored date has no read state."
    assert of_date(evaluation)["not_compared"] == "the stored date has no read state"
