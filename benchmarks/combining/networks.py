"""Two trunks with n linear heads, each head with a cross-entropy loss of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, width_out)
        self.second = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, width_out)
        self.around: nn.Module = nn.Identity()
        if (width_in, stride) != (width_out, 1):
            self.around = nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(value)))
        return torch.relu(self.second_norm(self.second(inner)) + self.around(value))


def mlp() -> tuple[nn.Module, int, Tensor]:
    """Return a trunk of 2.4 million parameters, its width and a batch of 64."""
    trunk = nn.Sequential(
        *(nn.Linear(784, 1024), nn.ReLU()),
        *(nn.Linear(1024, 1024), nn.ReLU()),
        *(nn.Linear(1024, 512), nn.ReLU()),
    )
    return trunk, 512, torch.randn(64, 784)


def residual() -> tuple[nn.Module, int, Tensor]:
    """Return a trunk of 0.31 million parameters, its width and a batch of 32 images."""
    trunk = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU()),
        *(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return trunk, 128, torch.randn(32, 3, 32, 32)


TRUNKS: dict[str, Callable[[], tuple[nn.Module, int, Tensor]]] = {
    "MLP": mlp,
    "residual network": residual,
}


class MultiTask(nn.Module):
    """A trunk, its heads and one batch."""

    def __init__(self, kind: str, tasks: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk, width, self.batch = TRUNKS[kind]()
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(tasks))
        self.labels = torch.randint(0, CLASSES, (tasks, len(self.batch)))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)

    def features(self) -> Tensor:
        result: Tensor = self.trunk(self.batch)
        return result

    def losses(self, features: Tensor) -> list[Tensor]:
        return [
            functional.cross_entropy(head(features), labels)
            for head, labels in zip(self.heads, self.labels, strict=True)
        ]
