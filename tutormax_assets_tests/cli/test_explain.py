"""Why a tutor is in a tier: what aged out, what arrived late, what was deleted."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tutormax_assets.api import explanation, pages
from tutormax_assets.database import tables
from tutormax_assets.metrics.policy import Policy
from tutormax_assets_tests.cli.conftest import Invoke, words
from tutormax_assets_tests.conftest import Platform, new_database, open_platform

# One process runs them all, so that the dates are computed once.
pytestmark = pytest.mark.xdist_group("explanations")

DAY_BEFORE, DAY = date(2025, 11, 6), date(2025, 11, 7)


def noon(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, 12, tzinfo=UTC)


def sessions(platform: Platform, tutor: str, day: date, number: int, **values: Any) -> None:
    rows = (
        {
            "session_id": f"{tutor}-{day}-{n}",
            "tutor_id": tutor,
            "scheduled_start": noon(day),
            "actual_start": None if values.get("no_show") else noon(day),
            **values,
        }
        for n in range(number)
    )
    platform.add(tables.sessions, *rows)


@pytest.fixture(scope="module")
def computed(
    server_url: sa.URL, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Two dates, between which a rating arrived and sessions were deleted."""
    home = tmp_path_factory.mktemp("explain")
    with (
        new_database(server_url, template=template_database) as url,
        open_platform(url, home / "home") as platform,
    ):
        sessions(platform, "aged", DAY_BEFORE - timedelta(days=7), 4, no_show=True)
        sessions(platform, "aged", DAY_BEFORE - timedelta(days=3), 2)
        sessions(platform, "late", DAY_BEFORE - timedelta(days=3), 1)
        sessions(platform, "deleted", DAY_BEFORE - timedelta(days=3), 4, no_show=True)
        sessions(platform, "deleted", DAY_BEFORE - timedelta(days=2), 2)
        sessions(platform, "twin", DAY_BEFORE - timedelta(days=3), 5, no_show=True)
        sessions(platform, "fixed", DAY_BEFORE - timedelta(days=3), 4, no_show=True)
        sessions(platform, "active", DAY_BEFORE - timedelta(days=3), 2, engagement_score=1.0)
        assert platform.run(str(DAY_BEFORE))[0].all_saved
        platform.add(
            tables.tutor_events,
            *(
                {"event_id": f"e{n}", "tutor_id": "active", "event_timestamp": noon(DAY_BEFORE)}
                for n in range(2)
            ),
        )
        platform.execute("DELETE FROM sessions WHERE session_id ~ '^twin.*-[01]$'")
        platform.execute("UPDATE sessions SET no_show = false WHERE tutor_id = 'fixed'")
        platform.add(
            tables.student_feedback,
            {
                "feedback_id": "f",
                "session_id": f"late-{DAY_BEFORE - timedelta(days=3)}-0",
                "tutor_id": "late",
                "overall_rating": 5,
            },
        )
        platform.execute("DELETE FROM sessions WHERE tutor_id = 'deleted' AND no_show")
        assert platform.run(str(DAY))[0].all_saved
        yield platform


@pytest.fixture
def explained(
    computed: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Invoke]:
    with open_platform(computed.url, Path(computed.settings.home_path), using=monkeypatch):
        yield invoke


def window(explained: Invoke, tutor: str, *arguments: str) -> dict[str, Any]:
    result = explained("explain", tutor, "--date", str(DAY), "--window", "7day", "--json")
    assert result.exit_code == 0, result.stderr
    [found] = json.loads(result.stdout)["windows"]
    assert isinstance(found, dict)
    return found


def since_the_day_before(found: dict[str, Any], metric: str) -> dict[str, Any]:
    [change] = [one for one in found["changes"] if one["days"] == 1]
    assert change["compared_with"] == str(DAY_BEFORE)
    split, *_ = [one for one in change["splits"] if one["metric"] == metric]
    rows = [one for one in change["rows"] if one["metric"] == metric]
    return {"move": change["move"], "split": split, "rows": rows}


def parts(split: dict[str, Any], role: str = "numerator") -> tuple[int, ...]:
    names = ("before", "came_in", "aged_out", "corrected", "after")
    return tuple(split[f"{role}_{name}"] for name in names)


def test_sessions_that_left_the_window_aged_out(explained: Invoke) -> None:
    found = since_the_day_before(window(explained, "aged"), "no_show_count")

    assert (found["split"]["flag_before"], found["split"]["flag"]) == ("red", "green")
    assert parts(found["split"]) == (4, 0, 4, 0, 0)
    assert parts(found["split"], "denominator") == (6, 0, 4, 0, 2)
    day = str(DAY_BEFORE - timedelta(days=7))
    assert [(row["part"], row["date"], row["session_id"]) for row in found["rows"]] == [
        ("aged_out", day, f"aged-{day}-{n}") for n in range(4)
    ]


def test_feedback_that_arrived_late_is_a_correction(explained: Invoke) -> None:
    found = since_the_day_before(window(explained, "late"), "avg_rating")

    assert (found["split"]["value_before"], found["split"]["value"]) == (None, 5)
    assert parts(found["split"]) == (0, 0, 0, 5, 5)
    day = str(DAY_BEFORE - timedelta(days=3))
    [row] = found["rows"]
    assert row == {
        "metric": "avg_rating",
        "part": "corrected_to",
        "date": day,
        "session_id": f"late-{day}-0",
        "overall_rating": 5,
    }


def test_a_deleted_session_is_a_correction_without_an_id(explained: Invoke) -> None:
    found = since_the_day_before(window(explained, "deleted"), "no_show_count")

    assert parts(found["split"]) == (4, 0, 0, -4, 0)
    assert [(row["part"], row["session_id"]) for row in found["rows"]] == [
        ("corrected_from", None)
    ] * 4


def test_sessions_that_are_alike_are_not_guessed_at(explained: Invoke) -> None:
    found = since_the_day_before(window(explained, "twin"), "no_show_count")

    assert parts(found["split"]) == (5, 0, 0, -2, 3)
    assert [(row["part"], row["session_id"]) for row in found["rows"]] == [
        ("corrected_from", None)
    ] * 2


def test_a_session_that_was_changed_has_its_id_as_it_is_now(explained: Invoke) -> None:
    found = since_the_day_before(window(explained, "fixed"), "no_show_count")

    day = DAY_BEFORE - timedelta(days=3)
    assert {(row["part"], row["session_id"], row["no_show"]) for row in found["rows"]} == {
        ("corrected_from", None, True),
        *(("corrected_to", f"fixed-{day}-{n}", False) for n in range(4)),
    }


def test_logins_are_among_what_moved_an_engagement_score(explained: Invoke, tmp_path: Path) -> None:
    found = since_the_day_before(window(explained, "active"), "engagement_score")

    assert found["rows"] == [
        {"metric": "engagement_score", "part": "came_in", "date": str(DAY_BEFORE), "logins": 2}
    ]
    page = tmp_path / "page.html"
    assert explained("explain", "active", "--date", str(DAY), "--html", str(page)).exit_code == 0
    assert "logins 2" in page.read_text(encoding="utf-8")


def test_it_says_since_when_how_sure_and_how_far(explained: Invoke) -> None:
    found = window(explained, "late")

    assert found["tier_since"] == str(DAY if found["previous_tier"] else DAY_BEFORE)
    assert (found["evidence"], found["sessions"]) == ("thin", 1)
    rating = next(one for one in found["metrics"] if one["metric"] == "avg_rating")
    assert (rating["flag"], rating["certainty"], rating["denominator"]) == (
        "green",
        "within_noise",
        1,
    )
    assert "green" in found["better"] or "red" in found["better"]
    assert found["engagement"] == {"login": 0.0, "session": 50.0, "punctual": 100.0}


def test_a_person_reads_it_in_a_pipe(explained: Invoke) -> None:
    result = explained("explain", "aged", "--date", str(DAY))

    assert result.exit_code == 0
    text = words(result.stdout)
    assert "7day: " in text
    assert "30day: " in text
    assert "no_shows: 4 + 0 came in - 4 aged out + 0 corrected = 0" in text
    assert f"{DAY_BEFORE - timedelta(days=7)} aged out: aged-" in text
    assert "Note: Thin evidence: 2 sessions in the 7day window" in text


def test_another_policy_than_that_of_the_date_is_told(
    explained: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[thresholds.engagement_score]\ngreen = 30\nred = 30\n")
    report = json.loads(explained("explain", "aged", "--date", str(DAY), "--json").stdout)
    assert not any("policy" in note for note in report["notes"])
    monkeypatch.setenv("TUTORMAX_POLICY", str(policy))

    report = json.loads(explained("explain", "aged", "--date", str(DAY), "--json").stdout)

    assert "The policy is another one than when the date was computed" in report["notes"][0]
    for found in report["windows"]:
        [score] = [one for one in found["metrics"] if one["metric"] == "engagement_score"]
        # The flag is that of the run, the bound today's.
        assert (score["flag"], score["green"]) == ("red", "30 or more")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nobody",), "2025-11-07 has no tutor 'nobody': the id is unknown"),
        (("aged", "--window", "31day"), "no window '31day'; expected one of 7day, 30day, 90day."),
        (("aged", "--date", "2025-11-01"), "2025-11-01 has no reasons: it has not been computed"),
        (("aged", "--date", "soon"), "--date 'soon' is not a date"),
        (("aged", "--window", ""), "no window ''; expected one of"),
        (("a\udcffb",), r"found the id 'a\udcffb', expected text"),
    ],
)
def test_what_is_not_there_is_a_sentence(
    explained: Invoke, arguments: tuple[str, ...], said: str
) -> None:
    result = explained("explain", "--date", str(DAY), *arguments)

    assert result.exit_code == 2
    assert said in words(result.stderr)


def test_what_cannot_be_looked_up_is_left_out(
    computed: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = "postgresql://nobody@127.0.0.1:1/none?connect_timeout=1"
    home = Path(computed.settings.home_path)
    monkeypatch.setenv("TUTORMAX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TUTORMAX_STORAGE", str(home / "storage"))
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", nowhere)

    result = invoke("explain", "aged", "--date", str(DAY), "--window", "7day", "--json")

    report = json.loads(result.stdout)
    assert (result.exit_code, report["read_at"]) == (0, None)
    [found] = report["windows"]
    assert (found["tier_since"], found["changes"][0]["rows"][0]["session_id"]) == (None, None)
    said = " ".join(report["problems"])
    assert "Since when is left out: " in said
    assert "The ids of sessions are left out: " in said
    assert not (tmp_path / "home" / "dagster").exists()


def test_a_date_that_was_not_saved_is_named(
    database: sa.URL, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open_platform(database, tmp_path / "home", using=monkeypatch) as platform:
        sessions(platform, "t", DAY_BEFORE - timedelta(days=3), 5, no_show=True)
        platform.run(str(DAY))
        platform.execute("UPDATE tutor_performance_metrics SET performance_tier = 'Strong'")

        result = invoke("explain", "t", "--date", str(DAY), "--window", "7day", "--json")

    report = json.loads(result.stdout)
    [found] = report["windows"]
    assert found["tier_since"] is None
    assert "The table has Strong for the 7day window" in " ".join(report["notes"])


def test_a_page_says_the_same_and_is_for_its_owner_only(explained: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "page.html"

    result = explained("explain", "aged", "--date", str(DAY), "--html", str(file))

    assert (result.exit_code, words(result.stdout)) == (0, words(f"Written: {file}"))
    assert file.stat().st_mode & 0o777 == 0o600
    page = words(file.read_text(encoding="utf-8"))
    assert f"Tiers of tutor <code>aged</code> on {DAY}" in page
    assert "No-shows: 4 (red) then, 0 (green) now." in page
    assert "4 then, 0 came in, 4 aged out, 0 corrected, 0 now." in page
    assert "Thin evidence: 2 sessions in the 7day window" in page
    assert "Remark of the reviewer" in page
    for outside in ("<script", "http", "src=", "Private"):
        assert outside not in page


def test_each_table_of_a_page_has_a_name_of_its_own(computed: Platform) -> None:
    found = explanation.explain(computed.settings, "aged", DAY)
    [moved] = [one for one in found.windows if one.changes][:1]
    both = [moved, replace(moved, window="14day")]

    page = pages.explanation_page(replace(found, windows=both), Policy())

    names = re.findall(r'role="region" aria-label="([^"]*)"', page)
    assert sum("sessions since" in name for name in names) >= 2
    assert len(set(names)) == len(names)


def test_a_page_escapes_what_comes_from_outside(computed: Platform) -> None:
    found = explanation.explain(computed.settings, "aged", DAY)
    page = pages.explanation_page(replace(found, tutor_id="<b>&"), Policy())
    assert "<code>&lt;b&gt;&amp;</code>" in page
    assert "<b>" not in page


def test_a_page_that_cannot_be_written_is_a_sentence(explained: Invoke, tmp_path: Path) -> None:
    result = explained("explain", "aged", "--date", str(DAY), "--html", str(tmp_path / "no" / "p"))

    assert result.exit_code == 1
    assert "no/p: No such file or directory" in words(result.stderr)
