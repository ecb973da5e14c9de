"""Ways to get a gradient for each task out of one forward pass.

The dear part is the trunk, which every way but one has to go through once for each task; they
differ in what they leave out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from esper.tolaria.aggregation.gradients import Row, TaskGradients, formed
from esper.tolaria.aggregation.graph import SharedGraph, shared_graph
from esper.tolaria.aggregation.layer import wide_layers

Mode = Literal["sequential", "batched", "factored", "features"]
MODES: tuple[Mode, ...] = get_args(Mode)
_Grads = Sequence[Tensor | None]
_DONATED = "donated buffers"


@dataclass(frozen=True)
class Features:
    """Gradients at the shared representation, with what is needed to go on from there.

    :ivar heads: gradients of the parameters that one task alone reaches; zero, and so absent, for
        all others.
    :ivar at_frontier: gradients where the tasks' graphs meet, a column for each edge.
    """

    graph: SharedGraph
    parameters: Sequence[Tensor]
    heads: TaskGradients
    at_frontier: TaskGradients

    def through_trunk(self, weights: Tensor) -> None:
        """Accumulate the weighted gradient of the shared parameters, by one pass of the trunk."""
        shared = [self.parameters[index] for index in self.graph.shared]
        edges = self.graph.frontier
        columns = [column for column in range(len(edges)) if self.at_frontier.reached(column)]
        if not shared or not columns:
            return
        sums = self.at_frontier.combine(columns, weights, [None] * len(columns))
        torch.autograd.backward([edges[column] for column in columns], sums, inputs=shared)


def sequential(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> TaskGradients:
    """Pull each task's gradient through its whole graph, one after the other."""
    last = len(losses) - 1
    rows = [
        _pull([loss], parameters, None, keep=task < last)
        for task, loss in enumerate(losses.values())
    ]
    return formed(losses, rows)


def batched(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> TaskGradients:
    """Pull through each head once, then through the trunk with all tasks in one vectorised pass."""
    features = at_features(losses, parameters)
    graph = features.graph
    stacked = [_stack(features, column) for column in range(len(graph.frontier))]
    targets = [parameters[index] for index in graph.shared]
    together = _vectorised(graph.frontier, targets, stacked)
    for task, row in enumerate(features.heads.rows.values()):
        for index, gradients in zip(graph.shared, together, strict=True):
            row[index] = None if gradients is None else gradients[task]
    return formed(losses, list(features.heads.rows.values()))


def factored(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> TaskGradients:
    """Pull as :func:`sequential` does, but leave out the weight gradients of wide layers.

    See :mod:`esper.tolaria.aggregation.layer`; the result is that of :func:`sequential` but for
    rounding.
    """
    graph = shared_graph(list(losses.values()), parameters)
    layers = wide_layers(graph, parameters)
    if not layers:
        return sequential(losses, parameters)
    rest = [index for index in range(len(parameters)) if index not in layers]
    targets: list[Tensor | GradientEdge] = [
        *(layer.output for layer in layers.values()),
        *(parameters[index] for index in rest),
    ]
    rows: list[Row] = []
    outputs: list[_Grads] = []
    last = len(losses) - 1
    for task, loss in enumerate(losses.values()):
        row = _pull([loss], targets, None, keep=task < last)
        outputs.append(row[: len(layers)])
        rows.append(_spread(row[len(layers) :], rest, len(parameters)))
    gradients = formed(losses, rows)
    for position, (index, layer) in enumerate(layers.items()):
        gradients.factored[index] = layer.factors([row[position] for row in outputs])
    return gradients


EXACT: dict[str, Callable[[Mapping[str, Tensor], Sequence[Tensor]], TaskGradients]] = {
    "sequential": sequential,
    "batched": batched,
    "factored": factored,
}


def at_features(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Features:
    """Pull each task's gradient through its head, as far as the shared representation."""
    graph = shared_graph(list(losses.values()), parameters)
    edges = len(graph.frontier)
    heads: list[Row] = []
    frontier: list[_Grads] = []
    for loss, own in zip(losses.values(), graph.own, strict=True):
        targets: list[Tensor | GradientEdge] = [
            *graph.frontier,
            *(parameters[index] for index in own),
        ]
        row = _pull([loss], targets, None, keep=True)
        frontier.append(row[:edges])
        heads.append(_spread(row[edges:], own, len(parameters)))
    return Features(graph, parameters, formed(losses, heads), formed(losses, frontier))


def _pull(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    gradients: _Grads | None,
    *,
    keep: bool,
) -> list[Tensor | None]:
    try:
        row = torch.autograd.grad(
            outputs,  # type: ignore[arg-type]
            inputs,  # type: ignore[arg-type]
            grad_outputs=gradients,
            retain_graph=keep,
            allow_unused=True,
        )
    except RuntimeError as error:
        if _DONATED not in str(error):
            raise
        raise RuntimeError(
            "the compiled model gives its buffers away in the first backward pass, but several "
            "tasks need several; set torch._functorch.config.donated_buffer = False before "
            "torch.compile"
        ) from error
    return list(cast("_Grads", row))


def _vectorised(
    outputs: Sequence[GradientEdge], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Pull n gradients at once; each comes back with a leading dimension n."""
    if not inputs:
        return []
    row = torch.autograd.grad(
        outputs,
        inputs,
        grad_outputs=gradients,
        is_grads_batched=True,
        allow_unused=True,
    )
    return list(cast("_Grads", row))


def _stack(features: Features, column: int) -> Tensor:
    return _fill([row[column] for row in features.at_frontier.rows.values()])


def _fill(gradients: _Grads) -> Tensor:
    """Stack, with zeros for tasks that do not reach this place."""
    known = next(gradient for gradient in gradients if gradient is not None)
    return torch.stack([torch.zeros_like(known) if g is None else g for g in gradients])


def _spread(row: _Grads, indices: Sequence[int], width: int) -> Row:
    result: Row = [None] * width
    for index, gradient in zip(indices, row, strict=True):
        result[index] = gradient
    return result
