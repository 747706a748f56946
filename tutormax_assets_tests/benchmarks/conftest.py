from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from benchmarks import contestants, peers, platforms
from benchmarks.contestants import Measured
from benchmarks.stages import stages
from tutormax_assets.database.connection import conninfo
from tutormax_assets_tests.conftest import SMALL_PLATFORM_END, Platform, new_database, open_platform


@pytest.fixture(scope="module")
def computed(
    server_url: sa.URL, small_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """A generated platform, some rows of which break the contract; its last date has run."""
    home = tmp_path_factory.mktemp("home")
    with (
        new_database(server_url, template=small_template) as url,
        open_platform(url, home) as opened,
    ):
        opened.run(SMALL_PLATFORM_END.isoformat())
        yield opened


@pytest.fixture
def measured_platform(computed: Platform) -> platforms.Platform:
    """The same, as the benchmark has it."""
    return platforms.found(computed.settings.home_path, conninfo(computed.url))


@pytest.fixture
def in_this_process(computed: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants run here: in processes of their own they would mostly import."""

    def product(platform: platforms.Platform, *arguments: str) -> Measured:
        since = datetime.now(UTC)
        computed.run(arguments[-1])
        seconds = {**stages(platform.home, since=since), "whole_process": 1.0}
        return Measured(seconds, peak_rss_bytes=1, output={})

    def run(platform: platforms.Platform, task: peers.Task, name: str) -> Measured:
        seconds = peers.named(name).measure(task)
        return Measured({**seconds, "total": sum(seconds.values())}, peak_rss_bytes=1, output={})

    url = computed.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", url)
    monkeypatch.setenv("TUTORMAX_HOME", str(computed.settings.home_path))
    for module in ("again", "daily"):
        monkeypatch.setattr(f"benchmarks.{module}.product", product)
    monkeypatch.setattr(contestants, "_in_its_process", run)
