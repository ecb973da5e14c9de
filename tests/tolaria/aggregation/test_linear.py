import pytest
import torch

from esper.tolaria.aggregation import Mean, Sum, Weighted


def test_sum_and_mean() -> None:
    gramian = torch.eye(4, dtype=torch.float64)
    assert Sum().weights(gramian).tolist() == [1, 1, 1, 1]
    assert Mean().weights(gramian).tolist() == [0.25] * 4


@pytest.mark.parametrize("aggregator", [Mean(), Weighted([5, 5, 5])])
def test_weights_have_all_digits_of_float64(aggregator: Mean | Weighted) -> None:
    weights = aggregator.weights(torch.eye(3).double())
    assert weights.tolist() == pytest.approx([1 / 3] * 3, rel=1e-15)


def test_weights_are_normalised_by_their_sum() -> None:
    assert Weighted([1, 3]).weights(torch.eye(2).double()).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0, 0], "sum to zero"), ([1, -1], "weight 1 is -1"), ([float("nan")], "weight 0 is nan")],
)
def test_bad_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        Weighted(weights)


def test_a_wrong_number_of_weights_is_refused() -> None:
    with pytest.raises(RuntimeError, match="2 weights were given for 3 tasks"):
        Weighted([1, 1]).weights(torch.eye(3).double())


def test_weights_by_name_follow_the_tasks_that_are_present() -> None:
    aggregator = Weighted({"a": 1, "b": 3, "c": 4})
    assert aggregator.for_tasks(["b", "a"]).weights(torch.eye(2).double()).tolist() == [0.75, 0.25]
    assert aggregator.for_tasks(["a", "b", "c"]) is aggregator
    with pytest.raises(RuntimeError, match=r"no weight for task 'd'; known: \['a', 'b', 'c'\]"):
        aggregator.for_tasks(["d"])


def test_a_batch_of_tasks_without_weight_moves_nothing() -> None:
    aggregator = Weighted({"a": 1, "b": 0}).for_tasks(["b"])
    assert aggregator.weights(torch.eye(1).double()).tolist() == [0]


def test_huge_weights_do_not_overflow() -> None:
    assert Weighted([1e308, 1e308]).weights(torch.eye(2).double()).tolist() == [0.5, 0.5]
