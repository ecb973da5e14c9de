"""Hooks change gradients once, as they do under one backward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper.tolaria.aggregation import MODES, Mode, PCGrad, Refreshed, Sum, backward
from tolaria.aggregation.models import make

Build = Callable[[], tuple[list[nn.Parameter], dict[str, Tensor]]]


def halved(gradient: Tensor) -> Tensor:
    return gradient * 0.5


def on_the_representation() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    weight = nn.Parameter(torch.ones(5))
    features = weight * 2
    features.register_hook(halved)
    return [weight], {"a": features.sum(), "b": features.square().sum()}


def on_a_shared_weight() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    weight = nn.Parameter(torch.ones(5))
    weight.register_hook(halved)
    return [weight], {"a": weight.sum(), "b": weight.square().sum()}


def on_a_wide_weight() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    layer = nn.Linear(40, 50)
    layer.weight.register_hook(halved)
    hidden = layer(torch.randn(2, 40)).tanh()
    return list(layer.parameters()), {"a": hidden.sum(), "b": hidden.square().sum()}


def on_the_output_of_a_wide_layer() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    layer = nn.Linear(40, 50)
    output = layer(torch.randn(2, 40))
    output.register_hook(halved)
    hidden = output.tanh()
    return list(layer.parameters()), {"a": hidden.sum(), "b": hidden.square().sum()}


def in_a_head() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    trunk, head = nn.Linear(4, 4), nn.Linear(4, 4)
    features = trunk(torch.randn(2, 4)).tanh()
    inner = head(features)
    inner.register_hook(halved)
    return [*trunk.parameters(), *head.parameters()], {"a": inner.sum(), "b": features.sum()}


BUILDS = [on_the_representation, on_a_shared_weight, on_a_wide_weight, in_a_head]


@pytest.mark.parametrize(
    ("build", "mode"),
    [
        *((build, mode) for build in BUILDS for mode in MODES),
        *((on_the_output_of_a_wide_layer, mode) for mode in MODES if mode != "batched-factored"),
    ],
)
def test_a_hook_is_applied_once(build: Build, mode: Mode) -> None:
    torch.manual_seed(0)
    parameters, losses = build()
    torch.stack(list(losses.values())).sum().backward(retain_graph=True)
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backward(losses, parameters, Sum(), mode=mode)
    torch.testing.assert_close([parameter.grad for parameter in parameters], expected)


@pytest.mark.parametrize("build", BUILDS)
def test_a_hook_is_applied_once_in_between_comparisons(build: Build) -> None:
    torch.manual_seed(0)
    parameters, losses = build()
    torch.stack(list(losses.values())).sum().backward(retain_graph=True)
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    aggregator = Refreshed(Sum(), every=2)
    eye = torch.eye(2, dtype=torch.float64)
    aggregator.keep(tuple(losses), eye, eye.diagonal())
    assert backward(losses, parameters, aggregator).age == 1
    torch.testing.assert_close([parameter.grad for parameter in parameters], expected)


@pytest.mark.parametrize("mode", ["batched", "features"])
def test_a_hook_that_needs_a_gradient_between_two_entries_is_explained(mode: Mode) -> None:
    weight = nn.Parameter(torch.ones(4))
    low = weight * 2
    middle = low * 3
    middle.register_hook(lambda gradient: gradient.clamp(-1, 1))
    high = middle.sin()
    losses = {"a": high.sum() + low.sum(), "b": high.square().sum() + low.cos().sum()}
    with pytest.raises(RuntimeError, match="use mode='sequential'"):
        backward(losses, [weight], Sum(), mode=mode)
    assert weight.grad is None


def test_no_hook_is_left_behind() -> None:
    case = make("mlp")
    losses = case.losses()
    backward(losses, case.parameters, PCGrad(), mode="features")
    with pytest.raises(RuntimeError, match="second time"):
        backward(losses, case.parameters, PCGrad(), mode="features")
