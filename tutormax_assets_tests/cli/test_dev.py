"""``tutormax dev``: where the UI listens."""

import os

import pytest

from tutormax_assets_tests.cli.conftest import Invoke, words


@pytest.mark.parametrize(
    ("arguments", "is_warned"),
    [
        ([], False),
        (["--host", "127.0.0.1"], False),
        (["--host", "localhost"], False),
        (["--host", "::1"], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "::"], True),
        (["--host", "10.0.0.1"], True),
        (["--host", "dagster.example.com"], True),
    ],
)
def test_a_ui_that_others_reach_is_warned_of(
    arguments: list[str], is_warned: bool, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    started: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.extend(command))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", "postgresql://nobody@/none?host=/nowhere")

    result = invoke("dev", *arguments)

    assert result.exit_code == 0
    host = arguments[-1] if arguments else "127.0.0.1"
    assert started[started.index("--host") + 1] == host
    assert ("Warning: the UI has no sign-on" in words(result.stderr)) == is_warned
