"""Passwords of the environment show nowhere: no output, no record, no error, no argument list."""

import os
import subprocess
import sys
import traceback
from contextlib import suppress

import psutil
import pytest
import sqlalchemy as sa

from tutormax_assets.database.connection import create_engine, database_url
from tutormax_assets.settings import load_settings
from tutormax_assets.source.platform import PlatformDatabase
from tutormax_assets.source.postgres import Source, unknown_tutors
from tutormax_assets.source.streams import SourceError
from tutormax_assets_tests.cli.conftest import Invoke
from tutormax_assets_tests.conftest import Platform
from tutormax_assets_tests.tls import refusing_server

DAY = "2025-11-07"
NOBODY = "127.0.0.1:1/platform"
SECRETS = {name: f"hunter2-{name}" for name in ("writer", "reader", "alerts", "five", "odd")}


def assert_discreet(*shown: object) -> None:
    for text in map(str, shown):
        assert [secret for secret in SECRETS.values() if secret in text] == []


@pytest.fixture
def environment(small_platform: Platform, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Every secret that there can be, all of them of use."""

    def url(user: str) -> str:
        return small_platform.url.set(password=SECRETS[user]).render_as_string(hide_password=False)

    variables = {
        "TUTORMAX_DATABASE_URL": url("writer"),
        "TUTORMAX_SOURCE_URL": url("reader"),
        "TUTORMAX_ALERTS": f"json://user:{SECRETS['alerts']}@127.0.0.1:1/?retry=0",
        # A home whose every file is looked at.
        "DAGSTER_HOME": str(small_platform.settings.home_path / "dagster"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def test_commands_that_succeed_and_commands_that_fail_show_and_keep_no_secret(
    small_platform: Platform,
    environment: dict[str, str],
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def expect(code: int, *arguments: str, **variables: str) -> None:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            result = invoke(*arguments)
        assert result.exit_code == code, result.output
        assert_discreet(result.stdout, result.stderr)

    run = ("run", "--date", DAY, "--verbose", "--max-retries", "1", "--retry-delay", "0")
    expect(0, "db", "upgrade")
    expect(0, "db", "status")
    expect(0, *run)
    expect(0, "set-aside", "--date", DAY)
    expect(0, "cleanup", "--dry-run")
    expect(0, "alert")
    expect(1, "alert", "--test")
    expect(1, "restore", "--month", "2001-01")
    to_nobody = f"postgresql://u:{SECRETS['odd']}@{NOBODY}"
    expect(1, *run, TUTORMAX_SOURCE_URL=to_nobody)
    expect(1, *run, TUTORMAX_DATABASE_URL=to_nobody)
    expect(1, "db", "status", TUTORMAX_DATABASE_URL=to_nobody)
    for malformed in (f"postgresql://u:p@{SECRETS['odd']}@h/db", f"{to_nobody}?{SECRETS['odd']}=1"):
        expect(2, "db", "status", TUTORMAX_DATABASE_URL=malformed)
        expect(2, *run, TUTORMAX_DATABASE_URL=malformed)
    five = {
        "POSTGRES_HOST": "127.0.0.1",
        "POSTGRES_PORT": "1",
        "POSTGRES_USER": "u",
        "POSTGRES_PASSWORD": SECRETS["five"],
        "POSTGRES_DB": "platform",
    }
    expect(1, "cleanup", TUTORMAX_DATABASE_URL="", **five)
    expect(2, "cleanup", TUTORMAX_DATABASE_URL="", **{**five, "POSTGRES_PORT": SECRETS["odd"]})

    home = small_platform.settings.home_path
    kept = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert any(b"daily_metrics" in content for content in kept)
    assert any(b"Connection refused" in content for content in kept)
    for secret in SECRETS.values():
        assert not any(secret.encode() in content for content in kept)


def test_no_process_has_a_secret_in_its_arguments(environment: dict[str, str]) -> None:
    code = "from tutormax_assets.cli import app; app(prog_name='tutormax')"
    arguments = [sys.executable, "-c", code, "run", "--date", DAY]
    seen: set[str] = set()
    with subprocess.Popen(
        arguments, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        family = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for member in (family, *family.children(recursive=True)):
                    seen.add(" ".join(member.cmdline()))
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert process.stdout is not None
        shown = process.stdout.read()

    assert process.returncode == 0, shown
    assert " ".join(arguments) in seen
    assert_discreet(shown, *seen)


def test_errors_and_what_is_printed_of_objects_hold_no_secret(
    environment: dict[str, str],
) -> None:
    settings = load_settings()
    database = PlatformDatabase(settings)
    with database.engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
    assert settings.database_url is not None
    assert SECRETS["writer"] in settings.database_url.get_secret_value()
    objects = [database, database.url, database.engine, database.engine.pool, database.source]
    assert_discreet(*objects, *map(repr, objects), repr(settings), settings.model_dump_json())
    database.close()

    with refusing_server("28P01", "password authentication failed") as server:
        for url in (
            server.set(username="u", password=SECRETS["reader"]),
            sa.make_url(f"postgresql+psycopg://u:{SECRETS['reader']}@{NOBODY}"),
            sa.make_url(f"postgresql+psycopg://u:{SECRETS['reader']}@{NOBODY}?sslmode=x"),
            database_url(settings).set(database="nowhere"),
        ):
            engine = create_engine(url)
            with pytest.raises(sa.exc.OperationalError) as writing:
                engine.connect()
            with pytest.raises(SourceError) as reading:
                unknown_tutors(Source(url), ["t"])
            engine.dispose()
            assert reading.value.__cause__ is not None
            for error in (writing.value, reading.value):
                assert_discreet(*traceback.format_exception(error), repr(error))
