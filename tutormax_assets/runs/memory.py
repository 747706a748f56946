"""Running out of memory: how much a process may have, and which setting to turn."""

import re
import resource
from pathlib import Path

ADDRESS_SPACE = "ulimit -v"
_ADVICE = (
    "Raise it; or let a run need less: fewer dates at once with TUTORMAX_MAX_DATES_PER_RUN, or a"
    " date in parts with --tutors. No partition is half-written; run the dates again"
)
# Each thread reserves address space for its allocations, most of which is never used.
_ADVICE_ON_ADDRESS_SPACE = " MALLOC_ARENA_MAX=2 in the environment lets threads reserve less of it."
_MEMORY_ERRORS = {"MemoryError", "ArrowMemoryError", "_ArrayMemoryError"}
# What is said by libraries, some of which know of no error of their own for it.
_REFUSED = re.compile(
    r"cannot allocate memory|memory allocation|failed to map segment|can't start new thread"
    r"|out of memory|panicked|could not load|ReadRecord failed",
    re.IGNORECASE,
)
_UNLIMITED = 1 << 60


def out_of_memory(found: str) -> str:
    """The sentence for a run that got no memory.

    Args:
        found: What happened, as a clause.
    """
    found_limits = limits()
    allowed = " and ".join(f"{limit} {_size(size)}" for limit, size in found_limits.items())
    on_address_space = _ADVICE_ON_ADDRESS_SPACE if ADDRESS_SPACE in found_limits else ""
    return (
        f"{found}. The limit of memory is {allowed or 'that of the machine'}. {_ADVICE}."
        f"{on_address_space}"
    )


def is_out_of_memory(class_name: str | None, text: str) -> bool:
    """Whether an error means that the process got no memory.

    Only where its address space is limited is an allocation refused; without such a limit, what
    sounds like it is the database's or something else.

    Args:
        class_name: Name of the error's class.
        text: What the error says.
    """
    if class_name in _MEMORY_ERRORS:
        return True
    return ADDRESS_SPACE in limits() and _REFUSED.search(text) is not None


def limits(root: Path = Path("/")) -> dict[str, int]:
    """The limits of this process that are set, in bytes, by what sets them.

    Args:
        root: Where ``/proc`` and ``/sys`` are.
    """
    found = {}
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found[ADDRESS_SPACE] = soft
    if (of_group := _of_control_groups(root)) is not None:
        found["the control group's"] = of_group
    return found


def _of_control_groups(root: Path) -> int | None:
    """The lowest limit of the control groups that the process is in, of either version of them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be that of the host, of which only the last folder is there.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            found.append(_number(folder / name))
            if folder == base:
                break
    return min((size for size in found if size is not None), default=None)


def _number(path: Path) -> int | None:
    try:
        size = int(path.read_text())
    # There is no such file, or it says "max".
    except (OSError, ValueError):
        return None
    return size if size < _UNLIMITED else None


def _size(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
