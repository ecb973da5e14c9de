"""Nested inputs and outputs: dicts, lists and tuples of tensors."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from esper.leyline import GrowthError

PLAIN = (bool, int, float, str, type(None))


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - any tree
    """Yield all that is no dict, list or tuple, with its name, in torch.export's order.

    :param name: of the tree itself; keys and indices follow it, joined by underscores.
    """
    if isinstance(tree, dict):
        pairs: Any = tree.items()
    elif isinstance(tree, list | tuple):
        pairs = enumerate(tree)
    else:
        yield name, tree
        return
    for key, value in pairs:
        yield from leaves(value, f"{name}_{key}" if name else str(key))


def tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401
    """Return the tensors of a tree."""
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    """Return a tree of plain dicts, lists and tuples with ``function`` applied to its leaves."""
    if isinstance(tree, dict):
        return {key: map_leaves(value, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_leaves(value, function) for value in tree]
    if isinstance(tree, tuple):
        values = [map_leaves(value, function) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return function(tree)


def check_outputs(outputs: Any) -> None:  # noqa: ANN401
    """Refuse outputs that cannot be described without the code of the model.

    :raises GrowthError: naming the type.
    """
    for name, leaf in leaves(outputs, "output"):
        if not isinstance(leaf, (Tensor, *PLAIN)):
            raise GrowthError(
                f"{name} of the model is a {type(leaf).__qualname__}; only tensors in dicts, "
                "lists and tuples can be exported"
            )


def describe(tree: Any, batch: int | None) -> Any:  # noqa: ANN401
    """Return shapes and types of JSON types; a first dimension of ``batch`` is named so.

    :param batch: samples in the batch; None when it cannot change.
    """
    return map_leaves(tree, lambda leaf: _describe_leaf(leaf, batch))


def brief(tree: Any, batch: int | None) -> str:  # noqa: ANN401
    """Return shapes and types in a form for people, such as ``float32 [batch, 10]``."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f'"{k}": {brief(v, batch)}' for k, v in tree.items()) + "}"
    if isinstance(tree, list | tuple):
        return "(" + ", ".join(brief(value, batch) for value in tree) + ")"
    if not isinstance(tree, Tensor):
        return repr(tree)
    return f"{dtype_name(tree)} [{', '.join(map(str, _shape(tree, batch)))}]"


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's type without ``torch.``."""
    return str(tensor.dtype).removeprefix("torch.")


def _describe_leaf(leaf: Any, batch: int | None) -> Any:  # noqa: ANN401
    if isinstance(leaf, Tensor):
        return {"shape": _shape(leaf, batch), "dtype": dtype_name(leaf)}
    return leaf


def _shape(tensor: Tensor, batch: int | None) -> list[int | str]:
    shape: list[int | str] = list(tensor.shape)
    if batch is not None and shape and shape[0] == batch:
        shape[0] = "batch"
    return shape
