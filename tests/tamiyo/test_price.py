import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.tamiyo import RuleLimits
from esper.tamiyo.price import expected_share, payback_steps, price_share

LIMITS = RuleLimits()


def test_doubling_the_model_has_the_price_that_is_set() -> None:
    assert price_share(1000, None, 1000, LIMITS) == pytest.approx(LIMITS.parameter_price)
    dearer = price_share(1000, 2000.0, 1000, LIMITS)
    assert dearer == pytest.approx(LIMITS.parameter_price + LIMITS.flop_price)
    assert price_share(1000, math.inf, 1000, LIMITS) == pytest.approx(LIMITS.parameter_price)


def test_doubling_the_model_can_be_expected_to_gain_what_the_power_law_says() -> None:
    assert expected_share(1000, 1000, LIMITS) == pytest.approx(1 - 2**-LIMITS.expected_exponent)
    assert expected_share(0, 1000, LIMITS) == 0


def test_there_is_a_size_from_which_on_more_is_not_worth_its_price() -> None:
    worth = [
        expected_share(n, 1000, LIMITS) - price_share(n, None, 1000, LIMITS)
        for n in range(0, 10_000, 100)
    ]
    best = worth.index(max(worth)) * 100
    assert 500 < best < 3000
    assert worth[-1] < 0


@given(st.floats(1, 1e4), st.floats(0, 1), st.floats(0, 1))
def test_it_has_paid_back_when_what_was_gained_so_far_reaches_the_price(
    life: float, price: float, expected: float
) -> None:
    steps = payback_steps(life, price, expected)
    if expected <= price:
        assert steps == math.inf
    else:
        assert steps >= life
        assert expected * (steps - life) / steps == pytest.approx(price, rel=1e-6, abs=1e-9)
