"""The folder for the rows that a run is working on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tutormax_assets.storage.spool import spool_folder

_KILLED = """
import os, sys
from pathlib import Path
from tutormax_assets.storage.spool import spool_folder
with spool_folder(Path(sys.argv[1])) as folder:
    (folder / "rows").write_text("rows")
    os.kill(os.getpid(), 9)
"""


def spooled(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "spool").rglob("*"))


def test_the_folder_is_empty_and_goes_with_its_block(tmp_path: Path) -> None:
    with spool_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []
        (folder / "rows").write_text("rows")

    assert spooled(tmp_path) == []


def test_the_folder_goes_when_the_block_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with spool_folder(tmp_path) as folder:
            (folder / "rows").write_text("rows")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert spooled(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    assert subprocess.run(command, env=dict(os.environ), check=False).returncode == -9
    assert "rows" in spooled(tmp_path)

    with spool_folder(tmp_path) as first:
        assert "rows" not in spooled(tmp_path)
        (first / "first").write_text("rows")
        with spool_folder(tmp_path):
            assert "first" in spooled(tmp_path)
