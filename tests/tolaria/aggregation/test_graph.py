import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from esper.tolaria.aggregation import MODES, Mode, Refreshed, Sum, backward
from esper.tolaria.aggregation.graph import SharedGraph, shared_graph

BATCH = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)


def names(model: nn.Module, indices: Iterable[int]) -> set[str]:
    """Return the top-level modules that some parameters lie in; they have to lie there whole."""
    qualified = [name for name, _ in model.named_parameters()]
    found = {qualified[index] for index in indices}
    modules = {name.split(".")[0] for name in found}
    assert found == {name for name in qualified if name.split(".")[0] in modules}
    return modules


def graph_of(model: nn.Module, losses: Iterable[Tensor]) -> SharedGraph:
    return shared_graph(list(losses), list(model.parameters()))


def edges(graph: SharedGraph) -> list[GradientEdge]:
    return [GradientEdge(edge.node, edge.output_nr) for edge in graph.frontier]


def test_heads_are_owned_and_the_trunk_is_shared() -> None:
    model = Parts()
    hidden = model.trunk(BATCH)
    graph = graph_of(model, [model.first(hidden).sum(), model.second(hidden).square().sum()])
    assert [names(model, own) for own in graph.own] == [{"first"}, {"second"}]
    assert names(model, graph.shared) == {"trunk"}
    assert edges(graph) == [get_gradient_edge(hidden)]


def test_an_edge_that_many_enter_through_is_named_once() -> None:
    model = Parts()
    hidden = model.trunk(BATCH)
    losses = [hidden.sum() + hidden.square().sum() * number for number in range(1, 5)]
    assert edges(graph_of(model, losses)) == [get_gradient_edge(hidden)]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_head_that_another_task_feeds_on_is_shared(swapped: bool) -> None:
    model = Parts()
    output = model.first(model.trunk(BATCH))
    losses = [output.square().sum(), model.second(output).sum()]
    graph = graph_of(model, reversed(losses) if swapped else losses)
    owned = [names(model, own) for own in graph.own]
    assert owned == ([{"second"}, set()] if swapped else [set(), {"second"}])
    assert names(model, graph.shared) == {"trunk", "first"}
    assert edges(graph) == [get_gradient_edge(output)]


def test_of_three_tasks_any_two_make_a_part_shared() -> None:
    model = Parts()
    hidden = model.trunk(BATCH)
    output = model.first(hidden)
    losses = [model.third(hidden).sum(), output.sum(), model.second(output).sum()]
    graph = graph_of(model, losses)
    assert [names(model, own) for own in graph.own] == [{"third"}, set(), {"second"}]
    assert names(model, graph.shared) == {"trunk", "first"}
    assert set(edges(graph)) == {get_gradient_edge(hidden), get_gradient_edge(output)}


def test_a_parameter_that_no_task_reaches_is_nowhere() -> None:
    model = Parts()
    hidden = model.trunk(BATCH)
    graph = graph_of(model, [model.first(hidden).sum(), model.second(hidden).sum()])
    assert names(model, graph.leaves) == {"trunk", "first", "second"}
    assert "third" not in names(model, [*graph.shared, *graph.own[0], *graph.own[1]])


def test_what_is_detached_is_not_shared() -> None:
    model = Parts()
    hidden = model.trunk(BATCH)
    graph = graph_of(model, [model.first(hidden).sum(), model.second(hidden.detach()).sum()])
    assert [names(model, own) for own in graph.own] == [{"trunk", "first"}, {"second"}]
    assert graph.shared == graph.frontier == ()


def test_the_whole_graph_of_one_task_alone_counts_as_shared() -> None:
    model = Parts()
    loss = model.first(model.trunk(BATCH)).sum()
    graph = graph_of(model, [loss])
    assert graph.own == ((),)
    assert names(model, graph.shared) == {"trunk", "first"}
    assert [edge.node for edge in graph.frontier] == [loss.grad_fn]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_loss_that_another_is_made_of_is_itself_on_the_frontier(swapped: bool) -> None:
    model = Parts()
    inner = model.first(model.trunk(BATCH)).square().sum()
    losses = [inner, inner * 2 + model.second(BATCH).sum()]
    graph = graph_of(model, reversed(losses) if swapped else losses)
    assert names(model, graph.shared) == {"trunk", "first"}
    assert names(model, graph.own[0 if swapped else 1]) == {"second"}
    assert graph.own[1 if swapped else 0] == ()
    assert edges(graph) == [get_gradient_edge(inner)]


def test_one_loss_under_two_names_is_shared_from_its_root() -> None:
    model = Parts()
    loss = model.first(model.trunk(BATCH)).sum()
    graph = graph_of(model, [loss, loss])
    assert names(model, graph.shared) == {"trunk", "first"}
    assert edges(graph) == [get_gradient_edge(loss)]


def test_a_parameter_may_be_a_loss() -> None:
    parameter = nn.Parameter(torch.ones(()))
    graph = shared_graph([parameter, parameter * 2], [parameter])
    assert graph.shared == (0,)
    assert edges(graph) == [get_gradient_edge(parameter)]


def test_a_weight_tied_between_two_heads_is_shared_and_on_the_frontier() -> None:
    model = Parts()
    model.second.weight = model.first.weight
    hidden = model.trunk(BATCH)
    graph = graph_of(model, [model.first(hidden).sum(), model.second(hidden).sum()])
    qualified = [name for name, _ in model.named_parameters()]
    assert [[qualified[index] for index in own] for own in graph.own] == [
        ["first.bias"],
        ["second.bias"],
    ]
    assert qualified.index("first.weight") in graph.shared
    assert set(edges(graph)) == {get_gradient_edge(hidden), get_gradient_edge(model.first.weight)}


def test_a_weight_tied_within_one_head_stays_its_own() -> None:
    model = Parts()
    model.second.weight = model.first.weight
    hidden = model.trunk(BATCH)
    graph = graph_of(model, [model.second(model.first(hidden)).sum(), model.third(hidden).sum()])
    assert [names(model, own) for own in graph.own] == [{"first", "second"}, {"third"}]
    assert edges(graph) == [get_gradient_edge(hidden)]


def test_a_trunk_that_hands_over_two_tensors_has_two_edges() -> None:
    model = Parts()
    below = model.trunk[0](BATCH)
    left, right = below.tanh(), below.exp()
    losses = [model.first.bias.sum() + left.sum() + right.sum(), left.sum() * right.sum()]
    graph = graph_of(model, losses)
    assert set(edges(graph)) == {get_gradient_edge(left), get_gradient_edge(right)}
    assert [index for own in graph.own for index in own] == [5]


@pytest.mark.parametrize(
    "cut",
    [
        lambda value: value.chunk(2, dim=1),
        lambda value: value.split([1, 3], dim=1),
        lambda value: value.unbind(1)[:2],
    ],
    ids=["chunk", "split", "unbind"],
)
def test_each_output_of_a_node_is_an_edge(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    model = Parts()
    left, right = cut(model.trunk(BATCH))
    graph = graph_of(model, [left.square().sum(), right.exp().sum()])
    assert names(model, graph.shared) == {"trunk"}
    assert {edge.node for edge in graph.frontier} == {left.grad_fn}
    assert sorted(edge.output_nr for edge in graph.frontier) == [0, 1]
    assert set(edges(graph)) == {get_gradient_edge(left), get_gradient_edge(right)}


def test_an_output_of_a_node_that_no_task_uses_is_no_edge() -> None:
    model = Parts()
    _, middle, _, last = model.trunk(BATCH).unbind(1)
    graph = graph_of(model, [middle.sum(), last.sum()])
    assert sorted(edge.output_nr for edge in graph.frontier) == [1, 3]


def test_consumers_say_where_a_shared_node_goes() -> None:
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    product = other * weight
    hidden = product + weight
    graph = shared_graph([hidden.sum(), hidden.exp().sum()], [weight, other])
    assert product.grad_fn is not None
    assert hidden.grad_fn is not None
    assert set(graph.consumers[graph.leaves[0]]) == {(product.grad_fn, 1), (hidden.grad_fn, 1)}
    assert graph.consumers[graph.leaves[1]] == [(product.grad_fn, 0)]
    assert graph.consumers[product.grad_fn] == [(hidden.grad_fn, 0)]


def test_a_deep_graph_is_walked_without_recursion() -> None:
    weight = nn.Parameter(torch.ones(()))
    hidden = weight * 2
    for _ in range(3000):
        hidden = hidden + 1
    graph = shared_graph([hidden.sin(), hidden.cos()], [weight])
    assert graph.shared == (0,)
    assert len(graph.consumers) == 3001


Wiring = list[list[int]]
wirings = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), max_size=10)
endings = st.lists(st.integers(0, 20), min_size=1, max_size=4)


def wired(wiring: Wiring, ends: list[int]) -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    """Build a graph from four leaves; each line of the wiring names what a node is made of."""
    leaves = [nn.Parameter(torch.tensor(0.2 * (i + 1), dtype=torch.float64)) for i in range(4)]
    nodes: list[Tensor] = list(leaves)
    for sources in wiring:
        values = [nodes[source % len(nodes)] for source in sources]
        nodes.append(torch.stack(values).sum().mul(0.7).tanh())
    # The last nodes first, so that a small number is an interesting one.
    return leaves, {str(n): nodes[-1 - end % len(nodes)] for n, end in enumerate(ends)}


@given(wiring=wirings, ends=endings)
def test_owned_and_shared_are_what_autograd_reaches(wiring: Wiring, ends: list[int]) -> None:
    leaves, losses = wired(wiring, ends)
    rows = [
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for loss in losses.values()
    ]
    tasks = [[task for task, row in enumerate(rows) if row[leaf] is not None] for leaf in range(4)]
    graph = shared_graph(list(losses.values()), leaves)
    shared = [leaf for leaf in range(4) if len(tasks[leaf]) > 1 or (tasks[leaf] and len(rows) == 1)]
    assert graph.own == tuple(
        tuple(leaf for leaf in range(4) if tasks[leaf] == [task] and leaf not in shared)
        for task in range(len(rows))
    )
    assert graph.shared == tuple(shared)
    assert sorted(graph.leaves) == [leaf for leaf in range(4) if tasks[leaf]]


def added_up(losses: dict[str, Tensor], parameters: list[nn.Parameter]) -> list[Tensor | None]:
    total = functools.reduce(torch.add, losses.values())
    return list(torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("mode", MODES)
@given(wiring=wirings, ends=endings)
def test_every_mode_adds_up_over_every_path_of_any_graph(
    mode: Mode, wiring: Wiring, ends: list[int]
) -> None:
    leaves, losses = wired(wiring, ends)
    expected = added_up(losses, leaves)
    backward(losses, leaves, Sum(), mode=mode)
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected)


def skipping() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    """Both heads take what two layers of the trunk hand over, one above the other."""
    model = Parts()
    low = model.trunk[0](BATCH).tanh()
    high = model.trunk[2](low)
    losses = {
        "a": model.first(high).square().sum() + low.sum(),
        "b": model.second(high).sum() + low.square().sum(),
    }
    return list(model.parameters()), losses


def with_auxiliary_loss() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    model = Parts()
    hidden = model.trunk(BATCH)
    inner = model.first(hidden).square().sum()
    return list(model.parameters()), {"a": inner, "b": inner * 2 + hidden.sum()}


def tied_embedding() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    """The table is looked up in the trunk, and transposed it is every head."""
    model = Parts()
    table = nn.Parameter(torch.randn(7, 4))
    hidden = model.trunk(nn.functional.embedding(torch.tensor([1, 2, 5]), table))
    losses = {"a": (hidden @ table.T).square().sum(), "b": (hidden @ table.T).exp().sum()}
    return [table, *model.parameters()], losses


def tied_linear() -> tuple[list[nn.Parameter], dict[str, Tensor]]:
    """One wide layer serves in the trunk and in one head."""
    layer = nn.Linear(40, 40)
    hidden = layer(torch.randn(2, 40)).tanh()
    return list(layer.parameters()), {"a": layer(hidden).square().sum(), "b": hidden.exp().sum()}


@pytest.mark.parametrize("mode", [*MODES, "refreshed"])
@pytest.mark.parametrize("make", [skipping, with_auxiliary_loss, tied_embedding, tied_linear])
def test_no_path_is_counted_twice_or_left_out(
    make: Callable[[], tuple[list[nn.Parameter], dict[str, Tensor]]], mode: Mode
) -> None:
    torch.manual_seed(0)
    parameters, losses = make()
    expected = added_up(losses, parameters)
    if mode == "refreshed":
        aggregator = Refreshed(Sum(), every=2)
        gramian = torch.eye(len(losses), dtype=torch.float64)
        aggregator.keep(tuple(losses), gramian, gramian.diagonal())
        assert backward(losses, parameters, aggregator).age == 1
    else:
        backward(losses, parameters, Sum(), mode=mode)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
