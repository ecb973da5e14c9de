import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.tolaria.aggregation import PCGrad
from esper.tolaria.aggregation.pcgrad import project_all
from tolaria.aggregation.textbook import textbook_pcgrad


def matrix(tasks: int, size: int, seed: int, scales: list[float]) -> torch.Tensor:
    rows = torch.randn(tasks, size, generator=torch.Generator().manual_seed(seed)).double()
    return rows * torch.tensor(scales[:tasks]).double().unsqueeze(1)


def combined(rows: torch.Tensor, aggregator: PCGrad) -> torch.Tensor:
    return aggregator.weights(rows @ rows.T) @ rows


@given(
    tasks=st.integers(1, 12),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    scales=st.lists(st.sampled_from([1e-20, 1e-3, 1.0, 50.0, 1e20]), min_size=12, max_size=12),
)
def test_task_space_equals_the_paper_on_whole_vectors(
    tasks: int, size: int, seed: int, scales: list[float]
) -> None:
    rows = matrix(tasks, size, seed, scales)
    aggregator = PCGrad(torch.Generator().manual_seed(seed))
    orders = PCGrad(torch.Generator().manual_seed(seed))._orders(tasks)
    expected = textbook_pcgrad(list(rows), orders.tolist())
    difference = (combined(rows, aggregator) - expected).norm()
    assert difference <= 1e-6 * rows.norm(dim=1).max()


@given(seed=st.integers(0, 2**31), size=st.integers(2, 30))
def test_two_tasks_are_both_served(seed: int, size: int) -> None:
    rows = matrix(2, size, seed, [1.0, 7.0])
    result = combined(rows, PCGrad())
    assert all(row @ result >= -1e-9 * row.norm() * rows.norm() for row in rows)


@given(seed=st.integers(0, 2**31), tasks=st.integers(1, 8))
def test_without_conflict_it_is_the_sum(seed: int, tasks: int) -> None:
    rows = matrix(tasks, 20, seed, [1.0] * 8).abs()
    torch.testing.assert_close(combined(rows, PCGrad()), rows.sum(0))


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-10, 0.5, 3.0, 1e10]))
def test_scaling_all_gradients_scales_the_result(seed: int, scale: float) -> None:
    rows = matrix(5, 10, seed, [1.0] * 5)
    first = combined(rows, PCGrad(torch.Generator().manual_seed(seed)))
    second = combined(rows * scale, PCGrad(torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(second, first * scale)


def test_opposite_gradients_cancel() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    torch.testing.assert_close(combined(rows, PCGrad()), torch.zeros(2).double())


def test_every_gradient_is_projected_against_the_original_of_the_other() -> None:
    rows = torch.tensor([[1.0, 0.2], [-1.0, 0.2]]).double()
    result = combined(rows, PCGrad())
    expected = textbook_pcgrad(list(rows), [[1], [0]])
    torch.testing.assert_close(result, expected)
    assert result[1] > rows.sum(0)[1], "the result must differ from the plain sum under conflict"


def test_a_zero_gradient_is_no_partner() -> None:
    rows = torch.tensor([[1.0, -1.0], [0.0, 0.0], [-1.0, 0.5]]).double()
    result = combined(rows, PCGrad())
    assert result.isfinite().all()
    torch.testing.assert_close(result, combined(rows[[0, 2]], PCGrad()))


def test_the_order_comes_from_the_given_generator_alone() -> None:
    rows = matrix(6, 4, 3, [1.0] * 6)
    torch.manual_seed(1)
    first = combined(rows, PCGrad(torch.Generator().manual_seed(5)))
    before = torch.get_rng_state()
    torch.manual_seed(2)
    second = combined(rows, PCGrad(torch.Generator().manual_seed(5)))
    assert torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was drawn from"


def test_its_generator_is_saved_and_restored() -> None:
    rows = matrix(6, 4, 4, [1.0] * 6)
    aggregator = PCGrad()
    combined(rows, aggregator)
    saved = aggregator.state_dict()
    first = combined(rows, aggregator)
    other = PCGrad()
    other.load_state_dict(saved)
    assert torch.equal(first, combined(rows, other))


def test_mean_divides_by_the_tasks() -> None:
    rows = matrix(3, 5, 1, [1.0] * 3)
    torch.testing.assert_close(
        combined(rows, PCGrad(reduction="mean")) * 3, combined(rows, PCGrad())
    )


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(RuntimeError, match="'max'"):
        PCGrad(reduction="max")  # type: ignore[arg-type]


@given(tasks=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_compiled_and_vectorised_projections_agree(tasks: int, seed: int) -> None:
    rows = matrix(tasks, 30, seed, [1.0, 1e-6, 30.0] * 14)
    preferences = [1.0 + task % 3 for task in range(tasks)]
    aggregator = PCGrad(torch.Generator().manual_seed(seed), preferences=preferences)
    orders = PCGrad(torch.Generator().manual_seed(seed))._orders(tasks)
    vectorised = project_all(
        rows @ rows.T, orders, 1e-100, torch.tensor(preferences, dtype=torch.float64)
    )
    torch.testing.assert_close(aggregator.weights(rows @ rows.T), vectorised, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernels_in_use", ["compiled", "torch"], indirect=True)
def test_partners_below_epsilon_are_left_out(kernels_in_use: str) -> None:
    rows = torch.tensor([[1.0, 0.0], [-1e-4, 1e-4]]).double()
    assert PCGrad(epsilon=1e-3).weights(rows @ rows.T)[1] == 1
    assert PCGrad(epsilon=1e-5).weights(rows @ rows.T)[1] > 1000


def test_each_gradient_draws_an_order_of_its_own() -> None:
    orders = PCGrad()._orders(20)
    assert all(sorted(order) == list(range(20)) for order in orders.tolist())
    assert len({tuple(order) for order in orders.tolist()}) == 20


def test_preferences_weigh_the_projected_gradients() -> None:
    rows = matrix(3, 5, 2, [1.0] * 3)
    alone = [
        combined(rows, PCGrad(preferences=[float(task == one) for one in range(3)]))
        for task in range(3)
    ]
    both = combined(rows, PCGrad(preferences=[2, 0, 0.5]))
    torch.testing.assert_close(both, 2 * alone[0] + 0.5 * alone[2])


def test_preferences_by_name_follow_the_tasks_that_are_present() -> None:
    aggregator = PCGrad(preferences={"a": 1, "b": 2, "c": 3})
    present = aggregator.for_tasks(["c", "a"])
    assert present.weights(torch.eye(2).double()).tolist() == [3, 1]
    assert aggregator.for_tasks(["a", "b", "c"]) is aggregator
    with pytest.raises(RuntimeError, match="no preference for task 'd'"):
        aggregator.for_tasks(["d"])


def test_a_selection_of_tasks_draws_from_the_same_generator() -> None:
    rows = matrix(4, 3, 5, [1.0] * 4)
    named = PCGrad(torch.Generator().manual_seed(3), preferences=dict.fromkeys("abcde", 1.0))
    plain = PCGrad(torch.Generator().manual_seed(3))
    for _ in range(3):
        assert torch.equal(combined(rows, named.for_tasks("abcd")), combined(rows, plain))


@pytest.mark.parametrize(
    ("preferences", "message"),
    [([1.0, -1.0], "weight 1 is -1"), ([1.0], "1 preferences were given for 2 tasks")],
)
def test_bad_preferences_are_refused(preferences: list[float], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        PCGrad(preferences=preferences).weights(torch.eye(2).double())


def test_a_gramian_of_float32_is_read_as_such() -> None:
    gramian = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    assert PCGrad().weights(gramian).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("epsilon", [-1.0, float("nan"), 1.0])
def test_an_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(RuntimeError, match="epsilon is"):
        PCGrad(epsilon=epsilon)
