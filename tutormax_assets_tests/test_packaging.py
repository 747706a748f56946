"""What a wheel holds, and which interpreter ``make`` installs into."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tutormax_assets

ROOT = Path(__file__).parent.parent
PACKAGE = Path(tutormax_assets.__file__).parent


def test_a_wheel_holds_every_file_that_is_not_python() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns = tool["setuptools"]["package-data"]
    held = {
        file
        for package, globs in patterns.items()
        for glob in globs
        for file in PACKAGE.parent.joinpath(*package.split(".")).glob(glob)
    }
    # Settings and caches of the linter are of no use in a wheel.
    there = {
        file
        for file in PACKAGE.rglob("*")
        if file.is_file()
        and file.suffix not in (".py", ".pyc")
        and file.name != "ruff.toml"
        and ".ruff_cache" not in file.parts
    }
    assert there == held
    for folder in {file.parent for file in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").is_file()


@pytest.mark.parametrize("is_same", [True, False])
def test_make_refuses_an_interpreter_that_did_not_make_the_environment(
    is_same: bool, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n{f"exec {sys.executable}" if is_same else "echo"} "$@"\n')
    python.chmod(0o755)

    def made(**variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["make", "same-python"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    named = made(PYTHON=sys.executable)

    assert named.returncode == (0 if is_same else 2)
    assert ("but another interpreter made .venv: " in named.stderr) == (not is_same)
    assert ("Remove .venv to use this one: rm -rf .venv" in named.stderr) == (not is_same)
    assert made().returncode == 0


def test_make_help_lists_every_target_with_a_description() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    described = {
        line.split(":")[0]
        for line in makefile.splitlines()
        if "## " in line and not line.startswith("\t")
    }
    said = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.split()[1] for line in said.stdout.splitlines()} == described
    assert "e2e" in described
