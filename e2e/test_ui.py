"""What a person does in the Dagster UI, done in a real browser, in this order.

Each test leaves a screenshot in ``docs/images``; the README shows some of them.
"""

import re
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import Page, expect

from .conftest import day, tutormax

IMAGES = Path(__file__).parent.parent / "docs" / "images"
GROUPS = ("platform", "snapshots", "metrics", "persisted")
LOCATION = "locations/tutormax_assets.definitions"
RUN_SECONDS, LOOK_SECONDS = 120, 6


def test_the_asset_graph_shows_every_stage(ui: str, page: Page) -> None:
    page.set_viewport_size({"width": 1700, "height": 1350})
    groups = ",".join(f"global@global:{group}" for group in GROUPS)
    page.goto(f"{ui}/asset-groups?expanded={groups}")
    zoom_out = page.get_by_label("zoom_out").first
    for _ in range(5):
        zoom_out.click()
    # At that distance a longer name is shown in part.
    for asset in ("tutors", "sessions_snapshot", "metrics_30day", "tutor_tier_changes"):
        expect(page.get_by_text(asset, exact=True).first).to_be_visible()
    expect(page.get_by_text("tutor_per")).to_be_visible()
    shot(page, "asset-graph")


def test_a_run_of_the_command_line_is_as_good_as_any(home: Path, ui: str, page: Page) -> None:
    tutormax(home, "run", "--date", str(day(4)))
    page.goto(f"{ui}/timeline")
    expect(page.get_by_text("daily_metrics", exact=True).first).to_be_visible()
    runs = f"{ui}/{LOCATION}/jobs/daily_metrics/runs"
    page.goto(runs)
    succeeded = page.get_by_text("Success", exact=True)
    expect(succeeded).to_have_count(1)
    expect(page.get_by_text("tutormax/source: tutormax run")).to_be_visible()
    run = page.locator("a[href^='/runs/']").first.get_attribute("href")
    page.goto(f"{ui}{run}")
    page.get_by_role("button", name="Re-execute all").click()
    expect(page).not_to_have_url(f"{ui}{run}")
    page.goto(runs)
    expect(succeeded).to_have_count(2, timeout=RUN_SECONDS * 1000)


def test_today_is_materialized(ui: str, page: Page) -> None:
    open_materialize_dialog(ui, page)
    page.get_by_role("button", name="Latest").first.click()
    page.get_by_role("button", name="Launch 1 run").click()
    wait_until_materialized(ui, page, partitions=2)
    page.goto(f"{ui}/assets/tutor_tiers?view=partitions&partition={day(0)}")
    expect(page.get_by_text("tutors_by_tier").first).to_be_visible()
    page.get_by_text("[Show Markdown]").first.click()
    picture = page.get_by_alt_text("Tutors by tier and window")
    expect(picture).to_be_visible()
    picture.screenshot(path=IMAGES / "tier-distribution.png")


def test_a_backfill_of_three_days_has_checks_for_each_day(ui: str, page: Page) -> None:
    open_materialize_dialog(ui, page)
    partitions = page.get_by_placeholder("No matching partitions")
    partitions.fill(f"[{day(3)}...{day(1)}]")
    partitions.press("Enter")
    page.get_by_role("button", name="Launch backfill").click()
    wait_until_materialized(ui, page, partitions=5)
    open_check(ui, page, "sessions_snapshot", "no_duplicate_sessions")
    page.get_by_text("Partitions", exact=True).last.click()
    # The dates of the tests before, and the three days.
    expect(page.get_by_text("Passed (5)")).to_be_visible()
    shot(page, "checks-by-day")


def test_the_report_of_a_failed_check_says_what_to_do(ui: str, page: Page) -> None:
    open_check(ui, page, "sessions_snapshot", "few_rows_set_aside")
    expect(page.get_by_text(f"tutormax set-aside --date {day(1)}").first).to_be_visible()
    expect(page.get_by_text("not within 0 and 1").first).to_be_visible()
    shot(page, "failed-check")


def test_the_schedule_is_turned_on(ui: str, page: Page) -> None:
    page.goto(f"{ui}/{LOCATION}/schedules/daily_metrics_at_night")
    switch = page.locator("label:has(input[type=checkbox])").first
    expect(switch.locator("input")).not_to_be_checked()
    switch.click()
    expect(switch.locator("input")).to_be_checked()
    shot(page, "schedule")


def test_all_checks_of_an_asset_are_executed_on_the_newest_date(ui: str, page: Page) -> None:
    page.goto(f"{ui}/assets/tutor_tiers?view=checks&checkDetail=counts_never_shrink")
    page.get_by_text("Execution history", exact=True).click()
    passed = page.get_by_role("row").filter(has_text=str(day(0))).filter(has_text="Passed")
    expect(passed).to_have_count(1)
    page.get_by_role("button", name="Execute all").click()
    expect(passed).to_have_count(2, timeout=RUN_SECONDS * 1000)


def open_materialize_dialog(ui: str, page: Page) -> None:
    page.goto(f"{ui}/{LOCATION}/jobs/daily_metrics")
    page.get_by_role("button", name=re.compile("Materialize all")).first.click()
    expect(page.get_by_text("Partition selection")).to_be_visible()


def open_check(ui: str, page: Page, asset: str, check: str) -> None:
    page.goto(f"{ui}/assets/{asset}?view=checks&checkDetail={check}")
    expect(page.get_by_text("Latest execution")).to_be_visible()


def wait_until_materialized(ui: str, page: Page, *, partitions: int) -> None:
    # What was launched is on record once the dialog is gone.
    expect(page.get_by_text("Partition selection")).not_to_be_visible()
    count = page.get_by_text(f"Materialized ({partitions})")
    for _ in range(RUN_SECONDS // LOOK_SECONDS):
        page.goto(f"{ui}/assets/tutor_performance_metrics?view=partitions")
        with suppress(AssertionError):
            expect(count).to_be_visible(timeout=LOOK_SECONDS * 1000)
            return
    expect(count).to_be_visible()


def shot(page: Page, name: str) -> None:
    # The UI draws graphs and tables piece by piece and says nowhere that it is done.
    page.wait_for_timeout(1500)
    page.screenshot(path=IMAGES / f"{name}.png")
