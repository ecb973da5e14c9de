"""State dictionaries as tensors by name plus JSON values, and back.

A ``state_dict`` mixes tensors with numbers, tuples, and dictionaries whose keys are no strings.
:func:`split` takes the tensors out and leaves markers that :func:`join` replaces again.
"""

from typing import Any

import torch
from torch import Tensor

from esper.leyline import StateError

_TENSOR = "$tensor"
_TUPLE = "$tuple"
_ITEMS = "$items"
_PLAIN = (str, int, float, bool, type(None))


def split(value: object, name: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - JSON
    """Return ``value`` with each tensor replaced by a marker.

    :param value: nested dicts, lists and tuples of tensors and plain values.
    :param name: the name of ``value``; a tensor below it is named by its path.
    :param tensors: receives the tensors by name.
    :returns: JSON types only.
    :raises StateError: a leaf is neither a tensor nor a plain value.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach() if value.requires_grad else value
        return {_TENSOR: name}
    if isinstance(value, list):
        return [split(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [split(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        return _split_dict(value, name, tensors)
    raise StateError(
        f"cannot save {name}: a {type(value).__qualname__} is neither a tensor nor a plain value; "
        "return numbers, strings, lists, dicts or tensors from state_dict()"
    )


def split_flat(value: dict[Any, Any], name: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """Return what :func:`split` returns, faster for a dictionary of nothing but named tensors."""
    found = {}
    for key, item in value.items():
        if type(key) is not str or key[:1] == "$" or not isinstance(item, Tensor):
            return split(value, name, tensors)
        path = f"{name}/{key}"
        tensors[path] = item.detach() if item.requires_grad else item
        found[key] = {_TENSOR: path}
    return found


def _split_dict(value: dict[Any, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: split(item, f"{name}/{key}", tensors) for key, item in value.items()}
    items = [
        [split(key, f"{name}/key", tensors), split(item, f"{name}/{key}", tensors)]
        for key, item in value.items()
    ]
    return {_ITEMS: items}


def join(value: object, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - inverse of split
    """Rebuild what :func:`split` took apart. Tensors are cloned, so that nothing is shared.

    :raises StateError: a tensor that a marker names is missing.
    """
    if isinstance(value, list):
        return [join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return _copy(value[_TENSOR], tensors)
    if _TUPLE in value:
        return tuple(join(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {join(key, tensors): join(item, tensors) for key, item in value[_ITEMS]}
    return {key: join(item, tensors) for key, item in value.items()}


def _copy(name: str, tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise StateError(f"the saved state names tensor {name!r} but does not hold it")
    return torch.clone(tensors[name])
