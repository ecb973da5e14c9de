import threading
from pathlib import Path

import pytest

from esper.core.config import PolicyConfig
from esper.leyline import AdaptationCommand, ScaleLearningRate, SystemState
from esper.tamiyo import PlateauPolicy
from esper.tolaria import TolariaTrainer
from support.jobs import config, two_task_job
from support.sinks import Memory


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
    short = config().model_copy(update={"policy": PolicyConfig(deadline_ms=1)})
    trainer = TolariaTrainer.from_job(two_task_job(policy=policy), config=short, sinks=[memory])
    records = list(trainer.steps())
    policy.release.set()
    assert trainer.outcome == "completed"
    assert len(records) == 48
    assert memory.events("policy_late")
    assert not memory.events("policy_answered")
    assert trainer.metrics_snapshot()["tolaria.timeout.tamiyo.timeout"] >= 1


def test_a_policy_that_fails_is_told_of_and_asked_again() -> None:
    memory = Memory()
    trainer = TolariaTrainer.from_job(two_task_job(policy=Fails()), config=config(), sinks=[memory])
    list(trainer.steps())
    assert trainer.outcome == "completed"
    assert len(memory.events("policy_failed")) == 2
    assert "ValueError: no idea" in memory.events("policy_failed")[0].message


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


@pytest.mark.parametrize("every", [1, 2])
def test_the_policy_is_asked_every_so_many_epochs(every: int) -> None:
    asked: list[int] = []

    class Notes:
        def decide(self, state: SystemState) -> AdaptationCommand | None:
            asked.append(state.epoch)
            return None

    changed = config(train={"epochs": 4}).model_copy(update={"policy": PolicyConfig(every=every)})
    list(TolariaTrainer.from_job(two_task_job(policy=Notes()), config=changed).steps())
    assert asked == [epoch for epoch in range(4) if (epoch + 1) % every == 0]
