"""What flows through slots of every layout, and seeds for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints import Flow, Pair, get

CPU = torch.device("cpu")
SHAPES = {
    "features": ((6, 12), -1),
    "tokens": ((3, 5, 8), -1),
    "conv1d": ((3, 8, 9), 1),
    "conv2d": ((3, 8, 6, 5), 1),
}
FITTING = {
    "features": ["linear", "low_rank", "mlp", "squeeze_excite"],
    "tokens": ["attention", "linear", "low_rank", "mlp", "squeeze_excite"],
    "conv1d": ["attention", "conv", "depthwise", "low_rank", "squeeze_excite"],
    "conv2d": ["attention", "conv", "depthwise", "low_rank", "squeeze_excite"],
}
CASES = [(name, layout) for layout, names in FITTING.items() for name in names]


def flow(layout: str, dtype: torch.dtype = torch.float32) -> Flow:
    shape, channel_dim = SHAPES[layout]
    return Flow(shape, dtype, CPU, channel_dim)


def flowing(layout: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[layout][0], generator=generator).to(dtype)


def built(name: str, layout: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return get(name).build(flow(layout, dtype), **arguments)


def stir(module: nn.Module, seed: int = 2) -> None:
    """Give every parameter and running statistic a value of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise.to(parameter.dtype))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator).to(buffer.dtype))
            elif name.endswith("num_batches_tracked"):
                buffer.add_(7)


def pair_of(*layers: nn.Module, source: tuple[int, ...]) -> Pair:
    return Pair(layers[0], layers[-1], tuple(layers[1:-1]), source)


def pair_flow(pair: Pair, dtype: torch.dtype = torch.float32) -> Flow:
    """Return what flows through a slot over a pair; the layers are left as they are."""
    model = nn.Sequential(pair.first, *pair.between, pair.second)
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        shape = tuple(model.eval()(torch.zeros(pair.source_shape, dtype=dtype)).shape)
    for module, mode in modes:
        module.training = mode
    return Flow(shape, dtype, CPU, 1 if len(shape) > 2 else -1, pair)


@contextmanager
def unchanged_stream() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)
