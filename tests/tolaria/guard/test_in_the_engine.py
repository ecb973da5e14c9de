"""The guard inside of a run: what is told, what is saved, what is declared to it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.core.config import PolicyConfig
from esper.leyline import DivergenceError, Event, ScaleLearningRate
from esper.tolaria import TolariaTrainer
from support.jobs import config, two_task_job
from support.policies import Answers
from support.sinks import Memory


def drilled(**sections: dict[str, Any]) -> tuple[TolariaTrainer, Memory]:
    memory = Memory()
    settings = config(train={"epochs": 8}, snapshots={"every": 5}, **sections)
    trainer = TolariaTrainer.from_job(two_task_job(), config=settings, sinks=[memory], drill=True)
    return trainer, memory


def the_one(events: list[Event]) -> dict[str, Any]:
    (event,) = events
    return event.data


def test_the_drill_climbs_the_ladder_and_each_rung_tells_what_led_to_it() -> None:
    trainer, memory = drilled()
    records = list(trainer.steps())
    skip, rollback = (the_one(memory.events(name)) for name in ("step_skipped", "rollback"))
    assert skip["skipped_updates"] == 1
    assert skip["signal"] == rollback["signal"]
    assert skip["trigger"]["spikes_in_a_row"] == 1
    assert rollback["trigger"]["spikes_in_a_row"] == 2
    assert rollback["trigger"]["value"] > rollback["trigger"]["highest"]
    assert (rollback["rewarm_from"], rollback["rewarm_steps"]) == (0.5, 100)
    assert [record.action for record in records].count("skip") == 1
    assert trainer.metrics_snapshot()["tolaria.rollback.total"] == 1


def test_after_a_rollback_the_rate_begins_at_half_and_climbs_back() -> None:
    trainer, _ = drilled(guard={"rewarm_steps": 10})
    again = [record.learning_rate for record in trainer.steps() if record.attempt == 1]
    plain = TolariaTrainer.from_job(two_task_job(), config=config(train={"epochs": 8}))
    rates = {record.step: record.learning_rate for record in plain.steps()}
    first = next(record for record in drilled_records() if record.attempt == 1).step
    # A record tells the rate after its step.
    assert again[0] == pytest.approx(0.55 * rates[first], rel=1e-6)
    assert again[9] == rates[first + 9]


def drilled_records() -> list[Any]:
    trainer, _ = drilled(guard={"rewarm_steps": 10})
    return list(trainer.steps())


def test_a_climb_back_is_resumed_in_the_middle(tmp_path: Path) -> None:
    settings = config(train={"epochs": 8}, snapshots={"every": 5}, checkpoints={"every": 5})

    def start(directory: Path) -> TolariaTrainer:
        return TolariaTrainer.from_job(
            two_task_job(), config=settings, directory=directory, drill=True
        )

    torch.manual_seed(0)
    whole = [record.learning_rate for record in start(tmp_path / "whole").steps()]
    torch.manual_seed(0)
    first = start(tmp_path / "cut")
    rates = []
    for record in first.steps():
        rates.append(record.learning_rate)
        if record.attempt == 1 and record.step % 20 == 19:
            first.stop()
    second = start(tmp_path / "cut")
    second.resume()
    assert second._parts.run.update.progress.rewarm_left > 0
    rates += [record.learning_rate for record in second.steps()]
    assert rates == whole


def test_a_halt_tells_the_last_values() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[0].sum() * math.nan

    memory = Memory()
    trainer = TolariaTrainer.from_job(two_task_job(loss=loss), config=config(), sinks=[memory])
    with pytest.raises(DivergenceError):
        list(trainer.steps())
    halted = the_one(memory.events("guard_halted"))
    assert "max_rollbacks" in halted["reason"]
    assert halted["signal"] == "loss"
    assert halted["trigger"]["not_finite_in_a_row"] == 4


def test_a_policy_that_changes_the_rate_declares_it_to_the_guard() -> None:
    settings = config(guard={"pause_steps": 1000}).model_copy(
        update={"policy": PolicyConfig(mode="wait")}
    )
    job = two_task_job(policy=Answers(ScaleLearningRate(0.9)), scheduler=None)
    trainer = TolariaTrainer.from_job(job, config=settings)
    guard = trainer._parts.run.guard
    assert guard.state_dict()["pause"] == [0, ""]
    list(trainer.steps())
    left, reason = guard.state_dict()["pause"]
    assert left > 900
    assert "learning rate" in reason
