"""What a newcomer reads first."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from tutormax_assets.cli import app
from tutormax_assets_tests.cli.conftest import Invoke, words

Command = TyperCommand | TyperGroup


def commands(group: TyperGroup, *path: str) -> Iterator[tuple[tuple[str, ...], Command]]:
    for name, command in group.commands.items():
        assert isinstance(command, TyperCommand | TyperGroup)
        yield (*path, name), command
        if isinstance(command, TyperGroup):
            yield from commands(command, *path, name)


ROOT = typer.main.get_command(app)
assert isinstance(ROOT, TyperGroup)
COMMANDS = dict(commands(ROOT))


def test_there_are_exactly_these_commands() -> None:
    assert {" ".join(path) for path in COMMANDS} == {
        "run",
        "backfill",
        "explain",
        "what-if",
        "report",
        "history",
        "table",
        "set-aside",
        "cleanup",
        "restore",
        "demo",
        "generate",
        "dev",
        "drift",
        "live",
        "quality",
        "health",
        "alert",
        "db",
        "db init",
        "db upgrade",
        "db roles",
        "db status",
        "db stop",
        "db psql",
        "status",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_a_help_text(path: tuple[str, ...], invoke: Invoke) -> None:
    command = COMMANDS[path]
    assert command.help
    for option in command.params:
        assert isinstance(option, TyperOption | TyperArgument)
        assert option.help, f"{' '.join(path)} {option.name}"
    for flag in ("--help", "-h"):
        result = invoke(*path, flag)
        assert result.exit_code == 0
        assert words(command.help.splitlines()[0])[:40] in words(result.stdout)


def test_no_command_shows_the_help(invoke: Invoke) -> None:
    for arguments in ([], ["db"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Usage: tutormax" in result.output


def test_the_version_is_that_of_the_package(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"tutormax {version('tutormax-assets')}\n"


def test_an_unknown_option_is_wrong_use(invoke: Invoke) -> None:
    assert invoke("run", "--dates", "2025-11-07").exit_code == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from tutormax_assets.cli import app\n"
        "try: app(['run', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'dagster', 'polars', 'sqlalchemy', 'psycopg'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
