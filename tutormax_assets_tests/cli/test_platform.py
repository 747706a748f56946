"""``tutormax generate``, ``tutormax db`` and ``tutormax set-aside``, on a given database."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tutormax_assets.database.connection import describe
from tutormax_assets.dates import today
from tutormax_assets_tests.cli.conftest import Invoke, words
from tutormax_assets_tests.conftest import PASSWORD, Platform, open_platform
from tutormax_assets_tests.tls import refusing_server

DAY = "2025-11-07"


@pytest.fixture
def empty_platform(
    empty_database: sa.URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Platform]:
    """A database without tables."""
    with open_platform(empty_database, tmp_path / "home", using=monkeypatch) as opened:
        yield opened


def test_a_database_is_created_filled_and_upgraded(
    empty_platform: Platform, invoke: Invoke
) -> None:
    result = invoke("db", "status")
    assert result.exit_code == 1
    assert "table tutors: found no such table" in result.stdout
    result = invoke("generate")
    assert result.exit_code == 1
    assert "no table tutors" in result.stderr
    assert "`tutormax db init`" in result.stderr

    result = invoke("db", "init")
    assert result.exit_code == 0
    assert "All tables are there, empty." in result.stdout
    result = invoke("db", "init")
    assert result.exit_code == 1
    assert "Error: expected an empty database but found tutors" in words(result.stderr)

    small = ["generate", "--tutors", "3", "--sessions-per-tutor", "4", "--end", DAY]
    result = invoke(*small, "--days", "30", "--seed", "2", "--bad-rows", "0.5")
    assert result.exit_code == 0
    assert "tutors: 3 rows" in result.stdout
    assert "sessions: 12 rows" in result.stdout
    result = invoke(*small)
    assert result.exit_code == 1
    assert "already holds 3 tutors" in result.stderr
    assert "Nothing was written." in result.stderr
    assert invoke(*small, "--append").exit_code == 0
    with empty_platform.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM tutors")) == 6

    result = invoke("db", "status")
    assert result.exit_code == 0
    shown = words(result.stdout)
    address = f"Database: {describe(empty_platform.url)} (from TUTORMAX_DATABASE_URL)"
    assert result.stdout.splitlines()[0] == address
    assert "tutor_performance_metrics: current" in shown
    assert PASSWORD not in result.output
    assert "postgres@" not in result.output


@pytest.mark.parametrize("arguments", [["--end", "2999-01-01"], ["--tutors", "0"], ["--end", "x"]])
def test_generate_is_told_wrong_use(
    arguments: list[str], platform: Platform, invoke: Invoke
) -> None:
    assert invoke("generate", *arguments).exit_code == 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("28P01", 'password authentication failed for user "tutormax"'),
        ("28000", 'no pg_hba.conf entry for host "10.0.0.1", user "tutormax", no encryption'),
        ("3D000", 'database "platform" does not exist'),
    ],
)
@pytest.mark.parametrize("variable", ["TUTORMAX_DATABASE_URL", "TUTORMAX_SOURCE_URL"])
def test_a_server_that_lets_nobody_in_is_quoted_in_a_sentence(
    variable: str,
    state: str,
    message: str,
    platform: Platform,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with refusing_server(state, message) as url:
        url = url.set(username="tutormax", password=PASSWORD)
        monkeypatch.setenv(variable, url.render_as_string(hide_password=False))
        result = invoke("db", "status")

    assert result.exit_code == 1
    assert f"{describe(url)} (from {variable})" in result.stdout
    [sentence] = result.stderr.splitlines()
    assert sentence.startswith("Error: PostgreSQL says: connection failed: connection to server")
    assert sentence.endswith(f"FATAL:  {message}")
    assert PASSWORD not in result.output


def test_an_address_where_nobody_answers_is_said_in_a_sentence(
    platform: Platform, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address, said in (
        ("127.0.0.1:1/platform", 'connection to server at "127.0.0.1", port 1 failed: Connection'),
        ("nowhere.invalid/platform", "failed to resolve host 'nowhere.invalid'"),
        ("127.0.0.1:1/platform?sslmode=full", 'invalid sslmode value: "full"'),
    ):
        monkeypatch.setenv("TUTORMAX_SOURCE_URL", f"postgresql://tutormax:{PASSWORD}@{address}")
        result = invoke("db", "status")
        assert result.exit_code == 1
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert PASSWORD not in result.output


def test_an_upgrade_can_be_asked_first(platform: Platform, invoke: Invoke) -> None:
    # As the replaced service left it: names for values, and a time of day.
    platform.execute(
        "ALTER TABLE tutor_performance_metrics"
        " DROP CONSTRAINT uq_tutor_performance_metrics_tutor_date_window"
    )
    platform.execute(
        "INSERT INTO tutors (tutor_id, name, email, onboarding_date, status, subjects)"
        " VALUES ('t', 'n', 'e', now(), 'active', '{}')"
    )
    platform.execute(
        'INSERT INTO tutor_performance_metrics (metric_id, tutor_id, calculation_date, "window",'
        " sessions_completed, no_show_count, performance_tier)"
        " VALUES ('m', 't', '2025-11-07 03:04Z', 'SEVEN_DAY', 1, 0, 'AT_RISK')"
    )
    before = platform.metrics()

    asked = invoke("db", "upgrade", "--dry-run")
    assert asked.exit_code == 0
    assert platform.metrics().equals(before)
    assert "not managed" in invoke("db", "status").stdout

    done = invoke("db", "upgrade")
    assert done.exit_code == 0
    assert done.stdout == asked.stdout
    [row] = platform.metrics().select("window", "performance_tier").rows()
    assert row == ("7day", "At Risk")
    assert invoke("db", "status").exit_code == 0

    # The old service was not stopped and writes one more night.
    platform.execute(
        'INSERT INTO tutor_performance_metrics (metric_id, tutor_id, calculation_date, "window",'
        " sessions_completed, no_show_count, performance_tier)"
        " VALUES ('n', 't', '2025-11-08 03:04Z', 'SEVEN_DAY', 1, 0, 'AT_RISK')"
    )
    status = invoke("db", "status")
    assert status.exit_code == 1
    assert "found 1 rows with another name in window" in status.stdout
    assert "`tutormax db upgrade`" in status.stdout.splitlines()[-1]
    assert "window names changed in 1 rows" in invoke("db", "upgrade", "--dry-run").stdout
    assert invoke("db", "upgrade").exit_code == 0
    assert invoke("db", "status").exit_code == 0


def test_an_upgrade_of_a_strange_database_is_refused(
    empty_platform: Platform, invoke: Invoke
) -> None:
    result = invoke("db", "upgrade")

    assert result.exit_code == 1
    assert "Error: expected the platform's table 'tutors'" in words(result.stderr)


def test_only_the_embedded_server_is_stopped(platform: Platform, invoke: Invoke) -> None:
    result = invoke("db", "stop")

    assert result.exit_code == 2
    assert "The database comes from TUTORMAX_DATABASE_URL" in result.stderr


def test_the_demo_does_not_write_into_a_given_database(platform: Platform, invoke: Invoke) -> None:
    result = invoke("demo")

    assert result.exit_code == 2
    assert "TUTORMAX_DATABASE_URL is set, and the demo writes synthetic rows" in result.stderr
    with platform.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM tutors")) == 0


def test_what_was_set_aside_is_shown(small_platform: Platform, invoke: Invoke) -> None:
    result = invoke("set-aside", "--date", DAY)
    assert result.exit_code == 1
    assert f"Materialize sessions_set_aside for {DAY} first." in words(result.stderr)

    small_platform.run(DAY)
    result = invoke("set-aside", "--date", DAY, "--json", "--limit", "1000")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["date"], report["values"]) == (DAY, len(report["rows"]))
    stored = small_platform.partition("sessions_set_aside", DAY)
    assert report["values"] == len(stored) + len(
        small_platform.partition("tutor_events_set_aside", DAY)
    )
    assert set(report["rows"][0]) == set(stored.columns)
    keys = [(row["source_table"], row["row_key"], row["column"]) for row in report["rows"]]
    assert keys == sorted(keys)
    assert {table for table, *_ in keys} == {"sessions", "student_feedback", "tutor_events"}

    result = invoke("set-aside", "--date", DAY, "--limit", "2")
    assert result.exit_code == 0
    shown = words(result.stdout)
    assert f"{report['values']} values set aside for {DAY}" in shown
    assert "The first 2 are shown; --limit shows more." in shown
    assert invoke("set-aside", "--date", "2999-01-01").exit_code == 2


def test_generated_rows_end_today_unless_told(platform: Platform, invoke: Invoke) -> None:
    assert invoke("generate", "--tutors", "2", "--days", "5").exit_code == 0

    with platform.engine.connect() as connection:
        newest = connection.scalar(sa.text("SELECT max(scheduled_start) FROM sessions"))
    assert 0 < (today(timezone="UTC") - newest.date()).days <= 5
