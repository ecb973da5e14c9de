"""The optimizer's state of a parameter that is replaced by a larger one.

New rows and columns come last in every dimension. Entries with the parameter's shape are widened by
what the optimizer itself begins with, which for moments is zero; counters go on counting. As long
as the new entries do not change the gradients of the old ones, these train on as if nothing had
been added.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper.leyline import GrowthError

# Row and column sums: their shapes follow from the parameter's, and may equal it by chance.
_FACTORED = ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")


def require_larger(old: Tensor, new: Tensor, which: str) -> None:
    """Refuse a replacement that ``old`` is no leading block of.

    :param which: the parameter, in words.
    :raises GrowthError: it is smaller in some dimension, or of another kind.
    """
    if old.ndim != new.ndim or any(o > n for o, n in zip(old.shape, new.shape, strict=True)):
        raise GrowthError(
            f"{which} cannot be carried into shape {tuple(new.shape)}: moments are carried into "
            "the leading block, so no dimension may shrink or be added; replace it with "
            "carry=False, which starts its moments afresh"
        )
    if (old.dtype, old.device) != (new.dtype, new.device):
        raise GrowthError(
            f"{which} is {old.dtype} on {old.device} but its replacement is {new.dtype} on "
            f"{new.device}; make the replacement like the original"
        )


def widened(
    state: Mapping[str, Any], old: Tensor, new: Tensor, group: Mapping[str, Any], which: str
) -> dict[str, Any]:
    """Return ``old``'s state widened to ``new``'s shape, in memory of its own.

    :param state: the optimizer's entries for ``old``; only read.
    :param group: the hyper-parameters of ``old``.
    :param which: the parameter, in words.
    :raises GrowthError: an entry's shape cannot be understood.
    """
    carried: dict[str, Any] = {}
    for key, value in state.items():
        if value is None or isinstance(value, (bool, int, float)):
            carried[key] = value
        elif _has_shape(key, value, old.shape):
            carried[key] = _beginning(key, value, new, group)
            carried[key][tuple(slice(size) for size in old.shape)] = value
        elif _has_shape(key, value, torch.Size()):
            carried[key] = value.clone()
        else:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise GrowthError(
                f"{which} cannot be widened: nothing says how its optimizer state {key!r} "
                f"({shape}) grows with it; replace it with carry=False, or use an optimizer whose "
                "moments have the parameter's shape, such as Adam or SGD"
            )
    return carried


def _has_shape(key: str, value: object, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and key not in _FACTORED


def _beginning(key: str, value: Tensor, new: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return an entry of ``new``'s shape as it is before the first step."""
    if key == "ax" and "t0" in group:
        # ASGD's running average of the weights: the average of one value is that value.
        return new.detach().to(value.dtype, copy=True)
    start = 0.0
    if key == "step_size" and "step_sizes" in group:
        start = float(group["lr"])  # Rprop
    elif key == "sum":
        start = float(group.get("initial_accumulator_value", 0.0))  # Adagrad
    fill = complex(start, start) if value.is_complex() else start
    return torch.full_like(new, fill, dtype=value.dtype, requires_grad=False)
