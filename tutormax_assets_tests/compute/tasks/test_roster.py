"""Which tutors a run computes."""

import polars as pl
import pytest

from tutormax_assets.compute.tasks.roster import choose_others, choose_roster
from tutormax_assets_tests.metrics.rows import source_tutors

TUTORS = source_tutors(a="active", b="Active", c="churned", d=None).collect()


@pytest.mark.parametrize(
    ("tutor_ids", "include_inactive", "computed", "unknown", "inactive", "total"),
    [
        (None, False, ["a", "b"], [], [], 2),
        (None, True, ["a", "b", "c", "d"], [], [], 4),
        (["b", "x", "c"], False, ["b"], ["x"], ["c"], 2),
        (["c", "b"], True, ["b", "c"], [], [], 3),
        (["y", "x"], False, [], ["x", "y"], [], 2),
        (["c"], False, [], [], ["c"], 2),
    ],
)
def test_who_is_computed_and_who_is_left_out(
    tutor_ids: list[str] | None,
    include_inactive: bool,
    computed: list[str],
    unknown: list[str],
    inactive: list[str],
    total: int,
) -> None:
    chosen = choose_roster(TUTORS, tutor_ids=tutor_ids, include_inactive=include_inactive)

    assert chosen.tutors["tutor_id"].to_list() == computed
    assert (chosen.unknown, chosen.inactive, chosen.total) == (unknown, inactive, total)


def test_the_platforms_other_tutors_are_those_of_any_status() -> None:
    others = choose_others(TUTORS, pl.Series(["b", "gone"]))

    assert others["tutor_id"].to_list() == ["a", "c", "d"]
