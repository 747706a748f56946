"""What ``deploy/`` says in several places is the same in all of them, and gives nothing away."""

import re
import tomllib
from itertools import pairwise
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


def read_all(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def pins(file: Path) -> dict[str, str]:
    return dict(PIN.findall(file.read_text(encoding="utf-8")))


def test_the_image_has_the_versions_that_the_tests_run_with() -> None:
    image, tested = pins(DEPLOY / "requirements.lock"), pins(ROOT / "requirements-dev.lock")
    needed = pins(ROOT / "requirements.lock")

    assert needed.items() <= image.items()
    assert {"dagster-postgres", "dagster-k8s", "s3fs", "gcsfs", "distributed"} <= image.keys()
    for name in image.keys() & tested.keys():
        assert image[name] == tested[name], name


def test_runs_of_the_command_line_name_the_code_location_as_the_ui_does() -> None:
    [location] = read("workspace.yaml")["load_from"]
    compose = read("compose.yaml")["services"]["code-location"]["environment"]
    [deployment] = read("kubernetes/values.yaml")["dagster-user-deployments"]["deployments"]

    assert compose["TUTORMAX_CODE_LOCATION"] == location["grpc_server"]["location_name"]
    assert deployment["env"]["TUTORMAX_CODE_LOCATION"] == deployment["name"]


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


def test_ticks_have_the_same_age_in_the_packaged_instance() -> None:
    packaged = yaml.safe_load(
        (DEPLOY.parent / "tutormax_assets" / "dagster.yaml").read_text("utf-8")
    )

    assert packaged["retention"] == read("dagster.yaml")["retention"]


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


def test_only_who_computes_knows_the_platforms_database() -> None:
    for name, service in read("compose.yaml")["services"].items():
        knows = "TUTORMAX_DATABASE_URL" in service["environment"] or "env_file" in service
        assert knows == (name in ("code-location", "live", "dask-worker")), name


def dask_commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command and environment of scheduler and workers, wherever they are started."""
    found = {}
    for name, service in read("compose.yaml")["services"].items():
        if name.startswith("dask-"):
            found[f"compose {name}"] = (service["command"], service["environment"])
    for document in read_all("kubernetes/dask.yaml"):
        if document["kind"] == "Deployment":
            [container] = document["spec"]["template"]["spec"]["containers"]
            values = {entry["name"]: entry["value"] for entry in container["env"]}
            found[f"kubernetes {document['metadata']['name']}"] = (container["command"], values)
    for unit in DEPLOY.glob("systemd/tutormax-dask-*.service"):
        text = unit.read_text(encoding="utf-8")
        [command] = re.findall(r"^ExecStart=\S+/(dask .*)$", text, re.MULTILINE)
        found[f"systemd {unit.name}"] = (
            command.split(),
            dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE)),
        )
    return found


def test_dasks_dashboards_are_on_loopback_and_a_worker_computes_one_shard_at_a_time() -> None:
    commands = dask_commands()

    assert len(commands) == 6
    settings: dict[str, list[dict[str, str]]] = {"scheduler": [], "worker": []}
    for where, (command, environment) in commands.items():
        options = dict(pairwise(command))
        assert options["--dashboard-address"].startswith("127.0.0.1:"), where
        assert "--no-dashboard" not in command, where
        if command[1] == "worker":
            assert options["--nthreads"] == "1", where
            assert options["--memory-limit"] != "auto", where
        kind = f"DASK_DISTRIBUTED__{command[1].upper()}__"
        settings[command[1]].append(
            {name: value for name, value in environment.items() if name.startswith(kind)}
        )
    for same in settings.values():
        assert same[0]
        assert same == [same[0]] * 3


def test_dask_has_no_password_but_certificates_or_a_network_of_its_own() -> None:
    services = read("compose.yaml")["services"]
    in_network = {name for name, s in services.items() if "dask" in s.get("networks", [])}
    assert in_network == {"code-location", "dask-scheduler", "dask-worker"}
    for where, (command, environment) in dask_commands().items():
        assert where.startswith("compose") or "tls" in command, where
        if where.startswith("kubernetes"):
            assert environment["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
    assert "NetworkPolicy" in [document["kind"] for document in read_all("kubernetes/dask.yaml")]


@pytest.mark.parametrize(
    "name", ["compose.yaml", "kubernetes/values.yaml", "kubernetes/dask.yaml", "dagster.yaml"]
)
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
            assert value.startswith("${") or key.lower().endswith("secretname"), key
        elif isinstance(value, str) and "://" in value and "@" in value:
            assert re.search(r"://\w+:\$\{\w+", value), key

    for document in read_all(name):
        walk(document)
    for line in (DEPLOY / ".env.example").read_text(encoding="utf-8").splitlines():
        if SECRET.match(line):
            assert line.endswith("="), line
