"""Another policy, judged on what is stored: the same as running the dates with it."""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from tutormax_assets.settings import load_settings
from tutormax_assets_tests.cli.conftest import DAY, Invoke, words
from tutormax_assets_tests.conftest import Platform

STRICT = """
[thresholds.avg_rating]
green = 4.9
red = 4.4
[tier_flags]
at_risk_red = 2
"""
ROWS = "late_limit_minutes = 2\nfirst_session_success_rating = 5\n"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(STRICT)
    return path


@pytest.mark.parametrize("text", [STRICT, ROWS])
def test_it_is_what_a_run_with_the_policy_gives(
    computed_platform: Platform,
    invoke: Invoke,
    policy: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    policy.write_text(text)
    before = computed_platform.partition("tutor_tiers", DAY)
    files = {path: path.stat().st_mtime_ns for path in computed_platform.storage.rglob("*")}

    result = invoke("what-if", str(policy), "--date", DAY, "--json")

    assert result.exit_code == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in computed_platform.storage.rglob("*")} == files
    report = json.loads(result.stdout)
    monkeypatch.setenv("TUTORMAX_POLICY", str(policy))
    replace(computed_platform, settings=load_settings()).run(DAY)
    after = computed_platform.partition("tutor_tiers", DAY)
    both = before.join(after, on=["tutor_id", "window"], suffix="_after")
    for window in report["windows"]:
        of_window = both.filter(window=window["window"])
        moved = of_window.filter(pl.col("performance_tier") != pl.col("performance_tier_after"))
        assert {
            (row["tutor_id"], row["tier"], row["other_tier"]) for row in window["movers"]
        } == set(moved.select("tutor_id", "performance_tier", "performance_tier_after").rows())
        assert sum(row["tutors"] for row in window["matrix"]) == len(of_window)
    assert any(window["movers"] for window in report["windows"])


def test_changes_from_date_to_date_are_counted_under_both(
    small_platform: Platform, invoke: Invoke, policy: Path
) -> None:
    small_platform.run("2025-11-05", "2025-11-06", DAY)
    policy.write_text("")

    result = invoke("what-if", str(policy), "--date", DAY, "--days", "3", "--json")

    report = json.loads(result.stdout)
    assert report["dates"] == ["2025-11-05", "2025-11-06", DAY]
    for window in report["windows"]:
        assert window["movers"] == []
        assert window["flaps"] == window["other_flaps"] > 0


def test_a_person_reads_a_matrix(computed_platform: Platform, invoke: Invoke, policy: Path) -> None:
    result = invoke("what-if", str(policy), "--date", DAY)

    assert result.exit_code == 0
    assert "30day on 2025-11-07: " in result.stdout
    assert "Under this policy" in result.stdout
    assert f"Dates: {DAY}" in result.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("late_limit = 3", "late_limit: Extra inputs are not permitted"),
        ("session_score_scale = 100", "session_score_scale decides which scores are read at all"),
        ("windows = [7, 120]", "A window of 120 days reaches back farther than the 90 days"),
        ("nonsense", "is not valid TOML"),
        ("", f"{DAY} is not stored. Run `tutormax run --date {DAY}`."),
    ],
)
def test_what_cannot_be_told_is_a_sentence(
    platform: Platform, invoke: Invoke, policy: Path, text: str, said: str
) -> None:
    policy.write_text(text)

    result = invoke("what-if", str(policy), "--date", DAY)

    assert result.exit_code == 2
    assert said in words(result.stderr)


def test_a_policy_that_is_not_there_is_a_sentence(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("what-if", str(tmp_path / "none.toml"))

    assert result.exit_code == 2
    assert "none.toml cannot be read: No such file or directory." in words(result.stderr)
