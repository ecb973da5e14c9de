"""Every optimizer of torch, grown while it runs."""

import inspect

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from esper.kasmina.surgery import OptimizerSurgeon
from esper.leyline import GrowthError
from kasmina.surgery.builders import (
    ELEMENTWISE,
    OPTIMIZERS,
    all_facts,
    gradient_of,
    parameter,
    step,
)

GROWING = [name for name in OPTIMIZERS if name != "LBFGS"]
FACTORED = [name for name in OPTIMIZERS if name.startswith("Adafactor")]
every_growing = pytest.mark.parametrize("name", GROWING)


def built(name: str, parameters: list[nn.Parameter], steps: int) -> Optimizer:
    optimizer = OPTIMIZERS[name](parameters)
    for number in range(steps):
        step(optimizer, number)
    return optimizer


def values(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [held.detach().clone() for held in parameters]


def test_every_optimizer_of_torch_has_a_case() -> None:
    found = {
        optimizer
        for _, optimizer in inspect.getmembers(torch.optim, inspect.isclass)
        if issubclass(optimizer, Optimizer) and optimizer is not Optimizer
    }
    assert found == {type(make([parameter(2, 2)])) for make in OPTIMIZERS.values()}
    for optimizer in found:
        kinds = [n for n, make in OPTIMIZERS.items() if type(make([parameter(2, 2)])) is optimizer]
        for variant in {"foreach", "fused"} & inspect.signature(optimizer).parameters.keys():
            assert any(variant in name for name in kinds), (optimizer, variant)


@every_growing
@pytest.mark.parametrize("after", [0, 3])
def test_a_group_added_and_removed_again_leaves_no_trace_in_the_host(name: str, after: int) -> None:
    control, host, seed = [[parameter(2, 3), parameter(4, 2)] for _ in range(3)]
    plain, grown = built(name, control, after), built(name, host, after)
    surgeon = OptimizerSurgeon(grown)
    surgeon.add_group("seed", seed, rate_factor=0.5, warmup_steps=2)
    before = values(seed)
    for number in range(after, after + 4):
        step(plain, number)
        step(grown, number)
    assert all(not torch.equal(a, b) for a, b in zip(before, seed, strict=True))
    surgeon.remove_group("seed")
    assert all(held not in grown.state for held in seed)
    for number in range(after + 4, after + 6):
        step(plain, number)
        step(grown, number)
    assert all(torch.equal(a, b) for a, b in zip(control, host, strict=True))


@every_growing
def test_a_merged_group_trains_on_with_its_moments(name: str) -> None:
    apart, together = [[parameter(2, 3), parameter(4, 2)] for _ in range(2)]
    optimizers = [built(name, [held[0]], 2) for held in (apart, together)]
    surgeons = [OptimizerSurgeon(optimizer) for optimizer in optimizers]
    for surgeon, held in zip(surgeons, (apart, together), strict=True):
        surgeon.add_group("seed", [held[1]])
    for number in range(2, 8):
        if number == 5:
            surgeons[1].merge_group("seed")
        for optimizer in optimizers:
            step(optimizer, number)
    assert [len(group["params"]) for group in optimizers[1].param_groups] == [2]
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def widening(name: str, steps: int) -> tuple[Optimizer, Optimizer, nn.Parameter, nn.Parameter]:
    """Return two optimizers after the same steps, the second one's parameter widened since."""
    narrow, old, other = parameter(3, 5), parameter(3, 5), parameter(2, 2)
    control, grown = built(name, [narrow], steps), built(name, [other, old], steps)
    wide = parameter(4, 7)
    with torch.no_grad():
        wide[:3, :5] = old
    OptimizerSurgeon(grown).replace_parameters([(old, wide)])
    assert grown.param_groups[0]["params"][1] is wide
    assert old not in grown.state
    return control, grown, narrow, wide


def train_both(both: tuple[Optimizer, Optimizer], narrow: nn.Parameter, wide: nn.Parameter) -> None:
    for number in range(20, 25):
        gradient = gradient_of(both[1], wide, number)
        wide.grad = gradient
        narrow.grad = gradient.to_dense()[:3, :5].clone()
        if gradient.is_sparse:
            narrow.grad = narrow.grad.to_sparse()
        for optimizer in both:
            optimizer.step(lambda: torch.tensor(1.0))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", [n for n in GROWING if n not in FACTORED and n != "Muon"])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_old_entries_train_on_as_if_nothing_had_been_added(name: str, steps: int) -> None:
    control, grown, narrow, wide = widening(name, steps)
    train_both((control, grown), narrow, wide)
    if name in ELEMENTWISE:
        assert torch.equal(wide[:3, :5], narrow)
    else:
        torch.testing.assert_close(wide[:3, :5], narrow, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in ELEMENTWISE if not n.startswith("ASGD")])
def test_new_entries_begin_as_the_optimizer_begins(name: str) -> None:
    _, grown, _, wide = widening(name, 4)
    beginnings = {"step_size": 0.01, "sum": 0.1 if name == "Adagrad" else 0.0}
    for key, carried in grown.state[wide].items():
        if isinstance(carried, torch.Tensor) and carried.ndim:
            start = torch.tensor(beginnings.get(key, 0.0))
            assert (carried[3:] == start).all(), key
            assert (carried[:, 5:] == start).all(), key
            assert carried.stride() == wide.stride()


def test_averaged_weights_of_new_entries_begin_with_the_weights() -> None:
    _, grown, _, wide = widening("ASGD, averaging, foreach", 6)
    average = grown.state[wide]["ax"]
    assert torch.equal(average[3:], wide[3:])
    assert not torch.equal(average[:3, :5], wide[:3, :5])


def test_momentum_of_a_matrix_optimizer_is_carried() -> None:
    if "Muon" not in OPTIMIZERS:
        pytest.skip("this torch has no Muon")
    control, grown, narrow, wide = widening("Muon", 3)
    buffer, carried = (o.state[p]["momentum_buffer"] for o, p in ((control, narrow), (grown, wide)))
    assert torch.equal(carried[:3, :5], buffer)
    assert not carried[3:].any()
    assert not carried[:, 5:].any()
    train_both((control, grown), narrow, wide)
    with pytest.raises(GrowthError, match="Muon trains matrices only"):
        OptimizerSurgeon(grown).add_group("seed", [parameter(3)])
    with pytest.raises(GrowthError, match="Muon trains matrices only"):
        OptimizerSurgeon(grown).replace_parameters([(wide, parameter(3))], carry=False)


@every_growing
def test_a_fresh_start_is_that_of_a_new_parameter(name: str) -> None:
    old, new, control = parameter(3, 5), parameter(4, 7), parameter(4, 7)
    grown, fresh = built(name, [old], 3), built(name, [control], 0)
    OptimizerSurgeon(grown).replace_parameters([(old, new)], carry=False)
    for number in range(3, 7):
        step(grown, number)
        step(fresh, number)
    assert torch.equal(new, control)


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (1, 1)])
def test_factored_statistics_are_not_carried(name: str, shape: tuple[int, int]) -> None:
    first, old = parameter(7), parameter(*shape)
    optimizer = built(name, [first, old], 2)
    surgeon = OptimizerSurgeon(optimizer)
    before = all_facts(optimizer)
    pairs = [(first, parameter(9)), (old, parameter(4, 7))]
    with pytest.raises(GrowthError, match=r"parameter 1 of group 0.*row_var.*carry=False"):
        surgeon.replace_parameters(pairs)
    assert all_facts(optimizer) == before
    surgeon.replace_parameters(pairs[:1])
    surgeon.replace_parameters(pairs[1:], carry=False)
    step(optimizer, 2)


def test_an_optimizer_without_states_of_parameters_is_refused() -> None:
    held = parameter(2, 2)
    optimizer = built("LBFGS", [held], 2)
    surgeon = OptimizerSurgeon(optimizer)
    before = all_facts(optimizer)
    for operation in (
        surgeon.require_growable,
        lambda: surgeon.add_group("seed", [parameter(3)]),
        lambda: surgeon.replace_parameters([(held, parameter(3, 3))], carry=False),
        lambda: surgeon.remove_group("seed"),
        lambda: surgeon.move_parameters([held], "seed"),
    ):
        with pytest.raises(GrowthError, match="LBFGS keeps one flat history"):
            operation()
    assert all_facts(optimizer) == before


def test_sparse_parameters_are_refused_where_they_cannot_be_trained() -> None:
    surgeon = OptimizerSurgeon(built("SparseAdam", [parameter(2, 2)], 1))
    with pytest.raises(GrowthError, match="sparse or complex"):
        surgeon.add_group("seed", [nn.Parameter(torch.eye(3).to_sparse())])


@every_growing
def test_undoing_everything_puts_every_bit_back(name: str) -> None:
    first, second, third = parameter(2, 3), parameter(4, 2), parameter(2, 2)
    optimizer = built(name, [first, second], 2)
    surgeon = OptimizerSurgeon(optimizer)
    surgeon.add_group("a", [parameter(5, 5), third], warmup_steps=3)
    surgeon.add_group("b", [parameter(5, 1)], rate_factor=2.0)
    surgeon.commit()
    step(optimizer, 2)
    before = all_facts(optimizer)
    undos = [
        surgeon.add_group("c", [parameter(3, 3)]),
        surgeon.replace_parameters([(third, parameter(2, 4))], carry=name not in FACTORED),
        surgeon.replace_parameters([(first, parameter(2, 5))], carry=False),
        surgeon.move_parameters([second], "b"),
        surgeon.merge_group("b", "a"),
        surgeon.remove_group("a"),
    ]
    for undo in reversed(undos):
        undo.undo()
    assert all_facts(optimizer) == before
    assert surgeon.operations == []


def test_fused_momentum_is_never_mixed_with_none() -> None:
    first, second, seed = parameter(2, 3), parameter(4, 2), parameter(3, 3)
    optimizer = built("SGD, fused", [first, second], 2)
    surgeon = OptimizerSurgeon(optimizer)
    surgeon.replace_parameters([(second, parameter(4, 4))], carry=False)
    step(optimizer, 2)
    surgeon.add_group("seed", [seed])
    before = all_facts(optimizer)
    with pytest.raises(GrowthError, match=r"shape \(3, 3\) has no momentum yet .*fused=False"):
        surgeon.merge_group("seed")
    with pytest.raises(GrowthError, match=r"shape \(2, 3\) has momentum .* has none yet"):
        surgeon.move_parameters([first], "seed")
    assert all_facts(optimizer) == before
    step(optimizer, 3)
    surgeon.merge_group("seed")
    step(optimizer, 4)


@every_growing
def test_steps_in_between_stay_with_what_was_there_all_the_time(name: str) -> None:
    control, host, new = parameter(2, 3), parameter(2, 3), parameter(4, 2)
    plain, grown = built(name, [control], 1), built(name, [host, old := parameter(3, 2)], 1)
    surgeon = OptimizerSurgeon(grown)
    old_state = dict(grown.state.get(old, {}))
    undos = [
        surgeon.add_group("seed", [parameter(3, 3)]),
        surgeon.replace_parameters([(old, new)], carry=name not in FACTORED),
    ]
    for number in range(1, 5):
        if number == 3:
            undos.append(surgeon.merge_group("seed"))
        step(plain, number)
        step(grown, number)
    for undo in reversed(undos):
        undo.undo()
    assert torch.equal(control, host)
    returned = grown.state.get(old, {})
    assert returned.keys() == old_state.keys()
    assert all(returned[key] is old_state[key] for key in old_state)
    (group,) = grown.param_groups
    assert [id(held) for held in group["params"]] == [id(host), id(old)]
    assert new not in grown.state
    step(grown, 5)


def test_the_states_that_adagrad_builds_in_are_given_to_later_parameters() -> None:
    optimizer = built("Adagrad", [parameter(2, 2)], 0)
    OptimizerSurgeon(optimizer).add_group("seed", [new := parameter(3, 3)])
    (expected,) = torch.optim.Adagrad([new], initial_accumulator_value=0.1).state.values()
    assert optimizer.state[new].keys() == expected.keys()
    assert all(torch.equal(optimizer.state[new][key], expected[key]) for key in expected)
