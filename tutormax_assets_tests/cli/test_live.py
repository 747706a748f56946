"""``tutormax live``."""

import json

import pytest

from tutormax_assets_tests.cli.conftest import Invoke
from tutormax_assets_tests.conftest import Platform


def test_it_names_the_tutors_that_it_cannot_show(small_platform: Platform, invoke: Invoke) -> None:
    small_platform.execute("UPDATE tutors SET status = 'churned' WHERE tutor_id = 'T000002'")

    result = invoke("live", "T000001", "T000002", "nobody")

    assert result.exit_code == 1
    assert "Unknown: nobody\nNot active: T000002\n" in result.stdout
    assert "sessions_completed" in result.stdout
    result = invoke("live", "nobody", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {
        "error": "Not in the platform's tutors: nobody. Check the ids."
    }


def test_it_counts_tutors_by_tier(small_platform: Platform, invoke: Invoke) -> None:
    found = json.loads(invoke("live", "--json").stdout)

    assert found["tutors"] > 20
    assert {sum(tiers.values()) for tiers in found["tiers"].values()} == {found["tutors"]}
    assert f"{found['tutors']} tutors, {3 * found['tutors']} rows" in invoke("live").stdout


def test_an_interval_out_of_range_is_wrong_use(
    small_platform: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_LIVE_SECONDS", "0")

    result = invoke("live", "--watch")

    assert result.exit_code == 2
    assert "TUTORMAX_LIVE_SECONDS" in result.stderr
