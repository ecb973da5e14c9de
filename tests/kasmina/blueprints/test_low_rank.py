"""Low-rank seeds behind convolutions; behind linear layers they are tested with folding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.blend import make_blend
from esper.kasmina.blueprints import Flow, Residual, get
from esper.kasmina.blueprints.plain import AddBlend
from kasmina.blueprints.builders import CPU, flow, stir, unchanged_stream
from support.growth import Loop, batch, loss

HOSTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "pointwise": (nn.Conv2d(3, 6, 1), (2, 3, 5, 5)),
    "padded": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "strided": (nn.Conv2d(3, 6, (3, 1), stride=2, dilation=(2, 1), bias=False), (2, 3, 9, 7)),
    "signals": (nn.Conv1d(3, 6, 5, padding="same", padding_mode="reflect"), (2, 3, 11)),
}


def seed_for(host: nn.Module, source: tuple[int, ...], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    shape = tuple(host(torch.zeros(source, dtype=dtype)).shape)
    seed = get("low_rank").build(Flow(shape, dtype, CPU, 1), rank=2)
    stir(seed)
    return seed


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HOSTS)
def test_it_becomes_part_of_the_kernel(name: str, dtype: torch.dtype, alpha: float) -> None:
    host, source = HOSTS[name]
    host = host.to(dtype)
    seed, x = seed_for(host, source, dtype), torch.randn(source, dtype=dtype)
    with unchanged_stream():
        merged = get("low_rank").fold(host, seed, AddBlend(), alpha)
    assert type(merged) is type(host)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in host.state_dict().items()
    }
    assert repr(merged) == repr(host)
    expected = host(x) + alpha * seed(host(x))
    tolerance = 1e-5 if dtype is torch.float32 else 1e-13
    assert largest(merged(x) - expected) <= tolerance * largest(expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("host", "layout"), [(nn.Linear(7, 12), "features"), (nn.Conv2d(3, 8, 3), "conv2d")]
)
def test_what_is_merged_keeps_its_mode_and_what_is_frozen(
    host: nn.Module, layout: str, training: bool
) -> None:
    host.train(training).get_parameter("weight").requires_grad_(False)
    merged = get("low_rank").fold(host, get("low_rank").build(flow(layout)), AddBlend(), 1.0)
    assert type(merged) is type(host)
    assert merged.training is training
    assert [p.requires_grad for p in merged.parameters()] == [False, True]


def test_what_cannot_be_merged_exactly_stays_beside_the_layer() -> None:
    x = torch.randn(2, 4, 5, 5)
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    seed = seed_for(grouped, (2, 4, 5, 5), torch.float32)
    folded: Any = get("low_rank").fold(grouped, seed, AddBlend(), 0.5)
    assert folded[0] is grouped
    assert type(folded.grown) is Residual
    torch.testing.assert_close(folded(x), grouped(x) + 0.5 * seed(grouped(x)))
    gate = make_blend("gate", Flow((2, 6, 3, 3), torch.float32, CPU, 1))
    host = nn.Conv2d(4, 6, 3)
    assert get("low_rank").fold(host, seed, gate, 0.5).get_submodule("host") is host


def test_a_seed_over_features_is_not_merged_into_a_convolution() -> None:
    # Without a batch dimension, the features of a convolution's output are its positions.
    host, x = nn.Conv1d(3, 6, 3, padding=1), torch.randn(3, 6)
    seed = get("low_rank").build(Flow((6, 6), torch.float32, CPU, -1))
    stir(seed)
    folded = get("low_rank").fold(host, seed, AddBlend(), 1.0)
    torch.testing.assert_close(folded(x), host(x) + seed(host(x)))


def test_a_convolution_of_a_model_takes_it_in_and_its_optimizer_goes_along() -> None:
    loop = Loop(["trunk.0"])
    report = loop.plant("trunk.0", "low_rank", training="insert")
    assert report.applied, report.detail
    loop.step(6)
    x, keys = batch(5)[0], {"trunk.0.weight", "trunk.0.bias"}
    with torch.no_grad():
        before = loop.model.eval()(x)
        loop.kasmina.finish()
        torch.testing.assert_close(loop.model.eval()(x), before)
    assert type(loop.model.trunk[0]) is nn.Conv2d
    assert {name for name in loop.model.state_dict() if name.startswith("trunk.0.")} == keys
    held = [p for group in loop.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in loop.model.parameters()}
    assert {id(p) for p in loop.optimizer.state} == {id(p) for p in held}
    weight = loop.model.trunk[0].weight
    was = weight.detach().clone()
    loss(loop.model.train(), batch(50)).backward()
    loop.optimizer.step()
    assert not torch.equal(weight, was)
