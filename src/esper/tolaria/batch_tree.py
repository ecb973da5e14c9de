"""Applying a function to every tensor of a batch, whatever the batch is made of."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def map_tensors(content: Any, function: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """Return a batch of the same structure with ``function`` applied to its tensors.

    :param content: a tensor, or dicts, lists and (named) tuples of batches; anything else stays
        as it is.
    """
    if isinstance(content, Tensor):
        return function(content)
    if isinstance(content, dict):
        return {key: map_tensors(value, function) for key, value in content.items()}
    if isinstance(content, list):
        return [map_tensors(value, function) for value in content]
    if isinstance(content, tuple):
        values = [map_tensors(value, function) for value in content]
        return type(content)(*values) if hasattr(content, "_fields") else tuple(values)
    return content
