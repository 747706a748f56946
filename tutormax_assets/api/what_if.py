"""Who would change tier under another policy: computed from what is stored, nothing written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import polars as pl

from tutormax_assets.compute.tasks.windows import window_metrics
from tutormax_assets.defs.resources import load_policy
from tutormax_assets.errors import UsageError
from tutormax_assets.metrics.comparison import tier_flaps, tier_matrix, tier_movers
from tutormax_assets.metrics.policy import Policy
from tutormax_assets.metrics.tiers import performance_tiers
from tutormax_assets.settings import Settings
from tutormax_assets.storage.store import PartitionStore

FLAPPING = 3
"""Changes of tier from which on a tutor counts as flapping."""


class WhatIfError(UsageError):
    """What is asked cannot be told from what is stored; the message says why and what to do."""


@dataclass(frozen=True)
class WindowComparison:
    """A window under the policy of its run and under another one.

    Attributes:
        window: Its name.
        matrix: ``tier``, ``other_tier`` and number of ``tutors``.
        movers: ``tutor_id``, ``tier``, ``other_tier`` and ``steps``, those who move farthest first.
        flaps: Changes of tier from date to date, of all tutors together.
        other_flaps: The same under the other policy.
        flapping: Tutors with at least ``FLAPPING`` changes.
        other_flapping: The same under the other policy.
    """

    window: str
    matrix: Sequence[Mapping[str, Any]]
    movers: Sequence[Mapping[str, Any]]
    flaps: int
    other_flaps: int
    flapping: int
    other_flapping: int


@dataclass(frozen=True)
class Comparison:
    """Tiers under the policies of their runs beside those under another one.

    Attributes:
        reference_date: Of matrix and movers.
        dates: Of the flaps, ascending: those of the last days that are stored.
        windows: Those that both policies have, the shortest first.
        only_one: Windows that only one of them has.
    """

    reference_date: date
    dates: Sequence[date]
    windows: Sequence[WindowComparison]
    only_one: Sequence[str]


def compare(settings: Settings, policy: Policy, reference_date: date, *, days: int) -> Comparison:
    """Judge stored dates by another policy.

    Args:
        settings: Where everything is.
        policy: The other policy.
        reference_date: The date whose tutors are compared.
        days: How many dates up to it are looked through for flaps.

    Raises:
        WhatIfError: The date is not stored, or the policy asks for rows that are not.
        PolicyError: The policy of the settings is refused.
    """
    store = PartitionStore(settings.storage_path)
    today = load_policy(settings)
    if policy.session_score_scale != today.session_score_scale:
        raise WhatIfError(
            "session_score_scale decides which scores are read at all, so that what is stored does"
            " not tell. Set it in the policy that TUTORMAX_POLICY names and run the date."
        )
    if policy.horizon_days > today.horizon_days:
        raise WhatIfError(
            f"A window of {policy.horizon_days} days reaches back farther than the"
            f" {today.horizon_days} days that are stored. Set it in the policy that TUTORMAX_POLICY"
            " names and run the date."
        )
    tiers: dict[date, pl.LazyFrame] = {}
    others: dict[date, pl.LazyFrame] = {}
    for ago in range(days - 1, -1, -1):
        day = reference_date - timedelta(days=ago)
        try:
            judged = store.whole_partition("tutor_tiers", str(day)).rows().scan()
            other = _tiers(store, day, policy)
        except FileNotFoundError:
            continue
        columns = ("tutor_id", "window", "performance_tier")
        tiers[day] = judged.select(columns).collect().lazy()
        # A tutor of a shard that failed is judged under neither.
        of_judged = other.select(columns).join(tiers[day], on="tutor_id", how="semi")
        others[day] = of_judged.collect(engine="streaming").lazy()
    if reference_date not in tiers:
        raise WhatIfError(
            f"{reference_date} is not stored. Run `tutormax run --date {reference_date}`."
        )
    return _comparison(reference_date, tiers, others)


def _tiers(store: PartitionStore, day: date, policy: Policy) -> pl.LazyFrame:
    """``TutorTiers`` of a date under a policy, from the rows that its run has read.

    What the rows add up to is stored, too, but by the policy of the run, whichever that was.
    """
    roster, sessions, events = (
        store.whole_partition(asset, str(day)).rows().scan()
        for asset in ("tutor_roster", "sessions_snapshot", "tutor_events_snapshot")
    )
    windows = window_metrics(
        roster, sessions, events, reference_date=day, windows=policy.windows, policy=policy
    )
    return performance_tiers(windows.lazy(), policy=policy)


def _comparison(
    reference_date: date,
    tiers: Mapping[date, pl.LazyFrame],
    others: Mapping[date, pl.LazyFrame],
) -> Comparison:
    now, then = tiers[reference_date], others[reference_date]
    matrix, movers, flaps, other_flaps, windows, other_windows = pl.collect_all(
        [
            tier_matrix(now, then),
            tier_movers(now, then),
            tier_flaps(tiers),
            tier_flaps(others),
            *(frame.select(pl.col("window").unique()) for frame in (now, then)),
        ]
    )
    both = {*windows["window"]} & {*other_windows["window"]}
    of_windows = [
        WindowComparison(
            window,
            matrix.filter(window=window).drop("window").to_dicts(),
            movers.filter(window=window).drop("window").to_dicts(),
            *(int(of.filter(window=window)["flaps"].sum()) for of in (flaps, other_flaps)),
            *(
                int((of.filter(window=window)["flaps"] >= FLAPPING).sum())
                for of in (flaps, other_flaps)
            ),
        )
        for window in sorted(both, key=_length)
    ]
    only_one = sorted({*windows["window"]} ^ {*other_windows["window"]}, key=_length)
    return Comparison(reference_date, sorted(tiers), of_windows, only_one)


def _length(window: str) -> int:
    return int(window.removesuffix("day"))
