"""The command ``python -m benchmarks``: what it measures, says and refuses."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from psycopg import sql
from typer.testing import CliRunner, Result

from benchmarks import __main__ as command
from benchmarks import again, processes, report, scale
from benchmarks.answers import TWIN
from benchmarks.contestants import Measured
from benchmarks.platforms import Platform, PlatformError, Size, generated
from benchmarks.stages import StagesError, stages
from tutormax_assets.database.tables import TABLES_OF_DATES
from tutormax_assets.settings import load_settings
from tutormax_assets_tests import conftest

pytestmark = pytest.mark.extended

KEYS = {
    "case",
    "tutors",
    "sessions",
    "date",
    "seconds",
    "ratio_to",
    "peak_rss_bytes",
    "peer_peak_rss_bytes",
    "answers_equal",
    "machine",
}


@pytest.fixture
def opened(measured_platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home that leads the command to the platform of the tests."""

    @contextmanager
    def opened_here(home: Path) -> Iterator[Platform]:
        yield measured_platform

    monkeypatch.setattr(command, "opened", opened_here)
    return measured_platform.home


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("in_this_process")
def test_one_date_is_measured_by_stage_and_against_each_peer(
    opened: Path, tmp_path: Path, measured_platform: Platform
) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--repeats", 1, "--peers", "sql,loop,floor", "--loop-tutors", 5]
    result = run("daily", "--home", opened, *arguments, "--json", file)

    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert figures.keys() >= KEYS
    seconds = figures["seconds"]
    assert seconds.keys() == {
        "read",
        "compute",
        "persist",
        "explain",
        "read_to_persisted",
        "run",
        "whole_process",
        "peers",
    }
    parts = seconds["read"] + seconds["compute"] + seconds["persist"]
    assert seconds["read_to_persisted"] == pytest.approx(parts, abs=0.001)
    assert figures["ratio_to"] == {
        name: pytest.approx(taken / seconds["read_to_persisted"], abs=0.01)
        for name, taken in seconds["peers"].items()
    }
    scaled = figures["scaled_from"]["loop"]
    assert seconds["peers"]["loop"] == pytest.approx(
        scaled["seconds"] * scaled["of"] / 5, abs=0.001
    )
    assert figures["answers_equal"] == {
        "sql": True,
        "loop": True,
        "floor": True,
        "oracle": True,
        "all": True,
    }
    assert "30 tutors" in result.output

    tables = [sql.Identifier(name) for name in TABLES_OF_DATES]
    rows = sql.SQL(" UNION ALL ").join(sql.SQL("SELECT count(*) FROM {}").format(t) for t in tables)
    day = measured_platform.end
    with measured_platform.connect() as connection:
        assert sum(number for (number,) in connection.execute(rows)) > 0
        measured_platform.forget(day, day)
        assert sum(number for (number,) in connection.execute(rows)) == 0
    assert not list((opened / "storage").glob(f"*/{day}.*"))


def test_a_command_whose_peer_differs_fails(
    opened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [kept] = [r for r in json.loads(command.RESULTS.read_text()) if r["case"] == "start-up"]
    result = {**kept, "answers_equal": {"oracle": False, "all": False}}
    result["rows_differing"] = {"oracle": 2}
    monkeypatch.setattr("benchmarks.start_up.measure", lambda *_, **__: result)
    kept_before = command.RESULTS.read_text()
    file = tmp_path / "figures.json"
    ended = run("start-up", "--home", opened, "--json", file, "--readme")

    assert ended.exit_code == 1
    assert "2 rows differ" in ended.output
    assert json.loads(file.read_text()) == result
    assert command.RESULTS.read_text() == kept_before


@pytest.mark.usefixtures("in_this_process")
def test_a_second_run_writes_the_rows_that_changed(measured_platform: Platform) -> None:
    source = "SELECT md5(string_agg(s::text, '' ORDER BY session_id)) FROM sessions AS s"
    with measured_platform.connect() as connection:
        before = connection.execute(source).fetchone()
        result = again.measure(measured_platform, repeats=1)
        after = connection.execute(source).fetchone()

    assert after == before
    assert result["answers_equal"]["all"]
    assert result["tutors_changed"] == 1
    assert 1 <= result["rows_changed"] == result["rows_written"] <= 3
    assert "1 of 30 tutors changed" in report.markdown([result])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["weekly"], "there is no case weekly; known: daily, backfill, again, start-up, all"),
        (["daily", "--peers", "sql,spark"], "--peers names spark; known: sql, pandas"),
        (["daily", "--end", "today"], "--end is 'today'; expected YYYY-MM-DD"),
    ],
)
def test_wrong_use_is_refused(arguments: list[str], said: str) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert said in result.output


def test_a_run_that_is_not_on_record_is_no_measurement(measured_platform: Platform) -> None:
    since = datetime.now(UTC) + timedelta(days=1)
    with pytest.raises(StagesError, match=r"has no run on record since .* expected at least one"):
        stages(measured_platform.home, since=since)


def test_a_platform_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "10x5x9").write_text("in the way")
    chosen = generated(tmp_path, Size(10, 5, 9), end=date(2025, 11, 7))
    with pytest.raises(PlatformError, match="10x5x9 is no folder"), chosen:
        pass


def test_a_command_is_measured_and_one_that_fails_says_why(tmp_path: Path) -> None:
    done = processes.run(["sh", "-c", "cat"], environment={}, folder=tmp_path, stdin="given")
    assert done.output == "given"

    with pytest.raises(processes.CommandError, match="exit code 3: no luck"):
        processes.run(["sh", "-c", "echo no luck >&2; exit 3"], environment={}, folder=tmp_path)


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    results: list[dict[str, Any]] = json.loads(command.RESULTS.read_text(encoding="utf-8"))
    text = command.README.read_text(encoding="utf-8")

    assert {result["case"] for result in results} == set(command.CASES)
    assert all(result["answers_equal"]["all"] for result in results)
    assert report.in_readme(text, results) == text


def test_results_take_the_place_of_those_of_the_same_case_and_size(tmp_path: Path) -> None:
    results = json.loads(command.RESULTS.read_text(encoding="utf-8"))
    file, readme = tmp_path / "results.json", tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    command.keep(results, file=file, readme=readme)
    again_measured = {**results[0], "tutors": 7}
    command.keep([again_measured, results[0]], file=file, readme=readme)

    kept = json.loads(file.read_text())
    assert len(kept) == len(results) + 1
    assert again_measured in kept
    assert readme.read_text() == (
        f"before\n{report.BEGIN}\n{report.markdown(kept)}{report.END}\nafter\n"
    )
    with pytest.raises(ValueError, match="The README has no lines"):
        report.in_readme("nothing", kept)


@pytest.fixture
def scale_of(
    measured_platform: Platform, computed: conftest.Platform, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The home of the platform, which is computed without workers."""

    @contextmanager
    def opened_here(home: Path) -> Iterator[Platform]:
        yield measured_platform

    def product(platform: Platform, *arguments: str, variables: Mapping[str, str]) -> Measured:
        since = datetime.now(UTC)
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            conftest.Platform(load_settings(), computed.engine).run(arguments[-1])
        seconds = {**stages(platform.home, since=since), "whole_process": 1.0}
        return Measured(seconds, peak_rss_bytes=1, output={})

    url = computed.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", url)
    monkeypatch.setenv("TUTORMAX_HOME", str(computed.settings.home_path))
    monkeypatch.setattr(scale, "opened", opened_here)
    monkeypatch.setattr(scale, "product", product)
    monkeypatch.setattr(scale, "WORKERS", (0,))
    return measured_platform.home


def run_scale(home: Path) -> Result:
    app = typer.Typer()
    app.command()(scale.main)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["--home", str(home)])


def test_rows_that_differ_from_those_of_one_process_are_counted(
    scale_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_scale(scale_of)

    assert result.exit_code == 0, result.output
    [here] = (line.split("│")[1:-1] for line in result.output.splitlines() if "│" in line)
    assert [cell.strip() for cell in (here[0], here[-1])] == ["none", "0"]

    keep = scale._keep

    def keep_another(platform: Platform) -> None:
        keep(platform)
        with platform.connect() as connection:
            connection.execute(
                sql.SQL("UPDATE {} SET no_show_count = no_show_count + 1").format(TWIN)
            )

    monkeypatch.setattr(scale, "_keep", keep_another)
    result = run_scale(scale_of)
    assert result.exit_code == 1
    assert result.output.splitlines()[-2].split("│")[-2].strip() == str(3 * 29)
