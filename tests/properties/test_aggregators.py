"""What holds for every aggregator, on gradients of all scales."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from esper.tolaria.aggregation import Aggregator, Mean, PCGrad, Sum, Weighted
from esper.tolaria.aggregation.pcgrad import project_all

SCALES = [1e-30, 1e-12, 1.0, 1e3, 1e15, 1e30]
Make = Callable[[int], Aggregator]

AGGREGATORS: dict[str, Make] = {
    "sum": lambda tasks: Sum(),
    "mean": lambda tasks: Mean(),
    "weighted": lambda tasks: Weighted([1.0 + task for task in range(tasks)]),
    "pcgrad": lambda tasks: PCGrad(torch.Generator().manual_seed(1)),
    "pcgrad, mean": lambda tasks: PCGrad(torch.Generator().manual_seed(1), reduction="mean"),
    "pcgrad, preferences": lambda tasks: PCGrad(
        torch.Generator().manual_seed(1), preferences=[1.0 + task for task in range(tasks)]
    ),
}
every_aggregator = pytest.mark.parametrize("make", AGGREGATORS.values(), ids=list(AGGREGATORS))


@st.composite
def jacobians(draw: st.DrawFn, least: int = 1, most: int = 9) -> Tensor:
    """Draw tasks by elements: random, of low rank, of one scale or many, with zero rows."""
    tasks = draw(st.integers(least, most))
    rank = draw(st.integers(1, tasks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    left = torch.randn(tasks, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, draw(st.integers(1, 30)), generator=generator, dtype=torch.float64)
    one = draw(st.sampled_from(SCALES))
    scales = draw(
        st.one_of(
            st.just([one] * tasks),
            st.lists(st.sampled_from([0.0, *SCALES]), min_size=tasks, max_size=tasks),
        )
    )
    return left @ right * torch.tensor(scales, dtype=torch.float64).unsqueeze(1)


def combine(aggregator: Aggregator, rows: Tensor) -> Tensor:
    return aggregator.weights(rows @ rows.T) @ rows


@every_aggregator
@given(rows=jacobians())
def test_finite_gradients_give_a_finite_update(make: Make, rows: Tensor) -> None:
    assert combine(make(len(rows)), rows).isfinite().all()


@every_aggregator
@given(rows=jacobians(most=1))
def test_one_gradient_is_the_update(make: Make, rows: Tensor) -> None:
    torch.testing.assert_close(combine(make(1), rows), rows[0], rtol=1e-12, atol=0)


@every_aggregator
@given(rows=jacobians(), power=st.sampled_from([-40, -3, 1, 40]))
def test_scaling_all_gradients_scales_the_update(make: Make, rows: Tensor, power: int) -> None:
    # A power of two, so that scaling rounds nothing and decides no comparison.
    factor = 2.0**power
    update = combine(make(len(rows)), rows) * factor
    torch.testing.assert_close(combine(make(len(rows)), rows * factor), update, rtol=1e-9, atol=0)


@every_aggregator
@given(rows=jacobians())
def test_the_gramian_is_left_alone(make: Make, rows: Tensor) -> None:
    gramian = rows @ rows.T
    before = gramian.clone()
    make(len(rows)).weights(gramian)
    assert torch.equal(gramian, before)


@every_aggregator
@given(rows=jacobians())
def test_the_same_input_and_generator_give_the_same_bits(make: Make, rows: Tensor) -> None:
    assert torch.equal(combine(make(len(rows)), rows), combine(make(len(rows)), rows))


@every_aggregator
@given(rows=jacobians(most=1), tasks=st.integers(2, 9))
def test_duplicates_do_not_conflict(make: Make, rows: Tensor, tasks: int) -> None:
    weights = make(tasks).weights((rows @ rows.T).expand(tasks, tasks).contiguous())
    orthogonal = make(tasks).weights(torch.eye(tasks, dtype=torch.float64))
    torch.testing.assert_close(weights, orthogonal, rtol=1e-12, atol=0)


@every_aggregator
@given(rows=jacobians())
def test_without_conflict_the_gradients_are_merely_weighed(make: Make, rows: Tensor) -> None:
    weights = make(len(rows)).weights(rows.abs() @ rows.abs().T)
    orthogonal = make(len(rows)).weights(torch.eye(len(rows), dtype=torch.float64))
    torch.testing.assert_close(weights, orthogonal, rtol=1e-12, atol=0)


@given(rows=jacobians(least=2), seed=st.integers(0, 2**31))
def test_permuting_tasks_and_orders_permutes_the_weights(rows: Tensor, seed: int) -> None:
    tasks = len(rows)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(tasks, tasks, generator=generator).argsort(dim=1)
    permutation = torch.randperm(tasks, generator=generator)
    gramian = rows @ rows.T
    ones = torch.ones(tasks, dtype=torch.float64)
    weights = project_all(gramian, orders, 1e-100, ones)
    # Task p[i] stands at place i now, and so do its partners.
    place = permutation.argsort()
    permuted = project_all(
        gramian[permutation][:, permutation], place[orders[permutation]], 1e-100, ones
    )
    torch.testing.assert_close(permuted, weights[permutation], rtol=1e-9, atol=1e-9)


@given(rows=jacobians(least=2, most=2))
def test_two_tasks_are_both_served_by_pcgrad(rows: Tensor) -> None:
    update = combine(PCGrad(), rows)
    norms = rows.norm(dim=1)
    assert (rows @ update >= -1e-12 * norms * norms.max()).all()


@given(rows=jacobians(least=2, most=2))
def test_under_conflict_pcgrad_is_not_the_sum(rows: Tensor) -> None:
    norms = rows.norm(dim=1)
    assume((norms > 0).all())
    rows = rows / norms.unsqueeze(1)
    assume(float(rows[0] @ rows[1]) < -1e-3)
    weights = PCGrad().weights(rows @ rows.T)
    assert (weights > 1 + 9e-4).all(), "a published failure is a silent plain sum"
