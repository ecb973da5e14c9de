"""Task gradients of wide layers that are never formed.

A linear layer's weight has for task ``i`` the gradient ``D_i.T @ X``, with ``X`` the layer's input
(rows by in) and ``D_i`` the gradient at its output (rows by out). Inner products need no such
matrix:

    <D_i.T X, D_j.T X> = <(X X.T) D_i, D_j>

and neither does a weighted sum, which is ``(sum of w_i D_i).T @ X``: one product in place of one
for each task. With few rows and wide layers, that saves most of the cost of a backward pass. An
embedding's gradient is zero but for the rows that the batch looked up; those suffice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from esper.tolaria.aggregation import kernels
from esper.tolaria.aggregation.graph import SharedGraph

# float64 products, in which the Gramian is formed, cost about twice those of the gradient's dtype.
_PRICE = 2
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

    def extend(self, other: Self) -> Self:
        """Return the gradients of two micro-batches together."""
        ...


class Layer(Protocol):
    """A use of a weight, found in the graph.

    :ivar output: where the gradient of the layer's output can be asked for.
    """

    output: GradientEdge

    def factors(self, outputs: Sequence[Tensor | None]) -> Factors:
        """Return the weight's gradients.

        :param outputs: gradient at the output for each task, None for zeros.
        """
        ...


@dataclass
class LinearLayer:
    """A product ``X @ W.T``; X is rows by in."""

    output: GradientEdge
    inputs: Tensor

    def factors(self, outputs: Sequence[Tensor | None]) -> "LinearFactors":
        """Return the weight's gradients."""
        return LinearFactors(self.inputs, _filled(outputs))


@dataclass
class EmbeddingLayer:
    """Rows looked up in a table; indices of any shape."""

    output: GradientEdge
    indices: Tensor
    table: Tensor
    padding: int

    def factors(self, outputs: Sequence[Tensor | None]) -> "EmbeddingFactors":
        """Return the table's gradients."""
        flat = [gradient.flatten(0, -2) for gradient in _filled(outputs)]
        return EmbeddingFactors(self.table, self.padding, self.indices.flatten(), flat)


@dataclass(frozen=True)
class LinearFactors:
    """X, rows by in, and D for each task, rows by out."""

    inputs: Tensor
    outputs: Sequence[Tensor]

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
        return (gram + gram.T) / 2

    def combine(self, weights: Tensor, into: Tensor | None) -> Tensor:
        """Return the weighted sum, out by in."""
        summed = _weighted(self.outputs, weights)
        if into is None:
            return summed.T @ self.inputs
        return into.addmm_(summed.T, self.inputs)

    def extend(self, other: "LinearFactors") -> "LinearFactors":
        """Return the gradients of two micro-batches together."""
        return LinearFactors(
            torch.cat([self.inputs, other.inputs]), _joined(self.outputs, other.outputs)
        )


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
        kept = (used != self.padding).double().unsqueeze(1)
        rows: list[list[Tensor]] = []
        for gradient in self.outputs:
            touched = kept.new_zeros(len(used), gradient.shape[1])
            rows.append([touched.index_add_(0, position, gradient.double()) * kept])
        return kernels.gramian(rows, [0])

    def combine(self, weights: Tensor, into: Tensor | None) -> Tensor:
        """Return the weighted sum, of the table's shape."""
        summed = _weighted(self.outputs, weights)
        result = torch.zeros_like(self.table) if into is None else into
        kept = self.indices != self.padding
        return result.index_add_(0, self.indices, summed * kept.unsqueeze(1))

    def extend(self, other: "EmbeddingFactors") -> "EmbeddingFactors":
        """Return the gradients of two micro-batches together."""
        return EmbeddingFactors(
            self.table,
            self.padding,
            torch.cat([self.indices, other.indices]),
            _joined(self.outputs, other.outputs),
        )


def wide_layers(graph: SharedGraph, parameters: Sequence[Tensor]) -> dict[int, Layer]:
    """Return the layers whose weight gradients are better left unformed, by parameter.

    Taken are weights that are used once, in an operation that autograd recorded as such; anything
    else is left to autograd.
    """
    layers: dict[int, Layer] = {}
    for index in graph.shared:
        weight = parameters[index]
        consumer = _only_consumer(graph, graph.leaves[index])
        if weight.dim() != 2 or consumer is None:
            continue
        node, _ = consumer
        if node.name() == "TBackward0":
            linear = _linear(graph, node, weight)
            if linear is not None and _worthwhile(linear.inputs, weight, len(graph.own)):
                layers[index] = linear
        elif node.name() == "EmbeddingBackward0":
            embedding = _embedding(node, weight)
            if embedding is not None and embedding.indices.numel() < len(weight):
                layers[index] = embedding
    return layers


def _linear(graph: SharedGraph, transpose: Node, weight: Tensor) -> LinearLayer | None:
    """Follow the transposed weight into its product, as long as there is one way only."""
    product = _only_consumer(graph, transpose)
    if product is None:
        return None
    node, position = product
    inputs: Tensor | None = None
    if node.name() == "AddmmBackward0" and position == 2 and getattr(node, "_saved_alpha", 0) == 1:
        inputs = getattr(node, "_saved_mat1", None)
    elif node.name() == "MmBackward0" and position == 1:
        inputs = getattr(node, "_saved_self", None)
    if inputs is None or inputs.dtype != weight.dtype:
        return None
    return LinearLayer(GradientEdge(node, 0), inputs.detach())


def _embedding(node: Node, table: Tensor) -> EmbeddingLayer | None:
    indices: Tensor | None = getattr(node, "_saved_indices", None)
    special = getattr(node, "_saved_scale_grad_by_freq", True) or getattr(
        node, "_saved_sparse", True
    )
    if indices is None or special:
        return None
    padding = int(getattr(node, "_saved_padding_idx", -1))
    # Autograd keeps "no padding" as an unsigned -1.
    padding = padding if 0 <= padding < len(table) else -1
    return EmbeddingLayer(GradientEdge(node, 0), indices, table.detach(), padding)


def _only_consumer(graph: SharedGraph, node: Node) -> tuple[Node, int] | None:
    consumers = graph.consumers.get(node, [])
    return consumers[0] if len(consumers) == 1 else None


def _worthwhile(inputs: Tensor, weight: Tensor, tasks: int) -> bool:
    """Whether the factors cost fewer multiplications than the gradients they stand for."""
    rows, (outs, ins) = len(inputs), weight.shape
    factored = _PRICE * rows * rows * (ins + tasks * outs) + rows * ins * outs
    formed = tasks * rows * ins * outs + tasks * tasks * ins * outs
    return factored < formed


def _filled(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    known = next(gradient for gradient in outputs if gradient is not None)
    return [torch.zeros_like(known) if gradient is None else gradient for gradient in outputs]


def _joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]


def _weighted(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    rows = kernels.dense([[gradient] for gradient in outputs])
    return kernels.combine(rows, [0], weights, [None])[0]
