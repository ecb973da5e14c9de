"""The tasks.

Signals by a convolution (A) and by a perceptron (B), two digits at once (C), text (D), and digits
that come later (E).
"""

from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from esper.jobs.digits import CANVAS, SCAN, TwoDigitReader
from esper.kasmina.blueprints.plain import Residual
from growing.signals import CLASSES, POINTS, signals
from growing.task import Growth, Split, Task
from growing.text import language_model, text

CHANNELS = 16
_OLD = 6


def convolution(blocks: int = 4) -> nn.Module:
    """Return a network for signals whose residual blocks stand at four places, the first ones."""
    places: list[nn.Module] = []
    for place in range(4):
        block = nn.Sequential(
            nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1),
        )
        # A normalisation marks the place, so that a seed there becomes the block that is missing.
        norm = nn.BatchNorm1d(CHANNELS)
        places.append(nn.Sequential(norm, Residual(block)) if place < blocks else norm)
    return nn.Sequential(
        nn.Unflatten(1, (1, POINTS)),
        nn.Conv1d(1, CHANNELS, 5, stride=2, padding=2),
        nn.GELU(),
        *places,
        nn.GELU(),
        nn.AvgPool1d(2),
        nn.Flatten(),
        nn.Linear(CHANNELS * POINTS // 4, CLASSES),
    )


def perceptron(width: int) -> nn.Module:
    """Return a network for signals with three hidden layers, the middle one of 16 units."""
    return nn.Sequential(
        nn.Linear(POINTS, width),
        nn.ReLU(),
        nn.Linear(width, 16),
        nn.ReLU(),
        nn.Linear(16, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


@cache
def signal_data() -> Split:
    """Return 4000 signals to learn from, 1000 to decide with, 2000 to report on."""
    return Split(signals(4000, 0), signals(1000, 1), signals(2000, 2))


def reader(channels: int) -> nn.Module:
    """Return the network of the built-in job with so many channels in its second convolution."""
    model = TwoDigitReader(6, 24)
    model.trunk[3] = nn.Conv2d(6, channels, 3, padding=1)
    model.trunk[8] = nn.Linear(channels * (CANVAS // 4) ** 2, 24)
    return model


@cache
def overlaid() -> Split:
    """Return pairs of digits laid over each other; the three sets are made of different scans."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, SCAN, SCAN).astype(np.float32) / 16.0
    random = np.random.default_rng(11)
    order = random.permutation(len(scans))
    parts = order[720:], order[:360], order[360:720]
    sets = [
        _pairs(scans[part], labels[part].astype(np.int64), count, random)
        for part, count in zip(parts, (6400, 1000, 2000), strict=True)
    ]
    return Split(*sets)


def _pairs(
    scans: np.ndarray, labels: np.ndarray, count: int, random: np.random.Generator
) -> TensorDataset:
    first, second = random.integers(len(scans), size=(2, count))
    canvas = np.zeros((count, 1, CANVAS, CANVAS), dtype=np.float32)
    canvas[:, 0, :SCAN, :SCAN] = scans[first]
    np.maximum(canvas[:, 0, -SCAN:, -SCAN:], scans[second], out=canvas[:, 0, -SCAN:, -SCAN:])
    found = canvas, labels[first], labels[second]
    return TensorDataset(*map(torch.from_numpy, found))


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor]:
    """Return scans, labels, and the order in which they are split."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(scans).float() / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    return images, torch.from_numpy(labels).long(), order


@cache
def later_digits() -> Split:
    """Return the second phase: classes 6 to 9, and ten samples of each earlier class.

    Validation and test hold all ten classes.
    """
    images, labels, order = _digits()
    validation, test, used = order[:360], order[360:720], order[720:]
    new = used[labels[used] >= _OLD]
    kept = torch.cat([used[labels[used] == label][:10] for label in range(_OLD)])
    both = torch.cat([new, kept])
    both = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(4))]
    both = both[: len(both) // 16 * 16]
    parts = both, validation, test
    return Split(*(TensorDataset(images[part], labels[part]) for part in parts))


def learn_first_digits(model: nn.Module, seed: int) -> int:
    """Train a model on classes 0 to 5; return the operations that took."""
    images, labels, order = _digits()
    used = order[720:]
    used = used[labels[used] < _OLD]
    source = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(model(images[:32]), labels[:32]).backward()
    for _ in range(400):
        chosen = used[torch.randint(len(used), (32,), generator=source)]
        optimizer.zero_grad()
        functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return 400 * int(counter.get_total_flops())


def digit_perceptron(width: int) -> nn.Module:
    """Return a network for single digits with one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


TASKS = {
    "A": Task(
        "A",
        "signals, convolution, 1 to 4 blocks",
        partial(convolution, 1),
        partial(convolution, 4),
        signal_data,
        Growth(("4", "5", "6"), "conv"),
        epochs=40,
        target=0.9,
        sizes=tuple((f"{blocks} blocks", partial(convolution, blocks)) for blocks in (1, 2, 3, 4)),
    ),
    "B": Task(
        "B",
        "signals, perceptron, two layers of 16 to 40",
        partial(perceptron, 16),
        partial(perceptron, 40),
        signal_data,
        Growth(("0>2", "4>6"), "widen", {"width": 12}, per_slot=2),
        epochs=40,
        sizes=tuple((f"width {width}", partial(perceptron, width)) for width in (16, 24, 32, 40)),
    ),
    "C": Task(
        "C",
        "two overlaid digits, 6 to 24 channels",
        partial(reader, 6),
        partial(reader, 24),
        overlaid,
        # Each seed doubles what is there.
        Growth(("trunk.3>trunk.8",), "widen", per_slot=2),
        epochs=20,
        batch=64,
    ),
    "D": Task(
        "D",
        "characters of documentation, 2 to 4 layers",
        partial(language_model, 2),
        partial(language_model, 4),
        text,
        Growth(("layers.2", "layers.3"), "decoder_layer"),
        epochs=12,
        batch=32,
        rates=(2e-3, 5e-3),
        bits=True,
        sizes=tuple((f"{layers} layers", partial(language_model, layers)) for layers in (2, 3, 4)),
    ),
    "E": Task(
        "E",
        "new classes of digits, width 16 to 48",
        partial(digit_perceptron, 16),
        partial(digit_perceptron, 48),
        later_digits,
        Growth(("0>2",), "widen", {"width": 16}, per_slot=2),
        epochs=40,
        batch=16,
        pretrain=learn_first_digits,
    ),
}
