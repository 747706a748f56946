"""Control charts: whether a value is unusual, judged by how much such values vary by themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

FEWEST_POINTS = 6
"""Earlier values that limits need at least."""

_ROUNDING = 1e-9

# Of the mean moving range: 3 standard deviations, each of which is the range over d2 of two values.
_MOVING_RANGES = 3 / 1.128


@dataclass(frozen=True)
class Limits:
    """The natural process limits of values that vary by chance.

    Attributes:
        center: The mean of the earlier values.
        lower: The lower limit.
        upper: The upper limit.
    """

    center: float
    lower: float
    upper: float

    def is_signal(self, value: float) -> bool:
        """Whether a value lies outside of the limits, by more than rounding."""
        slack = _ROUNDING * max(abs(self.lower), abs(self.upper), abs(value))
        return not self.lower - slack <= value <= self.upper + slack


def xmr_limits(values: Sequence[float]) -> Limits | None:
    """The limits of individual values and moving ranges; None for too few values.

    Source: W. A. Shewhart, Economic Control of Quality of Manufactured Product (1931), in the form
    of D. J. Wheeler, Understanding Variation (1993): the mean plus and minus 2.66 times the mean of
    the differences between neighbours.

    Args:
        values: In the order of time, of periods that do not overlap.
    """
    if len(values) < FEWEST_POINTS:
        return None
    center = fmean(values)
    moving_range = fmean(abs(b - a) for a, b in pairwise(values))
    half = _MOVING_RANGES * moving_range
    return Limits(center, center - half, center + half)
