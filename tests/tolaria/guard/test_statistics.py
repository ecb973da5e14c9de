import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.tolaria.guard import RobustStatistics

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200)


@given(values)
def test_the_window_keeps_its_order(losses: list[float]) -> None:
    statistics = RobustStatistics(window=16)
    for loss in losses:
        statistics.add(loss)
    last = sorted(losses[-16:])
    assert statistics.median == last[len(last) // 2]
    assert statistics.highest == last[-1]
    assert statistics.count == len(last)


@given(values, values)
def test_a_saved_window_goes_on_as_the_original(before: list[float], after: list[float]) -> None:
    statistics, other = RobustStatistics(window=16), RobustStatistics(window=16)
    for value in before:
        statistics.add(value)
    other.load_state_dict(statistics.state_dict())
    for value in after:
        statistics.add(value)
        other.add(value)
    assert other.state_dict() == statistics.state_dict()
    assert other.distance(1.0) == statistics.distance(1.0)


def test_a_shorter_window_takes_the_newest_values() -> None:
    long, short = RobustStatistics(window=16), RobustStatistics(window=4)
    for value in range(10):
        long.add(float(value))
    short.load_state_dict(long.state_dict())
    assert short.state_dict()["recent"] == [6.0, 7.0, 8.0, 9.0]
    short.add(10.0)
    assert short.state_dict()["recent"] == [7.0, 8.0, 9.0, 10.0]


def test_positive_values_are_compared_by_their_logarithm() -> None:
    statistics = RobustStatistics(window=8)
    for value in (0.01, 0.1, 1.0, 10.0, 100.0):
        statistics.add(value)
    assert statistics.distance(100.0) == pytest.approx(2.0)
    assert statistics.distance(0.01) == pytest.approx(-2.0)


def test_without_a_value_there_is_no_average() -> None:
    statistics = RobustStatistics(window=8)
    assert math.isnan(statistics.average)
    other = RobustStatistics(window=8)
    other.load_state_dict(statistics.state_dict())
    assert math.isnan(other.average)
