"""Folding: plain modules in the place of host and seed, with the same output."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.blend import make_blend
from esper.kasmina.blueprints import Grown, Residual, get, plain
from esper.kasmina.blueprints.plain import AddBlend
from esper.kasmina.slot import slots_of
from esper.leyline import Planting, SeedCommand, SeedOperation
from kasmina.blueprints.builders import (
    CASES,
    SHAPES,
    built,
    flow,
    flowing,
    stir,
    unchanged_stream,
)
from support.growth import Loop, batch, facts, loss

PLAIN = {kind for kind in vars(plain).values() if isinstance(kind, type)}
BLENDS = ["add", "multiply", "gate", "channel"]
LINEAR_HOSTS = [torch.float32, torch.float64, torch.bfloat16]


def host_of(layout: str) -> nn.Module:
    """Return a layer that keeps the layout; with running statistics where it is a convolution."""
    torch.manual_seed(4)
    features = SHAPES[layout][0][SHAPES[layout][1]]
    if layout in ("features", "tokens"):
        return nn.Linear(features, features)
    kinds: dict[str, tuple[Any, Any]] = {
        "conv1d": (nn.Conv1d, nn.BatchNorm1d),
        "conv2d": (nn.Conv2d, nn.BatchNorm2d),
    }
    convolution, norm = kinds[layout]
    return nn.Sequential(convolution(features, features, 3, padding=1), norm(features))


def grown(name: str, layout: str, blending: str) -> tuple[nn.Module, nn.Module, Any]:
    """Return host, seed and blend, all as if they had been trained."""
    host, seed, blend = host_of(layout), built(name, layout), make_blend(blending, flow(layout))
    for part in (host, seed, blend):
        stir(part)
    return host, seed, blend


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("blending", BLENDS)
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_folded_seed_does_what_it_did_blended(
    name: str, layout: str, blending: str, alpha: float
) -> None:
    host, seed, blend = grown(name, layout, blending)
    # Folding takes the host over, and running statistics change in training mode.
    parts = nn.ModuleList([copy.deepcopy(host), seed, blend])
    before = facts(nn.ModuleList([host, seed, blend]))
    with unchanged_stream():
        folded = get(name).fold(host, seed, blend, alpha)
    after = facts(nn.ModuleList([host, seed, blend]))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for training in (True, False):
        parts.train(training)
        folded.train(training)
        x = flowing(layout, seed=9)
        h = parts[0](x)
        expected = blend(h, seed(h), torch.tensor(alpha)).detach()
        difference = (folded(x).detach() - expected).abs().max()
        assert float(difference) <= 1e-5 * float(expected.abs().max())
    kinds = {type(module) for module in folded.modules()}
    assert all(kind in PLAIN or kind.__module__.startswith("torch.nn.") for kind in kinds), kinds


@pytest.mark.parametrize("blending", BLENDS)
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_folded_module_is_saved_copied_and_traced_like_any_other(
    name: str, layout: str, blending: str
) -> None:
    folded = get(name).fold(*grown(name, layout, blending), 0.5).eval()
    other = get(name).fold(
        host_of(layout), built(name, layout), make_blend(blending, flow(layout)), 0.25
    )
    other.load_state_dict(folded.state_dict())
    x = flowing(layout, seed=9)
    assert torch.equal(other.eval()(x), folded(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(folded)(x), folded(x))
    twin = copy.deepcopy(folded)
    assert torch.equal(twin(x), folded(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in folded.parameters()}


@pytest.mark.parametrize("layout", ["features", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LINEAR_HOSTS)
def test_low_rank_becomes_part_of_the_weights_behind_a_linear_layer(
    dtype: torch.dtype, bias: bool, layout: str
) -> None:
    seed = built("low_rank", layout, dtype)
    host = nn.Linear(7, SHAPES[layout][0][-1], bias=bias, dtype=dtype)
    stir(seed)
    x = torch.randn(*SHAPES[layout][0][:-1], 7, dtype=dtype)
    with unchanged_stream():
        merged = get("low_rank").fold(host, seed, AddBlend(), 0.5)
    assert type(merged) is nn.Linear
    assert (merged.bias is not None) is bias
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert all(p.requires_grad for p in merged.parameters())
    expected = (host(x) + 0.5 * seed(host(x))).detach()
    # One rounding of the weights, in place of one of each product.
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    assert float((merged(x).detach() - expected).abs().max() / expected.abs().max()) < tolerance


def test_what_was_frozen_stays_frozen_when_a_seed_is_merged() -> None:
    host, seed = nn.Linear(7, 12), built("low_rank", "features")
    host.weight.requires_grad_(False)
    merged = get("low_rank").fold(host, seed, AddBlend(), 1.0)
    assert not merged.weight.requires_grad
    assert merged.bias.requires_grad


def test_nothing_is_merged_into_a_layer_that_would_lose_something() -> None:
    seed, x = built("low_rank", "features"), flowing("features")
    hooked = nn.Linear(12, 12)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    for host in (hooked, Own(12, 12), nn.Sequential(nn.Linear(12, 12))):
        folded = get("low_rank").fold(host, seed, AddBlend(), 1.0)
        assert folded[0] is host
        torch.testing.assert_close(folded(x), host(x) + seed(host(x)))
    gated = get("low_rank").fold(nn.Linear(12, 12), seed, make_blend("gate", flow("features")), 1.0)
    assert type(gated.grown) is Grown


GROWING = [
    ("trunk.6", "mlp"),
    ("trunk.6", "linear"),
    ("trunk.6", "squeeze_excite"),
    ("head", "low_rank"),
    ("trunk.0", "conv"),
    ("trunk.1", "depthwise"),
    ("trunk.0", "attention"),
    ("trunk.0", "squeeze_excite"),
]


@pytest.mark.parametrize("blending", BLENDS)
@pytest.mark.parametrize(("slot", "name"), GROWING)
def test_a_model_keeps_its_outputs_and_its_optimizer_all_parameters(
    slot: str, name: str, blending: str
) -> None:
    loop = Loop([slot])
    report = loop.plant(slot, name, blend=blending, training="insert")
    assert report.applied, report.detail
    loop.step(6)
    before = {}
    for training in (True, False):
        before[training] = outputs(loop.model, training)
    loop.kasmina.finish()
    assert not slots_of(loop.model)
    for training in (True, False):
        torch.testing.assert_close(outputs(loop.model, training), before[training])
    held = [p for group in loop.optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in loop.model.parameters()}
    assert {id(p) for p in loop.optimizer.state} == {id(p) for p in held}
    weights = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    loss(loop.model, batch(50)).backward()
    loop.optimizer.step()
    assert not any(torch.equal(weights[n], p) for n, p in loop.model.named_parameters())


def outputs(model: nn.Module, training: bool) -> Tensor:
    """Return what a model gives; it is as before afterwards."""
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(11)
    with torch.no_grad():
        return twin(batch(5)[0])


def test_a_fold_is_taken_back_with_all_that_it_replaced() -> None:
    loop = Loop(["head"])
    loop.step(2)
    assert loop.kasmina.apply(_command("head", "low_rank")).applied
    loop.step(5)
    structure = loop.kasmina.structure()
    before, layer = facts(loop.model), loop.model.head.weight
    loop.kasmina._operations.finish()
    assert loop.model.head.weight is not layer
    loop.kasmina.rebuild(structure)
    assert loop.model.head.weight is layer
    assert all(torch.equal(facts(loop.model)[name], value) for name, value in before.items())
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loop.model.parameters()}


def _command(slot: str, blueprint: str) -> SeedCommand:
    planting = Planting(training="insert")
    return SeedCommand(slot, SeedOperation.GERMINATE, blueprint, planting=planting)


def test_a_residual_is_what_a_plain_sum_becomes() -> None:
    folded = get("mlp").fold(*grown("mlp", "features", "add"), 1.0)
    assert [type(part) for part in folded] == [nn.Linear, Residual]
