"""Pictures of the report as SVG, without scripts and without anything to load."""

import sys
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, cast
from xml.etree.ElementTree import Element

import pygal
from pygal.style import Style

from tutormax_assets.metrics.schemas import TIERS
from tutormax_assets.report.content import Chart

# Pygal hooks into all imports to find plugins, in a way that Python 3.11 warns of each time.
sys.meta_path[:] = [
    finder for finder in sys.meta_path if not isinstance(finder, pygal.PluginImportFixer)
]

# Neighbouring colors are distinguishable to color-blind readers.
TIER_COLORS = ("#0b6b2b", "#6aaed6", "#c7c7c7", "#e6a700", "#a4161a")
"""Of the tiers, the best one first."""
_FEW_LABELS = 6

# As large as a phone is wide, so that letters keep their size there.
_SIZE = {"width": 340, "height": 220}


def tier_chart(counts: Mapping[date, Mapping[str, int]], *, name: str) -> str:
    """A bar for each reference date, divided by tier.

    Args:
        counts: Number of tutors by date and tier.
        name: Tells the picture from others of the page.
    """
    chart = pygal.StackedBar(**_options(TIER_COLORS), spacing=1, show_legend=False)
    chart.uuid = name
    chart.x_labels = [f"{day:%b %-d}" for day in counts]
    chart.x_labels_major_every = max(1, -(-len(counts) // _FEW_LABELS))
    for tier in TIERS:
        chart.add(tier, [of_date[tier] for of_date in counts.values()])
    return _render(chart)


def control_chart(found: Chart, *, name: str) -> str:
    """The values, their center and their limits.

    Args:
        found: The chart.
        name: Tells the picture from others of the page.
    """
    colors = ("#0b57d0", "#5f5f5f", "#a4161a", "#a4161a")
    chart = pygal.Line(**_options(colors), show_legend=False, dots_size=3)
    chart.uuid = name
    chart.x_labels = [f"{day:%b %-d}" for day in found.dates]
    chart.x_labels_major_every = max(1, -(-len(found.dates) // _FEW_LABELS))
    chart.add("value", found.values)
    if found.limits is not None:
        number = len(found.values)
        dashes = {"width": 1, "dasharray": "4, 4"}
        for title, value in (
            ("center", found.limits.center),
            ("lower limit", found.limits.lower),
            ("upper limit", found.limits.upper),
        ):
            chart.add(title, [value] * number, show_dots=False, stroke_style=dashes)
    return _render(chart)


def series_chart(values: Mapping[date, float], *, limits: Sequence[float], name: str) -> str:
    """A value for each reference date, and limits.

    Args:
        values: The values by date.
        limits: Where dashed lines are drawn.
        name: Tells the picture from others of the page.
    """
    chart = pygal.Line(
        **_options(("#0b57d0", "#a4161a", "#a4161a")), show_legend=False, dots_size=3
    )
    chart.uuid = name
    chart.x_labels = [f"{day:%b %-d}" for day in values]
    chart.x_labels_major_every = max(1, -(-len(values) // _FEW_LABELS))
    chart.add("value", list(values.values()))
    dashes = {"width": 1, "dasharray": "4, 4"}
    for limit in limits:
        chart.add("limit", [limit] * len(values), show_dots=False, stroke_style=dashes)
    return _render(chart)


def _options(colors: tuple[str, ...]) -> dict[str, Any]:
    style = Style(
        background="#ffffff",
        plot_background="#ffffff",
        foreground="#1a1a1a",
        foreground_strong="#1a1a1a",
        foreground_subtle="#5f5f5f",
        font_family="system-ui, sans-serif",
        guide_stroke_color="#d0d0d0",
        major_guide_stroke_color="#d0d0d0",
        label_font_size=11,
        major_label_font_size=11,
        opacity="1",
        colors=colors,
    )
    return {
        **_SIZE,
        "style": style,
        "js": [],
        "explicit_size": False,
        "show_minor_x_labels": False,
        "margin": 4,
        "margin_right": 20,
        "value_formatter": lambda value: f"{value:.4g}",
        "include_x_axis": False,
        "max_scale": 5,
        "truncate_label": -1,
        "pretty_print": False,
    }


def _render(chart: Any) -> str:
    chart.add_xml_filter(_without_scripts)
    return cast("str", chart.render(is_unicode=True, disable_xml_declaration=True))


def _without_scripts(root: Element) -> Element:
    # The figure around it says what it shows; what only a script shows is left out.
    for parent in list(root.iter()):
        for child in list(parent):
            name = child.tag.rpartition("}")[2] if isinstance(child.tag, str) else ""
            if name in ("script", "desc", "title") or not name:
                parent.remove(child)
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return root
