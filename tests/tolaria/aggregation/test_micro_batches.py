import pytest
import torch
from torch import nn

from esper.tolaria.aggregation import MicroBatches, Mode, PCGrad, Refreshed, Sum, backward
from tolaria.aggregation.models import Case, make

PARTS = 3
MODES = ("sequential", "batched")
every_mode = pytest.mark.parametrize("mode", MODES)


def whole(kind: str) -> Case:
    case = make(kind, dtype=torch.float64)
    case.batch = torch.cat([case.batch] * PARTS)
    if case.batch.is_floating_point():
        case.batch += torch.linspace(0, 1, len(case.batch)).double().view(-1, 1)
    return case


@every_mode
def test_micro_batches_are_projected_as_one_batch(mode: Mode) -> None:
    case = whole("mlp")
    expected = backward(case.losses(), case.parameters, PCGrad())
    gradients = case.gradients()
    case.clear()
    micro = MicroBatches(case.parameters, PCGrad(), mode=mode)
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
def test_a_task_may_be_missing_from_some_micro_batches(mode: Mode) -> None:
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
    micro = MicroBatches(case.parameters, PCGrad(), mode=mode)
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


def test_nothing_added_is_refused() -> None:
    case = make("mlp")
    with pytest.raises(RuntimeError, match="no gradients available for aggregation"):
        MicroBatches(case.parameters, PCGrad()).finish()


@pytest.mark.parametrize("mode", ["features", "factored", "batched-factored"])
def test_modes_without_whole_gradients_of_each_task_are_refused(mode: Mode) -> None:
    with pytest.raises(RuntimeError, match="call backward for each micro-batch"):
        MicroBatches(make("mlp").parameters, PCGrad(), mode=mode)


def test_a_refreshed_aggregator_is_refused() -> None:
    with pytest.raises(RuntimeError, match="call backward for each micro-batch"):
        MicroBatches(make("mlp").parameters, Refreshed(PCGrad(), every=2))


def test_micro_batches_may_differ_in_their_memory_format() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, bias=False)
    last = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    plain = torch.randn(2, 8, 6, 6)
    (layer(last).square().sum() + layer(plain).sin().sum()).backward()
    expected = layer.weight.grad
    layer.weight.grad = None
    micro = MicroBatches([layer.weight], Sum())
    micro.add({"a": layer(last).square().sum()})
    micro.add({"b": layer(plain).sin().sum()})
    micro.finish()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_an_error_in_finish_keeps_what_was_added() -> None:
    class Moody:
        calls = 0

        def weights(self, gramian: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 1:
                raise ValueError("not now")
            return torch.ones(len(gramian), dtype=torch.float64)

    case = make("mlp")
    micro = MicroBatches(case.parameters, Moody())
    micro.add(case.losses())
    with pytest.raises(ValueError, match="not now"):
        micro.finish()
    assert all(parameter.grad is None for parameter in case.parameters)
    assert micro.finish().num_tasks == 3


def test_heads_may_be_given_as_an_iterator() -> None:
    case = make("mlp")
    micro = MicroBatches(
        case.trunk.parameters(),
        PCGrad(),
        heads=iter(list(case.trunk[4].parameters())),  # type: ignore[index]
    )
    grams = []
    for _ in range(2):
        micro.add(case.losses())
        grams.append(micro.finish().gramian)
    torch.testing.assert_close(grams[0], grams[1])
