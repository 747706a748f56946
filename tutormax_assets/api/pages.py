"""Pages to hand to people: self-contained HTML, without scripts and without anything to load."""

from collections.abc import Callable, Mapping
from typing import Any

from tutormax_assets.api.explanation import Explanation, distance_in_words
from tutormax_assets.api.movement import WindowChange
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.reasons import Distance
from tutormax_assets.report.page import METRICS_IN_WORDS, page_environment

MOST_ROWS = 100
"""Sessions and logins that a page shows of one comparison."""

_ROWS = {
    "ratings": "ratings",
    "first_rated": "rated first sessions",
    "reschedules_known": "sessions with a known reschedule flag",
    "sessions": "sessions",
    "objectives_known": "sessions with a known outcome",
}
_SUMS = {
    **_ROWS,
    "rating_sum": "sum of ratings",
    "first_successes": "successful first sessions",
    "reschedules": "sessions rescheduled",
    "no_shows": "no-shows",
    "logins": "logins",
    "scores": "scored sessions",
    "score_sum": "sum of session scores",
    "lateness_known": "sessions with a known start",
    "punctual": "punctual sessions",
    "objectives_met": "sessions that met their objectives",
}
_PARTS = {
    "came_in": "came into the window",
    "aged_out": "left the window",
    "corrected_from": "corrected, was",
    "corrected_to": "corrected, is",
}
_SCORE_UNITS = 10**9


def explanation_page(found: Explanation, policy: Policy) -> str:
    """An explanation as an HTML page that may be handed to the tutor.

    Args:
        found: The explanation.
        policy: Weights and rules, which the page tells.
    """
    environment = page_environment()
    filters: Mapping[str, Callable[..., Any]] = {
        "distance": _distance,
        "part_in_words": _PARTS.__getitem__,
        "rows_in_words": _ROWS.__getitem__,
        "shown_rows": _shown_rows,
        "share": lambda weight: f"{weight:.0%}",
        "sum_in_words": lambda name: _SUMS[name].capitalize(),
        "sum_of": _sum_of,
        "values": _values,
    }
    environment.filters.update(filters)
    template = environment.get_template("explanation.html.j2")
    return template.render(found=found, policy=policy, most_rows=MOST_ROWS)


def _distance(distance: Distance) -> str:
    said = str(distance_in_words(distance))
    for name, words in METRICS_IN_WORDS.items():
        said = said.replace(name, words.lower())
    return said


def _shown_rows(change: WindowChange) -> list[Mapping[str, Any]]:
    # A tutor knows whose session it was, and feedback is the student's.
    return [row for row in change.rows if "overall_rating" not in row]


def _sum_of(value: int, name: str) -> str:
    return f"{value / _SCORE_UNITS:.12g}" if name == "score_sum" else str(value)


def _values(row: Mapping[str, Any]) -> str:
    known = ("metric", "part", "date", "session_id")
    return ", ".join(
        f"{name.replace('_', ' ')} {'-' if value is None else value}"
        for name, value in row.items()
        if name not in known
    )
