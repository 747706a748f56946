"""What is asked of logins and message responses."""

from tutormax_assets.defs.checks.volumes import events_by_day
from tutormax_assets_tests.metrics.rows import DAY_BEFORE, D, events


def test_events_are_counted_by_day() -> None:
    rows = events({}, {"response_time_minutes": 5.0}, {"event_date": D})
    assert events_by_day(rows).collect().rows() == [(DAY_BEFORE, 2, 1), (D, 1, 1)]
    assert events_by_day(events()).collect().is_empty()
