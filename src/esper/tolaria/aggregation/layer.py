"""Finds the layers whose weight gradients are better left in factors, in autograd's own graph.

With few rows and wide layers, factors save most of the cost of a backward pass; ``factors.py`` has
the mathematics. Layers are taken where that takes fewer multiplications: linear ones, convolutions
over small images, embeddings. The gradients of a normalisation layer are vectors that come with
the pass through it; there is nothing to save.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional

from esper.tolaria.aggregation.factors import EmbeddingFactors, Factors, LinearFactors
from esper.tolaria.aggregation.graph import SharedGraph

# float64 products, in which the Gramian is formed, cost about twice those of the gradient's dtype.
_PRICE = 2


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
    shape: torch.Size

    def factors(self, outputs: Sequence[Tensor | None]) -> LinearFactors:
        """Return the weight's gradients."""
        return LinearFactors(self.inputs, _filled(outputs), self.shape)


@dataclass
class ConvolutionLayer:
    """A convolution of images, without groups.

    :ivar arguments: kernel size, dilation, padding and stride.
    """

    output: GradientEdge
    images: Tensor
    shape: torch.Size
    arguments: tuple[Any, ...]

    def factors(self, outputs: Sequence[Tensor | None]) -> LinearFactors:
        """Return the weight's gradients; a row is a place in an image."""
        patches = functional.unfold(self.images, *self.arguments).transpose(1, 2).flatten(0, 1)
        rows = [gradient.movedim(1, -1).flatten(0, -2) for gradient in _filled(outputs)]
        return LinearFactors(patches, rows, self.shape)


@dataclass
class EmbeddingLayer:
    """Rows looked up in a table; indices of any shape."""

    output: GradientEdge
    indices: Tensor
    table: Tensor
    padding: int

    def factors(self, outputs: Sequence[Tensor | None]) -> EmbeddingFactors:
        """Return the table's gradients."""
        flat = [gradient.reshape(-1, self.table.shape[1]) for gradient in _filled(outputs)]
        return EmbeddingFactors(self.table, self.padding, self.indices.flatten(), flat)


def wide_layers(graph: SharedGraph, parameters: Sequence[Tensor]) -> dict[int, Layer]:
    """Return the layers whose weight gradients are better left unformed, by parameter.

    Taken are weights that are used once, in an operation that autograd recorded as such; anything
    else is left to autograd, and so is what runs in another dtype than the weight's.
    """
    layers: dict[int, Layer] = {}
    for index in graph.shared:
        layer = _layer(graph, graph.leaves[index], parameters[index])
        if layer is not None:
            layers[index] = layer
    return layers


def _layer(graph: SharedGraph, leaf: Node, weight: Tensor) -> Layer | None:
    consumer = _only_consumer(graph, leaf)
    if consumer is None or getattr(weight, "_backward_hooks", None):
        return None
    node, position = consumer
    if node.name() == "TBackward0":
        return _linear(graph, node, weight)
    if node.name() == "ConvolutionBackward0" and position == 1:
        return _convolution(graph, node, weight)
    if node.name() == "EmbeddingBackward0":
        return _embedding(node, weight)
    return None


def _linear(graph: SharedGraph, transpose: Node, weight: Tensor) -> LinearLayer | None:
    """Follow the transposed weight into its product, as long as there is one way only."""
    product = _only_consumer(graph, transpose)
    if product is None:
        return None
    node, position = product
    inputs: Tensor | None = None
    if node.name() == "AddmmBackward0" and position == 2 and _saved(node, "alpha") == 1:
        inputs = _saved(node, "mat1")
    elif node.name() == "MmBackward0" and position == 1:
        inputs = _saved(node, "self")
    if inputs is None or inputs.dtype != weight.dtype:
        return None
    if not _worthwhile(len(inputs), weight, len(graph.own)):
        return None
    return LinearLayer(GradientEdge(node, 0), inputs.detach(), weight.shape)


def _convolution(graph: SharedGraph, node: Node, weight: Tensor) -> ConvolutionLayer | None:
    images: Tensor | None = _saved(node, "input")
    plain = _saved(node, "groups") == 1 and _saved(node, "transposed") is False
    if images is None or not plain or images.dim() != 4 or images.dtype != weight.dtype:
        return None
    kernel = tuple(weight.shape[2:])
    dilation, padding, stride = (
        _each_way(_saved(node, key), len(kernel)) for key in ("dilation", "padding", "stride")
    )
    places = 1
    for size, k, d, p, s in zip(images.shape[2:], kernel, dilation, padding, stride, strict=True):
        places *= (size + 2 * p - d * (k - 1) - 1) // s + 1
    if not _worthwhile(len(images) * places, weight, len(graph.own)):
        return None
    arguments = (kernel, dilation, padding, stride)
    return ConvolutionLayer(GradientEdge(node, 0), images.detach(), weight.shape, arguments)


def _embedding(node: Node, table: Tensor) -> EmbeddingLayer | None:
    indices: Tensor | None = _saved(node, "indices")
    special = _saved(node, "scale_grad_by_freq") or _saved(node, "sparse")
    if indices is None or special or indices.numel() >= len(table):
        return None
    padding = int(_saved(node, "padding_idx"))
    # Autograd keeps "no padding" as an unsigned -1.
    padding = padding if 0 <= padding < len(table) else -1
    return EmbeddingLayer(GradientEdge(node, 0), indices, table.detach(), padding)


def _each_way(values: Sequence[int], ways: int) -> tuple[int, ...]:
    """Return one value for each way; autograd may have recorded one for all."""
    return tuple(values) if len(values) == ways else tuple(values) * ways


def _saved(node: Node, name: str) -> Any:  # noqa: ANN401 - whatever autograd recorded
    return getattr(node, f"_saved_{name}", None)


def _only_consumer(graph: SharedGraph, node: Node) -> tuple[Node, int] | None:
    if any(edge.node is node for edge in graph.frontier):
        # A head uses it too, which the consumers within the trunk do not show.
        return None
    consumers = graph.consumers.get(node, [])
    return consumers[0] if len(consumers) == 1 else None


def _worthwhile(rows: int, weight: Tensor, tasks: int) -> bool:
    """Whether the factors cost fewer multiplications than the gradients they stand for."""
    if rows == 0 or weight.numel() == 0:
        return False
    outs, ins = len(weight), weight[0].numel()
    factored = _PRICE * rows * rows * (ins + tasks * outs) + rows * ins * outs
    formed = tasks * rows * ins * outs + tasks * tasks * ins * outs
    return factored < formed


def _filled(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    known = next(gradient for gradient in outputs if gradient is not None)
    return [torch.zeros_like(known) if gradient is None else gradient for gradient in outputs]
