"""What ``deploy/`` says in several places is the same in all of them, and gives nothing away."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PIN = re.compile(r"^([\w.-]+)(?:\[.*\])?==(\S+)", re.MULTILINE)
SECRET = re.compile(r"(?i)(password|secret|token|database_url).*")


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def pins(file: Path) -> dict[str, str]:
    return dict(PIN.findall(file.read_text(encoding="utf-8")))


def test_the_image_has_the_versions_that_the_tests_run_with() -> None:
    image, tested = pins(DEPLOY / "requirements.lock"), pins(ROOT / "requirements-dev.lock")
    needed = pins(ROOT / "requirements.lock")

    assert needed.items() <= image.items()
    assert {"dagster-postgres", "dagster-k8s", "s3fs", "gcsfs"} <= image.keys()
    for name in image.keys() & tested.keys():
        assert image[name] == tested[name], name


def test_kubernetes_has_the_limits_of_the_instance() -> None:
    instance, values = read("dagster.yaml"), read("kubernetes/values.yaml")
    runs, pools = instance["concurrency"]["runs"], instance["concurrency"]["pools"]
    monitoring, retries = instance["run_monitoring"], instance["run_retries"]

    assert values["concurrency"] == {
        "enabled": True,
        "runs": {
            "maxConcurrentRuns": runs["max_concurrent_runs"],
            "tagConcurrencyLimits": runs["tag_concurrency_limits"],
        },
        "pools": {
            "granularity": pools["granularity"],
            "defaultLimit": pools["default_limit"],
            "opGranularityRunBuffer": pools["op_granularity_run_buffer"],
        },
    }
    there = values["dagsterDaemon"]["runMonitoring"]
    for ours, theirs in (
        ("start_timeout_seconds", "startTimeoutSeconds"),
        ("poll_interval_seconds", "pollIntervalSeconds"),
        ("free_slots_after_run_end_seconds", "freeSlotsAfterRunEndSeconds"),
    ):
        assert there[theirs] == monitoring[ours]
    assert values["dagsterDaemon"]["runRetries"] == {
        "enabled": retries["enabled"],
        "maxRetries": retries["max_retries"],
        "retryOnAssetOrOpFailure": retries["retry_on_asset_or_op_failure"],
    }
    assert (
        values["retention"]["sensor"]["purgeAfterDays"]
        == (instance["retention"]["sensor"]["purge_after_days"])
    )
    assert not values["telemetry"]["enabled"]
    assert not instance["telemetry"]["enabled"]


def test_compose_publishes_the_ui_on_loopback_and_nothing_else() -> None:
    services = read("compose.yaml")["services"]

    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(published) == ["webserver"]
    assert [port.split(":")[0] for port in published["webserver"]] == ["127.0.0.1"]


def test_the_sign_on_leads_to_the_webserver_on_loopback_and_nowhere_else() -> None:
    sign_on = tomllib.loads((DEPLOY / "oauth2-proxy.cfg").read_text(encoding="utf-8"))
    unit = (DEPLOY / "systemd/tutormax-webserver.service").read_text(encoding="utf-8")
    [port] = re.findall(r"dagster-webserver -h 127\.0\.0\.1 -p (\d+)", unit)

    assert sign_on["upstreams"] == [f"http://127.0.0.1:{port}/"]
    assert sign_on["cookie_secure"]
    # A group is asked for, so that not everybody whom the identity provider knows may.
    assert sign_on["allowed_groups"]
    assert not {"client_secret", "cookie_secret"} & sign_on.keys()
    assert not [name for name in sign_on if name.startswith("skip_auth") or "insecure" in name]


def test_only_the_code_location_knows_the_platforms_database() -> None:
    for name, service in read("compose.yaml")["services"].items():
        knows = "TUTORMAX_DATABASE_URL" in service["environment"] or "env_file" in service
        assert knows == (name == "code-location"), name


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes/values.yaml", "dagster.yaml"])
def test_no_file_holds_a_secret(name: str) -> None:
    def walk(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for inner, child in value.items():
                walk(child, inner)
        elif isinstance(value, list):
            for child in value:
                walk(child, key)
        elif SECRET.fullmatch(key) and isinstance(value, str):
            # Substituted from the environment, or the name of a Kubernetes secret.
            assert value.startswith("${") or key.endswith("SecretName"), key
        elif isinstance(value, str) and "://" in value and "@" in value:
            assert re.search(r"://\w+:\$\{\w+", value), key

    walk(read(name))
    for line in (DEPLOY / ".env.example").read_text(encoding="utf-8").splitlines():
        if SECRET.match(line):
            assert line.endswith("="), line
