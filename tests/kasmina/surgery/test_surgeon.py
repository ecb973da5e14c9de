import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from esper.kasmina.surgery import OptimizerSurgeon
from esper.leyline import GrowthError
from kasmina.surgery.builders import all_facts, parameter, step

Operation = Callable[[OptimizerSurgeon], Any]


class Grown:
    """A host in two groups, a seed of two parameters, some steps, a schedule."""

    def __init__(self) -> None:
        self.first, self.second = parameter(2, 3), parameter(4)
        self.seed = [parameter(3, 3), parameter(5)]
        self.optimizer: Optimizer = torch.optim.Adam(
            [{"params": [self.first]}, {"params": [self.second], "name": "head"}], 0.1
        )
        self.scheduler = lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.surgeon = OptimizerSurgeon(self.optimizer, self.scheduler)
        self.surgeon.add_group("seed", self.seed, rate_factor=0.5)
        for number in range(3):
            step(self.optimizer, number)
            self.scheduler.step()
        self.surgeon.commit()


def test_an_added_group_takes_after_the_first_one() -> None:
    first = parameter(2, 3)
    betas = (torch.tensor([0.8]), torch.tensor([0.99]))
    optimizer = torch.optim.Adam(
        [{"params": [first], "weight_decay": 0.3, "own": [1]}, {"params": [parameter(4)], "lr": 9}],
        torch.tensor(0.1),
        betas=betas,
    )
    OptimizerSurgeon(optimizer).add_group("seed", iter([parameter(3)]), rate_factor=0.5)
    host, _, group = optimizer.param_groups
    assert list(group) == [*host, "name", "warmup_steps", "warmup_left"]
    assert group["weight_decay"] == 0.3
    assert group["lr"].item() == pytest.approx(0.05)
    assert group["lr"] is not host["lr"]
    assert group["betas"][0] == betas[0]
    assert group["betas"][0] is not betas[0]
    assert group["own"] == [1]
    assert group["own"] is not host["own"]
    assert (group["name"], group["warmup_steps"], group["warmup_left"]) == ("seed", 0, 0)


def test_a_group_added_behind_one_that_warms_up_does_not_inherit_that() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [parameter(2)], "name": "host", "warmup_steps": 9, "warmup_left": 5}], 0.1
    )
    OptimizerSurgeon(optimizer).add_group("seed", [parameter(3)])
    assert [group["warmup_left"] for group in optimizer.param_groups] == [5, 0]
    assert [group["name"] for group in optimizer.param_groups] == ["host", "seed"]


def test_a_removed_group_takes_its_moments_along() -> None:
    grown = Grown()
    undo = grown.surgeon.remove_group("seed")
    assert [len(group["params"]) for group in grown.optimizer.param_groups] == [1, 1]
    assert list(grown.optimizer.state) == [grown.first, grown.second]
    assert grown.scheduler.get_last_lr() == grown.scheduler.get_last_lr()[:2]
    undo.undo()
    assert list(grown.optimizer.state) == [grown.first, grown.second, *grown.seed]


def test_a_merged_group_joins_the_first_or_a_named_one() -> None:
    grown = Grown()
    moments = grown.optimizer.state[grown.seed[0]]
    undo = grown.surgeon.merge_group("seed")
    held = grown.optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in (grown.first, *grown.seed)]
    assert grown.optimizer.state[grown.seed[0]] is moments
    assert len(grown.optimizer.param_groups) == len(grown.scheduler.base_lrs) == 2
    undo.undo()
    grown.surgeon.merge_group("head", into="seed")
    held = grown.optimizer.param_groups[1]["params"]
    assert [id(p) for p in held] == [id(p) for p in (*grown.seed, grown.second)]


def test_parameters_move_one_by_one() -> None:
    grown = Grown()
    before = all_facts(grown.optimizer, grown.scheduler)
    undo = grown.surgeon.move_parameters([grown.seed[0]], into="head")
    head, seed = (grown.optimizer.param_groups[index]["params"] for index in (1, 2))
    assert [id(p) for p in head] == [id(grown.second), id(grown.seed[0])]
    assert [id(p) for p in seed] == [id(grown.seed[1])]
    undo.undo()
    assert all_facts(grown.optimizer, grown.scheduler) == before


def test_replaced_parameters_keep_group_and_position() -> None:
    grown = Grown()
    wide = [parameter(4, 3), parameter(6)]
    pairs = [(grown.seed[1], wide[1]), (grown.first, wide[0])]
    grown.surgeon.replace_parameters(pairs)
    held = [[id(p) for p in group["params"]] for group in grown.optimizer.param_groups]
    assert held == [[id(wide[0])], [id(grown.second)], [id(grown.seed[0]), id(wide[1])]]
    order = [wide[0], grown.second, grown.seed[0], wide[1]]
    assert [id(p) for p in grown.optimizer.state] == [id(p) for p in order]


REFUSALS: dict[str, Operation] = {
    "group 'seed' already": lambda s: s.add_group("seed", [parameter(7)]),
    "'nowhere'; its groups are None, 'head', 'seed'": lambda s: s.remove_group("nowhere"),
    "no parameter group 'nobody'": lambda s: s.merge_group("seed", into="nobody"),
    "no parameter group 'none'": lambda s: s.move_parameters([], into="none"),
    "would have no parameters": lambda s: s.add_group("new", []),
    "rate_factor is 0.0;": lambda s: s.add_group("new", [parameter(7)], rate_factor=0.0),
    "rate_factor is nan;": lambda s: s.add_group("new", [parameter(7)], rate_factor=math.nan),
    "rate_factor is inf;": lambda s: s.require_growable(rate_factor=math.inf),
    "warmup_steps is -1;": lambda s: s.add_group("new", [parameter(7)], warmup_steps=-1),
    "no leaf tensor": lambda s: s.add_group("new", [parameter(7) * 2]),
    "item 0 is no leaf tensor but str": lambda s: s.add_group("new", ["weight"]),  # type: ignore[list-item]
    "same parameter twice": lambda s: s.add_group("new", [p := parameter(7), p]),
    "parameter 0 of group 'head', shape .4,., and": lambda s: s.add_group(
        "new", [s._optimizer.param_groups[1]["params"][0]]
    ),
    "in that group already": lambda s: s.merge_group("seed", into="seed"),
    "does not hold the parameter of shape .7,. that it should move": lambda s: s.move_parameters(
        [parameter(7)], into="head"
    ),
    "no parameter to move": lambda s: s.move_parameters([], into="head"),
    "leave group 'head' empty; use merge_group": lambda s: s.move_parameters(
        s._optimizer.param_groups[1]["params"]
    ),
    "one is there twice": lambda s: s.move_parameters(
        s._optimizer.param_groups[2]["params"][:1] * 2
    ),
    "that it should replace": lambda s: s.replace_parameters([(parameter(7), parameter(8))]),
    "the replacement: item 0 is held already": lambda s: s.replace_parameters(
        [(s._optimizer.param_groups[1]["params"][0], s._optimizer.param_groups[0]["params"][0])]
    ),
    "the replacement was given the same parameter twice": lambda s: s.replace_parameters(
        [(group["params"][0], same) for same in [parameter(9, 9)] for group in groups_of(s)]
    ),
    "cannot be replaced twice at once": lambda s: s.replace_parameters(
        [(groups_of(s)[1]["params"][0], parameter(size)) for size in (6, 7)]
    ),
    "the replacement would have no parameters": lambda s: s.replace_parameters([]),
    "no dimension may shrink or be added": lambda s: s.replace_parameters(
        [(groups_of(s)[1]["params"][0], parameter(3))]
    ),
    "parameter 0 of group 0, shape .2, 3., cannot be carried": lambda s: s.replace_parameters(
        [(groups_of(s)[0]["params"][0], parameter(6))]
    ),
    "torch.float32 on cpu but its replacement is torch.float64": lambda s: s.replace_parameters(
        [(groups_of(s)[1]["params"][0], nn.Parameter(parameter(6).double()))]
    ),
}


def groups_of(surgeon: OptimizerSurgeon) -> list[dict[str, Any]]:
    return surgeon._optimizer.param_groups


@pytest.mark.parametrize(("words", "operation"), REFUSALS.items(), ids=list(REFUSALS))
def test_a_refused_operation_touches_nothing(words: str, operation: Operation) -> None:
    grown = Grown()
    before = all_facts(grown.optimizer, grown.scheduler)
    with pytest.raises(GrowthError, match=words):
        operation(grown.surgeon)
    assert all_facts(grown.optimizer, grown.scheduler) == before
    assert grown.surgeon.operations == []


@pytest.mark.parametrize("name", ["remove_group", "merge_group"])
def test_the_first_group_stays(name: str) -> None:
    optimizer = torch.optim.SGD([{"params": [parameter(2)], "name": "host"}], 0.1)
    with pytest.raises(GrowthError, match="group 'host' is the optimizer's first one"):
        getattr(OptimizerSurgeon(optimizer), name)("host")


@pytest.mark.parametrize("option", ["amsgrad", "capturable", "fused"])
def test_groups_that_keep_different_moments_do_not_mix(option: str) -> None:
    optimizer = torch.optim.Adam([parameter(2)], 0.1)
    surgeon = OptimizerSurgeon(optimizer)
    surgeon.add_group("seed", [parameter(3)])
    optimizer.param_groups[1][option] = True
    before = all_facts(optimizer)
    with pytest.raises(GrowthError, match=f"'seed' has {option} = True"):
        surgeon.merge_group("seed")
    assert all_facts(optimizer) == before


def test_what_the_optimizer_itself_refuses_is_told_as_such() -> None:
    class Full(torch.optim.SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if self.param_groups:
                raise ValueError("no room left")
            super().add_param_group(param_group)

    optimizer = Full([parameter(2)], 0.1)
    surgeon = OptimizerSurgeon(optimizer)
    before = all_facts(optimizer)
    with pytest.raises(GrowthError, match="refuses group 'seed': no room left"):
        surgeon.add_group("seed", [parameter(3)])
    assert all_facts(optimizer) == before


def test_names_of_parameters_go_along() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    surgeon = OptimizerSurgeon(optimizer)
    before = all_facts(optimizer)
    with pytest.raises(GrowthError, match="named_parameters"):
        surgeon.add_group("seed", nn.Linear(2, 2).parameters())
    assert all_facts(optimizer) == before
    seed = nn.Linear(2, 2)
    undos = [surgeon.add_group("seed", seed.named_parameters())]
    assert optimizer.param_groups[1]["param_names"] == ["weight", "bias"]
    undos.append(surgeon.replace_parameters([(seed.bias, parameter(3))]))
    assert optimizer.param_groups[1]["param_names"] == ["weight", "bias"]
    with pytest.raises(GrowthError, match="parameter 'weight' of group 'seed'"):
        surgeon.add_group("again", [("mine", seed.weight)])
    undos.append(surgeon.move_parameters([seed.weight]))
    assert optimizer.param_groups[0]["param_names"][-1] == "weight"
    undos.append(surgeon.merge_group("seed"))
    assert optimizer.param_groups[0]["param_names"][-2:] == ["weight", "bias"]
    for undo in reversed(undos):
        undo.undo()
    assert all_facts(optimizer) == before


def test_names_are_dropped_where_the_optimizer_has_none() -> None:
    optimizer = torch.optim.SGD([parameter(2)], 0.1)
    OptimizerSurgeon(optimizer).add_group("seed", [("weight", parameter(3))])
    assert "param_names" not in optimizer.param_groups[1]


def test_a_replacement_survives_the_optimizer_being_loaded() -> None:
    grown = Grown()
    before = grown.optimizer.state[grown.first]
    bits = {key: value.clone() for key, value in before.items()}
    undo = grown.surgeon.replace_parameters([(grown.first, parameter(4, 4))])
    grown.optimizer.load_state_dict(grown.optimizer.state_dict())
    step(grown.optimizer, 9)
    undo.undo()
    assert grown.optimizer.param_groups[0]["params"] == [grown.first]
    assert grown.optimizer.state[grown.first] is before
    assert all(torch.equal(before[key], bits[key]) for key in bits)
