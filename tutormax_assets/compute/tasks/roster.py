"""Which of the platform's tutors a run computes."""

from collections.abc import Collection
from dataclasses import dataclass

import polars as pl

from tutormax_assets.metrics.quality import good_tutors


@dataclass(frozen=True)
class Roster:
    """The tutors of a run.

    Attributes:
        tutors: ``TutorRoster`` of those that are computed.
        unknown: Ids that were asked for and are not among the platform's tutors, sorted.
        inactive: Ids that were asked for and are left out since they are not active, sorted.
        total: Tutors that a run of all would compute, and those of this run.
    """

    tutors: pl.DataFrame
    unknown: list[str]
    inactive: list[str]
    total: int


def choose_roster(
    tutors: pl.DataFrame, /, *, tutor_ids: Collection[str] | None, include_inactive: bool
) -> Roster:
    """The active tutors, or those of some ids.

    Args:
        tutors: ``SourceTutors``.
        tutor_ids: Only these tutors; all when null.
        include_inactive: Tutors of any status.
    """
    active = good_tutors(tutors.lazy(), include_inactive=False).collect()
    asked = tutors if tutor_ids is None else tutors.filter(pl.col("tutor_id").is_in(tutor_ids))
    chosen = good_tutors(asked.lazy(), include_inactive=include_inactive).collect()
    known, computed = set(asked["tutor_id"]), set(chosen["tutor_id"])
    return Roster(
        chosen,
        unknown=sorted(set(tutor_ids or ()) - known),
        inactive=[] if tutor_ids is None else sorted(known - computed),
        total=len({*active["tutor_id"], *computed}),
    )


def choose_others(tutors: pl.DataFrame, computed: pl.Series, /) -> pl.DataFrame:
    """``TutorRoster`` of the platform's tutors that are not computed.

    Args:
        tutors: ``SourceTutors``.
        computed: Ids of those that are.
    """
    everyone = good_tutors(tutors.lazy(), include_inactive=True)
    return everyone.filter(~pl.col("tutor_id").is_in(computed.implode())).collect()
