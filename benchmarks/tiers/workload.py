"""A training state of a wanted size, with as many tensors as a real one, and its floors."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from esper.tolaria.state import TrainState

WIDTHS = (32, 64, 128, 256, 512, 1024)
LEAST_BLOCKS = 8
# A weight and its two moments, four bytes each.
BYTES_EACH = 12


class Progress:
    """A component that keeps plain values, as a schedule or a data position does."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {
            "epoch": 3,
            "batch": 117,
            "rates": [1e-3 * 0.97**step for step in range(50)],
            "losses": {f"task{index}": 0.1 * index for index in range(8)},
        }

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


class Training:
    """A network of transformer blocks without attention between positions, and its AdamW.

    :param megabytes: bytes of weights and moments together, in 10^6.
    """

    def __init__(self, megabytes: float) -> None:
        self.model = _network(megabytes)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=False)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state = TrainState(self.model, self.optimizer, {"progress": Progress()})
        tensors = self.state.capture().tensors.values()
        self.count = len(tensors)
        self.nbytes = sum(tensor.nbytes for tensor in tensors)

    def dicts(self) -> dict[str, Any]:
        """Return what other ways save: references to the live tensors."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, dicts: dict[str, Any]) -> None:
        self.model.load_state_dict(dicts["model"])
        self.optimizer.load_state_dict(dicts["optimizer"])

    def describe(self) -> str:
        return f"{self.nbytes / 1e6:.0f} MB in {self.count} tensors"


def memcpy(nbytes: int) -> Callable[[], object]:
    """Return a copy between two buffers that are there, on one thread: the floor in memory."""
    source, target = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    # What was only asked for has no memory yet.
    source.fill(1)
    target.fill(2)

    def copy() -> None:
        ctypes.memmove(target.ctypes.data, source.ctypes.data, nbytes)

    return copy


def _network(megabytes: float) -> nn.Module:
    wanted = megabytes * 1e6 / BYTES_EACH
    width = next(
        (w for w in reversed(WIDTHS) if wanted >= LEAST_BLOCKS * _size(_block(w))), WIDTHS[0]
    )
    blocks = max(1, int(wanted / _size(_block(width))))
    with torch.device("cpu"):
        layers = [_block(width) for _ in range(blocks)]
    rest = max(1, int((wanted - blocks * _size(layers[0])) / (width + 1)))
    return nn.Sequential(*layers, nn.Linear(width, rest))


def _block(width: int) -> nn.Module:
    return nn.ModuleDict(
        {
            "norm1": nn.LayerNorm(width),
            "query": nn.Linear(width, width),
            "key": nn.Linear(width, width),
            "value": nn.Linear(width, width),
            "out": nn.Linear(width, width),
            "norm2": nn.LayerNorm(width),
            "up": nn.Linear(width, 4 * width),
            "down": nn.Linear(4 * width, width),
        }
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
