"""Prometheus metrics: what they say, where they go, and that they never fail a run."""

import base64
import logging
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import dagster as dg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tutormax_assets.definitions import JOB_NAME, build_definitions
from tutormax_assets.defs.automation.metrics import SENSOR_NAME, metrics_sensors, publish_metrics
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.settings import Settings, SettingsError, load_settings
from tutormax_assets_tests.conftest import PASSWORD, Platform, captured_log

DAY = "2025-11-07"

logger = logging.getLogger("tutormax_assets")


def samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples of each metric by their labels' values, in the order of the labels' names."""
    return {
        family.name: {
            tuple(value for _, value in sorted(one.labels.items())): one.value
            for one in family.samples
        }
        for family in text_string_to_metric_families(text)
    }


@contextmanager
def gateway() -> Iterator[tuple[str, list[tuple[str, str, dict[str, str], bytes]]]]:
    """Where a server listens, and what has been sent to it."""
    received: list[tuple[str, str, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.command, self.path, dict(self.headers), body))
            self.send_response(202)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def settings_with(platform: Platform, monkeypatch: pytest.MonkeyPatch, **names: str) -> Settings:
    # A home of its own: they are about the newest run.
    monkeypatch.setenv("DAGSTER_HOME", str(platform.settings.home_path / "dagster"))
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_a_run_writes_and_pushes_them_good_or_bad(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tutormax.prom"
    with gateway() as (address, received):
        url = f"http://reader:{PASSWORD}%40@{address}"
        names = {"TUTORMAX_METRICS_FILE": str(file), "TUTORMAX_PUSHGATEWAY": url}
        settings = settings_with(small_platform, monkeypatch, **names)
        own = Platform(settings, small_platform.engine)
        [summary] = own.run(DAY)
        first = file.read_text()
        own.execute("ALTER TABLE sessions RENAME TO lessons")
        own.run(DAY)

    good = samples(first)
    assert summary.all_saved
    assert good["tutormax_last_run_success"] == {(): 1}
    assert (
        good["tutormax_last_success_timestamp_seconds"]
        == (good["tutormax_last_run_timestamp_seconds"])
    )
    assert good["tutormax_reference_date_timestamp_seconds"] == {(): 1762473600}
    tutors = good["tutormax_tutors"]
    assert sum(n for (_, window), n in tutors.items() if window == "7day") == (summary.total_tutors)
    assert sum(good["tutormax_rows_written"].values()) == 3 * summary.total_tutors
    assert sum(good["tutormax_values_set_aside"].values()) == sum(
        row["values"] for row in summary.set_aside
    )
    assert sum(good["tutormax_check_results"].values()) > 20
    assert set(good["tutormax_source_newest_row_timestamp_seconds"]) == {
        ("sessions",), ("student_feedback",), ("tutor_events",)
    }  # fmt: skip
    assert good["tutormax_stage_duration_seconds"]["tutor_performance_metrics",] > 0
    assert stat.S_IMODE(file.stat().st_mode) & 0o044 == 0o044
    # Ids of tutors, sessions and feedback all have a number.
    assert "T0000" not in first

    bad = samples(file.read_text())
    assert bad["tutormax_last_run_success"] == {(): 0}
    for name in ("tutormax_last_success_timestamp_seconds", "tutormax_tutors"):
        assert bad[name] == good[name]

    assert [(method, path) for method, path, _, _ in received] == [
        ("PUT", "/metrics/job/tutormax")
    ] * 2
    assert samples(received[0][3].decode()) == good
    pair = base64.b64encode(f"reader:{PASSWORD}@".encode()).decode()
    assert {headers["Authorization"] for _, _, headers, _ in received} == {f"Basic {pair}"}


def test_places_that_cannot_be_reached_are_warnings(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = f"http://reader:{PASSWORD}@127.0.0.1:1/"
    missing = tmp_path / "nowhere" / "tutormax.prom"
    names = {"TUTORMAX_METRICS_FILE": str(missing), "TUTORMAX_PUSHGATEWAY": url}
    settings = settings_with(small_platform, monkeypatch, **names)

    with dagster_instance(settings) as instance, captured_log() as log:
        assert not publish_metrics(instance, settings, logger, job_name=JOB_NAME)

    assert f"WARNING Metrics cannot be written to {missing}: No such file or directory" in log[0]
    assert "WARNING Metrics cannot be pushed to 127.0.0.1:1: [Errno 111]" in log[1]
    assert PASSWORD not in str(log)


def test_the_sensor_publishes_once_for_each_run(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tutormax.prom"
    settings = settings_with(small_platform, monkeypatch)
    assert metrics_sensors(settings, JOB_NAME) == []
    Platform(settings, small_platform.engine).run(DAY)
    monkeypatch.setenv("TUTORMAX_METRICS_FILE", str(file))
    sensor = build_definitions(load_settings()).get_repository_def().get_sensor_def(SENSOR_NAME)

    with dagster_instance(settings) as instance:
        context = dg.build_sensor_context(instance=instance)
        said = [sensor.evaluate_tick(context).skip_message for _ in range(2)]

    assert said == [
        "The metrics are published.",
        "No run has ended since the metrics were published.",
    ]
    assert samples(file.read_text())["tutormax_last_run_success"] == {(): 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("METRICS_FILE", "metrics.prom"),
        ("METRICS_FILE", "/var/lib/metrics.txt"),
        ("PUSHGATEWAY", "gateway:9091"),
        ("PUSHGATEWAY", f"http://{PASSWORD}/?x"),
    ],
)
def test_an_unusable_place_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"TUTORMAX_{name}", value)

    with pytest.raises(SettingsError, match=f"TUTORMAX_{name}: expected") as refusal:
        load_settings()

    assert PASSWORD not in str(refusal.value)
