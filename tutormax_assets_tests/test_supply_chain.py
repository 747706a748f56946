"""Locked versions have hashes, are looked up as they are, and each dependency has its reason."""

import http.server
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tutormax_assets_tests.defs.automation.conftest import serving

ROOT = Path(__file__).parent.parent
LOCKS = (
    "requirements.lock",
    "requirements-dev.lock",
    "requirements-bench.lock",
    "deploy/requirements.lock",
)
NAME = re.compile(r"^([A-Za-z0-9.-]+)")


def requirements(lock: str) -> list[str]:
    """Each requirement of a lock with the lines that go on with it."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [block for block in re.split(r"\n(?=\S)", "\n".join(lines)) if block.strip()]


class VulnerabilityDatabase(http.server.ThreadingHTTPServer):
    """Answers as osv.dev does, and keeps what it was asked."""

    def __init__(self, *, vulnerable: str = "", status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.vulnerable = vulnerable
        self.status = status
        self.asked: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/query"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: VulnerabilityDatabase

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.server.asked[name] = query["version"]
        found: dict[str, Any] = {}
        if name == self.server.vulnerable:
            affected = {"package": query["package"], "ranges": [], "versions": [query["version"]]}
            found = {"vulns": [{"id": "OSV-1", "summary": "A hole.", "affected": [affected]}]}
        body = json.dumps(found).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def audit(url: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """``make audit`` with the environment of this test."""
    bin_folder = Path(sys.executable).parent
    return subprocess.run(
        ["make", "-o", ".venv/installed-dev", f"BIN={bin_folder}", "audit", f"OSV_URL={url}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_version_has_hashes_and_no_lock_names_an_index(lock: str) -> None:
    locked = requirements(lock)

    assert len(locked) > 50
    for requirement in locked:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==\S+", requirement), requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", requirement), requirement
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert "://" not in text
    assert "index-url" not in text


def test_an_audit_asks_for_every_locked_version(tmp_path: Path) -> None:
    database = VulnerabilityDatabase()
    with serving(database):
        result = audit(database.url, tmp_path)

    assert result.returncode == 0, result.stderr
    assert "No known vulnerabilities found" in result.stdout
    needed = {
        name: version
        for lock in LOCKS
        for requirement in requirements(lock)
        if " ; " not in requirement.splitlines()[0]
        for name, version in re.findall(r"^([\w.-]+)(?:\[.*?\])?==(\S+)", requirement)
    }
    assert needed.items() <= database.asked.items()
    assert {"dagster", "pytest", "s3fs"} <= needed.keys()


def test_an_audit_fails_on_a_vulnerability_and_names_it(tmp_path: Path) -> None:
    database = VulnerabilityDatabase(vulnerable="dagster")
    with serving(database):
        result = audit(database.url, tmp_path)

    assert result.returncode != 0
    assert re.search(r"^dagster +\S+ +OSV-1", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("answer", ["none", "error"])
def test_an_audit_that_cannot_ask_fails_with_a_sentence(tmp_path: Path, answer: str) -> None:
    database = VulnerabilityDatabase(status=503)
    url = database.url if answer == "error" else "http://127.0.0.1:1/v1/query"
    with serving(database):
        result = audit(url, tmp_path)

    assert result.returncode != 0
    assert result.stdout == ""
    [sentence, _] = result.stderr.splitlines()
    assert sentence.startswith(f"Nothing was audited: {url} cannot be reached, or does not answer")


def test_each_dependency_has_its_line_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = [
        *project["project"]["dependencies"],
        *(name for names in project["project"]["optional-dependencies"].values() for name in names),
        *(name for name in project["dependency-groups"]["dev"] if isinstance(name, str)),
        *project["dependency-groups"]["build"],
        *project["dependency-groups"]["bench"],
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| dependency | why it is here |")[1].split("\n\n")[0]
    explained = {
        name.strip() for row in table.splitlines()[2:] for name in row.split("|")[1].split(",")
    }

    names = {match[1] for name in declared if (match := NAME.match(name))}
    assert explained == names
