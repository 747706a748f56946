"""Limits of control charts: textbook values and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutormax_assets.metrics.control_chart import FEWEST_POINTS, xmr_limits

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=FEWEST_POINTS, max_size=30)


def test_limits_are_those_of_a_calculation_by_hand() -> None:
    # Moving ranges 2, 3, 1, 2, 4 and 2: 14 / 6.
    limits = xmr_limits([10, 12, 9, 10, 12, 8, 10])

    assert limits is not None
    assert limits.center == pytest.approx(71 / 7)
    assert limits.upper - limits.center == pytest.approx(2.66 * 14 / 6, rel=1e-3)
    assert limits.center - limits.lower == pytest.approx(limits.upper - limits.center)
    assert limits.is_signal(17)
    assert not limits.is_signal(16)


def test_few_values_have_no_limits() -> None:
    assert xmr_limits([1.0] * (FEWEST_POINTS - 1)) is None


def test_of_values_that_never_moved_any_other_is_a_signal() -> None:
    limits = xmr_limits([3.0] * FEWEST_POINTS)

    assert limits is not None
    assert not limits.is_signal(3.0)
    assert limits.is_signal(3.1)


@given(VALUES, st.floats(-1e6, 1e6))
def test_limits_move_with_the_values(values: list[float], by: float) -> None:
    limits, moved = xmr_limits(values), xmr_limits([value + by for value in values])

    assert limits is not None
    assert moved is not None
    assert limits.lower <= limits.center <= limits.upper
    assert moved.center == pytest.approx(limits.center + by, abs=1e-6)
    assert moved.upper - moved.lower == pytest.approx(limits.upper - limits.lower, abs=1e-5)
