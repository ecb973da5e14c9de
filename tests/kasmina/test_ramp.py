from typing import Any

import pytest

from esper.kasmina.ramp import Ramp
from esper.leyline import GrowthError


def test_curves_are_those_of_their_names() -> None:
    assert [Ramp(0.0, 1.0, 4, "linear").value(step) for step in range(5)] == [
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    ]
    cosine = Ramp(0.0, 1.0, 4)
    assert cosine.value(1) == pytest.approx((1 - 2**-0.5) / 2)
    assert cosine.value(2) == pytest.approx(0.5)
    sigmoid = Ramp(0.0, 1.0, 4, "sigmoid")
    assert sigmoid.value(1) == pytest.approx((1 / (1 + 2.718281828459045**3)), abs=3e-3)
    assert sigmoid.value(2) == pytest.approx(0.5)


def test_a_ramp_may_lead_down_or_nowhere_and_stays_at_its_target() -> None:
    down = Ramp(0.8, 0.2, 10, "linear")
    assert [down.value(step) for step in (-1, 0, 5, 10, 11)] == [0.8, 0.8, 0.5, 0.2, 0.2]
    assert {Ramp(0.3, 0.3, 5, "sigmoid").value(step) for step in range(7)} == {0.3}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((-0.1, 1.0, 5), "start of a ramp is -0.1; give a number from 0 to 1"),
        ((0.0, 1.5, 5), "target of a ramp is 1.5"),
        ((float("nan"), 1.0, 5), "start of a ramp is nan"),
        ((0.0, float("inf"), 5), "target of a ramp is inf"),
        ((0.0, 1.0, 0), "steps of a ramp is 0; give 1 or more"),
        ((0.0, 1.0, 2.5), "steps of a ramp is 2.5; give a whole number"),
        ((0.0, 1.0, float("nan")), "steps of a ramp is nan; give a whole number"),
        ((0.0, 1.0, "3"), "steps of a ramp is '3'; give a whole number"),
        (("0", 1.0, 3), "start of a ramp is '0'; give a number"),
        ((0.0, None, 3), "target of a ramp is None; give a number"),
        ((0.0, 1.0, 5, "cubic"), "curve of a ramp is 'cubic'; give one of linear, cosine, sigmoid"),
    ],
)
def test_what_is_no_ramp_is_refused(arguments: Any, reason: str) -> None:
    with pytest.raises(GrowthError, match=reason):
        Ramp(*arguments)
