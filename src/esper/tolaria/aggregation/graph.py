"""Where the graphs of several losses meet, read from autograd's own graph.

Nothing has to be declared: a node that two losses reach is shared, and so is all below it. The
edges that lead from one loss's own nodes into the shared part are the frontier: the shared
representation. Above it each task has its head; below it lies the trunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

SHARED = -1
Consumers = dict[Node, list[tuple[Node, int]]]


@dataclass(frozen=True)
class SharedGraph:
    """The parts of the graphs of several losses.

    :ivar frontier: edges through which gradients enter the shared part.
    :ivar entries: the tasks' own nodes that lead into it, with the position among their inputs and
        the place of the edge in ``frontier``; a loss that is itself shared has no such node.
    :ivar own: for each task, indices of the parameters that it alone reaches.
    :ivar shared: indices of the parameters that several tasks reach.
    :ivar consumers: for each shared node, the shared nodes that it feeds, with the position among
        their inputs.
    :ivar leaves: the node of each parameter that is reached, by index.
    """

    frontier: tuple[GradientEdge, ...]
    entries: tuple[tuple[Node, int, int], ...]
    own: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...]
    consumers: Consumers
    leaves: dict[int, Node]


class _Walk:
    """Finds out who owns each node of the losses' graphs."""

    def __init__(self) -> None:
        self.owner: dict[Node, int] = {}
        self._meeting: list[Node] = []

    def visit(self, root: Node, task: int) -> None:
        """Claim what only this task has reached so far; note where it meets another."""
        stack = [root]
        expanded: set[Node] = set()
        while stack:
            node = stack.pop()
            owner = self.owner.setdefault(node, task)
            if owner == task and node not in expanded:
                expanded.add(node)
                stack.extend(child for child, _ in node.next_functions if child is not None)
            elif owner not in (task, SHARED):
                self.owner[node] = SHARED
                self.share(node)

    def share(self, node: Node) -> None:
        """Declare a node, and with it all below, as shared."""
        self._meeting.append(node)

    def spread(self) -> Consumers:
        """Mark all below a meeting point as shared, and note which node feeds which."""
        consumers: Consumers = {}
        stack = self._meeting
        expanded: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in expanded:
                continue
            expanded.add(node)
            self.owner[node] = SHARED
            for position, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    consumers.setdefault(child, []).append((node, position))
                    stack.append(child)
        return consumers


def shared_graph(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> SharedGraph:
    """Find what the losses share.

    :param losses: tensors that carry a gradient.
    :param parameters: leaf tensors that require gradients.
    """
    roots = [get_gradient_edge(loss) for loss in losses]
    walk = _Walk()
    for task, root in enumerate(roots):
        walk.visit(root.node, task)
    if len(roots) == 1:
        # One task has no head apart from others: all of its graph is what the tasks share.
        walk.share(roots[0].node)
    consumers = walk.spread()
    leaves = _leaves(parameters, walk.owner)
    frontier, entries = _frontier(walk.owner, roots)
    return SharedGraph(
        frontier,
        entries,
        tuple(
            tuple(index for index, leaf in leaves.items() if walk.owner[leaf] == task)
            for task in range(len(losses))
        ),
        tuple(index for index, leaf in leaves.items() if walk.owner[leaf] == SHARED),
        consumers,
        leaves,
    )


def _leaves(parameters: Sequence[Tensor], reached: dict[Node, int]) -> dict[int, Node]:
    nodes = ((index, get_gradient_edge(p).node) for index, p in enumerate(parameters))
    return {index: node for index, node in nodes if node in reached}


def _frontier(
    owner: dict[Node, int], roots: Sequence[GradientEdge]
) -> tuple[tuple[GradientEdge, ...], tuple[tuple[Node, int, int], ...]]:
    places: dict[tuple[Node, int], int] = {}
    for root in roots:
        if owner[root.node] == SHARED:
            places.setdefault((root.node, root.output_nr), len(places))
    entries: list[tuple[Node, int, int]] = []
    for node, position, edge in _leading_in(owner):
        entries.append((node, position, places.setdefault(edge, len(places))))
    return tuple(GradientEdge(*edge) for edge in places), tuple(entries)


def _leading_in(owner: dict[Node, int]) -> Iterator[tuple[Node, int, tuple[Node, int]]]:
    """Yield each step from a task's own node to a shared one, with its place among the inputs."""
    for node, task in owner.items():
        if task == SHARED:
            continue
        for position, (child, number) in enumerate(node.next_functions):
            if child is not None and owner[child] == SHARED:
                yield node, position, (child, number)
