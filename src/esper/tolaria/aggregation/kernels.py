"""The two passes over all task gradients: their Gramian, and their weighted sum.

Gradients are rows: tasks by parameters, None where a task does not reach a parameter. On the CPU
the compiled kernels stream them; elsewhere, and where nothing was compiled, torch does.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from esper.tolaria.aggregation import bucket, native

Row = Sequence[Tensor | None]

# Products of float32 numbers below 1e-38 vanish. They can't matter to a sum of squares that is this
# many times larger; above it, nothing has overflowed as long as the sum is finite.
_SAFE_MEAN_SQUARE = 1e-30


def gramian(rows: Sequence[Row], columns: Sequence[int]) -> Tensor:
    """Return the inner products of the rows over some columns.

    Within 4096 elements, float32 and half precision gradients are multiplied and added in float32;
    across, in float64. Where the scale of a gradient would make float32 over- or underflow, all is
    computed in float64.

    :param rows: dense gradients; see :func:`dense`.
    :param columns: the columns to take into account.
    :returns: n by n, float64, on the device of the gradients.
    """
    result: Tensor | None = None
    for group in _by_dtype(rows, columns):
        part = _gramian(rows, group)
        result = part if result is None else result + part
    if result is None:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device_of(rows))
    return result


def combine(
    rows: Sequence[Row], columns: Sequence[int], weights: Tensor, into: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return the weighted sum of some columns, computed in float32 or better.

    :param rows: dense gradients.
    :param columns: the columns to combine; each has at least one gradient.
    :param weights: one for each task, float64.
    :param into: for each of ``columns``, a tensor that the sum is added to, or None for a new one.
    """
    results: dict[int, Tensor] = {}
    targets = dict(zip(columns, into, strict=True))
    for group in _by_dtype(rows, columns):
        tensors: list[Tensor] = []
        add: list[bool] = []
        for column in group:
            gradient = _first(rows, column)
            target = targets[column]
            usable = target is not None and _alike(target, gradient)
            tensors.append(target if target is not None and usable else torch.empty_like(gradient))
            add.append(usable)
        _combine([[row[column] for column in group] for row in rows], weights, tensors, add)
        results.update(zip(group, tensors, strict=True))
    return [_settle(results[column], targets[column]) for column in columns]


def dense(rows: Sequence[Row]) -> list[list[Tensor | None]]:
    """Return the rows with gradients that lie in memory without gaps, alike in each column.

    :raises RuntimeError: gradients of one parameter differ in shape, dtype or device, or the
        gradients lie on several devices.
    """
    result = [list(row) for row in rows]
    device = device_of(rows)
    for column in range(len(rows[0])):
        present = [task for task, row in enumerate(rows) if row[column] is not None]
        if present:
            _align(result, column, present, device)
    return result


def device_of(rows: Sequence[Row]) -> torch.device:
    """Return the device of the first gradient; the CPU if there is none."""
    for row in rows:
        for gradient in row:
            if gradient is not None:
                return gradient.device
    return torch.device("cpu")


def _align(
    rows: list[list[Tensor | None]], column: int, present: list[int], device: torch.device
) -> None:
    first = rows[present[0]][column]
    if first is not None and not first.dtype.is_floating_point:
        raise RuntimeError(f"gradient {column} is {_describe(first)}; give real gradients")
    for task in present:
        gradient = rows[task][column]
        if first is None or gradient is None:
            continue
        if (gradient.shape, gradient.dtype, gradient.device) != (first.shape, first.dtype, device):
            raise RuntimeError(
                f"gradient {column} of task {task} is {_describe(gradient)}, but "
                f"{_describe(first)} on {device} was expected; give all tasks' gradients one "
                "shape, one dtype and one device"
            )
    if not all(_in_order(rows[task][column], first) for task in present):
        for task in present:
            gradient = rows[task][column]
            rows[task][column] = None if gradient is None else gradient.contiguous()


def _in_order(gradient: Tensor | None, first: Tensor | None) -> bool:
    """Whether a gradient has no gaps and its elements lie in the same order as the first's."""
    if gradient is None or first is None:
        return True
    if gradient.is_contiguous():
        return first.is_contiguous()
    return gradient.stride() == first.stride() and _is_channels_last(gradient)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _alike(target: Tensor, gradient: Tensor) -> bool:
    return (
        target.dtype == gradient.dtype
        and target.device == gradient.device
        and target.stride() == gradient.stride()
    )


def _settle(result: Tensor, target: Tensor | None) -> Tensor:
    return result if target is None or target is result else target.add_(result)


def _by_dtype(rows: Sequence[Row], columns: Sequence[int]) -> Iterator[list[int]]:
    groups: dict[torch.dtype, list[int]] = {}
    for column in columns:
        groups.setdefault(_first(rows, column).dtype, []).append(column)
    yield from groups.values()


def _first(rows: Sequence[Row], column: int) -> Tensor:
    for row in rows:
        gradient = row[column]
        if gradient is not None:
            return gradient
    raise RuntimeError(f"no gradients available for aggregation of parameter {column}")


def _compiled(tensor: Tensor, tasks: int) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in native.TYPES and native.available(tasks)


def _gramian(rows: Sequence[Row], columns: Sequence[int]) -> Tensor:
    """Return the Gramian over columns of one dtype."""
    chosen = [[row[column] for column in columns] for row in rows]
    firsts = [_first(rows, column) for column in columns]
    lengths = [first.numel() for first in firsts]
    if not _compiled(firsts[0], len(rows)):
        return bucket.gramian(chosen, lengths)
    table = native.Table.of(chosen, lengths)
    result = table.gramian(wide=False)
    squares = result.diagonal()
    if not np.isfinite(squares).all() or (squares < _SAFE_MEAN_SQUARE * sum(lengths)).any():
        result = table.gramian(wide=True)
    return torch.from_numpy(result)


def _combine(
    rows: Sequence[Row], weights: Tensor, targets: Sequence[Tensor], add: Sequence[bool]
) -> None:
    """Combine columns of one dtype."""
    lengths = [target.numel() for target in targets]
    if not _compiled(targets[0], len(rows)):
        bucket.combine(rows, weights, targets, add)
        return
    table = native.Table.of(rows, lengths)
    table.combine(weights.numpy().astype(np.float64, copy=False), targets, add)


def _describe(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} of shape {tuple(tensor.shape)} on {tensor.device}"
