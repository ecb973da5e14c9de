"""What a task is: small and large model, where the small one may grow, data, and the score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

Pretrain = Callable[[nn.Module, int], int]


@dataclass(frozen=True)
class Split:
    """Data by what it is used for.

    :param training: what is learnt from.
    :param validation: for everything that is decided, by policies and by tuning.
    :param test: for the reported score, and nothing else.
    """

    training: Dataset[Any]
    validation: TensorDataset
    test: TensorDataset


@dataclass(frozen=True)
class Growth:
    """Where and what a small model may grow.

    :param slots: by name.
    :param blueprint: of every seed.
    :param arguments: of the blueprint.
    :param per_slot: seeds that may be fossilised in one slot.
    """

    slots: tuple[str, ...]
    blueprint: str
    arguments: Mapping[str, int] = field(default_factory=dict)
    per_slot: int = 1


@dataclass(frozen=True)
class Task:
    """One task, and how every arm trains on it.

    :param key: a letter.
    :param small: makes the model that growth begins with.
    :param large: makes one as growth can end at most.
    :param data: makes the split, the same each time.
    :param growth: where the small model may grow, and what.
    :param rates: learning rates that are tried.
    :param decays: weight decays that are tried.
    :param target: validation score to reach first, where that is counted.
    :param bits: the score is bits a character, less is better; else accuracy.
    :param pretrain: what comes before, given the model and the seed; returns its operations.
    :param sizes: models of a sweep by name, the smallest first.
    """

    key: str
    title: str
    small: Callable[[], nn.Module]
    large: Callable[[], nn.Module]
    data: Callable[[], Split]
    growth: Growth
    epochs: int
    batch: int = 100
    rates: tuple[float, ...] = (3e-3, 1e-2)
    decays: tuple[float, ...] = (0.0, 1e-2)
    target: float | None = None
    bits: bool = False
    pretrain: Pretrain | None = None
    sizes: tuple[tuple[str, Callable[[], nn.Module]], ...] = ()

    def loss(self, model: nn.Module, batch: Any) -> Tensor | dict[str, Tensor]:
        """Return the cross-entropy, by head where there are several."""
        outputs, labels = model(batch[0]), batch[1:]
        if isinstance(outputs, dict):
            pairs = zip(outputs.items(), labels, strict=True)
            return {name: functional.cross_entropy(out, label) for (name, out), label in pairs}
        return functional.cross_entropy(outputs.flatten(0, -2), labels[0].flatten())

    def score(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Return the score of a batch: accuracy, or bits a character."""
        outputs, labels = model(batch[0]), batch[1:]
        if self.bits:
            loss = functional.cross_entropy(outputs.flatten(0, -2), labels[0].flatten())
            return {"score": float(loss) / 0.6931471805599453}
        heads = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
        right = [
            (out.argmax(-1) == label).float().mean()
            for out, label in zip(heads, labels, strict=True)
        ]
        return {"score": float(torch.stack(right).mean())}

    def evaluate(self, model: nn.Module, data: TensorDataset) -> float:
        """Return the score on a whole set, in evaluation mode."""
        model.eval()
        with torch.no_grad():
            score = self.score(model, data.tensors)["score"]
        model.train()
        return score

    def better(self, score: float, than: float) -> bool:
        """Whether one score is better than another."""
        return score < than if self.bits else score > than

    def reached(self, score: float) -> bool:
        """Whether a validation score is that of the target."""
        return self.target is not None and not self.better(self.target, score)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
