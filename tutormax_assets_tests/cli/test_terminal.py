"""What the commands print: in a pipe, on a narrow terminal, as JSON, and when they fail."""

import io
import json
import logging
from datetime import date

import pytest
import typer
from rich.console import Console
from rich.table import Table

from tutormax_assets.cli import terminal
from tutormax_assets.cli.arguments import command_again, dates_in_words
from tutormax_assets.cli.run import _reasons
from tutormax_assets.cli.terminal import Commands, fail, log_to_stderr, show, table
from tutormax_assets_tests.cli.conftest import Invoke

LONG = "a_key_" * 60


def long_table() -> Table:
    block = table(":fire:", "[red]key", "count", right=("count",))
    block.add_row(LONG, ":fire: [bold]7[/]")
    return block


def test_in_a_pipe_a_row_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")

    show(long_table())

    shown = capsys.readouterr().out
    [row] = [line for line in shown.splitlines() if LONG in line]
    assert ":fire: [bold]7[/]" in row
    assert "[red]key" in shown
    assert shown.startswith(":fire:")


def test_on_a_narrow_terminal_a_cell_wraps_and_nothing_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    narrow = Console(file=written, width=80, force_terminal=True, color_system=None, markup=False)
    monkeypatch.setattr(terminal, "output", narrow)

    show(long_table())

    lines = written.getvalue().splitlines()
    cells = [line.split("\N{BOX DRAWINGS LIGHT VERTICAL}")[1] for line in lines[4:-1]]
    assert "".join(cell.strip() for cell in cells) == LONG
    assert max(map(len, lines)) <= 80


@pytest.mark.usefixtures("invoke")
def test_log_lines_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    logging.getLogger("tutormax_assets").error(":fire: [red]%s[/red]", LONG)

    assert capsys.readouterr().err.endswith(f"ERROR :fire: [red]{LONG}[/red]\n")


@pytest.mark.parametrize(
    "variables",
    [{"TUTORMAX_TIMEZONE": "Mars"}, {"TUTORMAX_DATABSE_URL": "postgresql://u@h/d"}],
)
@pytest.mark.parametrize(
    "command",
    ["run", "backfill --from 2025-11-07", "set-aside", "cleanup", "restore --month 2025-11"],
)
def test_wrong_settings_are_one_json_object(
    variables: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    result = invoke(*command.split(), "--json")

    assert result.exit_code == 2
    said = json.loads(result.stdout)["error"]
    assert result.stderr == f"Error: {said}\n"


def test_set_aside_of_a_date_that_was_not_computed_is_one_json_object(invoke: Invoke) -> None:
    result = invoke("set-aside", "--date", "2025-11-07", "--json")

    assert result.exit_code == 1
    assert "There is no partition at" in json.loads(result.stdout)["error"]


def app_that(raises: BaseException | None) -> typer.Typer:
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @app.command()
    def first(as_json: bool = typer.Option(False, "--json")) -> None:
        if raises is None:
            fail("It is wrong.", code=2, days=["2025-11-07"])
        raise raises

    @app.command()
    def second() -> None: ...

    return app


@pytest.mark.parametrize(
    ("raises", "expected"),
    [
        (None, {"error": "It is wrong.", "days": ["2025-11-07"]}),
        (KeyboardInterrupt(), {"error": "It was interrupted."}),
        (
            ValueError("hunter2"),
            {"error": "Unexpected ValueError; standard error shows its traceback."},
        ),
    ],
)
def test_whatever_ends_a_command_is_one_json_object(
    raises: BaseException | None, expected: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)):
        app_that(raises)(["first", "--json"])

    assert json.loads(capsys.readouterr().out) == expected


def test_dates_that_follow_one_another_are_a_range() -> None:
    days = [date(2025, 11, day) for day in (7, 1, 2, 3, 5)]

    assert dates_in_words(days) == "2025-11-01 to 2025-11-03, 2025-11-05, 2025-11-07"


def test_the_reasons_of_a_backfill_are_grouped() -> None:
    from tutormax_assets.api.summary import SYSTEM, AggregationSummary
    from tutormax_assets.dates import midnight

    def summary(day: int, *errors: tuple[str, str]) -> AggregationSummary:
        of_day = [{"tutor_id": tutor, "error": error} for tutor, error in errors]
        return AggregationSummary(midnight(date(2025, 11, day), timezone="UTC"), errors=of_day)

    lines = _reasons(
        [
            summary(5),
            summary(6, (SYSTEM, "metrics of 2025-11-06 are wrong")),
            summary(7, (SYSTEM, "metrics of 2025-11-07 are wrong")),
            summary(8, ("a", "refused"), ("b", "refused")),
        ]
    )

    assert list(lines) == [
        "Failed: 2025-11-06 to 2025-11-07: metrics of the date are wrong",
        "Failed: 2025-11-08, 2 tutors: refused",
    ]


def test_the_command_that_goes_on_keeps_the_options() -> None:
    found: list[str] = []
    app = typer.Typer(cls=Commands)

    @app.command()
    def first(
        context: typer.Context,
        start: str = typer.Option(..., "--from"),
        tutors: list[str] | None = typer.Option(None, "--tutors"),  # noqa: B008
        quiet: bool = typer.Option(False, "--quiet"),
        batch_size: int = typer.Option(5, "--batch-size"),
        size: int = typer.Option(5, "--size"),
    ) -> None:
        found.append(command_again(context, start="2025-11-07"))

    @app.command()
    def second() -> None: ...

    arguments = ["first", "--from", "x", "--tutors", "a b", "--tutors", "c", "--quiet", "--size=6"]
    app(arguments, prog_name="tutormax", standalone_mode=False)

    assert found == ["tutormax first --from 2025-11-07 --tutors 'a b' --tutors c --quiet --size 6"]
