"""What holds for any two layers that are made wider."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.kasmina.blueprints import Pair, get
from kasmina.blueprints.builders import pair_flow, pair_of, stir

Draw = Callable[[st.SearchStrategy[Any]], Any]
SIZES = st.integers(1, 5)
ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Identity, nn.Softplus]


@st.composite
def perceptrons(draw: Draw) -> Pair:
    inputs, middle, outputs = draw(SIZES), draw(SIZES), draw(SIZES)
    tokens = draw(st.booleans())
    between: list[nn.Module] = [draw(st.sampled_from(ACTIVATIONS))()]
    if not tokens and draw(st.booleans()):
        between.insert(0, nn.BatchNorm1d(middle, affine=draw(st.booleans())))
    return pair_of(
        nn.Linear(inputs, middle, bias=draw(st.booleans())),
        *between,
        nn.Linear(middle, outputs, bias=draw(st.booleans())),
        source=(4, 3, inputs) if tokens else (4, inputs),
    )


@st.composite
def convolutions(draw: Draw) -> Pair:
    flat = draw(st.booleans())
    kind: Any = nn.Conv1d if flat else nn.Conv2d
    norm: Any = nn.BatchNorm1d if flat else nn.BatchNorm2d
    pool: Any = nn.MaxPool1d if flat else nn.AvgPool2d
    inputs, middle, outputs = draw(SIZES), draw(SIZES), draw(SIZES)
    between: list[nn.Module] = [draw(st.sampled_from(ACTIVATIONS))()]
    if draw(st.booleans()):
        between.insert(0, norm(middle))
    if draw(st.booleans()):
        between.append(pool(2))
    first = kind(inputs, middle, **options(draw))
    source = (3, inputs, 26) if flat else (3, inputs, 26, 28)
    second: nn.Module = kind(middle, outputs, **options(draw))
    if draw(st.booleans()):
        body = nn.Sequential(first, *between, nn.Flatten()).eval()
        with torch.no_grad():
            second = nn.Linear(body(torch.zeros(source)).shape[1], outputs)
        between.append(nn.Flatten())
    return pair_of(first, *between, second, source=source)


def options(draw: Draw) -> dict[str, Any]:
    return {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)),
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "replicate", "reflect"])),
        "dilation": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
    }


@given(perceptrons() | convolutions(), st.integers(0, 6), st.floats(0, 1), st.booleans())
def test_wider_layers_compute_what_layers_and_branch_do(
    pair: Pair, width: int, alpha: float, training: bool
) -> None:
    host = nn.Sequential(pair.first, *pair.between, pair.second).double()
    blueprint, flow = get("widen"), pair_flow(pair, torch.float64)
    assert blueprint.fits(flow) == ""
    seed = blueprint.build(flow, width=width)
    stir(host)
    stir(seed)
    wider = blueprint.fold_pair(pair, seed, alpha)
    folded = nn.Sequential(wider.first, *wider.between, wider.second)
    x = torch.randn(pair.source_shape, dtype=torch.float64)
    for module in (host, seed, folded):
        module.train(training)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), host(x) + alpha * seed(x), rtol=1e-9, atol=1e-9)
    assert set(wider.replaced) == set(host.parameters())
