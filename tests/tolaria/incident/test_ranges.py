import math

import pytest
import torch

from esper.tolaria.incident.ranges import (
    FACTOR,
    Baseline,
    Place,
    can_measure,
    range_of,
    rms_of,
)

PLACE: Place = ("forward", "trunk", "aten.mm", 0, 0)


def baseline(*values: float) -> Baseline:
    made = Baseline()
    for value in values:
        made.take_in([(PLACE, value)])
    return made


def test_a_range_counts_what_is_not_finite_and_describes_the_rest() -> None:
    found = range_of(torch.tensor([[1.0, math.nan], [-3.0, math.inf]]), "weight")
    assert (found.low, found.high, found.mean, found.not_finite) == (-3.0, 1.0, -1.0, 2)
    assert found.rms == pytest.approx(math.sqrt(5))
    assert str(found) == "weight float32 (2, 2): -3 to 1, mean -1, 2 not finite"


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.tensor([math.nan]), "float32 (1,): no finite value, 1 not finite"),
        (torch.zeros(0, 3), "float32 (0, 3): no values"),
        (torch.tensor([3, 7]), "int64 (2,): 3 to 7, mean 5"),
        (torch.tensor([True, False]), "bool (2,): 0 to 1, mean 0.5"),
        (torch.eye(2).to_sparse(), "float32 (2, 2): no values"),
    ],
)
def test_every_kind_of_tensor_has_a_range(tensor: torch.Tensor, text: str) -> None:
    assert str(range_of(tensor)) == text


def test_only_tensors_with_values_of_their_own_are_measured() -> None:
    assert can_measure(torch.ones(2, dtype=torch.complex64))
    assert not can_measure(torch.ones(2, dtype=torch.int64))
    assert not can_measure(torch.ones(2, device="meta"))
    assert not can_measure(torch.eye(2).to_sparse())


def test_the_root_mean_square_does_not_overflow_where_the_values_do_not() -> None:
    assert rms_of(torch.full((4,), 3e38)) == pytest.approx(3e38)
    assert rms_of(torch.full((4,), 6e4, dtype=torch.float16)) == pytest.approx(6e4, rel=1e-3)
    assert rms_of(torch.tensor([3 + 4j])) == pytest.approx(math.sqrt(12.5))
    assert math.isnan(rms_of(torch.tensor([1.0, math.nan])))


def test_a_clear_factor_above_the_highest_breaks_the_trend() -> None:
    usual = baseline(1.0, 1.1, 0.9, 1.0)
    assert not usual.broken_by(PLACE, 1.1 * FACTOR * 0.99, doubtful=True)
    assert usual.broken_by(PLACE, 1.1 * FACTOR * 1.01, doubtful=True)
    assert usual.usual(PLACE) == pytest.approx((0.9, 1.1))


def test_a_series_that_spans_much_is_given_as_much_again() -> None:
    usual = baseline(1e-4, 1e-2, 1e-3, 1e-4)
    assert not usual.broken_by(PLACE, 0.9, doubtful=True)
    assert usual.broken_by(PLACE, 1.1, doubtful=True)


def test_few_steps_and_steps_without_a_doubt_need_a_larger_factor() -> None:
    assert not baseline(1.0, 1.0).broken_by(PLACE, 60.0, doubtful=True)
    assert baseline(1.0, 1.0).broken_by(PLACE, 65.0, doubtful=True)
    assert not baseline(1.0, 1.0, 1.0, 1.0).broken_by(PLACE, 60.0, doubtful=False)


def test_what_is_not_known_breaks_nothing() -> None:
    usual = baseline(0.0, math.inf)
    assert not usual.broken_by(PLACE, 1e9, doubtful=True)
    assert usual.often_not_finite(PLACE)
    assert usual.usual(PLACE) is None
    assert usual.steps == 2
