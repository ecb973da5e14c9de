"""The gradients of one weight for several tasks, in factors that are smaller than the gradients.

A linear layer's weight has for task ``i`` the gradient ``D_i.T @ X``, with ``X`` the layer's input
(rows by in) and ``D_i`` the gradient at its output (rows by out). Inner products need no such
matrix:

    <D_i.T X, D_j.T X> = <(X X.T) D_i, D_j>

and neither does a weighted sum, which is ``(sum of w_i D_i).T @ X``: one product in place of one
for each task. A convolution is that product over the patches of its input. An embedding's gradient
is zero but for the rows that the batch looked up; those suffice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from esper.tolaria.aggregation import kernels

# Numbers worked on at a time: a megabyte of float64, which stays in the cache.
_SLICE = 1 << 17


class Factors(Protocol):
    """The gradients of one weight for several tasks, in factors."""

    def gramian(self) -> Tensor:
        """Return the inner products of the tasks' gradients, formed in float64; n by n."""
        ...

    def combine(self, weights: Tensor, into: Tensor | None) -> Tensor:
        """Return the weighted sum of the tasks' gradients, added to ``into`` if it is given."""
        ...


@dataclass(frozen=True)
class LinearFactors:
    """X, rows by in, and D for each task, rows by out.

    :ivar shape: of the weight: out by in, or out by channels by kernel.
    """

    inputs: Tensor
    outputs: Sequence[Tensor]
    shape: torch.Size

    def gramian(self) -> Tensor:
        """Return the inner products of the tasks' gradients; n by n."""
        inputs = self.inputs.double()
        kernel = inputs @ inputs.T
        tasks, (rows, width) = len(self.outputs), self.outputs[0].shape
        gram = kernel.new_zeros(tasks, tasks)
        step = min(width, max(1, _SLICE // (rows * tasks)))
        # rows by tasks by columns, so that one product serves all tasks.
        held = kernel.new_empty(rows * tasks * step)
        for start in range(0, width, step):
            columns = slice(start, min(start + step, width))
            size = columns.stop - start
            outputs = held[: rows * tasks * size].view(rows, tasks, size)
            for task, gradient in enumerate(self.outputs):
                outputs[:, task].copy_(gradient[:, columns])
            spread = (kernel @ outputs.flatten(1)).view_as(outputs)
            gram += torch.bmm(spread, outputs.transpose(1, 2)).sum(0)
        gram = (gram + gram.T) / 2
        # Where a gradient cancels to nothing, rounding may leave less than that.
        gram.diagonal().clamp_(min=0)
        return gram

    def combine(self, weights: Tensor, into: Tensor | None) -> Tensor:
        """Return the weighted sum, of the weight's shape."""
        summed = _weighted(self.outputs, weights)
        result = (summed.T @ self.inputs).view(self.shape)
        return result if into is None else into.add_(result)


@dataclass(frozen=True)
class EmbeddingFactors:
    """The indices that were looked up, and for each task the gradient of what was found."""

    table: Tensor
    padding: int
    indices: Tensor
    outputs: Sequence[Tensor]

    def gramian(self) -> Tensor:
        """Return the inner products of the tasks' gradients; n by n."""
        used, position = torch.unique(self.indices, return_inverse=True)
        padded = (used == self.padding).unsqueeze(1)
        rows: list[list[Tensor]] = []
        for gradient in self.outputs:
            touched = gradient.new_zeros(len(used), gradient.shape[1], dtype=torch.float64)
            touched.index_add_(0, position, gradient.double())
            # Not multiplied by zero: what a padded place is given may be NaN.
            rows.append([touched.masked_fill_(padded, 0.0)])
        return kernels.select(rows, [0]).gramian()

    def combine(self, weights: Tensor, into: Tensor | None) -> Tensor:
        """Return the weighted sum, of the table's shape."""
        summed = _weighted(self.outputs, weights)
        result = torch.zeros_like(self.table) if into is None else into
        kept = self.indices != self.padding
        return result.index_add_(0, self.indices, summed.masked_fill(~kept.unsqueeze(1), 0.0))


def _weighted(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    rows = kernels.dense([[gradient] for gradient in outputs])
    return kernels.select(rows, [0]).combine(weights)[0]
