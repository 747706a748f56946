"""Metrics in the distribution's Prometheus, through node exporter and Pushgateway."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from interop.servers import Server
from tutormax_assets.database.connection import create_engine
from tutormax_assets.database.tables import metrics_metadata, source_metadata
from tutormax_assets.sample import platform as sample_platform

TUTORMAX = str(Path(sys.executable).with_name("tutormax"))
DEPLOY = Path(__file__).parents[1] / "deploy"
DAY = date(2025, 11, 7)
PATIENCE_SECONDS = 20


@dataclass(frozen=True)
class Scraped:
    """A Prometheus that has scraped a run, and the file that the run wrote."""

    port: int
    file: Path

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        query = urllib.parse.urlencode({"query": expression})
        answer = json.loads(get(self.port, f"/api/v1/query?{query}"))
        assert answer["status"] == "success"
        found = answer["data"]["result"]
        return found if answer["data"]["resultType"] == "vector" else [{"value": found}]


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(program: str, *arguments: str, folder: Path, port: int) -> Iterator[int]:
    """A server on loopback, once it answers."""
    path = shutil.which(program)
    assert path, f"{program} is not installed; `make interop` installs it"
    with (folder / f"{program}.log").open("wb") as log:
        process = subprocess.Popen([path, *arguments], cwd=folder, stdout=log, stderr=log)
        try:
            wait_until(lambda: get(port, "/metrics") != "", folder)
            yield port
        finally:
            process.terminate()
            process.wait(10)


def wait_until(is_so: Any, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if is_so():
                return
        except (OSError, urllib.error.URLError):
            pass
        logs = "\n".join(log.read_text()[-500:] for log in folder.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


@pytest.fixture(scope="module")
def scraped(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    folder = tmp_path_factory.mktemp("prometheus")
    textfiles = folder / "textfiles"
    textfiles.mkdir()
    file = textfiles / "tutormax.prom"
    node, gateway, prometheus = free_port(), free_port(), free_port()
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    config = config.replace("9100", str(node)).replace("9091", str(gateway))
    (folder / "prometheus.yml").write_text(re.sub(r"_interval: 1m", "_interval: 1s", config))
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", folder)
    with ExitStack() as stack:
        url = server.url(stack.enter_context(server.database("", {})))
        engine = create_engine(url)
        stack.callback(engine.dispose)
        source_metadata.create_all(engine)
        metrics_metadata.create_all(engine)
        sample_platform.generate(
            engine, tutors=80, sessions_per_tutor=50, days=130, end=DAY, seed=5, bad_rows=0.02
        )
        stack.enter_context(
            running(
                "prometheus-node-exporter",
                "--collector.disable-defaults",
                "--collector.textfile",
                f"--collector.textfile.directory={textfiles}",
                f"--web.listen-address=127.0.0.1:{node}",
                folder=folder,
                port=node,
            )
        )
        stack.enter_context(
            running(
                "prometheus-pushgateway",
                f"--web.listen-address=127.0.0.1:{gateway}",
                folder=folder,
                port=gateway,
            )
        )
        subprocess.run(
            [TUTORMAX, "backfill", "--from", "2025-11-06", "--to", str(DAY)],
            env={
                "PATH": os.environ["PATH"],
                "TUTORMAX_HOME": str(folder / "home"),
                "TUTORMAX_DATABASE_URL": url.render_as_string(hide_password=False),
                "TUTORMAX_METRICS_FILE": str(file),
                "TUTORMAX_PUSHGATEWAY": f"http://127.0.0.1:{gateway}",
            },
            cwd=folder,
            capture_output=True,
            check=True,
        )
        stack.enter_context(
            running(
                "prometheus",
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=data",
                f"--web.listen-address=127.0.0.1:{prometheus}",
                folder=folder,
                port=prometheus,
            )
        )
        found = Scraped(prometheus, file)
        wait_until(lambda: len(found.query("tutormax_last_run_success")) == 2, folder)
        yield found


def test_both_ways_lead_to_the_values_of_the_run(scraped: Scraped) -> None:
    families = list(text_string_to_metric_families(scraped.file.read_text()))

    assert scraped.query("node_textfile_scrape_error")[0]["value"][1] == "0"
    for family in families:
        for way in ("node", "tutormax"):
            found = {
                frozenset(
                    (name, value)
                    for name, value in one["metric"].items()
                    if name not in ("__name__", "instance", "job")
                ): float(one["value"][1])
                for one in scraped.query(f'{family.name}{{job="{way}"}}')
            }
            assert found == {
                frozenset(sample.labels.items()): sample.value for sample in family.samples
            }, (way, family.name)
    assert len(families) >= 17


def test_names_and_help_texts_are_as_prometheus_wants_them(scraped: Scraped) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=scraped.file.read_text(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "command",
    [
        ["check", "rules", "rules.yml"],
        ["test", "rules", "rules_test.yml"],
        ["check", "config", "prometheus.yml"],
    ],
    ids=" ".join,
)
def test_promtool_accepts_rules_and_configuration(command: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *command],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_name_only_metrics_that_exist(scraped: Scraped) -> None:
    written = {family.name for family in text_string_to_metric_families(scraped.file.read_text())}

    rules = json.loads(get(scraped.port, "/api/v1/rules"))["data"]["groups"][0]["rules"]
    assert len(rules) >= 9
    for rule in rules:
        assert set(re.findall(r"tutormax_\w+", rule["query"])) <= written, rule["name"]


def test_every_query_of_the_dashboard_has_data(scraped: Scraped) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "tutormax.json").read_text())

    expressions = [
        target["expr"].replace("$window", "30day")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    assert len(expressions) >= 13
    assert [one for one in expressions if not scraped.query(one)] == []
    names = {one["name"] for one in dashboard["templating"]["list"]}
    assert names == {"datasource", "window"}
