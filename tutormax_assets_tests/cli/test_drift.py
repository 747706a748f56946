"""Stored dates compared with the platform, on the command line."""

import json
from pathlib import Path

import pytest

from tutormax_assets_tests.cli.conftest import DAY, Invoke, words
from tutormax_assets_tests.conftest import Platform


def test_what_differs_is_told_with_its_cause(
    computed_platform: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {path: path.stat().st_mtime_ns for path in computed_platform.storage.rglob("*")}

    same = invoke("drift", "--from", "2025-11-06", "--to", DAY)

    assert same.exit_code == 0
    assert words(same.stdout) == words(
        f"{DAY}: no differences from the platform. Not stored: 2025-11-06"
    )

    computed_platform.execute("UPDATE sessions SET no_show = true WHERE tutor_id = 'T000003'")
    different = invoke("drift", "--from", DAY, "--to", DAY)
    as_json = invoke("drift", "--from", DAY, "--to", DAY, "--json")

    assert (different.exit_code, as_json.exit_code) == (1, 1)
    assert "1 of 1 dates differ, 1 tutors." in different.stdout
    report = json.loads(as_json.stdout)
    counts = {one["metric"]: (one["cause"], one["tutors"]) for one in report["counts"]}
    assert counts["no_show_count"] == counts["performance_tier"] == ("corrected", 1)
    [value] = [
        one
        for one in report["values"]
        if (one["metric"], one["window"]) == ("no_show_count", "90day")
    ]
    assert (value["reference_date"], value["tutor_id"], value["causes"]) == (
        DAY,
        "T000003",
        ["corrected"],
    )
    assert int(value["now"]) > int(value["stored"])
    computed_platform.execute("UPDATE sessions SET no_show = false WHERE tutor_id = 'T000003'")

    policy = tmp_path / "policy.toml"
    policy.write_text("[thresholds.avg_rating]\ngreen = 4.99\nred = 4.9\n")
    monkeypatch.setenv("TUTORMAX_POLICY", str(policy))
    judged = json.loads(invoke("drift", "--from", DAY, "--to", DAY, "--json").stdout)
    of_others = [one for one in judged["values"] if one["tutor_id"] != "T000003"]
    assert of_others
    assert {one["metric"] for one in of_others} == {"performance_tier"}
    assert {cause for one in of_others for cause in one["causes"]} == {"policy"}
    assert {path: path.stat().st_mtime_ns for path in computed_platform.storage.rglob("*")} == files


def test_dates_that_cannot_be_compared_are_wrong_use(platform: Platform, invoke: Invoke) -> None:
    reversed_dates = invoke("drift", "--from", DAY, "--to", "2025-11-01")
    nothing = invoke("drift", "--from", DAY, "--to", DAY)

    assert (reversed_dates.exit_code, nothing.exit_code) == (2, 2)
    assert "--to 2025-11-01 lies before --from 2025-11-07" in reversed_dates.stderr
    assert f"Nothing is stored of {DAY} to {DAY}." in nothing.stderr
    assert "`tutormax backfill --from" in nothing.stderr
