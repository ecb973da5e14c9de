import dataclasses
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.core.config import PolicyConfig, WorkerConfig
from esper.core.worker import check_cancelled, make_worker
from esper.leyline import (
    AdaptationCommand,
    ConfigError,
    FieldReport,
    Policy,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    SystemState,
)
from esper.tamiyo import PlateauPolicy
from esper.tolaria import TolariaTrainer
from support import policies
from support.jobs import config, two_task_job
from support.sinks import Memory

QUICK = WorkerConfig(grace_ms=1, shutdown_timeout_s=1)


class Hangs:
    """Never answers, until it is let go."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def decide(self, state: SystemState) -> AdaptationCommand | None:
        self.release.wait()
        return ScaleLearningRate(1e-9)


class Fails:
    def decide(self, state: SystemState) -> AdaptationCommand | None:
        raise ValueError("no idea")


def test_a_policy_that_hangs_changes_nothing_and_is_counted() -> None:
    policy, memory = Hangs(), Memory()
    short = config(train={"epochs": 12}).model_copy(
        update={"policy": PolicyConfig(deadline_ms=1), "worker": QUICK}
    )
    with make_worker(QUICK) as worker:
        trainer = TolariaTrainer.from_job(
            two_task_job(policy=policy), config=short, sinks=[memory], worker=worker
        )
        records = list(trainer.steps())
        policy.release.set()
    assert trainer.outcome == "completed"
    assert len(records) == 192
    assert memory.events("timeout_inference")
    assert memory.events("tamiyo_timeout")
    assert not memory.events("policy_answered")
    assert memory.events("policy_unstoppable")
    assert trainer.metrics_snapshot()["tolaria.timeout.tamiyo.timeout"] >= 1


def test_a_policy_that_fails_is_told_of_and_asked_again() -> None:
    memory = Memory()
    trainer = TolariaTrainer.from_job(two_task_job(policy=Fails()), config=config(), sinks=[memory])
    list(trainer.steps())
    assert trainer.outcome == "completed"
    assert len(memory.events("tamiyo_error")) == 2
    assert "ValueError: no idea" in memory.events("tamiyo_error")[0].message


def test_a_question_that_was_open_is_asked_again_after_a_resume(tmp_path: Path) -> None:
    def start(directory: Path) -> TolariaTrainer:
        policy = PlateauPolicy(patience=1, factor=0.5, threshold=0.9)
        job = two_task_job(policy=policy, scheduler=None)
        return TolariaTrainer.from_job(job, config=config(train={"epochs": 5}), directory=directory)

    whole = [record.learning_rate for record in start(tmp_path / "whole").steps()]
    assert len(set(whole)) > 1
    first = start(tmp_path / "cut")
    for record in first.steps():
        if record.step == 36:
            first.stop()
    second = start(tmp_path / "cut")
    second.resume()
    assert [record.learning_rate for record in second.steps()] == whole[37:]


def test_a_question_about_what_is_not_finite_is_asked_again_too(tmp_path: Path) -> None:
    asked: list[float] = []

    class Notes:
        isolation = "thread"

        def decide(self, state: SystemState) -> AdaptationCommand | None:
            asked.append(state.validation["score"])
            return None

    def start() -> TolariaTrainer:
        job = two_task_job(policy=Notes(), metrics=lambda model, batch: {"score": math.nan})
        return TolariaTrainer.from_job(job, config=config(train={"epochs": 3}), directory=tmp_path)

    first = start()
    for record in first.steps():
        if record.step == 20:
            assert first._parts.companions.state_dict()["question"] is not None
            first.stop()
    second = start()
    second.resume()
    list(second.steps())
    assert second.outcome == "completed"
    assert all(map(math.isnan, asked))


@pytest.mark.parametrize("every", [1, 2])
def test_the_policy_is_asked_every_so_many_epochs(every: int) -> None:
    asked: list[int] = []

    class Notes:
        def decide(self, state: SystemState) -> AdaptationCommand | None:
            asked.append(state.epoch)
            return None

    changed = config(train={"epochs": 6}).model_copy(update={"policy": PolicyConfig(every=every)})
    list(TolariaTrainer.from_job(two_task_job(policy=Notes()), config=changed).steps())
    # What is asked at the very end may be cancelled before it begins.
    assert [e for e in asked if e < 5] == [e for e in range(5) if (e + 1) % every == 0]


HANGING = [policies.Spins, policies.HoldsTheInterpreter, policies.Sleeps, policies.Awaits]


@pytest.mark.parametrize("hanging", [*HANGING, policies.Swallows])
@pytest.mark.parametrize("mode", ["overlap", "wait"])
def test_with_a_policy_that_always_hangs_a_run_ends_in_the_weights_of_one_without(
    hanging: type[Policy], mode: str
) -> None:
    alone = two_task_job()
    list(TolariaTrainer.from_job(alone, config=config(train={"epochs": 12})).steps())
    memory, job = Memory(), two_task_job(policy=hanging())
    section = PolicyConfig.model_validate({"deadline_ms": 20, "mode": mode})
    changed = config(train={"epochs": 12}).model_copy(update={"policy": section})
    worker = make_worker(QUICK)
    trainer = TolariaTrainer.from_job(job, config=changed, sinks=[memory], worker=worker)
    list(trainer.steps())
    metrics = trainer.metrics_snapshot()
    worker.shutdown(0.0)
    for ours, theirs in zip(job.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert memory.events("timeout_inference")
    assert metrics["tolaria.timeout.tamiyo.success"] == 0
    assert metrics["tolaria.timeout.tamiyo.timeout"] >= 1
    if mode == "wait":
        assert metrics["tolaria.timeout.tamiyo.timeout"] == 3
        assert metrics["tolaria.timeout.tamiyo.refused"] == 9
        assert metrics["tolaria.mode.conservative"] == 1
        assert len(memory.events("breaker_opened")) == 1
        assert len(memory.events("conservative_mode_entered")) == 2


def test_a_policy_in_a_process_keeps_what_it_has_learnt() -> None:
    memory, policy = Memory(), policies.Counts()
    section = PolicyConfig(mode="wait")
    changed = config(train={"epochs": 5}).model_copy(update={"policy": section})
    job = two_task_job(policy=policy)
    list(TolariaTrainer.from_job(job, config=changed, sinks=[memory]).steps())
    assert policy.asked == 5
    assert [event.step for event in memory.events("policy_answered")] == [48]


@pytest.mark.parametrize("answer", ["faster", ScaleLearningRate(math.nan), ScaleLearningRate(-1.0)])
def test_an_answer_that_is_no_sound_command_is_refused(answer: object) -> None:
    memory, job = Memory(), two_task_job(policy=policies.Answers(answer), scheduler=None)
    changed = config().model_copy(update={"policy": PolicyConfig(mode="wait")})
    list(TolariaTrainer.from_job(job, config=changed, sinks=[memory]).steps())
    assert len(memory.events("policy_answered")) == 3
    assert not memory.events("policy_answered")[0].data["applied"]
    assert job.optimizer.param_groups[0]["lr"] == 0.02


def test_a_policy_is_refused_an_isolation_that_does_not_suit_it() -> None:
    changed = config().model_copy(update={"policy": PolicyConfig(isolation="async")})
    with pytest.raises(ConfigError, match="no coroutine function"):
        TolariaTrainer.from_job(two_task_job(policy=policies.Spins()), config=changed)


class Prepares:
    """An executor that does the long part beside training."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.seconds, self.error = seconds, error
        self.applied: list[object] = []

    def prepare(self, command: AdaptationCommand) -> str:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            check_cancelled()
            time.sleep(0.001)
        return threading.current_thread().name

    def apply(self, command: AdaptationCommand) -> FieldReport:
        raise AssertionError("not without preparation")

    def apply_prepared(self, command: AdaptationCommand, prepared: str) -> FieldReport:
        if self.error is not None:
            raise self.error
        self.applied.append((command, prepared, threading.current_thread().name))
        return FieldReport("seed", applied=True, detail="grown")


GERMINATE = SeedCommand("trunk", SeedOperation.GERMINATE)


def _grow(executor: Prepares, **policy: Any) -> Memory:
    memory, job = Memory(), two_task_job(policy=policies.Answers(GERMINATE))
    section = PolicyConfig(mode="wait", **policy)
    changed = config(train={"epochs": 12}).model_copy(update={"policy": section})
    worker = make_worker(QUICK)
    with worker:
        list(
            TolariaTrainer.from_job(
                dataclasses.replace(job, executor=executor),
                config=changed,
                sinks=[memory],
                worker=worker,
            ).steps()
        )
    return memory


def test_an_executor_prepares_beside_training_and_applies_on_its_thread() -> None:
    executor = Prepares()
    _grow(executor)
    assert executor.applied
    for command, prepared_on, applied_on in executor.applied:
        assert command == GERMINATE
        assert prepared_on.startswith("esper-call")
        assert applied_on == threading.current_thread().name


def test_an_executor_that_is_late_loses_the_command_and_growth_stops_after_the_second_time() -> (
    None
):
    executor = Prepares(seconds=10)
    memory = _grow(executor, prepare_deadline_ms=5)
    assert not executor.applied
    assert memory.events("kasmina_timeout")
    refused = [event.message for event in memory.events("policy_answered")]
    assert any("kasmina" in message for message in refused)
    assert any("no growth in conservative mode" in message for message in refused)


def test_an_executor_that_raises_is_contained() -> None:
    memory = _grow(Prepares(error=RuntimeError("does not fit")))
    assert "does not fit" in memory.events("kasmina_error")[0].message
    assert memory.events("run_ended")[0].data["outcome"] == "completed"
