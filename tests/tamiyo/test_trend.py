import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.tamiyo.trend import Trend, progress, theil_sen


def test_a_straight_line_is_found_whatever_one_wild_point_does() -> None:
    times = [0.0, 1, 2, 3, 4, 5, 6]
    values = [2 - 0.5 * t for t in times]
    values[3] = 1e6
    found = theil_sen(times, values)
    assert found is not None
    assert found.slope == pytest.approx(-0.5)
    assert found.low == pytest.approx(-0.5)
    assert found.high < 1e6 / 3


def test_below_five_points_nothing_is_sure() -> None:
    assert theil_sen([0.0], [1.0]) is None
    assert theil_sen([2.0, 2.0], [1.0, 3.0]) is None
    four = theil_sen([0.0, 1, 2, 3], [0.0, 1, 2, 3])
    assert four == Trend(1.0, -math.inf, math.inf)
    five = theil_sen([0.0, 1, 2, 3, 4], [0.0, 1, 2, 3, 5])
    assert five == Trend(1.0, 1.0, 2.0)


def test_the_interval_holds_the_true_slope_about_as_often_as_it_says() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    times = list(map(float, range(10)))
    held = 0
    for _ in range(400):
        found = theil_sen(times, (0.3 * np.arange(10) + random.normal(0, 1, 10)).tolist())
        assert found is not None
        held += found.low <= 0.3 <= found.high
    assert 0.92 <= held / 400 <= 0.99


def test_progress_is_a_share_of_the_loss() -> None:
    halving = progress([0.0, 1, 2, 3, 4], [8.0, 4, 2, 1, 0.5])
    assert halving is not None
    assert [halving.slope, halving.low, halving.high] == pytest.approx([math.log(2)] * 3)
    negative = progress([0.0, 1, 2], [1.0, 0.0, -1.0])
    assert negative is not None
    assert negative.slope == pytest.approx(1.5)
    assert progress([0.0, 1], [0.0, 0.0]) == Trend(0.0)
    assert progress([], []) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), st.floats(0.1, 10), st.floats(-5, 5))
def test_scaling_and_shifting_the_values_scales_the_slope(
    values: list[float], scale: float, shift: float
) -> None:
    times = list(map(float, range(len(values))))
    before, after = (
        theil_sen(times, values),
        theil_sen(times, [scale * value + shift for value in values]),
    )
    assert before is not None
    assert after is not None
    assert after.slope == pytest.approx(scale * before.slope, rel=1e-6, abs=1e-6)
    assert after.low <= after.slope <= after.high
