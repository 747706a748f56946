"""What is asked of sessions and feedback."""

from typing import Any

import polars as pl
import pytest

from tutormax_assets.defs.checks import ERROR, WARN
from tutormax_assets.defs.checks.sessions_snapshot import (
    engagement_scores_fill_their_scale,
    feedback_is_of_the_sessions_tutor,
    no_duplicate_sessions,
    rows_read,
    tutors_are_known,
)
from tutormax_assets.defs.checks.volumes import sessions_by_day
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.quality import good_sessions
from tutormax_assets.metrics.schemas import SetAside
from tutormax_assets_tests.metrics.rows import DAY_BEFORE, source_sessions

NOTHING = pl.DataFrame(schema=pl.Schema(SetAside))


def snapshot_of(*rows: dict[str, Any]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Sessions by day, and what was set aside, of these source rows."""
    good, set_aside = good_sessions(source_sessions(*rows), policy=Policy(), timezone="UTC")
    by_day, aside = pl.collect_all([sessions_by_day(good), set_aside])
    return by_day, aside


def test_rows_read_are_counted_whether_they_could_be_used_or_not() -> None:
    by_day, set_aside = snapshot_of(
        {"overall_rating": 4},
        {"overall_rating": 9},
        {"overall_rating": 4, "feedback_tutor_id": "another"},
        {"session_id": "s1"},
        {"late_start_minutes": -1, "session_number": 0},
    )

    counts = rows_read(by_day, set_aside).group_by("source_table", "date").agg(pl.col("rows").sum())

    assert set(counts.rows()) == {
        ("sessions", DAY_BEFORE, 5),
        ("student_feedback", DAY_BEFORE, 3),
    }


def test_no_sessions_are_no_rows() -> None:
    by_day, set_aside = snapshot_of()
    assert rows_read(by_day, set_aside).is_empty()
    assert by_day.columns == ["date", "rows", "rated", "highest_score"]


def test_sessions_that_come_once_pass() -> None:
    _, set_aside = snapshot_of({}, {"late_start_minutes": -1})
    assert no_duplicate_sessions(set_aside).passed
    assert no_duplicate_sessions(NOTHING).passed


def test_sessions_that_come_again_are_named() -> None:
    _, set_aside = snapshot_of({}, {"session_id": "s1"}, {"session_id": "s1"}, {})

    finding = no_duplicate_sessions(set_aside)

    assert (finding.passed, finding.severity) == (False, WARN)
    assert finding.metadata["session_ids"] == 1
    first = finding.metadata["first_rows"]
    assert isinstance(first, pl.DataFrame)
    assert first.rows() == [("s1", "t1")]


def test_feedback_of_the_sessions_tutor_passes() -> None:
    by_day, set_aside = snapshot_of({"overall_rating": 4}, {"overall_rating": 9}, {})
    rated = int(by_day["rated"].sum())

    finding = feedback_is_of_the_sessions_tutor(set_aside, rated=rated, warn_share=0)
    assert finding.passed
    assert finding.metadata == {"of_another_tutor": 0, "feedback_read": 2}
    assert feedback_is_of_the_sessions_tutor(NOTHING, rated=0, warn_share=0).passed


@pytest.mark.parametrize(("warn_share", "passed"), [(0.5, True), (0.49, False)])
def test_feedback_of_another_tutor_is_measured_by_its_share(
    warn_share: float, passed: bool
) -> None:
    by_day, set_aside = snapshot_of(
        {"overall_rating": 4}, {"overall_rating": 4, "feedback_tutor_id": "another"}
    )

    finding = feedback_is_of_the_sessions_tutor(
        set_aside, rated=int(by_day["rated"].sum()), warn_share=warn_share
    )

    assert finding.passed is passed
    if not passed:
        assert finding.severity is WARN
        assert str(finding.description).startswith("1 of 2 rows of student_feedback name another")
        first = finding.metadata["first_rows"]
        assert isinstance(first, pl.DataFrame)
        assert first.rows() == [("f2", "t1")]


UNKNOWN = pl.DataFrame({"tutor_id": ["b"], "rows": [5]})


def test_known_tutors_pass() -> None:
    finding = tutors_are_known(UNKNOWN.clear(), sessions_read=100, error_share=0)
    assert finding.passed
    assert finding.metadata["sessions_read"] == 100
    assert tutors_are_known(UNKNOWN.clear(), sessions_read=0, error_share=0).passed
    unknown = tutors_are_known(None, sessions_read=100, error_share=0)
    assert unknown.passed
    assert str(unknown.description).startswith("Not compared: ")


@pytest.mark.parametrize(("error_share", "severity"), [(0.05, WARN), (0.04, ERROR)])
def test_unknown_tutors_fail_where_they_have_many_sessions(
    error_share: float, severity: object
) -> None:
    finding = tutors_are_known(UNKNOWN, sessions_read=100, error_share=error_share)

    assert (finding.passed, finding.severity) == (False, severity)
    assert str(finding.description).startswith("5 of 100 sessions are of 1 tutors who were not in")
    first = finding.metadata["first_tutors"]
    assert isinstance(first, pl.DataFrame)
    assert first["tutor_id"].to_list() == ["b"]


@pytest.mark.parametrize(
    ("highest", "scale", "passed"),
    [(None, 100, True), (1.0, 100, False), (0.0, 100, False), (1.01, 100, True), (1.0, 1, True)],
)
def test_scores_up_to_one_do_not_fill_a_scale_of_100(
    highest: float | None, scale: int, passed: bool
) -> None:
    finding = engagement_scores_fill_their_scale(highest, scale=scale)

    assert finding.passed is passed
    if not passed:
        assert finding.severity is WARN
        assert "set session_score_scale = 1 in the policy" in str(finding.description)
