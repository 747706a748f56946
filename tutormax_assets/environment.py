"""The names in the environment and in ``.env``: one that no setting has is refused."""

import os
import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from io import StringIO
from pathlib import Path

from dotenv.parser import parse_stream

from tutormax_assets.errors import UsageError

DOTENV = Path(".env")
"""The file, in the current folder."""

_PREFIX = "TUTORMAX_"

# Kubernetes sets them for each service of a namespace, by the service's name.
_OF_KUBERNETES = re.compile(r".*_SERVICE_(HOST|PORT(_\w+)?)|.*_PORT(_\d+_\w+)?")

# Two names that are more alike than this are one that is misspelled.
_ALIKE = 0.9


class DotenvError(UsageError):
    """The file ``.env`` cannot be read; the message says why and in which line."""


def unknown_names(known: Collection[str], *, other: Collection[str] = ()) -> list[str]:
    """A sentence for each variable that looks like a setting and is none.

    Args:
        known: Names of the settings.
        other: Names that are no settings, but not unknown either.

    Raises:
        DotenvError: ``.env`` is there and cannot be read.
    """
    variables = [*_of_dotenv(), *((name, "the environment") for name in os.environ)]
    present = {name.upper() for name, _ in variables}
    sentences = []
    for name, place in variables:
        if name.upper() in {*known, *other}:
            continue
        close = _suggestion(name.upper(), known, present)
        if close is not None:
            advice = f"did you mean {close}?" if close else "the README lists the settings"
            sentences.append(f"{name} in {place} is not a setting; {advice}")
    return sentences


def dotenv_state() -> str:
    """The place of ``.env``, and whether it is there."""
    return f"{DOTENV.absolute()}{'' if DOTENV.is_file() else ' (there is no such file)'}"


def _suggestion(name: str, known: Collection[str], present: Collection[str]) -> str | None:
    """The setting that a name may mean, "" if there is none like it; none if it is not ours."""
    if name.startswith(_PREFIX):
        if _OF_KUBERNETES.fullmatch(name):
            return None
        own = [other.removeprefix(_PREFIX) for other in known if other.startswith(_PREFIX)]
        close = get_close_matches(name.removeprefix(_PREFIX), own, n=1)
        return _PREFIX + close[0] if close else ""
    if name.startswith("POSTGRES_"):
        # Other programs read such variables too: one counts only where ours is missing.
        own = [] if f"{_PREFIX}DATABASE_URL" in present else list(set(known) - set(present))
    elif name.startswith("TUTOR"):
        own = list(known)
    else:
        return None
    return next(iter(get_close_matches(name, own, n=1, cutoff=_ALIKE)), None)


def _of_dotenv() -> Iterator[tuple[str, str]]:
    """Each variable of ``.env`` with the place of its line."""
    path = DOTENV.absolute()
    if not path.is_file():
        return
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DotenvError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DotenvError(f"{path}, line {line}: expected UTF-8; save the file anew") from None
    wrong = []
    for binding in parse_stream(StringIO(text)):
        string = binding.original.string
        line = binding.original.line + string[: -len(string.lstrip()) or None].count("\n")
        is_ours = (binding.key or "").upper().startswith((_PREFIX, "POSTGRES_"))
        if binding.error or "\0" in string or (is_ours and binding.value is None):
            wrong.append(line)
        elif binding.key is not None:
            yield binding.key, f"{path}, line {line},"
    if wrong:
        lines = f"line{'s' if len(wrong) > 1 else ''} {', '.join(map(str, wrong))}"
        raise DotenvError(f"{path}, {lines}: expected NAME=value, or # before a comment")
