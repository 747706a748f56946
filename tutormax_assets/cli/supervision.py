"""The process above ``tutormax run`` and ``backfill``: it outlives them and says how they died.

A process that runs out of memory can say nothing: the kernel kills it, or a library aborts it. So
the command runs in a child, which is forked before anything heavy is imported and before there are
threads. Only what is imported already is used here, until the child is dead.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.text import Text

from tutormax_assets.cli.terminal import EXIT_FAILED, messages, output

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OF_MEMORY = {
    signal.SIGKILL: "as the kernel does when memory runs out",
    signal.SIGABRT: "as libraries do that get no memory",
    signal.SIGSEGV: "as may happen when memory runs out",
    signal.SIGBUS: "as may happen when memory runs out",
    signal.SIGTRAP: "as may happen when memory runs out",
}
_PR_SET_PDEATHSIG = 1


def in_a_child(command: Callable[[], None]) -> NoReturn:
    """Run a command in a child process, wait for it, and exit as it did.

    A child that a signal or a library ended is reported on standard error and in Dagster's records,
    and makes this process exit with 1.
    """
    parent = os.getpid()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        _run(command, writing)
    os.close(writing)
    for number in _FORWARDED:
        signal.signal(number, lambda number, _: _forward(number, child))
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 or os.read(reading, 1):
        sys.exit(code)
    sentence = _sentence(code, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    messages.print(Text.assemble(("Error:", "bold red"), " ", sentence), soft_wrap=True)
    if "--json" in sys.argv:
        output.print(json.dumps({"error": sentence}), soft_wrap=True)
    _put_on_record(child, sentence)
    sys.exit(EXIT_FAILED)


def _run(command: Callable[[], None], writing: int) -> NoReturn:
    """Run the command and exit; before that, let the parent know that it need not explain."""
    # SIGTERM ends a command as Ctrl-C does, before Dagster takes care of both as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except BaseException as error:
        # Only the limit of the address space makes Python itself raise something, at any place.
        if not isinstance(error, SystemExit) and _is_out_of_memory(error):
            os._exit(EXIT_FAILED)
        os.write(writing, b".")
        raise
    os.write(writing, b".")
    sys.exit()


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, where the system can: else nobody would wait for the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _forward(number: int, child: int) -> None:
    # Ctrl-C reaches every process of the terminal's foreground by itself.
    if number == signal.SIGINT and _is_in_foreground():
        return
    os.kill(child, number)


def _is_in_foreground() -> bool:
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_out_of_memory(error: BaseException) -> bool:
    from tutormax_assets.runs.memory import is_out_of_memory

    return is_out_of_memory(type(error).__name__, str(error))


def _sentence(code: int, peak: int) -> str:
    from tutormax_assets.runs.memory import out_of_memory

    if code > 0:
        found = "The run was given up in the midst, as libraries do that get no memory"
    else:
        number = signal.Signals(-code)
        found = f"The run was ended by {number.name}"
        if number not in _OF_MEMORY:
            return f"{found}. No partition is half-written; run the dates again."
        found += f", {_OF_MEMORY[number]}"
    return out_of_memory(f"{found}; it held up to {peak / 2**20:,.0f} MiB")


def _put_on_record(child: int, sentence: str) -> None:
    """Tell Dagster; in a process of its own, which may be short of memory as well.

    If that fails, the next run does it.
    """
    helper = os.fork()
    if helper:
        os.waitpid(helper, 0)
        return
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        from tutormax_assets.api.runs import end_killed_process
        from tutormax_assets.settings import load_settings

        end_killed_process(load_settings(), child, sentence)
    finally:
        os._exit(0)
