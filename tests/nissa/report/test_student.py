import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.nissa.report.student import interval, quantile

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423),
     (100, 1.9840)],
)  # fmt: skip
def test_quantiles_are_those_of_the_printed_tables(freedom: int, expected: float) -> None:
    assert quantile(freedom) == pytest.approx(expected, abs=5e-5)


def test_intervals_hold_the_true_mean_in_95_of_100_cases() -> None:
    chance = random.Random(1)
    held = 0
    for _ in range(2000):
        found = interval([chance.gauss(3.0, 2.0) for _ in range(4)])
        assert found is not None
        held += found.low <= 3.0 <= found.high
    # Four standard errors of the share.
    assert abs(held / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


@given(values=VALUES, shift=st.floats(-100, 100), factor=st.floats(0.1, 10))
def test_an_interval_moves_and_scales_with_its_values(
    values: list[float], shift: float, factor: float
) -> None:
    plain, moved = interval(values), interval([factor * value + shift for value in values])
    assert plain is not None
    assert moved is not None
    assert moved.mean == pytest.approx(factor * plain.mean + shift, abs=1e-6)
    assert moved.reach == pytest.approx(factor * plain.reach, abs=1e-6)


def test_one_value_has_no_end_and_none_no_interval() -> None:
    alone = interval([2.0])
    assert alone is not None
    assert (alone.mean, alone.low, alone.high) == (2.0, -math.inf, math.inf)
    assert interval([]) is None
    same = interval([2.0, 2.0])
    assert same is not None
    assert same.reach == 0
