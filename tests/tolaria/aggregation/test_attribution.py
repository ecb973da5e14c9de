import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.tolaria.aggregation import Sum, backward, losses_by_task

TASKS = ("first", "second", "third", "fourth")
samples = st.lists(
    st.tuples(st.integers(0, 3), st.floats(-100, 100, width=32)), min_size=0, max_size=30
)


@given(batch=samples)
def test_each_task_gets_the_mean_of_its_own_samples(batch: list[tuple[int, float]]) -> None:
    ids = torch.tensor([task for task, _ in batch], dtype=torch.int64)
    values = torch.tensor([value for _, value in batch], dtype=torch.float64)
    losses = losses_by_task(values, ids, TASKS)
    assert tuple(losses) == TASKS
    for number, loss in enumerate(losses.values()):
        own = [value for task, value in batch if task == number]
        if own:
            assert loss is not None
            assert loss.shape == ()
            assert float(loss) == pytest.approx(sum(own) / len(own), abs=1e-9)
        else:
            assert loss is None


@given(batch=samples)
def test_gradients_reach_the_samples_of_the_task_alone(batch: list[tuple[int, float]]) -> None:
    ids = torch.tensor([task for task, _ in batch], dtype=torch.int64)
    values = torch.tensor([value for _, value in batch]).requires_grad_()
    for number, loss in enumerate(losses_by_task(values, ids, TASKS).values()):
        if loss is not None:
            (gradient,) = torch.autograd.grad(loss, values)
            members = (ids == number).float()
            torch.testing.assert_close(gradient, members / members.sum())


def test_numbers_may_be_given_by_name() -> None:
    losses = losses_by_task(
        torch.tensor([1.0, 2.0, 4.0]), torch.tensor([70, -3, 70]), {"b": -3, "c": 0, "a": 70}
    )
    assert {task: None if loss is None else float(loss) for task, loss in losses.items()} == {
        "b": 2.0,
        "c": None,
        "a": 2.5,
    }
    assert list(losses) == ["b", "c", "a"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_may_be_any_integers(dtype: torch.dtype) -> None:
    losses = losses_by_task(
        torch.tensor([1.0, 3.0]), torch.tensor([1, 0], dtype=dtype), ["one", "other"]
    )
    assert losses == {"one": 3.0, "other": 1.0}


def test_ids_and_losses_stay_on_their_device(device: str) -> None:
    losses = losses_by_task(
        torch.tensor([1.0, 3.0], device=device), torch.tensor([1, 1], device=device), ["a", "b"]
    )
    assert losses["a"] is None
    assert losses["b"] is not None
    assert losses["b"].device.type == device
    assert float(losses["b"]) == 2.0


def test_a_sample_of_no_task_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"tasks \[-1, 7\]; known are {'a': 0, 'b': 1}"):
        losses_by_task(torch.ones(4), torch.tensor([0, 7, -1, 7]), ["a", "b"])


def test_a_loss_that_was_reduced_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"shape \(\) and ids \(2,\).*reduction='none'"):
        losses_by_task(torch.tensor(1.0), torch.tensor([0, 1]), ["a", "b"])


def test_several_losses_of_a_sample_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) and ids \(2, 3\); give both one"):
        losses_by_task(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), ["a", "b"])


def test_another_number_of_ids_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"shape \(2,\) and ids \(3,\)"):
        losses_by_task(torch.ones(2), torch.tensor([0, 1, 0]), ["a", "b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_ids_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"ids are {dtype}; give integers"):
        losses_by_task(torch.ones(2), torch.tensor([0, 1], dtype=dtype), ["a", "b"])


def test_the_report_names_the_tasks_that_are_absent() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    inputs, ids = torch.randn(6, 3), torch.tensor([3, 1, 1, 3, 3, 1])
    expected = (model(inputs[ids == 1]).square().mean() + model(inputs[ids == 3]).square().mean(),)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    losses = losses_by_task(model(inputs).square().squeeze(1), ids, TASKS)
    report = backward(losses, list(model.parameters()), Sum())
    assert report.tasks == ("second", "fourth")
    assert report.absent == ("first", "third")
    torch.testing.assert_close([p.grad for p in model.parameters()], list(gradients))


def test_a_batch_without_samples_has_nothing_to_aggregate() -> None:
    model = nn.Linear(3, 1)
    losses = losses_by_task(model(torch.ones(0, 3)).squeeze(1), torch.ones(0).long(), TASKS)
    assert losses == dict.fromkeys(TASKS)
    with pytest.raises(RuntimeError, match=r"^no gradients available for aggregation$"):
        backward(losses, list(model.parameters()), Sum())


@pytest.mark.parametrize("tasks", [[], {"a": 0, "b": 0}])
def test_tasks_need_numbers_of_their_own(tasks: list[str] | dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match="give at least one, each its own number"):
        losses_by_task(torch.ones(2), torch.tensor([0, 5]), tasks)


def test_complex_ids_are_refused() -> None:
    with pytest.raises(RuntimeError, match="give integers"):
        losses_by_task(torch.ones(2), torch.ones(2, dtype=torch.complex64), ["a"])
