"""What every trainer trains: a small network on scikit-learn's digits, in a fixed order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 64


class Digits(Dataset[Any]):
    """A user's data set: it is asked for one sample at a time, without any fast path.

    :param steps: full batches that an epoch holds; the scans are repeated as needed.
    """

    def __init__(self, steps: int) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images / 16, dtype=torch.float32)
        self.labels = torch.tensor(labels)
        self.size = steps * BATCH_SIZE

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image and label."""
        place = index % len(self.images)
        return self.images[place], self.labels[place]


@dataclass
class Task:
    """A fresh model, its optimizer and its data."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]


def make_task(steps: int) -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Task(model, optimizer, DataLoader(Digits(steps), batch_size=BATCH_SIZE))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


# Runs one epoch of a task; what comes before the first step and after the last cancels out.
Arm = Callable[[Task], None]
