"""The daily report says what the tables and the record say, of many tutors and of none."""

import re
import stat
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import sqlalchemy as sa
from upath import UPath

from tutormax_assets.api.daily_report import collect_report
from tutormax_assets.database import tables
from tutormax_assets.metrics.control_chart import xmr_limits
from tutormax_assets.metrics.overview import charted_values, metric_distributions, tier_shares
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.report.content import Chart, DailyReport, Listing, report_path
from tutormax_assets.report.page import daily_report_page
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets_tests.cli.conftest import Invoke, words
from tutormax_assets_tests.conftest import Platform, new_database, open_platform, store

DAY_BEFORE, DAY = date(2025, 11, 6), date(2025, 11, 7)


@pytest.fixture(scope="module")
def reported(
    server_url: sa.URL, small_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Two dates of a generated platform, between which many sessions became no-shows."""
    home = tmp_path_factory.mktemp("report") / "home"
    with (
        new_database(server_url, template=small_template) as url,
        open_platform(url, home) as platform,
    ):
        platform.run(str(DAY_BEFORE))
        platform.execute(
            "UPDATE sessions SET no_show = true, actual_start = NULL"
            " WHERE scheduled_start >= '2025-11-01' AND tutor_id > 'T000010'"
        )
        platform.run(str(DAY))
        yield platform


@pytest.fixture
def page_of(
    reported: Platform,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Invoke]:
    with open_platform(reported.url, Path(reported.settings.home_path), using=monkeypatch):
        yield invoke


def tiers_of(platform: Platform, day: date) -> dict[tuple[str, str], str]:
    instant = datetime(day.year, day.month, day.day, tzinfo=UTC)
    rows = platform.metrics().filter(calculation_date=instant)
    return {
        (tutor, window): tier
        for tutor, window, tier in rows.select("tutor_id", "window", "performance_tier").rows()
    }


def test_it_says_what_the_table_says(reported: Platform) -> None:
    before, now = tiers_of(reported, DAY_BEFORE), tiers_of(reported, DAY)

    found = collect_report(reported.settings, DAY)

    moved = {key: (before[key], tier) for key, tier in now.items() if before[key] != tier}
    assert len(moved) > 0
    assert found.movers.total == len(moved)
    for mover in found.movers.rows:
        assert moved[mover.tutor_id, mover.window] == (mover.tier_before, mover.tier)
    assert found.moves is not None
    assert sum(moves["down"] + moves["up"] for moves in found.moves.values()) == len(moved)
    at_risk = {key for key, tier in now.items() if tier == "At Risk"}
    assert {
        (row.tutor_id, window) for window, rows in found.at_risk.items() for row in rows.rows
    } == at_risk
    for window, rows in found.at_risk.items():
        for row in rows.rows:
            assert row.since is not None
            is_new = before[row.tutor_id, window] != "At Risk"
            assert row.since.tier_since.date() == (DAY if is_new else DAY_BEFORE)
    assert found.tutors == len({tutor for tutor, _ in now})
    assert [*found.tiers["7day"]] == [DAY_BEFORE, DAY]
    assert sum(found.tiers["7day"][DAY].values()) == found.tutors
    assert found.read_at is not None
    assert any(check.passed for check in found.checks)
    assert found.problems == []
    set_aside = reported.partition("sessions_set_aside", str(DAY)).height
    set_aside += reported.partition("tutor_events_set_aside", str(DAY)).height
    assert sum(row[-1] for row in found.set_aside) == set_aside > 0


def test_the_page_of_the_run_needs_nothing_and_names_nobody(reported: Platform) -> None:
    path = Path(str(report_path(reported.settings.storage_path, DAY)))
    page = path.read_text()

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(page) < 1_000_000
    assert "<script" not in page
    # Of namespaces alone.
    assert set(re.findall(r"https?://[^\"'<> ]+", page)) <= {"http://www.w3.org/2000/svg"}
    with reported.engine.connect() as connection:
        names = list(connection.scalars(sa.select(tables.tutors.c.name)))
    assert not any(name in page for name in names)
    positions = [page.index(f'id="{part}"') for part in ("movers", "at-risk", "tiers", "quality")]
    assert positions == sorted(positions)
    # What the run recorded is there, and not only what a later look finds.
    assert "sessions_snapshot, few_rows_set_aside" in page


def test_names_are_shown_on_request(page_of: Invoke, tmp_path: Path, reported: Platform) -> None:
    file = tmp_path / "page.html"
    found = collect_report(reported.settings, DAY)
    mover = found.movers.rows[0].tutor_id

    result = page_of("report", "--date", str(DAY), "--names", "--output", str(file))

    assert (result.exit_code, words(result.stdout)) == (0, words(f"Written: {file}"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with reported.engine.connect() as connection:
        query = sa.select(tables.tutors.c.name).where(tables.tutors.c.tutor_id == mover)
        name = connection.scalar(query)
    assert f"{name} (<code>{mover}</code>)" in file.read_text()


def test_a_date_that_is_not_there_is_told(page_of: Invoke) -> None:
    result = page_of("report", "--date", "2025-11-01")

    assert result.exit_code == 2
    assert "2025-11-01 has not been computed. Run `tutormax run" in words(result.stderr)


def test_a_date_without_tutors_has_a_page(platform: Platform) -> None:
    path = UPath(platform.storage) / "tutor_tiers" / f"{DAY}.parquet"
    store(path, TutorTiers.create_empty())

    found = collect_report(platform.settings, DAY)
    page = daily_report_page(found)

    assert found.tutors == 0
    assert [chart.values[-1] for chart in found.charts if chart.name == "tutors"] == [0]
    assert "0 tutors computed" in page
    assert "There are no tutors." in page


def test_values_of_dates_whose_parquet_is_gone_come_from_the_record(reported: Platform) -> None:
    with dagster_instance(reported.settings) as instance:
        for weeks in range(1, 8):
            earlier = str(DAY - timedelta(days=7 * weeks))
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    "daily_report", partition=earlier, metadata={"no_shows_7day": float(weeks % 2)}
                )
            )

    charts = {chart.name: chart for chart in collect_report(reported.settings, DAY).charts}

    no_shows = charts["no_shows"]
    assert no_shows.values[:-1] == [1, 0, 1, 0, 1, 0, 1]
    assert no_shows.dates[0] == DAY - timedelta(days=49)
    assert no_shows.is_signal
    assert len(charts["tutors"].values) == 1


def an_empty_report(**values: object) -> DailyReport:
    defaults: dict[str, object] = {
        "reference_date": DAY,
        "calculation_date": datetime(2025, 11, 7, tzinfo=UTC),
        "read_at": None,
        "windows": ["7day"],
        "tutors": 0,
        "moves": None,
        "movers": Listing([], 0),
        "at_risk": {},
        "thin": {},
        "tiers": {},
        "distributions": [],
        "chart_window": "7day",
        "charts": [],
        "checks": [],
        "set_aside": [],
        "newest": {},
        "errors": Listing([], 0),
        "names": {},
        "problems": [],
    }
    return DailyReport(**{**defaults, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(("newest", "is_unusual"), [(10.0, False), (40.0, True)])
def test_a_value_outside_of_its_limits_is_named_first(newest: float, is_unusual: bool) -> None:
    values = [10.0, 12, 9, 10, 12, 8, 10, newest]
    dates = [DAY - timedelta(days=7 * n) for n in range(len(values))][::-1]
    chart = Chart("no_shows", "No-shows", dates, values, True, xmr_limits(values[:-1]))

    page = daily_report_page(an_empty_report(charts=[chart]))

    assert ("Unusual: No-shows 40" in page) == is_unusual
    assert ("Nothing is unusual" in page) != is_unusual


def test_what_is_cut_is_counted_and_text_stays_text() -> None:
    errors = Listing([("<b>t</b>", "it's <refused> & gone")], 1_234)

    page = daily_report_page(an_empty_report(errors=errors, problems=["<i>"]))

    assert "1,233 more of 1,234 are not shown" in page
    assert "<b>t</b>" not in page
    assert "it&#39;s &lt;refused&gt; &amp; gone" in page


def test_frames_of_no_rows_have_no_distribution() -> None:
    none = TutorTiers.create_empty(lazy=True)
    dated = none.with_columns(reference_date=pl.lit(DAY))
    assert metric_distributions(none).collect().is_empty()
    assert charted_values(dated).collect().is_empty()
    assert tier_shares(dated).collect().is_empty()
