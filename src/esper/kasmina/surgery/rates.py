"""Rates: numbers, or tensors for optimizers that are captured in a graph."""

import copy
from typing import Any

from torch import Tensor


def same(value: Any) -> Any:  # noqa: ANN401 - any hyper-parameter
    """Return ``value``; whatever in it could be changed in place is copied."""
    return copy.deepcopy(value)


def scaled(rate: Any, factor: float) -> Any:  # noqa: ANN401 - a number or a tensor
    """Return ``rate * factor``, in memory of its own; exactly ``rate`` when the factor is 1."""
    if factor == 1.0:
        return same(rate)
    return rate.detach() * factor if isinstance(rate, Tensor) else rate * factor
