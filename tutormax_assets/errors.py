"""The base classes of all errors that a sentence explains.

Callers decide by these attributes and never by the text of a message.
"""

from collections.abc import Iterator
from typing import ClassVar


class TutormaxError(Exception):
    """A failure whose message says what was found, what was expected and what to do.

    Attributes:
        exit_code: That of a command which ends with it.
        may_pass: Whether the same may succeed when it is tried again.
        affects_every_date: Whether each date of a range by itself would fail as well, because the
            platform cannot be reached, read or written at all.
    """

    exit_code: ClassVar[int] = 1
    may_pass: ClassVar[bool] = False
    affects_every_date: ClassVar[bool] = False


class UsageError(TutormaxError):
    """What was given is unusable: an option, the environment, the policy."""

    exit_code = 2


def affects_every_date(class_name: str | None) -> bool:
    """Whether an error of this class, which Dagster has on record by its name, affects every date.

    Args:
        class_name: Without its module; of a class that is not loaded or not ours, it does not.
    """
    return any(
        one.affects_every_date for one in _subclasses(TutormaxError) if one.__name__ == class_name
    )


def _subclasses(base: type[TutormaxError]) -> Iterator[type[TutormaxError]]:
    yield base
    for subclass in base.__subclasses__():
        yield from _subclasses(subclass)
