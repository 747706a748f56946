"""Pages as self-contained HTML: no scripts, and nothing to load."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from tutormax_assets.metrics.schemas import TIERS
from tutormax_assets.report.charts import TIER_COLORS, control_chart, tier_chart
from tutormax_assets.report.content import DATES_SHOWN, DailyReport

METRICS_IN_WORDS: Mapping[str, str] = {
    "sessions_completed": "Sessions completed",
    "avg_rating": "Mean rating",
    "first_session_success_rate": "Successful first sessions, %",
    "reschedule_rate": "Sessions rescheduled, %",
    "no_show_count": "No-shows",
    "engagement_score": "Engagement score",
    "learning_objectives_met_pct": "Learning objectives met, %",
    "response_time_avg_minutes": "Mean response time, minutes",
}


def daily_report_page(found: DailyReport) -> str:
    """A daily report as an HTML page.

    Args:
        found: What it says.
    """
    environment = page_environment()
    template = environment.get_template("daily_report.html.j2")
    return template.render(
        found=found,
        dates_shown=DATES_SHOWN,
        tiers=dict(zip(TIERS, TIER_COLORS, strict=True)),
        tier_charts={
            window: Markup(tier_chart(counts, name=f"tiers-{window}"))  # noqa: S704
            for window, counts in found.tiers.items()
            if counts
        },
        control_charts=[
            (chart, Markup(control_chart(chart, name=f"control-{number}")))  # noqa: S704
            for number, chart in enumerate(found.charts)
        ],
    )


@cache
def page_environment() -> jinja2.Environment:
    """The templates, each compiled once, with the filters that they share."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tutormax_assets.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: Mapping[str, Callable[..., Any]] = {
        "days": lambda window: f"{window.removesuffix('day')} days",
        "metric_in_words": METRICS_IN_WORDS.__getitem__,
        "number": lambda value: "-" if value is None else f"{value:.12g}",
        "rounded": lambda value: "-" if value is None else f"{round(value, 2):.12g}",
        "thousands": lambda value: f"{value:,}",
    }
    environment.filters.update(filters)
    return environment
