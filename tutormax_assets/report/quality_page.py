"""The quality report as self-contained HTML."""

from typing import Any

from markupsafe import Markup

from tutormax_assets.report.charts import series_chart
from tutormax_assets.report.page import page_environment
from tutormax_assets.report.quality import Measure, QualityReport

_UNITS = {"of the usual": " times the usual", "share": " points", "index": ""}
_POINTS = 100


def quality_page(found: QualityReport) -> str:
    """A quality report as an HTML page.

    Args:
        found: The report.
    """
    environment = page_environment().overlay()
    environment.filters["percent"] = lambda share: f"{share:.2%}"
    template = environment.get_template("quality.html.j2")
    return template.render(found=found, charts=list(_charts(found)), set_aside=_set_aside(found))


def _charts(found: QualityReport) -> Any:
    names = {measure.name: measure for one in found.dates for measure in one.measures}
    for number, (name, newest) in enumerate(names.items()):
        values: dict[Any, Measure] = {
            one.day: measure
            for one in found.dates
            for measure in one.measures
            if measure.name == name
        }
        picture = series_chart(
            {day: _scale(one) * one.value for day, one in values.items()},
            limits=_limits(newest),
            name=f"measure-{number}",
        )
        yield (
            name,
            {
                "newest": _scale(newest) * list(values.values())[-1].value,
                "unit": _UNITS[newest.unit],
                "limit": " to ".join(f"{limit:g}" for limit in _limits(newest)),
                "anomalies": [day for day, one in values.items() if one.is_anomaly],
                "picture": Markup(picture),  # noqa: S704
            },
        )


def _limits(measure: Measure) -> list[float]:
    if measure.unit == "of the usual":
        return [1 - measure.limit, 1 + measure.limit]
    return [_scale(measure) * measure.limit]


def _scale(measure: Measure) -> int:
    return _POINTS if measure.unit == "share" else 1


def _set_aside(found: QualityReport) -> dict[str, Any]:
    shares: dict[tuple[str, str, str], dict[Any, float]] = {}
    for of_date in found.dates:
        for one in of_date.set_aside:
            key = one.source_table, one.column, one.reason
            shares.setdefault(key, {})[of_date.day] = one.share
    rows = []
    for (table, column, reason), of_days in sorted(shares.items()):
        on, most = max(of_days.items(), key=lambda entry: (entry[1], entry[0]))
        last = of_days.get(found.dates[-1].day, 0.0)
        row = {"table": table, "column": column, "reason": reason}
        rows.append({**row, "last": last, "most": most, "on": on})
    picture = series_chart(
        {one.day: 100 * one.set_aside_share for one in found.dates}, limits=[], name="set-aside"
    )
    return {"rows": rows, "picture": Markup(picture)}  # noqa: S704
