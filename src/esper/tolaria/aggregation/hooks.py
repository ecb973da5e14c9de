"""Hooks on nodes of autograd's graph, for as long as gradients are pulled."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_Grads = Sequence[Tensor | None]


@contextmanager
def entering(entries: Iterable[tuple[Node, int, int]]) -> Iterator[dict[int, Tensor]]:
    """Yield a dict that fills with what some nodes pass on, by edge.

    That is before the hooks of the tensor at the edge; what autograd returns for it is after them.

    :param entries: nodes, a position among the inputs of each, and a number for the edge there.
    """
    entered: dict[int, Tensor] = {}

    def note(position: int, edge: int, inputs: _Grads, _outputs: _Grads) -> None:
        gradient = inputs[position]
        if gradient is not None:
            known = entered.get(edge)
            entered[edge] = gradient if known is None else known + gradient

    with ExitStack() as stack:
        for node, position, edge in entries:
            hook = node.register_hook(partial(note, position, edge))
            stack.callback(hook.remove)
        yield entered


@contextmanager
def run_on(nodes: Sequence[Node]) -> Iterator[dict[int, Tensor]]:
    """Yield a dict that fills with the gradient that each node is run on, by its place.

    That is after the hooks of the node's output; what autograd returns for the output of a node
    that is run is before them.
    """
    seen: dict[int, Tensor] = {}

    def note(place: int, gradients: _Grads) -> None:
        if gradients[0] is not None:
            seen[place] = gradients[0]

    with ExitStack() as stack:
        for place, node in enumerate(nodes):
            hook = node.register_prehook(partial(note, place))
            stack.callback(hook.remove)
        yield seen


@contextmanager
def held_back(edges: Iterable[GradientEdge]) -> Iterator[None]:
    """Let no gradient through the nodes at some edges."""
    with ExitStack() as stack:
        for node in {edge.node for edge in edges}:
            hook = node.register_prehook(lambda gradients: (None,) * len(gradients))
            stack.callback(hook.remove)
        yield
