"""``tutormax quality``: what runs have recorded about their data."""

import json
import stat
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tutormax_assets.database.connection import create_engine
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets_tests.cli.conftest import Invoke, words
from tutormax_assets_tests.conftest import Platform, new_database, open_platform

DAYS = ["2025-11-05", "2025-11-06", "2025-11-07"]
EMPTY_DAY = "2025-11-06"
"""Few sessions are left of it, so the next date warns."""


@pytest.fixture(scope="module")
def recorded(
    server_url: sa.URL, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Three dates, the last of which has lost the day before and is blocked."""
    with new_database(server_url, template=template_database) as url:
        engine = create_engine(url)
        sample_platform.generate(
            engine, tutors=80, sessions_per_tutor=50, days=130, end=date(2025, 11, 7), seed=5,
            bad_rows=0.03,
        )  # fmt: skip
        engine.dispose()
        with open_platform(url, tmp_path_factory.mktemp("quality")) as platform:
            platform.run(*DAYS[:2])
            platform.execute(
                "DELETE FROM student_feedback USING sessions WHERE sessions.session_id ="
                " student_feedback.session_id AND scheduled_start >= '2025-11-06T00:00Z'"
            )
            platform.execute("DELETE FROM sessions WHERE scheduled_start >= '2025-11-06T00:00Z'")
            platform.run(DAYS[2])
        yield platform


@pytest.fixture
def quality(recorded: Platform, invoke: Invoke) -> Iterator[Any]:
    """The command over the dates."""
    with open_platform(recorded.url, recorded.settings.home_path):
        yield lambda *arguments: invoke("quality", "--from", DAYS[0], "--to", DAYS[2], *arguments)


def test_every_check_of_every_date_is_reported(recorded: Platform, quality: Any) -> None:
    found = json.loads(quality("--json").stdout)

    assert [one["date"] for one in found["dates"]] == DAYS
    assert found["missing_dates"] == []
    assert len(found["dates"][0]["run_id"]) == 36
    last = found["dates"][2]
    checks = {(one["asset"], one["name"]): one for one in last["checks"]}
    volume = checks["sessions_snapshot", "day_volume_is_usual"]
    assert (volume["passed"], volume["severity"]) == (False, "WARN")
    assert volume["says"].startswith(f"{EMPTY_DAY} has 0 sessions")
    [measure] = [one for one in last["measures"] if one["name"] == "Newest day of sessions"]
    assert (measure["value"], measure["limit"], measure["is_anomaly"]) == (0, 0.5, True)


def test_values_set_aside_are_shares_of_the_rows(recorded: Platform, quality: Any) -> None:
    for one in json.loads(quality("--json").stdout)["dates"]:
        set_aside, rows = (
            sum(len(recorded.partition(f"{name}_{kind}", one["date"])) for name in SOURCES)
            for kind in ("set_aside", "snapshot")
        )
        assert set_aside > 0
        assert sum(reason["values"] for reason in one["set_aside"]) == set_aside
        assert (one["rows"], one["set_aside_share"]) == (rows, set_aside / rows)


SOURCES = ("sessions", "tutor_events")


def test_a_person_sees_each_problem_once(recorded: Platform, quality: Any) -> None:
    said = words(quality().stdout)

    assert words("Newest day of sessions 0.00") in said
    assert words(f"WARN sessions_snapshot, day_volume_is_usual, {DAYS[2]}. The last one:") in said
    assert said.count("few_rows_set_aside") <= 4


def test_the_page_loads_nothing_and_names_nobody(
    recorded: Platform, quality: Any, tmp_path: Path
) -> None:
    file = tmp_path / "quality.html"

    assert quality("--html", str(file)).exit_code == 0

    page = file.read_text()
    assert "<script" not in page
    assert "src=" not in page
    assert "T0000" not in page
    assert page.count("<svg") >= 5
    assert f"beyond it on {DAYS[2]}" in page
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_dates_without_a_record_are_wrong_use(recorded: Platform, quality: Any) -> None:
    for arguments, sentence in (
        (["--to", "2025-11-01"], "lies before --from"),
        (["--from", "2025-06-01", "--to", "2025-06-02"], "Nothing is on record of 2025-06-01"),
    ):
        result = quality(*arguments)
        assert result.exit_code == 2
        assert sentence in result.stderr
