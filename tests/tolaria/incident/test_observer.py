from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.tolaria.aggregation import MODES, Mode, PCGrad, backward
from esper.tolaria.incident.observer import OUTSIDE, Finding, Observer
from esper.tolaria.incident.ranges import Baseline


class Odd(nn.Module):
    """Does something to its input, as a part of a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs)


class Around(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Tanh(), Odd(function))
        self.last = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.inner(self.first(inputs)))


def watch(
    model: nn.Module,
    inputs: Tensor,
    baseline: Baseline | None = None,
    reduce: Callable[[Tensor], Tensor] = torch.mean,
    doubtful: bool = True,
) -> Observer:
    torch.manual_seed(3)
    observer = Observer(model, baseline or Baseline(), doubtful=doubtful)
    with observer.watching([("batch[0]", inputs)]):
        loss = reduce(model(inputs))
        observer.turn()
        loss.backward()
    observer.conclude([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    return observer


def found(observer: Observer) -> Finding:
    assert observer.not_finite is not None
    return observer.not_finite


def around(function: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Around(function)


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: x / 0.0, "aten.div"),
        (lambda x: (x - 2.0).log(), "aten.log"),
        (lambda x: (1e4 * x).exp(), "aten.exp"),
        (lambda x: (x - 2.0).sqrt(), "aten.sqrt"),
        (lambda x: x.clone().div_(0.0), "aten.div_"),
    ],
    ids=["division by zero", "negative logarithm", "overflow", "negative root", "in place"],
)
def test_a_forward_operation_is_named_with_its_module_and_inputs(
    function: Callable[[Tensor], Tensor], operation: str
) -> None:
    finding = found(watch(around(function), torch.ones(3, 4)))
    assert (finding.phase, finding.module) == ("forward", "inner.1")
    assert finding.operation == operation
    assert finding.inputs[0].not_finite == 0, "what went in was in order"
    assert finding.output.not_finite > 0


@pytest.mark.parametrize(
    ("function", "forward"),
    [
        (lambda x: (x * 0).sqrt(), "aten.sqrt"),
        (lambda x: (x * 0 + 1e-30).pow(-1).mul(1e-30), "aten.pow"),
        (lambda x: torch.where(x > 9, (x * 0).sqrt(), x), "aten.sqrt"),
    ],
    ids=["root of zero", "reciprocal", "where"],
)
def test_a_gradient_is_named_with_the_module_and_operation_it_belongs_to(
    function: Callable[[Tensor], Tensor], forward: str
) -> None:
    finding = found(watch(around(function), torch.ones(3, 4)))
    assert (finding.phase, finding.module) == ("backward", "inner.1")
    assert finding.forward == forward


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 0).norm(dim=1, keepdim=True) + x,
        lambda x: torch.where(x > 9, (x.detach() - 9).sqrt(), x),
        lambda x: x + 0 * (x.detach() / 0).nan_to_num(),
    ],
    ids=["norm at zero", "where without gradient", "put right"],
)
def test_what_is_not_finite_and_does_no_harm_is_passed_over(
    function: Callable[[Tensor], Tensor],
) -> None:
    assert watch(around(function), torch.ones(3, 4)).not_finite is None
    # Nor is it taken for the cause of what comes later.
    later = found(watch(around(lambda x: function(x).log()), -100 * torch.ones(3, 4)))
    assert later.operation == "aten.log"


def test_what_the_loss_function_does_itself_is_told_apart_from_the_model() -> None:
    finding = found(watch(around(torch.tanh), torch.ones(3, 4), reduce=lambda y: y.sum() / 0))
    assert (finding.module, finding.operation) == (OUTSIDE, "aten.div")


def test_the_model_itself_is_named_by_its_class() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * self.weight / 0

    finding = found(watch(Plain(), torch.ones(3, 4)))
    assert (finding.module, finding.operation) == ("Plain", "aten.div")


def test_parameters_and_batch_are_named_in_the_inputs() -> None:
    model = around(torch.tanh)
    with torch.no_grad():
        model.get_parameter("first.weight")[1, 2] = torch.nan
    finding = found(watch(model, torch.ones(3, 4)))
    assert (finding.module, finding.operation) == ("first", "aten.addmm")
    assert {r.name: r.not_finite for r in finding.inputs} == {
        "first.bias": 0,
        "batch[0]": 0,
        "first.weight": 1,
    }


def test_memory_that_is_not_written_yet_is_no_result() -> None:
    # The allocator hands out the same block again, with the values that were in it.
    torch.full((3, 4), torch.nan)
    observer = Observer(nn.Identity(), Baseline(), doubtful=True)
    with observer.watching([]):
        torch.empty(3, 4)
        torch.empty_strided((3, 4), (4, 1))
    assert not observer.values


def test_values_that_are_usually_not_finite_are_not_taken_for_the_cause() -> None:
    def mask(inputs: Tensor) -> Tensor:
        hidden = torch.arange(4) < (1 if inputs[0, 0] > 0 else 4)
        return inputs.masked_fill(hidden, -torch.inf).softmax(1)

    model, usual = around(mask), Baseline()
    with torch.no_grad():
        model.get_parameter("first.weight").copy_(torch.eye(4))
        model.get_parameter("first.bias").zero_()
    usual.take_in(watch(model, torch.ones(3, 4), usual, doubtful=False).values)
    assert watch(model, torch.ones(3, 4), usual).not_finite is None
    # All is masked: it is the softmax that has nothing left.
    assert found(watch(model, -torch.ones(3, 4), usual)).operation == "aten._softmax"


def test_the_first_output_out_of_the_trend_is_named_with_what_is_usual() -> None:
    model, usual = around(torch.relu), Baseline()
    for seed in range(5):
        inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        usual.take_in(watch(model, inputs, usual, doubtful=False).values)
    with torch.no_grad():
        model.get_parameter("last.weight").mul_(1000)
    observer = watch(model, torch.randn(3, 4), usual)
    finding = observer.out_of_trend
    assert observer.not_finite is None
    assert finding is not None
    assert (finding.kind, finding.phase, finding.module) == ("out of trend", "forward", "last")
    assert finding.usual is not None
    assert finding.output.rms > 8 * finding.usual[1]


def test_what_is_computed_again_in_the_backward_pass_belongs_to_its_modules() -> None:
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part = nn.Linear(4, 4), Odd(lambda x: (x * 0).sqrt())

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            result: Tensor = checkpoint(self.part, hidden, use_reentrant=False)
            return result

    finding = found(watch(Recomputing(), torch.ones(3, 4)))
    assert (finding.phase, finding.module) == ("backward", "part")
    assert finding.forward == "aten.sqrt"


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_combine_gradients_can_be_watched(mode: Mode) -> None:
    model = around(lambda x: (x * 0).sqrt())
    observer = Observer(model, Baseline(), doubtful=True)
    with observer.watching([]):
        output = model(torch.ones(3, 4))
        losses = {"mean": output.mean(), "square": output.square().mean()}
        observer.turn()
        backward(losses, model.parameters(), PCGrad(), mode=mode)
    observer.conclude([p.grad for p in model.parameters() if p.grad is not None])
    finding = found(observer)
    assert finding.phase == "backward"
    assert (finding.module, finding.forward) == ("inner.1", "aten.sqrt")


def test_watching_changes_no_bit_and_leaves_nothing_behind() -> None:
    def gradients(observed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
        inputs = torch.randn(16, 4)
        if observed:
            watch(model, inputs)
        else:
            torch.manual_seed(3)
            model(inputs).mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, watched = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_step_that_raises_leaves_no_hook_behind() -> None:
    def refuse(inputs: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        watch(around(refuse), torch.ones(3, 4))
    assert not torch.nn.modules.module._global_forward_hooks
