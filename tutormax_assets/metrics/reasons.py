"""Reasons for a tier, their certainty, and the distance to the next tiers.

Nothing here changes a metric or a tier. Reasons use the same sums and the same flags.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import polars as pl

from tutormax_assets.metrics.policy import HIGHER_IS_BETTER, LOWER_IS_BETTER, Policy
from tutormax_assets.metrics.schemas import CERTAINTIES, EVIDENCE, FLAGS, TierReasons
from tutormax_assets.metrics.tiers import flags, tier_of, with_tiers
from tutormax_assets.metrics.window import round_hundredths

CONFIDENCE = 0.95

_TWO_SIDED = (1 + CONFIDENCE) / 2
_Z = NormalDist().inv_cdf(_TWO_SIDED)

DENOMINATORS: Mapping[str, str] = {
    "avg_rating": "ratings",
    "first_session_success_rate": "first_rated",
    "reschedule_rate": "reschedules_known",
    "no_show_count": "sessions",
    "engagement_score": "sessions",
    "learning_objectives_met_pct": "objectives_known",
}
"""The column of ``WindowSums`` that counts the rows which a flagged metric rests on."""

_SHARES: Mapping[str, str] = {
    "first_session_success_rate": "first_successes",
    "reschedule_rate": "reschedules",
    "learning_objectives_met_pct": "objectives_met",
}


def tier_reasons(metrics: pl.LazyFrame, /, *, policy: Policy) -> pl.LazyFrame:
    """Why each tutor is in the tier of each window.

    Args:
        metrics: ``WindowSums`` of any windows.
        policy: Thresholds, how many flags make a tier, and how many sessions are evidence.

    Returns:
        ``TierReasons``, in the order of the rows that came in.
    """
    is_thin = pl.col("sessions") < policy.evidence_min_sessions
    sufficient, thin = (_one_of(EVIDENCE, one) for one in EVIDENCE)
    columns = {"evidence": pl.when(is_thin).then(thin).otherwise(sufficient)}
    for name, (green, red) in flags(policy).items():
        columns[f"{name}_denominator"] = pl.col(DENOMINATORS[name])
        columns[f"{name}_flag"] = (
            pl.when(green).then(_one_of(FLAGS, "green")).when(red).then(_one_of(FLAGS, "red"))
        )
    ends = {
        f"{name}_{side}": end
        for name, low_and_high in intervals().items()
        for side, end in zip(("low", "high"), low_and_high, strict=True)
    }
    certainties = {f"{name}_certainty": _certainty(name, policy) for name in intervals()}
    return (
        with_tiers(metrics, policy=policy)
        .with_columns(**columns, **ends)
        # Rounding repeats what it rounds: in the same step the plan would grow many times over.
        .with_columns(round_hundredths(pl.col(list(ends))))
        .with_columns(**certainties)
        .select(TierReasons.column_names())
    )


def intervals() -> dict[str, tuple[pl.Expr, pl.Expr]]:
    """The ends of the 95 % interval of each metric that has one, over ``WindowSums``.

    A share of nothing and a mean of fewer than two ratings have none: null.
    """
    shares = {
        name: wilson_interval(pl.col(part), pl.col(DENOMINATORS[name]))
        for name, part in _SHARES.items()
    }
    rating = t_interval(pl.col("ratings"), pl.col("rating_sum"), pl.col("rating_square_sum"))
    low, high = (end.clip(1, 5) for end in rating)
    return {"avg_rating": (low, high), **shares}


def wilson_interval(part: pl.Expr, whole: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """The 95 % score interval of a share, in percent; null where the whole is 0.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    Journal of the American Statistical Association 22 (1927).
    """
    n = pl.when(whole > 0).then(whole.cast(pl.Float64))
    k = part.cast(pl.Float64)
    middle = k + _Z**2 / 2
    # Without p (1 - p), which would lose digits: of none and of all, one end is exact.
    half = _Z * (k * (n - k) / n + _Z**2 / 4).sqrt()
    low = pl.when(k == 0).then(0 * n).otherwise(100 * (middle - half) / (n + _Z**2))
    high = pl.when(k == n).then(100 + 0 * n).otherwise(100 * (middle + half) / (n + _Z**2))
    return low, high


def t_interval(count: pl.Expr, total: pl.Expr, squares: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """The 95 % interval of a mean from count, sum and sum of squares; null for fewer than two.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    n = pl.when(count > 1).then(count.cast(pl.Int64))
    # Whole numbers, so that equal values have no variance.
    variance = (n * squares - total * total) / (n * (n - 1))
    half = _t_quantile(n - 1) * (variance / n).sqrt()
    mean = total / n
    return mean - half, mean + half


def _t_quantile(degrees: pl.Expr) -> pl.Expr:
    def quantiles(values: pl.Series) -> pl.Series:
        from scipy.special import stdtrit

        known = values.drop_nulls().unique()
        of_known = pl.Series(stdtrit(known.to_numpy(), _TWO_SIDED), dtype=pl.Float64)
        return values.replace_strict(known, of_known, default=None, return_dtype=pl.Float64)

    return degrees.map_batches(quantiles, return_dtype=pl.Float64, is_elementwise=True)


def _certainty(name: str, policy: Policy) -> pl.Expr:
    bound = getattr(policy.thresholds, name)
    low, high, flag = (pl.col(f"{name}_{part}") for part in ("low", "high", "flag"))
    higher_is_better = name in HIGHER_IS_BETTER
    beyond_green = low >= bound.green if higher_is_better else high <= bound.green
    beyond_red = high < bound.red if higher_is_better else low > bound.red
    is_certain = pl.when(flag == "green").then(beyond_green).otherwise(beyond_red)
    certain, within_noise = (_one_of(CERTAINTIES, one) for one in CERTAINTIES)
    # Without an interval nothing is certain.
    judged = pl.when(is_certain.fill_null(False)).then(certain).otherwise(within_noise)
    return pl.when(flag.is_not_null()).then(judged)


def _one_of(values: tuple[str, ...], value: str) -> pl.Expr:
    return pl.lit(value, dtype=pl.Enum(values))


@dataclass(frozen=True)
class Candidate:
    """A metric whose flag may change.

    Attributes:
        metric: Its name.
        value: Its value.
        bound: The bound at which the flag changes.
        condition: When it has the flag that the bound is of, such as ``10 or less``.
    """

    metric: str
    value: float
    bound: float
    condition: str


@dataclass(frozen=True)
class FlagChange:
    """Flags that have to be gained or lost.

    Attributes:
        flag: ``green`` or ``red``.
        count: How many; negative where they have to be lost.
        candidates: The metrics whose flags may change so, those nearest to their bounds first.
    """

    flag: str
    count: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Distance:
    """What separates a row from another tier.

    Attributes:
        tier: The tier.
        changes: The flags that have to change, all of them.
    """

    tier: str
    changes: tuple[FlagChange, ...]


def distance_to_better(reasons: Mapping[str, Any], /, *, policy: Policy) -> Distance | None:
    """The fewest flags that lead to a better tier; None from the best one.

    Args:
        reasons: A row of ``TierReasons``.
        policy: Thresholds, and how many flags make a tier.
    """
    need, green, red = policy.tier_flags, reasons["green_flags"], reasons["red_flags"]
    match reasons["performance_tier"]:
        case "Exemplary":
            return None
        case "Strong":
            counts = {"green": max(need.exemplary_green - green, 0), "red": -red}
        case "Developing":
            counts = {"green": need.strong_green - green}
        case "Needs Attention":
            counts = {"red": need.needs_attention_red - 1 - red}
        case _:
            counts = {"red": need.at_risk_red - 1 - red}
    return _distance(reasons, counts, policy)


def distance_to_worse(reasons: Mapping[str, Any], /, *, policy: Policy) -> Distance | None:
    """The flags that lead to the next worse tier; None from the worst one.

    Args:
        reasons: A row of ``TierReasons``.
        policy: Thresholds, and how many flags make a tier.
    """
    need, green, red = policy.tier_flags, reasons["green_flags"], reasons["red_flags"]
    match reasons["performance_tier"]:
        case "Exemplary":
            counts = {"green": need.exemplary_green - 1 - green}
        case "Strong":
            counts = {"green": need.strong_green - 1 - green}
        case "Developing":
            counts = {"red": need.needs_attention_red - red}
        case "Needs Attention":
            counts = {"red": need.at_risk_red - red}
        case _:
            return None
    return _distance(reasons, counts, policy)


def _distance(reasons: Mapping[str, Any], counts: Mapping[str, int], policy: Policy) -> Distance:
    flags_then = {flag: reasons[f"{flag}_flags"] + counts.get(flag, 0) for flag in FLAGS}
    changes = (
        FlagChange(flag, count, tuple(_candidates(reasons, flag, gained=count > 0, policy=policy)))
        for flag, count in counts.items()
        if count
    )
    return Distance(tier_of(flags_then["green"], flags_then["red"], policy=policy), tuple(changes))


def _candidates(
    reasons: Mapping[str, Any], flag: str, *, gained: bool, policy: Policy
) -> list[Candidate]:
    found = []
    for name in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER):
        value, has_flag = reasons[name], reasons[f"{name}_flag"] == flag
        if value is None or has_flag == gained:
            continue
        bounds = getattr(policy.thresholds, name)
        bound = getattr(bounds, flag)
        distance = abs(value - bound) / (abs(bounds.green - bounds.red) or 1)
        found.append((distance, Candidate(name, value, bound, condition(name, flag, bound))))
    return [candidate for _, candidate in sorted(found, key=lambda one: one[0])]


def condition(metric: str, flag: str, bound: float) -> str:
    """When a metric has a flag, in words: such as ``4.5 or more`` or ``more than 15``."""
    more = (metric in HIGHER_IS_BETTER) == (flag == "green")
    if flag == "green":
        if bound == 0 and not more:
            return "0"
        return f"{bound:g} or {'more' if more else 'less'}"
    return f"{'more' if more else 'less'} than {bound:g}"
