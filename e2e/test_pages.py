"""The pages for people, in a real browser: two widths, print, keyboard alone, and axe-core.

The test of the report leaves its picture in ``docs/images``.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from .conftest import day, tutormax

IMAGES = Path(__file__).parent.parent / "docs" / "images"
NARROW, WIDE = 360, 1100
_FOCUSED = "document.activeElement.ariaLabel || document.activeElement.tagName"
_IS_LAST_SUMMARY = (
    "document.activeElement.parentElement === [...document.querySelectorAll('details')].at(-1)"
)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the metrics of two months."""
    home = tmp_path_factory.mktemp("pages")
    for folder in (home, *home.parents[:2]):
        folder.chmod(0o755)
    tutormax(home, "db", "init")
    tutormax(home, "generate", "--tutors", "200", "--days", "160", "--bad-rows", "0.02")
    tutormax(home, "backfill", "--from", str(day(60)), "--to", str(day(0)))
    yield home
    tutormax(home, "db", "stop")


@pytest.fixture(scope="module")
def report(computed: Path) -> Path:
    """The page of today."""
    file = computed / "report.html"
    tutormax(computed, "report", "--date", str(day(0)), "--output", str(file))
    return file


@pytest.fixture(scope="module")
def explanation(computed: Path) -> Path:
    """The page that explains the tiers of a tutor."""
    file = computed / "explanation.html"
    tutormax(computed, "explain", "T000001", "--date", str(day(0)), "--html", str(file))
    return file


@pytest.fixture(params=["report", "explanation"])
def file(request: pytest.FixtureRequest) -> Path:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Path)
    return found


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_a_page_is_whole_and_for_everybody(browser: Browser, file: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    loaded: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: loaded.append(request.url))

    page.goto(file.as_uri())
    found = Axe().run(page)

    assert said == []
    assert loaded == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert found.violations_count == 0, found.generate_report()
    page.close()


def test_a_page_can_be_read_on_paper(page: Page, file: Path) -> None:
    page.goto(file.as_uri())
    page.emulate_media(media="print")

    # A4 without its margins: what scrolls on a screen would be cut off.
    page.set_viewport_size({"width": 680, "height": 1000})
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll')]"
        ".filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.ariaLabel)"
    )
    assert cut == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_report_is_used_with_the_keyboard_alone(page: Page, report: Path) -> None:
    page.goto(report.as_uri())
    details = page.locator("details").last
    expect(details).not_to_have_attribute("open", "")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(_FOCUSED))
        if page.evaluate(_IS_LAST_SUMMARY):
            page.keyboard.press("Enter")
            break
    expect(details).to_have_attribute("open", "")
    assert {"Number of movers", "Movers", "At Risk, 7 days", "SUMMARY"} <= reached


def test_the_picture_of_the_report(page: Page, report: Path) -> None:
    page.set_viewport_size({"width": WIDE, "height": 1400})
    page.goto(report.as_uri())
    expect(page.get_by_role("heading", name="New movers")).to_be_visible()
    charts = page.locator(".charts")
    expect(charts).to_have_count(2)
    expect(page.locator("figure svg")).to_have_count(10)
    page.screenshot(path=IMAGES / "daily-report.png")
    charts.last.screenshot(path=IMAGES / "control-charts.png")
