"""Aggregators that do not look at conflicts: sum, mean and fixed weights."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esper.tolaria.aggregation.base import Aggregator, like


class Sum:
    """Adds the task gradients: the same update as one backward pass of the summed loss."""

    def weights(self, gramian: Tensor) -> Tensor:
        """Return n ones."""
        return torch.ones(len(gramian), dtype=gramian.dtype, device=gramian.device)


class Mean:
    """Averages the task gradients."""

    def weights(self, gramian: Tensor) -> Tensor:
        """Return n times ``1 / n``."""
        return torch.full_like(gramian.diagonal(), 1 / len(gramian))


class Weighted:
    """Averages the task gradients with fixed weights, normalised by their sum.

    Normalised weights shrink the gradient of parts that only few tasks reach: two tasks with equal
    weights each move their own part at half the rate. Use :class:`Sum` where that is not wanted.

    :param weights: one finite, non-negative weight for each task, in the order of the losses; or
        by name, which also serves batches that some tasks are absent from.
    :raises RuntimeError: a weight is negative or not finite, or they sum to zero.
    """

    def __init__(self, weights: Sequence[float] | Mapping[str, float]) -> None:
        self._named = dict(weights) if isinstance(weights, Mapping) else None
        values = weights.values() if isinstance(weights, Mapping) else weights
        self._weights = check_weights(list(values))

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the normalised weights.

        :raises RuntimeError: there are not as many weights as tasks.
        """
        _check_number(self._weights, len(gramian))
        return like(self._weights, gramian)

    def for_tasks(self, tasks: Sequence[str]) -> Aggregator:
        """Return the weighting of the tasks that are present.

        Where all of them have weight zero, so has the update.

        :raises RuntimeError: a task has no weight.
        """
        if self._named is None or tuple(self._named) == tuple(tasks):
            return self
        weights = select_by_name(self._named, tasks, "weight")
        return Weighted(weights) if any(weights) else _Nothing()


class _Nothing:
    def weights(self, gramian: Tensor) -> Tensor:
        return torch.zeros_like(gramian.diagonal())


def select_by_name(values: Mapping[str, float], tasks: Sequence[str], kind: str) -> list[float]:
    """Return the values of some tasks, in their order.

    :param kind: what the values are, for the error.
    :raises RuntimeError: a task has none.
    """
    missing = [task for task in tasks if task not in values]
    if missing:
        raise RuntimeError(f"there is no {kind} for task {missing[0]!r}; known: {sorted(values)}")
    return [values[task] for task in tasks]


def check_weights(weights: Sequence[float], tasks: int | None = None) -> list[float]:
    """Return weights divided by their sum.

    :param tasks: how many there have to be.
    :raises RuntimeError: a weight is negative or not finite, all are zero, or their number is
        wrong.
    """
    if tasks is not None:
        _check_number(weights, tasks)
    for index, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise RuntimeError(f"weight {index} is {weight}; give a finite one, 0 or more")
    # Divided by the largest first: a sum of huge weights must not overflow.
    largest = max(weights, default=0.0)
    if largest <= 0:
        raise RuntimeError(f"the weights {list(weights)} sum to zero; give one above zero")
    scaled = [weight / largest for weight in weights]
    total = math.fsum(scaled)
    return [weight / total for weight in scaled]


def _check_number(weights: Sequence[float], tasks: int) -> None:
    if len(weights) != tasks:
        raise RuntimeError(f"{len(weights)} weights were given for {tasks} tasks")
