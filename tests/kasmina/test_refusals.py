import copy
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from esper.core.config import GrowthConfig
from esper.core.signing import sign
from esper.kasmina import Blueprint, Flow, Kasmina, register
from esper.kasmina.slot import slots_of
from esper.leyline import (
    Gate,
    GrowthError,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    Stage,
)
from support.growth import QUICK, Images, Loop, batch, facts

SLOT = "trunk.6"
GERMINATE = SeedOperation.GERMINATE
ADVANCE = SeedOperation.ADVANCE


def test_gates_refuse_and_say_what_they_measured() -> None:
    loop = Loop(config=GrowthConfig(min_training_steps=50))
    refused = loop.ask(GERMINATE, blueprint="mlp", seed="trunk.7")
    assert not refused.applied
    assert "there is no slot 'trunk.7'" in refused.detail
    report = loop.plant()
    assert "50" not in report.detail
    early = loop.ask(ADVANCE)
    assert early.gates[0].gate is Gate.G2
    assert early.gates[0].values["age"] == 0.0
    loop.kasmina.config = loop.kasmina._operations.config = QUICK
    unmeasured = loop.ask(ADVANCE)
    assert "not measured" in unmeasured.detail
    assert loop.kasmina.stages[SLOT] is Stage.TRAINING


def test_a_budget_of_parameters_is_kept() -> None:
    model_size = sum(p.numel() for p in Images().parameters())
    loop = Loop(config=GrowthConfig(max_parameters=model_size + 10))
    before = facts(loop.model)
    report = loop.plant()
    assert not report.applied
    assert "max_parameters" in report.detail
    assert facts(loop.model).keys() == before.keys()
    assert len(loop.optimizer.param_groups) == 1
    assert loop.kasmina.stages[SLOT] is Stage.DORMANT


def test_a_command_is_carried_out_once_in_time_and_on_what_it_was_meant_for() -> None:
    loop = Loop()
    first = SeedCommand(SLOT, GERMINATE, "mlp", id="a", version=0)
    assert loop.kasmina.apply(first).applied
    assert "was carried out before" in loop.kasmina.apply(first).detail
    stale = SeedCommand(SLOT, SeedOperation.CULL, id="b", version=0)
    assert "architecture version 0; there is 1" in loop.kasmina.apply(stale).detail
    late = SeedCommand(SLOT, SeedOperation.CULL, id="c", version=1, deadline=1.0)
    assert "after its deadline" in loop.kasmina.apply(late).detail
    assert not loop.kasmina.apply(ScaleLearningRate(0.5)).applied


def test_with_a_key_only_signed_commands_are_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    key = b"0123456789abcdef"
    monkeypatch.setenv("ESPER_COMMAND_KEY", key.decode())
    loop = Loop()
    command = SeedCommand(SLOT, GERMINATE, "mlp", id="a")
    assert "not signed" in loop.kasmina.apply(command).detail
    signed = sign(command, key)
    altered = msgspec.structs.replace(signed, blueprint="low_rank")
    assert "not signed" in loop.kasmina.apply(altered).detail
    assert loop.kasmina.apply(signed).applied


@pytest.mark.parametrize("planting", [{"ramp": "cubic"}, {"ramp_steps": -3}])
def test_a_ramp_that_cannot_be_is_refused_before_anything_grows(planting: dict[str, Any]) -> None:
    loop = Loop()
    report = loop.plant(**planting)
    assert not report.applied
    assert "ramp" in report.detail
    assert loop.kasmina.stages[SLOT] is Stage.DORMANT
    assert loop.kasmina.version == 0


class Faulty(Blueprint):
    name = "faulty"

    def fits(self, flow: Flow) -> str:
        raise ZeroDivisionError("never thought of")

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        return nn.Identity()


def test_a_blueprint_that_fails_is_refused_and_not_offered() -> None:
    register(Faulty())
    loop = Loop()
    report = loop.plant(blueprint="faulty")
    assert not report.applied
    assert "ZeroDivisionError: never thought of" in report.detail
    assert "faulty" not in loop.survey().seeds[SLOT].offers
    assert loop.kasmina.stages[SLOT] is Stage.DORMANT


def test_slots_are_attached_all_or_none() -> None:
    model = Images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GrowthError, match="no module 'tail'"):
        Kasmina(model, optimizer, slots=["head", "tail"], sample=batch()[0])
    with pytest.raises(GrowthError, match="has a slot already"):
        Kasmina(model, optimizer, slots=["trunk", "trunk.6"], sample=batch()[0])
    assert not slots_of(model)
    assert type(model.trunk[6]) is nn.ReLU


def test_an_unknown_blueprint_changes_nothing() -> None:
    loop = Loop()
    report = loop.plant(blueprint="no_such")
    assert not report.applied
    assert "no_such" in report.detail
    assert loop.kasmina.version == 0


def test_what_cannot_be_rebuilt_leaves_the_model_as_it_is() -> None:
    loop = Loop()
    loop.plant()
    described = copy.deepcopy(loop.kasmina.structure())
    described["changes"][0]["blueprint"] = "no_such"
    with pytest.raises(GrowthError):
        loop.kasmina.rebuild(described)
    assert loop.kasmina.structure()["changes"] != described["changes"]
    assert any("esper_slot" in name for name in loop.model.state_dict())
    with pytest.raises(GrowthError, match="seeds still grow"):
        loop.kasmina.release()
