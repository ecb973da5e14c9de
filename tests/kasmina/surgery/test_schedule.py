import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from esper.kasmina.surgery import OptimizerSurgeon
from esper.kasmina.surgery.schedule import KNOWN
from esper.leyline import GrowthError
from kasmina.surgery.builders import (
    SCHEDULES,
    Scheduled,
    advance,
    all_facts,
    parameter,
    two_groups,
)

STEPS = 18
every_schedule = pytest.mark.parametrize("kind", SCHEDULES.values(), ids=list(SCHEDULES))
moments = pytest.mark.parametrize("grown_at", [0, 1, 3, 4, 6, 10])


def rates(optimizer: Optimizer, groups: list[int]) -> list[Any]:
    keys = ("lr", "momentum", "betas")
    return [[optimizer.param_groups[group].get(key) for key in keys] for group in groups]


def share(kind: Scheduled) -> float:
    return 0.3 if kind.any_share else 1.0


def agree(actual: float, expected: float) -> bool:
    # Close to the end of a cosine the rate is the difference of numbers of the size of the first.
    return math.isclose(actual, expected, rel_tol=1e-9, abs_tol=1e-15)


def test_every_scheduler_of_torch_is_known_and_has_a_case() -> None:
    found = {
        scheduler
        for module in (lr_scheduler, swa_utils)
        for _, scheduler in inspect.getmembers(module, inspect.isclass)
        if issubclass(scheduler, LRScheduler)
        if scheduler not in (LRScheduler, lr_scheduler._LRScheduler)
    }
    assert found == set(KNOWN)
    assert found == {type(two_groups(kind)[1]) for kind in SCHEDULES.values()}


@every_schedule
@moments
def test_an_added_group_keeps_its_share_and_the_host_its_rates(
    kind: Scheduled, grown_at: int
) -> None:
    (control, plain), (optimizer, scheduler) = two_groups(kind), two_groups(kind)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    for number in range(STEPS):
        if number == grown_at:
            surgeon.add_group("seed", [parameter(3)], rate_factor=share(kind))
        advance(control, plain, number)
        advance(optimizer, scheduler, number)
        assert rates(optimizer, [0, 1]) == rates(control, [0, 1])
        if number >= grown_at:
            first, _, new = optimizer.param_groups
            assert agree(new["lr"], share(kind) * first["lr"]), number
            assert rates(optimizer, [2])[0][1:] == rates(optimizer, [0])[0][1:]
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@every_schedule
@moments
def test_it_has_the_rate_that_it_would_have_had_from_the_start(
    kind: Scheduled, grown_at: int
) -> None:
    early, late = two_groups(kind), two_groups(kind)
    # Added before the first step, where nothing but base rates has been used.
    OptimizerSurgeon(*early).add_group("seed", [parameter(3)], rate_factor=share(kind))
    for number in range(STEPS):
        if number == grown_at:
            OptimizerSurgeon(*late).add_group("seed", [parameter(3)], rate_factor=share(kind))
        advance(*early, number)
        advance(*late, number)
        if number >= grown_at:
            assert agree(late[0].param_groups[2]["lr"], early[0].param_groups[2]["lr"])


def test_a_linear_rise_is_that_of_a_group_built_in_from_the_start() -> None:
    parameters = [parameter(2), parameter(3)]
    whole = torch.optim.SGD(
        [{"params": parameters[0], "lr": 0.1}, {"params": parameters[1], "lr": 0.05}]
    )
    optimizer = torch.optim.SGD([parameter(2)], 0.1)
    ramps = [lr_scheduler.LinearLR(o, 0.1, total_iters=8) for o in (whole, optimizer)]
    for number in range(12):
        if number == 4:
            surgeon = OptimizerSurgeon(optimizer, ramps[1])
            surgeon.add_group("seed", [parameter(3)], rate_factor=0.5)
        advance(whole, ramps[0], number)
        advance(optimizer, ramps[1], number)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(whole.param_groups[1]["lr"], rel=1e-12)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05, rel=1e-12)


@every_schedule
@pytest.mark.parametrize("removed_at", [3, 4, 9])
def test_after_a_removal_the_others_go_on(kind: Scheduled, removed_at: int) -> None:
    (control, plain), (optimizer, scheduler) = two_groups(kind), two_groups(kind)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    for number in range(STEPS):
        if number == 2:
            surgeon.add_group("culled", [parameter(3)], rate_factor=share(kind))
            surgeon.add_group("kept", [parameter(5)], rate_factor=share(kind) ** 2)
        if number == removed_at:
            surgeon.remove_group("culled")
        advance(control, plain, number)
        advance(optimizer, scheduler, number)
        assert rates(optimizer, [0, 1]) == rates(control, [0, 1])
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    first, _, kept = optimizer.param_groups
    assert agree(kept["lr"], share(kind) ** 2 * first["lr"])


@every_schedule
def test_a_saved_schedule_goes_on_as_if_never_stopped(kind: Scheduled) -> None:
    optimizer, scheduler = two_groups(kind)
    resumed, loaded = two_groups(kind)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    for number in range(6):
        if number == 3:
            surgeon.add_group("first", [parameter(3)], rate_factor=share(kind))
            surgeon.add_group("second", [parameter(5)], rate_factor=share(kind))
        if number == 5:
            surgeon.remove_group("first")
        advance(optimizer, scheduler, number)
    OptimizerSurgeon(resumed, loaded).add_group("second", [parameter(5)])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for number in range(6, STEPS):
        advance(optimizer, scheduler, number)
        advance(resumed, loaded, number)
        assert rates(resumed, [0, 1, 2]) == rates(optimizer, [0, 1, 2])


@every_schedule
@pytest.mark.parametrize("at", [0, 2, 5])
def test_undoing_puts_the_schedule_back(kind: Scheduled, at: int) -> None:
    optimizer, scheduler = two_groups(kind)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    for number in range(at):
        advance(optimizer, scheduler, number)
    before = all_facts(optimizer, scheduler)
    added = surgeon.add_group("seed", [parameter(3)], rate_factor=share(kind))
    with_group = all_facts(optimizer, scheduler)
    removed = surgeon.remove_group("seed")
    removed.undo()
    assert all_facts(optimizer, scheduler) == with_group
    added.undo()
    assert all_facts(optimizer, scheduler) == before


@every_schedule
def test_undoing_an_addition_later_leaves_the_host_where_the_schedule_is(kind: Scheduled) -> None:
    (control, plain), (optimizer, scheduler) = two_groups(kind), two_groups(kind)
    undo = OptimizerSurgeon(optimizer, scheduler).add_group("seed", [parameter(3)])
    for number in range(STEPS):
        if number == 7:
            undo.undo()
        advance(control, plain, number)
        advance(optimizer, scheduler, number)
        assert rates(optimizer, [0, 1]) == rates(control, [0, 1])


def test_rates_in_tensors_are_scheduled_too() -> None:
    optimizer = torch.optim.Adam([parameter(2)], torch.tensor(0.1, dtype=torch.float64))
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 6)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    for number in range(12):
        if number == 2:
            surgeon.add_group("seed", [parameter(3)], rate_factor=0.5)
        advance(optimizer, scheduler, number)
    first, new = optimizer.param_groups
    assert isinstance(new["lr"], torch.Tensor)
    assert new["lr"].data_ptr() != first["lr"].data_ptr()
    assert new["initial_lr"].item() == pytest.approx(0.05)
    torch.testing.assert_close(new["lr"], 0.5 * first["lr"], rtol=1e-9, atol=1e-15)


class Halving(LRScheduler):
    def get_lr(self) -> list[Any]:
        return [group["lr"] / 2 for group in self.optimizer.param_groups]


class OwnRates(lr_scheduler.StepLR):
    def get_lr(self) -> list[Any]:
        return [2 * rate for rate in super().get_lr()]


class Named(lr_scheduler.StepLR):
    def __init__(self, optimizer: Optimizer, name: str) -> None:
        self.name = name
        super().__init__(optimizer, 2)


def patched(optimizer: Optimizer) -> LRScheduler:
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    scheduler.get_lr = lambda: [0.1]  # type: ignore[method-assign]
    return scheduler


REFUSED = {
    "Halving .* none of torch.optim's.*LambdaLR": Halving,
    "OwnRates .* its own get_lr": lambda o: OwnRates(o, 2),
    "StepLR .* its own get_lr": patched,
    "OwnRates .* its own": lambda o: lr_scheduler.ChainedScheduler([OwnRates(o, 2)], optimizer=o),
    "CosineAnnealingLR .* eta_min = 0.01.* rate_factor": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.CosineAnnealingLR(o, 4, 0.01)], [2]
    ),
}


@pytest.mark.parametrize(("words", "make"), REFUSED.items(), ids=list(REFUSED))
def test_what_cannot_be_kept_right_is_refused_untouched(words: str, make: Any) -> None:
    optimizer = torch.optim.SGD([parameter(2)], 0.1)
    surgeon = OptimizerSurgeon(optimizer, scheduler := make(optimizer))
    before = all_facts(optimizer, scheduler)
    with pytest.raises(GrowthError, match=words):
        surgeon.require_growable(rate_factor=0.5)
    with pytest.raises(GrowthError, match=words):
        surgeon.add_group("seed", [parameter(3)], rate_factor=0.5)
    assert all_facts(optimizer, scheduler) == before


def test_a_subclass_that_computes_rates_as_its_base_does_is_welcome() -> None:
    optimizer = torch.optim.SGD([parameter(2)], 0.1)
    scheduler = Named(optimizer, "mine")
    OptimizerSurgeon(optimizer, scheduler).add_group("seed", [parameter(3)], rate_factor=0.5)
    for number in range(5):
        advance(optimizer, scheduler, number)
    assert scheduler.get_last_lr() == pytest.approx([0.001, 0.0005])


def test_a_group_added_behind_the_schedule_s_back_is_noticed() -> None:
    optimizer = torch.optim.SGD([parameter(2)], 0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    optimizer.add_param_group({"params": [parameter(5)], "name": "smuggled"})
    before = all_facts(optimizer, scheduler)
    for operation in (
        lambda: surgeon.add_group("seed", [parameter(3)]),
        lambda: surgeon.remove_group("smuggled"),
        lambda: surgeon.merge_group("smuggled"),
    ):
        with pytest.raises(GrowthError, match=r"knows 1 parameter groups .* optimizer has 2"):
            operation()
    assert all_facts(optimizer, scheduler) == before


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    ours, other = (torch.optim.SGD([parameter(2)], 0.1) for _ in range(2))
    with pytest.raises(GrowthError, match="StepLR sets the rates of another optimizer"):
        OptimizerSurgeon(ours, lr_scheduler.StepLR(other, 2))
