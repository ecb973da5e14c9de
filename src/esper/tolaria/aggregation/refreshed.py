"""Conflicts that are measured now and then, and assumed to last in between."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper.tolaria.aggregation.base import Aggregator


class Refreshed:
    """Has the gradients of all tasks compared every k calls; in between, one pass serves.

    What is kept are the cosines between the task gradients, and for each task how much longer its
    gradient is in the trunk than at the shared representation. In between,
    :func:`~esper.tolaria.aggregation.backward` takes the lengths at the representation from the
    batch at hand, and weighs by the Gramian that follows from both; then it goes through the trunk
    once. The error is that of cosines and ratios that belong to an earlier batch.

    The weights themselves are not kept: they are ratios of lengths, and one that suits a batch
    with a short gradient can be a hundred times too large for the next.

    A change in which tasks are present has all compared anew, and so has a gradient that was zero
    or not finite.

    :param aggregator: is asked at every call.
    :param every: k, calls between two comparisons.
    :raises RuntimeError: k is less than 1.
    """

    def __init__(self, aggregator: Aggregator, *, every: int) -> None:
        if every < 1:
            raise RuntimeError(f"every is {every}; give 1 or more")
        self.aggregator = aggregator
        self._every = every
        self._age = 0
        self._tasks: tuple[str, ...] = ()
        self._cosine = torch.empty(0, 0, dtype=torch.float64)
        self._ratio = torch.empty(0, dtype=torch.float64)

    @property
    def age(self) -> int:
        """Calls since the gradients were compared."""
        return self._age

    def estimate(self, tasks: Sequence[str], lengths: Tensor) -> Tensor | None:
        """Return the Gramian that is to be expected, and count the call; None when it is time.

        :param lengths: norm of each task's gradient at the shared representation; n, float64.
        :returns: n by n, float64.
        """
        if self._tasks != tuple(tasks) or self._age + 1 >= self._every:
            return None
        self._age += 1
        expected = lengths * self._ratio.to(lengths.device)
        return self._cosine.to(lengths.device) * torch.outer(expected, expected)

    def keep(self, tasks: Sequence[str], gramian: Tensor, lengths: Tensor) -> None:
        """Take in a comparison.

        :param gramian: of the gradients in the trunk; n by n, float64.
        :param lengths: as for :meth:`estimate`.
        """
        norms = gramian.diagonal().sqrt()
        scale = torch.outer(norms, norms)
        self._cosine = torch.where(scale > 0, gramian / scale, 0.0)
        self._ratio = torch.where(lengths > 0, norms / lengths, 0.0)
        self._age = 0
        # Of a task that had no gradient nothing can be expected; and what is not finite in one
        # place is not finite in the sum.
        usable = (self._cosine.sum() + self._ratio.sum()).isfinite() & (self._ratio > 0).all()
        self._tasks = tuple(tasks) if usable else ()

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the aggregator's weights."""
        return self.aggregator.weights(gramian)

    def state_dict(self) -> dict[str, Any]:
        """Return the last comparison, its age, and the aggregator's own state."""
        inner = getattr(self.aggregator, "state_dict", None)
        return {
            "age": self._age,
            "tasks": list(self._tasks),
            "cosine": self._cosine,
            "ratio": self._ratio,
            "aggregator": {} if inner is None else inner(),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set what :meth:`state_dict` returned."""
        self._age = state_dict["age"]
        self._tasks = tuple(state_dict["tasks"])
        self._cosine = state_dict["cosine"].clone()
        self._ratio = state_dict["ratio"].clone()
        inner = getattr(self.aggregator, "load_state_dict", None)
        if inner is not None:
            inner(state_dict["aggregator"])
