"""Aggregators that do not look at conflicts: sum, mean and fixed weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Sum:
    """Adds the task gradients: the same update as one backward pass of the summed loss."""

    def weights(self, gramian: Tensor) -> Tensor:
        """Return n ones."""
        return torch.ones(len(gramian), dtype=gramian.dtype, device=gramian.device)


class Mean:
    """Averages the task gradients."""

    def weights(self, gramian: Tensor) -> Tensor:
        """Return n times ``1 / n``."""
        return torch.full((len(gramian),), 1 / len(gramian)).to(gramian)


class Weighted:
    """Averages the task gradients with fixed weights, normalised by their sum.

    Normalised weights shrink the gradient of parts that only few tasks reach: two tasks with equal
    weights each move their own part at half the rate. Use :class:`Sum` where that is not wanted.

    :param weights: one finite, non-negative weight for each task, in the order of the losses.
    :raises RuntimeError: a weight is negative or not finite, or they sum to zero.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        for index, weight in enumerate(weights):
            if not math.isfinite(weight) or weight < 0:
                raise RuntimeError(f"weight {index} is {weight}; give a finite one, 0 or more")
        total = math.fsum(weights)
        if total <= 0:
            raise RuntimeError(f"the weights {list(weights)} sum to zero; give one above zero")
        self._weights = [weight / total for weight in weights]

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the normalised weights.

        :raises RuntimeError: there are not as many weights as tasks.
        """
        if len(self._weights) != len(gramian):
            raise RuntimeError(f"{len(self._weights)} weights were given for {len(gramian)} tasks")
        return torch.tensor(self._weights, dtype=gramian.dtype, device=gramian.device)
