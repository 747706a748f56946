"""Calling ``tutormax`` in this process, and in one of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from tutormax_assets.cli import app

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Iterator[Invoke]:
    """Call a command; an exception that it does not turn into a sentence fails the test."""
    logger = logging.getLogger("tutormax_assets")
    before = (list(logger.handlers), logger.level, logger.propagate)

    def call(*arguments: str) -> Result:
        # Each command is a process of its own, so it sets up its log once.
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False)

    yield call
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def tutormax(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own, with the environment of the test."""
    code = "from tutormax_assets.cli import app; app(prog_name='tutormax')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )


def words(text: str) -> str:
    """The text without the line breaks and frames that a terminal's width brings about."""
    return " ".join(text.replace("│", " ").split())
