"""Calling ``tutormax`` in this process, and in one of its own."""

import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
from typer.testing import CliRunner, Result

from tutormax_assets.cli import app
from tutormax_assets.database.date_locks import DateLocks
from tutormax_assets.defs.log import LOGGER
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets_tests.conftest import Platform

Invoke = Callable[..., Result]

DAY = "2025-11-07"
MAIN = "import sys; sys.argv[0] = 'tutormax'; from tutormax_assets.cli import main; main()"
SECONDS = 60


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


def start(*arguments: str, address_space: int | None = None) -> "subprocess.Popen[str]":
    def limit() -> None:
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


@contextmanager
def date_is_taken(platform: Platform) -> Iterator[None]:
    """Keep runs of the date waiting."""
    log = logging.getLogger(LOGGER)
    locks = DateLocks(platform.engine, [DAY], retrying=RunOptions().retrying(log), log=log)
    locks.take()
    try:
        yield
    finally:
        locks.release()


def until_it_waits(process: "subprocess.Popen[str]") -> psutil.Process:
    """The process that computes, once its run is on record and waits for its date."""
    assert process.stderr is not None
    line = process.stderr.readline()
    assert f"Another run of {DAY} is under way" in line
    [child] = psutil.Process(process.pid).children()
    return child
