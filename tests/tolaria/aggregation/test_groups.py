import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from esper.tolaria.aggregation import PCGrad, backward, by_layer, by_name
from esper.tolaria.aggregation.groups import Groups, columns_of


def network() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module(
        "trunk", nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    )
    model.add_module("trunk2", nn.Linear(4, 5))
    model.add_module("head", nn.Linear(5, 2, bias=False))
    return model


def named(model: nn.Module, groups: Groups) -> dict[str, list[str]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group: [name_of[id(member)] for member in groups[group]] for group in groups}


def test_by_layer_names_each_module_that_holds_parameters() -> None:
    model = network()
    assert named(model, by_layer(model)) == {
        "trunk.0": ["trunk.0.weight", "trunk.0.bias"],
        "trunk.1.0": ["trunk.1.0.weight", "trunk.1.0.bias"],
        "trunk2": ["trunk2.weight", "trunk2.bias"],
        "head": ["head.weight"],
    }


def test_by_layer_keeps_a_tied_parameter_with_the_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].weight = model[2].weight = model[0].weight
    assert named(model, by_layer(model)) == {"0": ["0.weight", "0.bias"], "1": ["1.bias"]}


def test_by_layer_leaves_out_frozen_parameters() -> None:
    model = network()
    model.trunk2.requires_grad_(False)
    model.trunk[0].bias.requires_grad_(False)
    assert named(model, by_layer(model)) == {
        "trunk.0": ["trunk.0.weight"],
        "trunk.1.0": ["trunk.1.0.weight", "trunk.1.0.bias"],
        "head": ["head.weight"],
    }


def test_by_layer_names_the_parameters_of_the_model_itself_with_nothing() -> None:
    model = nn.Linear(1, 1)
    model.add_module("inner", nn.Linear(1, 1, bias=False))
    assert named(model, by_layer(model)) == {"": ["weight", "bias"], "inner": ["inner.weight"]}


def test_by_name_takes_the_longest_name() -> None:
    model = network()
    groups = by_name(model, ["trunk.1", "trunk", "trunk.1.0", ""])
    assert named(model, groups) == {
        "trunk.1": [],
        "trunk": ["trunk.0.weight", "trunk.0.bias"],
        "trunk.1.0": ["trunk.1.0.weight", "trunk.1.0.bias"],
        "": ["trunk2.weight", "trunk2.bias", "head.weight"],
    }


def test_by_name_takes_no_module_whose_name_only_begins_alike() -> None:
    model = network()
    groups = named(model, by_name(model, ["trunk", ""]))
    assert groups[""] == ["trunk2.weight", "trunk2.bias", "head.weight"]


def test_by_name_keeps_a_tied_parameter_with_the_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert named(model, by_name(model, ["1", "0"])) == {
        "1": ["1.bias"],
        "0": ["0.weight", "0.bias"],
    }


def test_by_name_leaves_out_frozen_parameters_wherever_they_are() -> None:
    model = network()
    model.trunk2.requires_grad_(False)
    model.head.requires_grad_(False)
    model.trunk[0].bias.requires_grad_(False)
    assert named(model, by_name(model, ["trunk"])) == {
        "trunk": ["trunk.0.weight", "trunk.1.0.weight", "trunk.1.0.bias"]
    }


MODULES = [name for name, _ in network().named_modules() if name]


@given(
    names=st.lists(st.sampled_from(MODULES), unique=True),
    frozen=st.sets(st.integers(0, 6)),
)
def test_by_name_puts_each_trainable_parameter_into_one_group(
    names: list[str], frozen: set[int]
) -> None:
    model = network()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index not in frozen)
    groups = named(model, by_name(model, [*names, ""]))
    assert list(groups) == [*names, ""]
    members = sorted(member for group in groups.values() for member in group)
    assert members == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for group, inside in groups.items():
        for member in inside:
            above = [name for name in names if member.startswith(f"{name}.")]
            assert group == max(above, key=len, default="")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"no submodule 'tail'; it has \['head', 'trunk', "):
        by_name(network(), ["trunk", "tail"])


def test_a_parameter_is_no_submodule() -> None:
    with pytest.raises(RuntimeError, match=r"no submodule 'head\.weight'"):
        by_name(network(), ["head.weight", ""])


def test_a_parameter_under_no_name_is_refused() -> None:
    message = r"'trunk2\.weight' is in none of the groups \['trunk', 'head'\]; .* add '' for"
    with pytest.raises(RuntimeError, match=message):
        by_name(network(), ["trunk", "head"])


def leaf(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def test_columns_without_groups_are_all_that_is_shared() -> None:
    assert columns_of(None, [leaf(1)] * 4, [0, 2]) == {"": [0, 2]}


def test_columns_of_each_group_are_those_that_are_shared() -> None:
    model = network()
    parameters = list(model.parameters())
    groups = by_name(model, ["head", "trunk", "trunk2"])
    # The head's own parameters, and all of trunk2, are left out: they are not shared.
    assert columns_of(groups, parameters, [0, 1, 3]) == {"trunk": [0, 1, 3]}
    assert columns_of(groups, parameters, [6, 3, 4]) == {"head": [6], "trunk": [3], "trunk2": [4]}


def test_groups_need_not_hold_what_is_not_shared() -> None:
    first, second = leaf(1), leaf(2)
    assert columns_of({"a": [second]}, [first, second], [1]) == {"a": [1]}


def test_a_parameter_may_be_in_its_group_twice() -> None:
    parameter = leaf(1)
    assert columns_of({"a": [parameter, parameter]}, [parameter], [0]) == {"a": [0]}


def test_equal_parameters_are_told_apart() -> None:
    first, second = leaf(1), leaf(1)
    assert columns_of({"a": [second], "b": [first]}, [first, second], [0, 1]) == {
        "b": [0],
        "a": [1],
    }


def test_a_shared_parameter_in_no_group_is_refused() -> None:
    parameters = [leaf(1), leaf(2, 3)]
    with pytest.raises(RuntimeError, match=r"parameter 1 of shape \(2, 3\) is in no group; add it"):
        columns_of({"a": parameters[:1]}, parameters, [0, 1])


def test_a_parameter_in_two_groups_is_refused() -> None:
    parameters = [leaf(1), leaf(2)]
    with pytest.raises(RuntimeError, match="parameter 1 is in groups 'a' and 'b'; put it into one"):
        columns_of({"a": parameters, "b": parameters[1:]}, parameters, [0])


def test_a_tensor_that_is_no_parameter_is_refused() -> None:
    parameters = [leaf(1)]
    with pytest.raises(RuntimeError, match=r"group 'b' holds a tensor of shape \(2, 3\) that is"):
        columns_of({"a": parameters, "b": [leaf(2, 3)]}, parameters, [0])


def test_frozen_members_of_a_group_are_left_alone() -> None:
    first, second, frozen = leaf(1), leaf(2), leaf(3).requires_grad_(False)
    groups = {"a": [first, frozen], "b": [frozen, second], "c": [frozen]}
    assert columns_of(groups, [first, second], [0, 1]) == {"a": [0], "b": [1]}


def test_each_group_of_a_model_is_weighed_apart() -> None:
    torch.manual_seed(0)
    model = network()
    hidden = model.trunk2(model.trunk(torch.randn(6, 3)))
    losses = {"a": model.head(hidden).square().sum(), "b": -hidden.exp().sum()}
    parameters = list(model.parameters())
    rows = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in losses.values()
    ]
    report = backward(losses, parameters, PCGrad(), groups=by_layer(model))
    # One task alone reaches the head.
    assert list(report.groups) == ["trunk.0", "trunk.1.0", "trunk2"]
    for start, part in zip([0, 2, 4], report.groups.values(), strict=True):
        matrix = torch.stack(
            [torch.cat([g.flatten() for g in row[start : start + 2]]).double() for row in rows]
        )
        torch.testing.assert_close(part.gramian, matrix @ matrix.T)
        assert torch.equal(part.weights, PCGrad().weights(part.gramian))
        combined = torch.cat([parameters[start + i].grad.flatten() for i in range(2)])
        torch.testing.assert_close(combined.double(), part.weights @ matrix)
