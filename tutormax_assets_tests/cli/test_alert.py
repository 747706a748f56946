"""``tutormax alert``, with a webhook on this machine; and where the UI that it names is."""

import os
from pathlib import Path

import pytest

from tutormax_assets_tests.cli.conftest import Invoke, words
from tutormax_assets_tests.defs.automation.conftest import TOKEN, WebhookServer, serving


def test_a_test_message_arrives(monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> None:
    server = WebhookServer()
    monkeypatch.setenv("TUTORMAX_ALERTS", server.url)
    monkeypatch.setenv("TUTORMAX_UI_URL", "https://dagster.example.com")

    with serving(server):
        shown = invoke("alert")
        assert server.requests == []
        tested = invoke("alert", "--test")

    assert (shown.exit_code, shown.stdout) == (0, "receiver 1 (json)\n")
    assert (tested.exit_code, tested.stdout) == (0, "receiver 1 (json): arrived\n")
    [request] = server.requests
    assert request["title"] == "tutormax: test of the alerts"
    assert "https://dagster.example.com" in request["message"]


def test_it_says_where_the_message_did_not_arrive(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    url = f"json://reader:{TOKEN}@127.0.0.1:1/{TOKEN}?retry=0"
    monkeypatch.setenv("TUTORMAX_ALERTS", f"{url} nonsense://x")

    result = invoke("alert", "--test")

    assert result.exit_code == 1
    first, second = result.stdout.splitlines()
    assert first.startswith("receiver 1 (json): A Connection error")
    assert second.startswith("receiver 2 (nonsense): it is no URL that Apprise understands")
    assert TOKEN not in result.output


def test_without_receivers_it_says_how_to_name_one(invoke: Invoke) -> None:
    result = invoke("alert", "--test")

    assert (result.exit_code, result.stdout) == (2, "")
    assert "TUTORMAX_ALERTS is not set, so alerts are in the log only" in words(result.stderr)


@pytest.mark.parametrize(
    ("variables", "automation", "ui_url"),
    [
        ({}, "true", "http://127.0.0.1:3999"),
        (
            {"TUTORMAX_AUTOMATION": "false", "TUTORMAX_UI_URL": "https://dagster.example.com"},
            "false",
            "https://dagster.example.com",
        ),
    ],
)
def test_dev_turns_schedule_and_sensors_on_unless_told(
    variables: dict[str, str],
    automation: str,
    ui_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    (tmp_path / ".env").write_text(
        "".join(f"{name}={value}\n" for name, value in variables.items()), encoding="utf-8"
    )
    started: dict[str, str] = {}

    def execv(_: str, __: list[str]) -> None:
        started.update(os.environ)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", "postgresql://nobody@/none?host=/nowhere")

    assert invoke("dev", "--port", "3999").exit_code == 0

    # What `.env` says, Dagster reads there too.
    found = {**variables, **started}
    assert (found["TUTORMAX_AUTOMATION"], found["TUTORMAX_UI_URL"]) == (automation, ui_url)
    if variables:
        assert "TUTORMAX_AUTOMATION" not in started
