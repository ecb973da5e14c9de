import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from esper.kasmina.surgery import OptimizerSurgeon
from kasmina.surgery.builders import all_facts, parameter

RATE = 0.1


def built(
    rate: Any = RATE, warmup_steps: int = 4, **options: Any
) -> tuple[Optimizer, OptimizerSurgeon, nn.Parameter]:
    optimizer = torch.optim.SGD([parameter(2)], rate, **options)
    surgeon = OptimizerSurgeon(optimizer)
    seed = nn.Parameter(torch.zeros(3))
    surgeon.add_group("seed", [seed], warmup_steps=warmup_steps)
    return optimizer, surgeon, seed


def step(optimizer: Optimizer, value: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for held in group["params"]:
            held.grad = torch.full_like(held, value)
    optimizer.step()


def moved(optimizer: Optimizer, seed: nn.Parameter) -> float:
    """Return the rate that a step takes."""
    before = seed.detach().clone()
    step(optimizer)
    return (before - seed).detach()[0].item()


def seeds_group(optimizer: Optimizer) -> dict[str, Any]:
    return optimizer.param_groups[1]


def fail(optimizer: Optimizer) -> None:
    """Take a step that raises, after the rates were lowered."""

    def closure() -> float:
        raise ArithmeticError("overheated")

    with pytest.raises(ArithmeticError, match="overheated"):
        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_the_rate_rises_linearly_and_is_whole_in_between(options: dict[str, Any]) -> None:
    optimizer, _, seed = built(**options)
    taken = []
    for left in (3, 2, 1, 0, 0, 0):
        taken.append(moved(optimizer, seed))
        assert seeds_group(optimizer)["lr"].hex() == RATE.hex()
        assert seeds_group(optimizer)["warmup_left"] == left
    assert taken == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rel=1e-6)


def test_the_host_s_rate_is_never_lowered() -> None:
    optimizer, _, _ = built()
    host = optimizer.param_groups[0]["params"][0]
    assert moved(optimizer, host) == pytest.approx(RATE, rel=1e-6)


def test_a_rate_in_a_tensor_is_put_back_to_the_bit_in_the_same_tensor() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer, _, seed = built(rate, warmup_steps=3)
    live = seeds_group(optimizer)["lr"]
    assert moved(optimizer, seed) == pytest.approx(0.1 / 3, rel=1e-6)
    assert seeds_group(optimizer)["lr"] is live
    assert torch.equal(live, rate)
    fail(optimizer)
    assert moved(optimizer, seed) == pytest.approx(0.2 / 3, rel=1e-6)
    assert torch.equal(live, rate)


def test_the_schedule_never_sees_the_share() -> None:
    optimizer = torch.optim.SGD([parameter(2)], RATE)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    surgeon.add_group("seed", [seed := nn.Parameter(torch.zeros(3))], warmup_steps=4)
    for number in range(6):
        rate = optimizer.param_groups[0]["lr"]
        share = min(1.0, (number + 1) / 4)
        assert moved(optimizer, seed) == pytest.approx(rate * share, rel=1e-5)
        scheduler.step()
        assert seeds_group(optimizer)["lr"].hex() == optimizer.param_groups[0]["lr"].hex()


def test_a_second_surgeon_does_not_lower_it_again() -> None:
    optimizer, _, seed = built()
    OptimizerSurgeon(optimizer)
    assert moved(optimizer, seed) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_does_not_count(fused: bool) -> None:
    optimizer, _, seed = built(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    counts = []
    for value in (1.0, float("inf"), float("nan"), 1.0):
        for held in (optimizer.param_groups[0]["params"][0], seed):
            held.grad = torch.full_like(held, value)
        scaler.scale(torch.tensor(0.0))
        scaler.step(optimizer)
        scaler.update()
        counts.append(seeds_group(optimizer)["warmup_left"])
        assert seeds_group(optimizer)["lr"].hex() == RATE.hex()
    assert counts == [3, 3, 3, 2]
    assert seed.isfinite().all()


def test_a_step_that_raises_leaves_the_next_one_its_rate() -> None:
    optimizer, _, seed = built()
    fail(optimizer)
    fail(optimizer)
    assert seeds_group(optimizer)["warmup_left"] == 4
    assert moved(optimizer, seed) == pytest.approx(0.025, rel=1e-6)
    assert seeds_group(optimizer)["lr"].hex() == RATE.hex()


def test_after_a_step_that_raised_the_whole_rate_is_saved() -> None:
    optimizer, _, _ = built()
    fail(optimizer)
    assert optimizer.state_dict()["param_groups"][1]["lr"].hex() == RATE.hex()


def test_an_operation_begins_with_whole_rates() -> None:
    optimizer, surgeon, _ = built()
    fail(optimizer)
    surgeon.add_group("other", [parameter(5)])
    assert [group["lr"] for group in optimizer.param_groups] == [RATE] * 3


def test_rates_can_be_put_back_before_the_schedule_goes_on() -> None:
    optimizer = torch.optim.SGD([parameter(2)], RATE)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    surgeon.add_group("seed", [seed := nn.Parameter(torch.zeros(3))], warmup_steps=4)
    fail(optimizer)
    surgeon.restore_rates()
    scheduler.step()
    assert seeds_group(optimizer)["lr"] == optimizer.param_groups[0]["lr"] == RATE * 0.9
    assert moved(optimizer, seed) == pytest.approx(RATE * 0.9 / 4, rel=1e-5)


def test_a_rate_that_was_set_since_the_step_raised_stays() -> None:
    optimizer, surgeon, _ = built()
    fail(optimizer)
    seeds_group(optimizer)["lr"] = 0.7
    surgeon.restore_rates()
    assert seeds_group(optimizer)["lr"] == 0.7
    step(optimizer)
    assert seeds_group(optimizer)["lr"] == 0.7


def test_a_warm_up_goes_on_after_a_resume() -> None:
    (optimizer, _, seed), (resumed, _, other) = built(), built(warmup_steps=9)
    step(optimizer)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seeds_group(resumed)["warmup_left"] == 3
    assert moved(resumed, other) == pytest.approx(0.05, rel=1e-5)
    assert moved(optimizer, seed) == pytest.approx(0.05, rel=1e-5)


def test_an_optimizer_that_is_loaded_needs_only_a_surgeon_to_warm_up() -> None:
    optimizer, _, _ = built()
    step(optimizer)
    plain = torch.optim.SGD([{"params": [parameter(2)]}, {"params": [seed := parameter(3)]}], 9.0)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    OptimizerSurgeon(plain)
    assert moved(plain, seed) == pytest.approx(0.05, rel=1e-4)


def test_a_warm_up_that_is_undone_and_begun_anew_begins_anew() -> None:
    optimizer, surgeon, seed = built(warmup_steps=4)
    step(optimizer)
    undo = surgeon.remove_group("seed")
    before = all_facts(optimizer)
    again = surgeon.add_group("seed", [seed], warmup_steps=2)
    assert moved(optimizer, seed) == pytest.approx(0.05, rel=1e-5)
    again.undo()
    assert all_facts(optimizer)[0][1:] != before[0]
    undo.undo()
    assert seeds_group(optimizer)["warmup_left"] == 3


def test_no_optimizer_is_kept_alive() -> None:
    optimizer, surgeon, _ = built()
    step(optimizer)
    alive = weakref.ref(optimizer)
    del optimizer, surgeon
    gc.collect()
    assert alive() is None
