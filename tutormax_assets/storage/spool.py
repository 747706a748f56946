"""A folder for the rows that a run is working on, so that they need no memory.

The kernel frees the lock of a folder however its process ends. What a killed process left behind is
removed by the next one.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout


@contextmanager
def spool_folder(home: Path) -> Iterator[Path]:
    """An empty folder that is removed after the block.

    Args:
        home: Folder of everything local.
    """
    spool = home / "spool"
    spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left_behind in spool.glob("*.lock"):
        with suppress(Timeout), FileLock(left_behind, blocking=False):
            _remove(left_behind)
    path = spool / f"{uuid4().hex}.lock"
    with FileLock(path):
        folder = path.with_suffix("")
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            _remove(path)


def _remove(lock: Path) -> None:
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)
