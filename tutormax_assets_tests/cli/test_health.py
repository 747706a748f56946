"""``tutormax health``: a sentence for each thing that is not well."""

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from tutormax_assets.api.health import Finding, examine_health
from tutormax_assets.settings import Settings
from tutormax_assets_tests.cli.conftest import DAY, Invoke
from tutormax_assets_tests.conftest import PASSWORD, Platform

NOON = datetime(2025, 11, 7, 12, tzinfo=UTC)


def unwell(settings: Settings) -> dict[str, str]:
    return {one.name: one.says for one in examine_health(settings, now=NOON) if not one.is_well}


@pytest.fixture
def healthy(small_platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Platform:
    """A platform whose night is saved, with a Dagster home of its own."""
    home = small_platform.settings.home_path / "dagster"
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    settings = small_platform.settings.model_copy(update={"dagster_home": home})
    platform = Platform(settings, small_platform.engine)
    platform.run(DAY)
    return platform


def test_each_thing_that_is_not_well_has_a_sentence(
    healthy: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unwell(healthy.settings) == {}

    automated = healthy.settings.model_copy(update={"automation": True})
    assert unwell(automated) == {
        "daemon": "No heartbeat ever, expected one every 30 seconds. Start the daemon, or see its"
        " log."
    }
    later = examine_health(healthy.settings, now=datetime(2025, 11, 8, 12, tzinfo=UTC))
    assert (
        Finding(
            "last night",
            False,
            "2025-11-08 is not saved. `tutormax run --date 2025-11-08` computes it.",
        )
        in later
    )
    healthy.execute("ALTER TABLE sessions RENAME TO lessons")
    shutil.rmtree(healthy.storage)
    healthy.storage.write_text("a file")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(total=100 << 30, free=3 << 30)
    )
    found = unwell(healthy.settings)
    assert set(found) == {"source", "storage", "disk"}
    assert "table sessions" in found["source"]
    assert found["storage"].startswith(f"{healthy.storage} takes no files: ")
    assert found["disk"].startswith("3% of the disk of home")


def test_a_database_that_cannot_be_reached_is_one_of_several_findings(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUTORMAX_HOME", str(tmp_path))
    url = f"postgresql://reader:{PASSWORD}@127.0.0.1:1/platform"
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", url)

    result = invoke("health", "--json")

    assert result.exit_code == 1
    found = {one["name"]: one for one in json.loads(result.stdout)["findings"]}
    assert "Connection refused" in found["database"]["says"]
    assert "There is no Dagster home" in found["instance"]["says"]
    assert [name for name, one in found.items() if not one["is_well"]] == [
        "instance", "database", "source"
    ]  # fmt: skip
    assert PASSWORD not in result.stdout
    assert os.listdir(tmp_path) == []
    assert "NOT WELL" in invoke("health").stdout
