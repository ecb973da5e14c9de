import pytest
import torch

from esper.tolaria.aggregation import MicroBatches, PCGrad, Refreshed, backward
from tolaria.aggregation.models import Case, make

PARTS = 3
MODES = ("sequential", "factored", "batched")
every_mode = pytest.mark.parametrize("mode", MODES)


def whole(kind: str) -> Case:
    case = make(kind, dtype=torch.float64)
    case.batch = torch.cat([case.batch] * PARTS)
    if case.batch.is_floating_point():
        case.batch += torch.linspace(0, 1, len(case.batch)).double().view(-1, 1)
    return case


@every_mode
def test_micro_batches_are_projected_as_one_batch(mode: str) -> None:
    case = whole("mlp")
    expected = backward(case.losses(), case.parameters, PCGrad())
    gradients = case.gradients()
    case.clear()
    micro = MicroBatches(case.parameters, PCGrad(), mode=mode)  # type: ignore[arg-type]
    for part in case.batch.chunk(PARTS):
        micro.add({task: loss / PARTS for task, loss in case.losses(part).items()})
        assert all(parameter.grad is None for parameter in case.parameters)
    report = micro.finish()
    assert report.mode == mode
    torch.testing.assert_close(report.gramian, expected.gramian)
    torch.testing.assert_close(report.weights, expected.weights)
    for found, wanted in zip(case.gradients(), gradients, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_task_may_be_missing_from_some_micro_batches(mode: str) -> None:
    case = whole("mlp")
    parts = case.batch.chunk(PARTS)
    first, second = case.losses(parts[0]), case.losses(parts[1])
    total = {
        "first": first["first"],
        "second": first["second"] + second["second"],
        "third": second["third"],
    }
    expected = backward(total, case.parameters, PCGrad())
    case.clear()
    micro = MicroBatches(case.parameters, PCGrad(), mode=mode)  # type: ignore[arg-type]
    left = case.losses(parts[0])
    micro.add({"first": left["first"], "second": left["second"], "third": None})
    right = case.losses(parts[1])
    micro.add({"first": None, "second": right["second"], "third": right["third"]})
    report = micro.finish()
    assert report.tasks == ("first", "second", "third")
    assert report.absent == ()
    torch.testing.assert_close(report.gramian, expected.gramian)


def test_a_task_that_no_micro_batch_has_is_named() -> None:
    case = make("mlp")
    micro = MicroBatches(case.parameters, PCGrad())
    losses = case.losses()
    micro.add({"first": losses["first"], "second": losses["second"], "third": None})
    assert micro.finish().absent == ("third",)


def test_each_update_begins_anew() -> None:
    case = make("mlp")
    micro = MicroBatches(case.parameters, PCGrad())
    micro.add(case.losses())
    first = micro.finish()
    micro.add(case.losses())
    torch.testing.assert_close(micro.finish().gramian, first.gramian)


def test_factors_of_batches_with_other_tasks_are_refused() -> None:
    case = make("mlp")
    micro = MicroBatches(case.parameters, PCGrad(), mode="factored")
    losses = case.losses()
    micro.add({"first": losses["first"], "second": losses["second"]})
    with pytest.raises(RuntimeError, match="mode='sequential'"):
        micro.add(case.losses())


def test_nothing_added_is_refused() -> None:
    case = make("mlp")
    with pytest.raises(RuntimeError, match="no gradients available for aggregation"):
        MicroBatches(case.parameters, PCGrad()).finish()


@pytest.mark.parametrize("aggregator", [PCGrad(), Refreshed(PCGrad(), every=2)])
def test_modes_without_a_gradient_for_each_task_are_refused(
    aggregator: PCGrad | Refreshed,
) -> None:
    mode = "features" if isinstance(aggregator, PCGrad) else "sequential"
    with pytest.raises(RuntimeError, match="call backward for each micro-batch"):
        MicroBatches(make("mlp").parameters, aggregator, mode=mode)  # type: ignore[arg-type]
