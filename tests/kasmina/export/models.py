"""Models of many kinds, each with inputs."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.jobs.digits import TwoDigitReader


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        return h + self.block(h)


def digits() -> tuple[nn.Module, Any]:
    return TwoDigitReader(8), torch.rand(5, 1, 12, 12)


def grown_digits() -> tuple[nn.Module, Any]:
    model, images = digits()
    block = nn.Sequential(
        nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 3, padding=1, padding_mode="reflect")
    )
    trunk: Any = model.trunk
    trunk[3] = nn.Sequential(OrderedDict(host=trunk[3], grown=Residual(block)))
    return model, images


def encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    return model, torch.rand(3, 5, 16)


class Attention(nn.Module):
    """Written by hand, with shapes of the input in it and a table that is not saved."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(1 / math.sqrt(width // heads)))
        mask = torch.full((context, context), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = q.view(shape).transpose(1, 2), k.view(shape).transpose(1, 2), v.view(shape)
        v = v.transpose(1, 2)
        scores = q @ k.transpose(-2, -1) * self.scale
        if causal:
            scores = scores + self.mask[:length, :length]
        mixed = functional.softmax(scores, dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.attention = Attention(width, 2, 8)
        self.second = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x), causal=True)
        return x + self.mlp(self.second(x))


class LanguageModel(nn.Module):
    """Blocks in a list; the output layer shares its weights with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.blocks = nn.ModuleList(Block(12) for _ in range(3))
        self.out = nn.Linear(12, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def tied() -> tuple[nn.Module, Any]:
    return LanguageModel(), torch.randint(0, 11, (4, 6))


def with_batch_norm() -> tuple[nn.Module, Any]:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=1e-3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6) * 3 + 1)
    return model, torch.randn(2, 3, 6, 6)


class TwoInputs(nn.Module):
    """Gives back a tuple, with a list in it, and mutates nothing that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"left": nn.Linear(4, 3), "right": nn.Linear(5, 3)})
        self.weights = nn.ParameterList([torch.rand(3), torch.rand(3)])

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Any:
        a = self.towers["left"](left) * self.weights[0]
        b = self.towers["right"](right) * self.weights[1] * scale
        joint = torch.cat([a, b], dim=1)[:, 1:-1]
        return joint, [a - b, -(a**2) / 2]


def two_inputs() -> tuple[nn.Module, Any]:
    return TwoInputs(), {"right": torch.rand(3, 5), "left": torch.rand(3, 4), "scale": 0.5}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (hidden, _) = self.lstm(x)
        return self.out(outputs[:, -1] + hidden[-1])


def recurrent() -> tuple[nn.Module, Any]:
    return Recurrent(), torch.rand(2, 5, 3)


class AnyNumber(nn.Module):
    """What fx cannot follow: any number of inputs, and control flow on a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"0": nn.Linear(4, 4)})
        self.register_buffer("offset", torch.rand(4))

    def forward(self, *parts: Tensor) -> dict[str, Any]:
        total = sum(self.stem["0"](part) for part in parts)
        if int(total.shape[1]) > 3:
            total = total + self.offset + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return {"sum": total, "pair": (total * 2, total.mean())}


def any_number() -> tuple[nn.Module, Any]:
    return AnyNumber(), (torch.rand(2, 4), torch.rand(2, 4))


class Doubled(nn.Module):
    """A module of another precision, whose batch is built in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(2, 4))


def fixed_batch() -> tuple[nn.Module, Any]:
    return Doubled(), torch.rand(2, 4, dtype=torch.float64)


class Undecided(nn.Module):
    """Control flow on the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def undecided() -> tuple[nn.Module, Any]:
    return Undecided(), torch.rand(2, 4)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    build.__name__: build
    for build in (
        digits,
        grown_digits,
        encoder,
        tied,
        with_batch_norm,
        two_inputs,
        recurrent,
        any_number,
        fixed_batch,
    )
}
# Where model.py comes from.
FROM_OPERATIONS = {"any_number"}
