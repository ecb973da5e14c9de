from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina import Kasmina
from esper.kasmina.slot import slots_of
from esper.leyline import (
    Gate,
    SeedOperation,
    Stage,
)
from support.growth import QUICK, Images, Loop, batch, facts, loss

SLOT = "trunk.6"
GERMINATE = SeedOperation.GERMINATE
ADVANCE = SeedOperation.ADVANCE


def without_seed(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in named.items() if "esper_slot" not in name}


def test_a_seed_that_trains_apart_leaves_the_host_to_the_bit() -> None:
    alone, together = Loop(), Loop()
    report = together.plant()
    alone.step()
    assert report.applied
    assert together.kasmina.stages == {SLOT: Stage.TRAINING}
    for loop in (alone, together):
        loop.step(20)
    host = without_seed(facts(together.model))
    assert all(torch.equal(host[name], tensor) for name, tensor in facts(alone.model).items())
    seed = slots_of(together.model)[SLOT].seed
    assert any(bool(weight.abs().sum() > 0) for weight in seed.last.parameters())
    moments = together.optimizer.state
    assert torch.equal(
        moments[together.model.head.weight]["exp_avg"],
        alone.optimizer.state[alone.model.head.weight]["exp_avg"],
    )


def test_the_random_stream_is_the_hosts_alone() -> None:
    streams = []
    for planted in (False, True):
        loop = Loop()
        if planted:
            loop.ask(GERMINATE, blueprint="mlp")
        loop.step(5)
        loop.survey()
        streams.append(torch.get_rng_state())
    assert torch.equal(*streams)


def test_a_whole_life_ends_in_plain_modules() -> None:
    loop = Loop()
    loop.plant()
    loop.blend()
    state = loop.survey()
    gain = state.seeds[SLOT].gain
    assert gain.low > 0
    assert state.seeds[SLOT].alpha == 1.0
    with torch.no_grad():
        loop.model.eval()
        before = loop.model(batch(5)[0])
    report = loop.ask(ADVANCE)
    assert report.applied
    assert [result.gate for result in report.gates] == [Gate.G4, Gate.G5]
    assert report.after is Stage.FOSSILISED
    with torch.no_grad():
        torch.testing.assert_close(loop.model(batch(5)[0]), before)
    loop.model.train()
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loop.model.parameters()}
    assert len(loop.optimizer.param_groups) == 1
    loop.step(3)
    loop.kasmina.release()
    kinds = {type(module).__module__ for module in loop.model.modules()}
    assert not any("slot" in kind for kind in kinds)
    assert not slots_of(loop.model)
    assert type(loop.model.trunk[5]) is nn.Linear


def test_the_moments_go_along_when_a_seed_is_folded() -> None:
    loop = Loop()
    loop.plant()
    loop.blend()
    loop.survey()
    slot = slots_of(loop.model)[SLOT]
    before = [loop.optimizer.state[p]["exp_avg"].clone() for p in slot.own_parameters()]
    assert loop.ask(ADVANCE).applied
    grown = [p for name, p in loop.model.named_parameters() if ".grown." in name]
    after = [loop.optimizer.state[p]["exp_avg"] for p in grown]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("until", [Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
def test_growth_can_be_ended_at_any_time_without_a_change_of_outputs(until: Stage) -> None:
    loop = Loop(["trunk.6", "head"], config=QUICK.model_copy(update={"ramp_steps": 30}))
    loop.plant("head")
    loop.plant()
    for _ in range(40):
        if loop.kasmina.stages[SLOT] is until:
            break
        loop.step(10)
        loop.survey()
        loop.ask(ADVANCE)
    loop.step(10 if until is Stage.BLENDING else 0)
    assert loop.kasmina.stages[SLOT] is until
    loop.model.eval()
    with torch.no_grad():
        before = loop.model(batch(5)[0])
        model = loop.kasmina.finish()
        torch.testing.assert_close(model(batch(5)[0]), before)
    assert model is loop.model
    assert not slots_of(model)
    assert loop.kasmina.stages["head"] is Stage.CULLED


def test_a_culled_seed_leaves_nothing_and_the_slot_waits() -> None:
    loop = Loop()
    loop.plant()
    loop.step(3)
    report = loop.ask(SeedOperation.CULL)
    assert report.applied
    assert len(loop.optimizer.param_groups) == 1
    assert len(loop.optimizer.state) == len(list(loop.model.parameters()))
    assert not any("esper_slot" in name for name in loop.model.state_dict())
    refused = loop.ask(GERMINATE, blueprint="mlp")
    assert "it is culled, not dormant" in refused.detail
    stages = []
    for _ in range(8):
        loop.step()
        stages.append(loop.kasmina.stages[SLOT])
    order = [s for s, after in zip(stages, [*stages[1:], None], strict=True) if s is not after]
    assert order == [Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT]
    assert loop.plant().applied


def test_a_seed_that_the_model_relies_on_fades_out_before_it_is_culled() -> None:
    loop = Loop()
    loop.plant()
    loop.blend()
    loop.survey()
    slot = slots_of(loop.model)[SLOT]
    report = loop.ask(SeedOperation.CULL)
    assert (report.before, report.after) == (Stage.HOLDING, Stage.BLENDING)
    assert loop.survey().seeds[SLOT].fading
    for operation in (ADVANCE, SeedOperation.HOLD, SeedOperation.CULL):
        assert "fades out" in loop.ask(operation).detail
    shares = []
    reports = []
    while loop.kasmina.stages[SLOT] is Stage.BLENDING:
        shares.append(float(slot.alpha))
        reports += loop.step()
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0
    assert shares[-1] < 0.3
    assert reports[0].after is Stage.CULLED
    assert len(loop.optimizer.param_groups) == 1


def test_shares_are_counted_in_optimizer_steps_and_retargeted_from_holding_only() -> None:
    loop = Loop()
    loop.plant()
    for _ in range(40):
        loop.step(10)
        loop.survey()
        if loop.ask(ADVANCE).applied:
            break
    slot = slots_of(loop.model)[SLOT]
    assert loop.kasmina.stages[SLOT] is Stage.BLENDING
    assert "retargeted from holding only" in loop.ask(SeedOperation.RETARGET, target=0.0).detail
    shares = [float(slot.alpha)]
    for _ in range(2):
        loop.step()
        shares.append(float(slot.alpha))
    assert shares == sorted(shares)
    assert 0 < shares[-1] < 1
    assert loop.ask(SeedOperation.HOLD).applied
    held = float(slot.alpha)
    loop.step(5)
    assert float(slot.alpha) == held
    assert loop.ask(SeedOperation.RETARGET, target=0.0).applied
    loop.step(6)
    assert float(slot.alpha) == 0.0
    assert loop.kasmina.stages[SLOT] is Stage.HOLDING
    loop.survey()
    assert "its share is 0, not 1" in loop.ask(ADVANCE).detail


def test_a_seed_whose_gradients_are_not_finite_is_culled_and_the_host_unharmed() -> None:
    alone, together = Loop(), Loop()
    together.plant()
    alone.step()
    seed = slots_of(together.model)[SLOT].seed
    with torch.no_grad():
        next(seed.parameters()).fill_(float("nan"))
    reports = together.step(6)
    alone.step(6)
    assert [report.after for report in reports][:2] == [Stage.CULLED, Stage.EMBARGOED]
    assert "no finite gradient" in reports[0].detail
    host = without_seed(facts(together.model))
    assert all(torch.equal(host[name], tensor) for name, tensor in facts(alone.model).items())


def test_a_seed_trained_far_too_fast_does_not_reach_the_host() -> None:
    alone = Loop()
    together = Loop(config=QUICK.model_copy(update={"rate_factor": 100.0}))
    together.plant()
    alone.step()
    for loop in (alone, together):
        loop.step(30)
    host = without_seed(facts(together.model))
    assert all(torch.equal(host[name], tensor) for name, tensor in facts(alone.model).items())


def test_an_inserted_seed_begins_at_once_and_changes_nothing_at_first() -> None:
    loop = Loop()
    loop.step(3)
    loop.model.eval()
    before = loop.model(batch(4)[0])
    assert loop.ask(GERMINATE, blueprint="mlp", planting=_inserted()).applied
    assert torch.equal(loop.model(batch(4)[0]), before)
    loop.model.train()
    loop.step(2)
    assert loop.kasmina.stages[SLOT] is Stage.HOLDING
    loop.step(20)
    weight = slots_of(loop.model)[SLOT].seed.last.weight
    assert weight.grad is not None or float(weight.abs().sum()) > 0


def _inserted() -> Any:
    from esper.leyline import Planting

    return Planting(training="insert")


def test_a_part_of_a_host_that_was_put_into_evaluation_stays_there() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    loop = Loop.__new__(Loop)
    torch.manual_seed(0)
    loop.model, loop.steps = Images(), 0
    loop.model.trunk.append(Frozen())
    loop.model.trunk[7].norm.eval()
    loop.optimizer = torch.optim.Adam(loop.model.parameters(), lr=1e-2)
    slots = ["trunk.7"]
    loop.kasmina = Kasmina(loop.model, loop.optimizer, slots=slots, sample=batch()[0], config=QUICK)
    assert loop.plant("trunk.7", "mlp", training="insert").applied
    loop.kasmina.finish()
    assert loop.model.trunk[7].host.training
    assert not loop.model.trunk[7].host.norm.training


def test_a_pair_is_widened_in_place_with_its_moments() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

    torch.manual_seed(0)
    loop = Loop.__new__(Loop)
    loop.model = Layers()  # type: ignore[assignment]
    loop.optimizer = torch.optim.Adam(loop.model.parameters(), lr=1e-2)
    loop.kasmina = Kasmina(
        loop.model, loop.optimizer, slots=["net.1>net.3"], sample=batch()[0], config=QUICK
    )
    loop.steps = 0
    loop.step(5)
    moment = loop.optimizer.state[loop.model.net[1].weight]["exp_avg"].clone()
    assert loop.plant("net.1>net.3", "widen").applied
    loop.step()
    first = loop.model.net[1]
    loop.blend("net.1>net.3")
    loop.survey()
    moment = loop.optimizer.state[first.weight]["exp_avg"].clone()
    with torch.no_grad():
        before = loop.model(batch(9)[0])
    assert loop.ask(ADVANCE, "net.1>net.3").applied
    wider = loop.model.net[1]
    assert type(wider) is nn.Linear
    assert wider.out_features > 6
    assert torch.equal(loop.optimizer.state[wider.weight]["exp_avg"][:6], moment)
    with torch.no_grad():
        torch.testing.assert_close(loop.model(batch(9)[0]), before)
    loop.step(3)


def test_several_seeds_train_each_on_its_own() -> None:
    alone, both = Loop(["trunk.6"]), Loop(["trunk.6", "head"])
    alone.ask(GERMINATE, blueprint="mlp")
    both.ask(GERMINATE, blueprint="mlp")
    both.ask(GERMINATE, "head", blueprint="mlp")
    for loop in (alone, both):
        loop.step(8)
    one, two = slots_of(alone.model)[SLOT].seed, slots_of(both.model)[SLOT].seed
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_the_loss_of_a_seed_is_that_of_the_model_with_it() -> None:
    loop = Loop()
    loop.plant()
    loop.step(40)
    loop.model.eval()
    content = batch(77, 256)
    state = loop.kasmina.survey(lambda b: loss(loop.model, b), [content, batch(78, 256)], 100)
    assert state.steps_left == 100
    slot = slots_of(loop.model)[SLOT]
    with torch.no_grad():
        base = float(loss(loop.model, content))
        features = loop.model.trunk(content[0])
        moved = loop.model.head(features + slot.seed(features))
        better = float(nn.functional.cross_entropy(moved, content[1]))
    gain = state.seeds[SLOT].gain
    assert gain.batches == 2
    assert gain.low <= base - better <= gain.high or gain.mean == pytest.approx(
        base - better, abs=0.05
    )
    assert state.seeds[SLOT].residual is not None
