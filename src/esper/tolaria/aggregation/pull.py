"""Ways to get a gradient for each task out of one forward pass.

The dear part is the trunk, which every way but one has to go through once for each task; they
differ in what they leave out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast, get_args

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from esper.core.config import AggregationMode
from esper.tolaria.aggregation.gradients import Part, TaskGradients, formed
from esper.tolaria.aggregation.graph import SharedGraph, shared_graph
from esper.tolaria.aggregation.hooks import entering, held_back, run_on
from esper.tolaria.aggregation.layer import Layer, wide_layers

Mode = AggregationMode
MODES: tuple[Mode, ...] = get_args(Mode)
_Grads = Sequence[Tensor | None]
_DONATED = "donated buffers"


@dataclass(frozen=True)
class Features:
    """Gradients at the shared representation, with what is needed to go on from there.

    :ivar heads: gradients of the parameters that one task alone reaches; None for all others.
    :ivar representation: gradients where the tasks' graphs meet, a column for each edge of the
        frontier that some task reaches.
    """

    graph: SharedGraph
    parameters: Sequence[Tensor]
    heads: TaskGradients
    representation: Part

    def through_trunk(self, weights: Tensor) -> None:
        """Accumulate the weighted gradient of the shared parameters, by one pass of the trunk."""
        shared = [self.parameters[index] for index in self.graph.shared]
        edges = [self.graph.frontier[column] for column in self.representation.columns]
        if shared and edges:
            sums = self.representation.combine(weights)
            torch.autograd.backward(edges, sums, inputs=shared)


@dataclass(frozen=True)
class _Targets:
    """What is asked of the trunk.

    :ivar layers: those whose weights stay in factors, so that gradients at their outputs do.
    :ivar others: the parameters whose gradients are formed.
    """

    parameters: Sequence[Tensor]
    layers: Mapping[int, Layer]
    others: Sequence[int]

    def inputs(self) -> list[Tensor | GradientEdge]:
        """Return what to hand to autograd."""
        return [
            *(layer.output for layer in self.layers.values()),
            *(self.parameters[index] for index in self.others),
        ]

    def gather(
        self, losses: Mapping[str, Tensor], rows: Sequence[_Grads], heads: Sequence[_Grads]
    ) -> TaskGradients:
        """Return the tasks' gradients.

        :param rows: for each task, gradients of :meth:`inputs`.
        :param heads: for each task, gradients of parameters that were not asked for here.
        """
        first = len(self.layers)
        gradients = formed(
            losses,
            [
                _spread(row[first:], self.others, head)
                for row, head in zip(rows, heads, strict=True)
            ],
        )
        for position, (index, layer) in enumerate(self.layers.items()):
            outputs = [row[position] for row in rows]
            if any(output is not None for output in outputs):
                gradients.factored[index] = layer.factors(outputs)
        return gradients


def one_by_one(
    losses: Mapping[str, Tensor], parameters: Sequence[Tensor], *, factored: bool
) -> TaskGradients:
    """Pull each task's gradient through its whole graph, one after the other."""
    layers: dict[int, Layer] = {}
    if factored:
        layers = wide_layers(shared_graph(list(losses.values()), parameters), parameters)
    others = [index for index in range(len(parameters)) if index not in layers]
    targets = _Targets(parameters, layers, others)
    inputs = targets.inputs()
    last = len(losses) - 1
    rows: list[_Grads] = []
    with run_on([layer.output.node for layer in layers.values()]) as seen:
        for task, loss in enumerate(losses.values()):
            seen.clear()
            row = _pull([loss], inputs, keep=task < last)
            rows.append([seen.get(place, gradient) for place, gradient in enumerate(row)])
    return targets.gather(losses, rows, [[None] * len(parameters)] * len(rows))


def together(
    losses: Mapping[str, Tensor], parameters: Sequence[Tensor], *, factored: bool
) -> TaskGradients:
    """Pull through each head once, then through the trunk with all tasks in one vectorised pass."""
    graph = shared_graph(list(losses.values()), parameters)
    heads, arriving = _through_heads(losses, parameters, graph)
    reached = _reached(arriving)
    layers = wide_layers(graph, parameters) if factored else {}
    targets = _Targets(parameters, layers, [i for i in graph.shared if i not in layers])
    pulled = _vectorised(
        [graph.frontier[edge] for edge in reached],
        targets.inputs(),
        [_fill([row[edge] for row in arriving]) for edge in reached],
    )
    return targets.gather(losses, _unstack(pulled, len(losses)), heads)


EXACT: dict[str, Callable[[Mapping[str, Tensor], Sequence[Tensor]], TaskGradients]] = {
    "sequential": partial(one_by_one, factored=False),
    "factored": partial(one_by_one, factored=True),
    "batched": partial(together, factored=False),
    "batched-factored": partial(together, factored=True),
}


def at_features(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Features:
    """Pull each task's gradient through its head, as far as the shared representation."""
    graph = shared_graph(list(losses.values()), parameters)
    heads, arriving = _through_heads(losses, parameters, graph)
    representation = formed(losses, arriving).select(_reached(arriving))
    return Features(graph, parameters, formed(losses, heads), representation)


def _through_heads(
    losses: Mapping[str, Tensor], parameters: Sequence[Tensor], graph: SharedGraph
) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
    """Return for each task the gradients of its own parameters, and those at the frontier.

    At the frontier that is what the head's own nodes pass on: before hooks of the tensor there,
    which run when the trunk is pulled, and without what flows in from another part of the trunk.
    """
    edges = len(graph.frontier)
    heads: list[list[Tensor | None]] = []
    arriving: list[list[Tensor | None]] = []
    with held_back(graph.frontier), entering(graph.entries) as entered:
        for loss, own in zip(losses.values(), graph.own, strict=True):
            entered.clear()
            own_parameters = [parameters[index] for index in own]
            row = _pull_head(loss, [*graph.frontier, *own_parameters])
            heads.append(_spread(row[edges:], own, [None] * len(parameters)))
            arriving.append([entered.get(edge) for edge in range(edges)])
    for loss, row in zip(losses.values(), arriving, strict=True):
        root = get_gradient_edge(loss)
        for place, edge in enumerate(graph.frontier):
            if (edge.node, edge.output_nr) == (root.node, root.output_nr):
                row[place] = torch.ones_like(loss)
    return heads, arriving


def _pull_head(loss: Tensor, targets: Sequence[Tensor | GradientEdge]) -> list[Tensor | None]:
    try:
        return _pull([loss], targets, keep=True)
    except (AttributeError, TypeError) as error:
        # Parts of the trunk that lie above an entry into it are given no gradient here.
        raise RuntimeError(
            f"a hook or a function of the model did not take a missing gradient ({error}); use "
            "mode='sequential' or mode='factored', which give it one"
        ) from error


def _reached(rows: Sequence[_Grads]) -> list[int]:
    """Return the columns in which some row has a gradient."""
    columns = enumerate(zip(*rows, strict=True))
    return [column for column, gradients in columns if any(g is not None for g in gradients)]


def _pull(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    *,
    keep: bool,
) -> list[Tensor | None]:
    if not inputs:
        return []
    try:
        row = torch.autograd.grad(
            outputs,  # type: ignore[arg-type]
            inputs,  # type: ignore[arg-type]
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
    outputs: Sequence[GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    gradients: Sequence[Tensor],
) -> list[Tensor | None]:
    """Pull n gradients at once; each comes back with a leading dimension n."""
    if not inputs or not outputs:
        return [None] * len(inputs)
    try:
        row = torch.autograd.grad(
            outputs,
            inputs,  # type: ignore[arg-type]
            grad_outputs=gradients,
            is_grads_batched=True,
            allow_unused=True,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"the vectorised pass failed ({error}); use mode='sequential' or mode='factored', "
            "which go through the trunk task by task"
        ) from error
    return list(cast("_Grads", row))


def _unstack(gradients: _Grads, tasks: int) -> list[_Grads]:
    """Return a row for each task of gradients with a leading dimension."""
    return [[None if g is None else g[task] for g in gradients] for task in range(tasks)]


def _fill(gradients: _Grads) -> Tensor:
    """Stack, with zeros for tasks that do not reach this place."""
    known = next(gradient for gradient in gradients if gradient is not None)
    return torch.stack([torch.zeros_like(known) if g is None else g for g in gradients])


def _spread(row: _Grads, indices: Sequence[int], onto: _Grads) -> list[Tensor | None]:
    """Return a copy of ``onto`` with the gradients of a row at some indices."""
    result = list(onto)
    for index, gradient in zip(indices, row, strict=True):
        result[index] = gradient
    return result
