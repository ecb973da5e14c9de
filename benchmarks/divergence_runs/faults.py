"""What goes wrong in a run, from a given step on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from divergence_runs.setups import Batch

POISON, GARBAGE, GROWTH = -30.0, 1e20, 1.5


def _same(batch: Batch, age: int) -> Batch:  # noqa: ARG001 - a fault's signature
    return batch


def _nothing(model: nn.Module, age: int) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """A fault; ``age`` counts steps since its onset, from 0.

    :param rate: what the schedule multiplies the learning rate by.
    :param batch: what becomes of a batch.
    :param model: what is done to the model before a step.
    """

    name: str
    rate: float = 1.0
    batch: Callable[[Batch, int], Batch] = _same
    model: Callable[[nn.Module, int], None] = _nothing
    needs_bf16: bool = False


def _wrong_labels(batch: Batch, age: int) -> Batch:
    """Exchange every label of every batch from here on for another digit's."""
    return (batch[0], *((label + 1 + age % 9) % 10 for label in batch[1:]))


def _poison(batch: Batch, age: int) -> Batch:
    """Scale, negate and reorder one batch, as the drill of ``esper train`` does."""
    return batch if age else (torch.roll(batch[0], 1, 0) * POISON, *batch[1:])


def _garbage(batch: Batch, age: int) -> Batch:
    """Put what an uninitialised buffer may hold into one batch."""
    if age:
        return batch
    images = batch[0].clone()
    images.view(-1)[::97] = GARBAGE
    return (images, *batch[1:])


@torch.no_grad()
def _grow(model: nn.Module, age: int) -> None:
    """Scale the largest matrix up, for ten steps."""
    if age < 10:
        max((p for p in model.parameters() if p.dim() > 1), key=torch.numel).mul_(GROWTH)


FAULTS = [
    Fault("rate too high", rate=100.0),
    Fault("corrupted labels", batch=_wrong_labels),
    Fault("poisoned batch", batch=_poison),
    Fault("exploding layer", model=_grow),
    Fault("bf16 overflow", batch=_garbage, needs_bf16=True),
]
