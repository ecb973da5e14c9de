"""Small trainings on real scans of digits: what is trained, on what, and what is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from esper.jobs.digits import TwoDigitReader, overlaid_digits

BATCH = 64
Batch = tuple[Tensor, ...]


class Perceptron(nn.Module):
    """Two hidden layers with squared rectifiers, whose values can overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 96)
        self.middle = nn.Linear(96, 96)
        self.outer = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.inner(images.flatten(1)).relu().square()
        return {"digit": self.outer(self.middle(hidden).relu())}


class Attention(nn.Module):
    """One transformer block over the eight rows of a scan."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.02 * torch.randn(8, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 96, 0.1, batch_first=True)
        self.outer = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"digit": self.outer(self.block(self.embed(images) + self.place).mean(1))}


@dataclass(frozen=True)
class Setup:
    """One training: model, optimizer and precision.

    :param single: one digit in a scan, or two laid over each other (two tasks).
    """

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    single: bool = True
    bf16: bool = False

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy of each task."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = model(batch[0])
        pairs = zip(logits.items(), batch[1:], strict=True)
        return {task: functional.cross_entropy(out.float(), label) for (task, out), label in pairs}

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the share of digits of the validation set that are named correctly."""
        model.eval()
        batch = data(self.single)[1]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = model(batch[0])
        model.train()
        pairs = zip(logits.values(), batch[1:], strict=True)
        shares = [(out.argmax(1) == label).float().mean().item() for out, label in pairs]
        return sum(shares) / len(shares)


def _sgd(rate: float) -> Callable[[nn.Module], Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def _adamw(rate: float) -> Callable[[nn.Module], Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate)


SETUPS = [
    Setup("perceptron, SGD", Perceptron, _sgd(0.05)),
    Setup("perceptron, AdamW, bf16", Perceptron, _adamw(2e-3), bf16=True),
    Setup("convolution, two tasks, SGD", lambda: TwoDigitReader(16), _sgd(0.05), single=False),
    Setup("convolution, two tasks, AdamW", lambda: TwoDigitReader(16), _adamw(2e-3), single=False),
    Setup("transformer, AdamW", Attention, _adamw(2e-3)),
    Setup("transformer, SGD, bf16", Attention, _sgd(0.05), bf16=True),
]


@cache
def data(single: bool) -> tuple[Batch, Batch]:
    """Return training and validation set: images and labels of each task."""
    if not single:
        training, validation = overlaid_digits()
        return training.tensors, validation.tensors
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(scans).float().reshape(-1, 8, 8) / 16
    target = torch.from_numpy(labels).long()
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(7))
    held_out, used = order[:450], order[450:]
    return (images[used], target[used]), (images[held_out], target[held_out])


def draw(single: bool, source: torch.Generator) -> Batch:
    """Return a random batch of the training set."""
    tensors = data(single)[0]
    chosen = torch.randint(len(tensors[0]), (BATCH,), generator=source)
    return tuple(tensor[chosen] for tensor in tensors)
