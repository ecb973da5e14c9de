"""One backward pass for each task, combined into ``.grad``: what replaces ``loss.backward()``."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from esper.tolaria.aggregation.base import Aggregator
from esper.tolaria.aggregation.report import ConflictReport

_Row = Sequence[Tensor | None]


def backward(
    losses: Mapping[str, Tensor],
    parameters: Sequence[Tensor],
    aggregator: Aggregator,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> ConflictReport:
    """Compute each task's gradient and accumulate their aggregation into ``.grad``.

    A parameter that only one task reaches, such as a head's, gets that task's gradient as it is;
    one that no task reaches keeps its ``.grad``. The aggregator sees the shared parameters only.

    :param losses: one scalar for each task present in the batch, by name. All come from one
        forward pass; a task that is absent from the batch is left out.
    :param parameters: tensors that require gradients.
    :param aggregator: turns the Gramian into weights.
    :param scaler: scales every loss alike; the gradients stay scaled, the report's Gramian too.
    :raises RuntimeError: there is no loss, or a gradient is sparse.
    """
    if not losses:
        raise RuntimeError("no gradients available for aggregation")
    rows = _task_gradients(list(losses.values()), parameters, scaler)
    shared = [index for index in range(len(parameters)) if _reached(rows, index) > 1]
    gram = gramian(rows, shared)
    weights = aggregator.weights(gram)
    host_weights: list[float] = weights.tolist()
    is_shared = set(shared)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            gradient = (
                _combine(rows, index, host_weights) if index in is_shared else _only(rows, index)
            )
            if gradient is not None:
                _accumulate(parameter, gradient)
    return ConflictReport(tuple(losses), gram, weights)


def gramian(rows: Sequence[_Row], columns: Sequence[int]) -> Tensor:
    """Return the inner products of the rows, accumulated in float64 one parameter at a time.

    :param rows: a gradient or None for each task and parameter.
    :param columns: the parameters to take into account.
    :returns: n by n, float64, on the device of the gradients.
    """
    device = _device_of(rows)
    result = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for column in columns:
        present = [task for task, row in enumerate(rows) if row[column] is not None]
        block = torch.stack(
            [gradient.flatten() for row in rows if (gradient := row[column]) is not None]
        ).double()
        if len(present) == len(rows):
            result.addmm_(block, block.T)
        else:
            index = torch.tensor(present, device=device)
            result[index.unsqueeze(1), index] += block @ block.T
    return result


def _task_gradients(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], scaler: torch.amp.GradScaler | None
) -> list[_Row]:
    last = len(losses) - 1
    rows: list[_Row] = []
    for task, loss in enumerate(losses):
        scaled = loss if scaler is None else scaler.scale(loss)
        row = torch.autograd.grad(scaled, parameters, retain_graph=task < last, allow_unused=True)
        for index, gradient in enumerate(cast("_Row", row)):
            if gradient is not None and gradient.is_sparse:
                raise RuntimeError(
                    f"parameter {index} has a sparse gradient; build its embedding with "
                    "sparse=False to aggregate several tasks"
                )
        rows.append(row)
    return rows


def _device_of(rows: Sequence[_Row]) -> torch.device:
    for row in rows:
        for gradient in row:
            if gradient is not None:
                return gradient.device
    return torch.device("cpu")


def _reached(rows: Sequence[_Row], index: int) -> int:
    return sum(row[index] is not None for row in rows)


def _only(rows: Sequence[_Row], index: int) -> Tensor | None:
    for row in rows:
        gradient = row[index]
        if gradient is not None:
            # A copy: autograd may have returned one tensor for two parameters, or an expanded one.
            return gradient.clone()
    return None


def _combine(rows: Sequence[_Row], index: int, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of one parameter's gradients, accumulated in float32 or better."""
    total: Tensor | None = None
    dtype = torch.float32
    for row, weight in zip(rows, weights, strict=True):
        gradient = row[index]
        if gradient is None:
            continue
        if total is None:
            dtype = gradient.dtype
            wide = gradient.float() if dtype.itemsize < 4 else gradient
            total = wide * weight
        else:
            total.add_(gradient, alpha=weight)
    if total is None:
        raise RuntimeError(f"no gradients available for aggregation of parameter {index}")
    return total.to(dtype)


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
