import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.tolaria.aggregation import MODES, PCGrad, Refreshed, Sum, measure_modes
from tolaria.aggregation.models import make


class Slow(torch.autograd.Function):
    """A trunk whose backward pass takes five milliseconds."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.005)
        return gradient * 1


class Unbatchable(torch.autograd.Function):
    """Its backward pass leaves torch, where no vectorisation can follow."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float(gradient.isfinite().all())


class Model:
    def __init__(self, trunk: type[torch.autograd.Function] | None = None) -> None:
        self.weight = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0)))
        self.unused = nn.Parameter(torch.ones(2))
        self.parameters = [self.weight, self.unused]
        self.calls = 0
        self._trunk = trunk

    def losses(self) -> dict[str, Tensor]:
        self.calls += 1
        hidden = self.weight.tanh()
        if self._trunk is not None:
            hidden = self._trunk.apply(hidden)
        return {"a": hidden.sum(), "b": -hidden.square().sum(), "c": hidden.exp().sum()}


def test_all_modes_are_timed_and_the_fastest_comes_first() -> None:
    model = Model(Slow)
    times = measure_modes(model.losses, model.parameters, Sum(), repeats=3)
    assert set(times) == set(MODES)
    assert list(times.values()) == sorted(times.values())
    # Seconds: three passes through the trunk, or one.
    assert times["sequential"] >= 0.015
    assert times["factored"] >= 0.015
    assert 0.005 <= times["features"] < times["sequential"]
    assert 0.005 <= times["batched"] < times["sequential"]


def test_modes_take_turns_as_often_as_asked() -> None:
    model = Model()
    measure_modes(model.losses, model.parameters, Sum(), repeats=3)
    assert model.calls == 3 * len(MODES)


def test_gradients_are_left_as_they_were() -> None:
    model = Model()
    held = torch.full((4,), 7.0)
    model.weight.grad = held
    measure_modes(model.losses, model.parameters, PCGrad(), repeats=1)
    assert model.weight.grad is held
    assert held.tolist() == [7.0] * 4
    assert model.unused.grad is None


def test_a_parameter_without_a_gradient_is_left_without() -> None:
    model = Model()
    measure_modes(model.losses, model.parameters, PCGrad(), repeats=1)
    assert model.weight.grad is None


def test_a_mode_that_the_model_does_not_allow_is_left_out_and_not_tried_again() -> None:
    model = Model(Unbatchable)
    model.weight.grad = held = torch.ones(4)
    times = measure_modes(model.losses, model.parameters, Sum(), repeats=3)
    assert set(times) == {"sequential", "factored", "features"}
    assert model.calls == 3 * 3 + 2
    assert model.weight.grad is held


def test_what_goes_wrong_in_every_mode_is_raised() -> None:
    model = Model()
    model.weight.grad = held = torch.ones(4)
    with pytest.raises(RuntimeError, match="the loss of task 'a' has shape"):
        measure_modes(lambda: {"a": model.weight * 2}, model.parameters, Sum())
    assert model.weight.grad is held
    assert held.tolist() == [1.0] * 4


def test_an_error_of_the_model_itself_is_raised() -> None:
    model = Model()
    calls: list[int] = []

    def losses() -> dict[str, Tensor]:
        calls.append(len(calls))
        if len(calls) > 2:
            raise ValueError("no more batches")
        return model.losses()

    with pytest.raises(ValueError, match="no more batches"):
        measure_modes(losses, model.parameters, Sum())
    assert len(calls) == 3
    assert model.weight.grad is None


def test_the_shortest_of_the_timings_counts() -> None:
    model = Model()

    def losses() -> dict[str, Tensor]:
        # Slow in the first and the last of three rounds.
        if not len(MODES) <= model.calls < 2 * len(MODES):
            time.sleep(0.03)
        return model.losses()

    times = measure_modes(losses, model.parameters, Sum(), repeats=3)
    assert max(times.values()) < 0.03


def test_what_cannot_be_measured_is_refused() -> None:
    case = make("mlp")
    with pytest.raises(RuntimeError, match="repeats is 0"):
        measure_modes(case.losses, case.parameters, PCGrad(), repeats=0)
    with pytest.raises(RuntimeError, match="measure with the aggregator that it asks"):
        measure_modes(case.losses, case.parameters, Refreshed(PCGrad(), every=3))
