import time
from typing import Any

import torch

from esper.core.config import ConservativeConfig, PolicyConfig, TelemetryConfig
from esper.leyline import Action, ScaleLearningRate, SystemState
from esper.tolaria import TolariaTrainer
from support.jobs import config, two_task_job
from support.policies import Answers
from support.sinks import Memory


def poisoned(**changes: Any) -> tuple[TolariaTrainer, Memory]:
    memory = Memory()
    settings = config(train={"epochs": 12}).model_copy(update=changes)
    trainer = TolariaTrainer.from_job(two_task_job(), config=settings, sinks=[memory], drill=True)
    return trainer, memory


def test_a_rollback_makes_the_engine_careful_until_training_has_been_healthy_for_a_while() -> None:
    trainer, memory = poisoned(conservative=ConservativeConfig(healthy_steps=40))
    guard = trainer._parts.run.guard
    strictness: list[float] = []
    actions = []
    for record in trainer.steps():
        strictness.append(guard.strictness)
        actions.append(record.action)
    at = actions.index(Action.ROLLBACK)
    assert strictness[at - 1] == 1.0
    assert 0 < strictness[at] < 1
    assert strictness[-1] == 1.0
    entered, left = (
        memory.events("conservative_mode_entered"),
        memory.events("conservative_mode_left"),
    )
    assert [event.data["reason"] for event in entered] == ["rollback"]
    assert left[0].data["steps"] >= 40


def test_what_is_risky_waits_for_the_end_of_conservative_mode() -> None:
    memory, policy = Memory(), Answers(ScaleLearningRate(1.5))
    settings = config(train={"epochs": 12}).model_copy(
        update={
            "policy": PolicyConfig(mode="wait"),
            "conservative": ConservativeConfig(healthy_steps=10**6),
        }
    )
    job = two_task_job(policy=policy, scheduler=None)
    trainer = TolariaTrainer.from_job(job, config=settings, sinks=[memory], drill=True)
    list(trainer.steps())
    applied = [event.data["applied"] for event in memory.events("policy_answered")]
    assert True in applied
    assert applied[-1] is False
    assert (
        "no higher learning rate in conservative mode"
        in memory.events("policy_answered")[-1].message
    )
    assert trainer.metrics_snapshot()["tolaria.mode.conservative"] == 1


def test_conservative_mode_is_resumed(tmp_path: Any) -> None:
    settings = config(train={"epochs": 12}).model_copy(
        update={"conservative": ConservativeConfig(healthy_steps=10**6)}
    )
    first = TolariaTrainer.from_job(two_task_job(), config=settings, directory=tmp_path, drill=True)
    for record in first.steps():
        if record.action == Action.ROLLBACK:
            first.stop()
    second = TolariaTrainer.from_job(two_task_job(), config=settings, directory=tmp_path)
    second.resume()
    list(second.steps())
    assert second.metrics_snapshot()["tolaria.mode.conservative"] == 1
    assert second._parts.run.guard.strictness < 1


def test_a_slow_epoch_boundary_raises_an_alarm_and_nothing_else() -> None:
    class Slow(Answers):
        def decide(self, state: SystemState) -> None:
            time.sleep(0.03)

    memory, job = Memory(), two_task_job(policy=Slow(None))
    settings = config().model_copy(update={"policy": PolicyConfig(mode="wait")})
    trainer = TolariaTrainer.from_job(job, config=settings, sinks=[memory])
    list(trainer.steps())
    alarms = memory.events("epoch_budget_exceeded")
    assert len(alarms) == 3
    assert alarms[0].data["latency_ms"] > 30
    metrics = trainer.metrics_snapshot()
    assert metrics["tolaria.epoch.budget_exceeded_total"] == 3
    assert metrics["tolaria.epoch.boundary_ms"] > 30
    assert metrics["tolaria.rollback.total"] == 0
    assert metrics["tolaria.mode.conservative"] == 0
    plain = two_task_job()
    list(TolariaTrainer.from_job(plain, config=config()).steps())
    for ours, theirs in zip(job.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_state_of_an_epoch_carries_the_metrics_of_calls_and_mode() -> None:
    settings = config().model_copy(update={"telemetry": TelemetryConfig(epoch_boundary_ms=10**6)})
    trainer = TolariaTrainer.from_job(two_task_job(policy=Answers(None)), config=settings)
    metrics = list(trainer.run())[-1].metrics
    assert metrics["tolaria.timeout.tamiyo.success"] >= 1
    assert metrics["tolaria.timeout.kasmina.error"] == 0
    assert metrics["tolaria.mode.conservative"] == 0
    assert metrics["tolaria.epoch.boundary_p95_ms"] > 0
