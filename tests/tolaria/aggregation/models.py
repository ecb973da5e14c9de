"""Small multi-task models of many kinds, for tests that hold for all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

TASKS = ("first", "second", "third")


@dataclass
class Case:
    """A trunk and a head for each task, with a batch."""

    trunk: nn.Module
    heads: nn.ModuleDict
    batch: Tensor

    def to(self, device: str) -> "Case":
        return Case(self.trunk.to(device), self.heads.to(device), self.batch.to(device))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def losses(self, batch: Tensor | None = None) -> dict[str, Tensor]:
        features = self.trunk(self.batch if batch is None else batch)
        return {
            # Different losses, so that the tasks disagree.
            task: functional.softplus(head(features) * (1 - 2 * (number % 2))).square().mean()
            for number, (task, head) in enumerate(self.heads.items())
        }

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.parameters]

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: Tensor) -> Tensor:
        return value + self.inner(value)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.inner(self.inner(value))
        return result


class Attention(nn.Module):
    """One weight for queries, keys and values, without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        query, key, values = self.project(value).chunk(3, dim=-1)
        return functional.scaled_dot_product_attention(query, key, values)


class MeanOverWords(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.mean(1)


def _mlp() -> tuple[nn.Module, int, Tensor]:
    trunk = nn.Sequential(
        nn.Linear(40, 60), nn.Tanh(), Residual(nn.Linear(60, 60)), nn.Tanh(), nn.Linear(60, 30)
    )
    return trunk, 30, torch.randn(5, 40)


def _convolutions() -> tuple[nn.Module, int, Tensor]:
    trunk = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 48, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(4, 48),
        nn.ReLU(),
        nn.Conv2d(48, 64, (3, 1), dilation=(1, 2), padding=(0, 0)),
        nn.ReLU(),
        nn.Conv2d(64, 32, 1, groups=2),
        nn.Flatten(),
    )
    return trunk, 32 * 2 * 4, torch.randn(2, 3, 8, 8)


def _words() -> tuple[nn.Module, int, Tensor]:
    trunk = nn.Sequential(
        nn.Embedding(50, 24, padding_idx=3),
        nn.LayerNorm(24),
        Residual(Attention(24)),
        nn.Dropout(0.3),
        nn.Linear(24, 100),
        nn.GELU(),
        MeanOverWords(),
    )
    return trunk, 100, torch.randint(0, 12, (1, 6))


def _tied() -> tuple[nn.Module, int, Tensor]:
    shared = nn.Linear(20, 20)
    trunk = nn.Sequential(
        Twice(shared), nn.Tanh(), nn.Linear(20, 40), nn.LayerNorm(40), nn.Linear(40, 20), shared
    )
    return trunk, 20, torch.randn(4, 20)


def _recurrent() -> tuple[nn.Module, int, Tensor]:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(10, 24, batch_first=True)

        def forward(self, value: Tensor) -> Tensor:
            output: Tensor = self.cell(value)[0][:, -1]
            return output

    return Last(), 24, torch.randn(3, 5, 10)


KINDS: dict[str, Callable[[], tuple[nn.Module, int, Tensor]]] = {
    "mlp": _mlp,
    "convolutions": _convolutions,
    "words": _words,
    "tied": _tied,
    "recurrent": _recurrent,
}


def make(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(seed)
    trunk, width, batch = KINDS[kind]()
    heads = nn.ModuleDict(
        {task: nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 2)) for task in TASKS}
    )
    if batch.is_floating_point():
        batch = batch.to(dtype)
    return Case(trunk.to(dtype), heads.to(dtype), batch)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.first = nn.Linear(8, 3)
        self.second = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)

    def losses(self) -> dict[str, Tensor]:
        hidden = self.trunk(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
        return {
            "first": self.first(hidden).square().mean(),
            "second": -self.second(hidden).tanh().mean(),
        }


def gradients_of(model: TwoHeads) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
