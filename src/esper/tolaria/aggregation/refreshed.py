"""Weights that are computed now and then, and reused in between."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper.tolaria.aggregation.base import Aggregator, finite_weights


class Refreshed:
    """Asks an aggregator every k calls; in between, its last weights serve.

    In between, :func:`~esper.tolaria.aggregation.backward` goes through the trunk once, so that a
    step costs little more than one backward pass of the summed loss. The weights then belong to
    an earlier batch: that is the error made. A change in which tasks are present refreshes them.

    :param aggregator: is asked.
    :param every: k, calls between two answers.
    :raises RuntimeError: k is less than 1.
    """

    def __init__(self, aggregator: Aggregator, *, every: int) -> None:
        if every < 1:
            raise RuntimeError(f"every is {every}; give 1 or more")
        self._aggregator = aggregator
        self._every = every
        self._age = 0
        self._tasks: tuple[str, ...] = ()
        self._gramian: Tensor | None = None
        self._weights: Tensor | None = None

    @property
    def age(self) -> int:
        """Calls since the weights were computed."""
        return self._age

    def reuse(self, tasks: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Return the last Gramian and weights while they serve, and count the call."""
        known = self._gramian is not None and self._weights is not None
        if not known or self._tasks != tuple(tasks) or self._age + 1 >= self._every:
            return None
        self._age += 1
        return self._gramian, self._weights  # type: ignore[return-value]

    def refresh(self, gramian: Tensor, tasks: Sequence[str]) -> Tensor:
        """Ask the aggregator, and keep its answer; one that is not finite is not kept."""
        weights = finite_weights(self._aggregator, gramian, tasks)
        self._tasks, self._age = tuple(tasks), 0
        if weights.isfinite().all():
            self._gramian, self._weights = gramian, weights
        else:
            self._gramian = self._weights = None
        return weights

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the aggregator's weights, computed anew."""
        return self._aggregator.weights(gramian)

    def state_dict(self) -> dict[str, Any]:
        """Return the last answer, its age, and the aggregator's own state."""
        inner = getattr(self._aggregator, "state_dict", None)
        return {
            "age": self._age,
            "tasks": list(self._tasks),
            "gramian": _or_empty(self._gramian),
            "weights": _or_empty(self._weights),
            "aggregator": {} if inner is None else inner(),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set what :meth:`state_dict` returned."""
        self._age = state_dict["age"]
        self._tasks = tuple(state_dict["tasks"])
        known = state_dict["weights"].numel() > 0
        self._gramian = state_dict["gramian"].clone() if known else None
        self._weights = state_dict["weights"].clone() if known else None
        inner = getattr(self._aggregator, "load_state_dict", None)
        if inner is not None:
            inner(state_dict["aggregator"])


def _or_empty(tensor: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.float64) if tensor is None else tensor
