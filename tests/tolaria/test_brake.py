import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.leyline import Action, EmergencyLevel, EmergencySignal, StepRecord
from esper.tolaria import TolariaTrainer
from esper.tolaria.emergency import EmergencyWord
from esper.tolaria.listening import WORD
from support.jobs import config, two_task_job
from support.sinks import Memory


def started(
    directory: Path | None = None, **changes: Any
) -> tuple[TolariaTrainer, Iterator[StepRecord], Memory]:
    memory = Memory()
    trainer = TolariaTrainer.from_job(
        two_task_job(**changes),
        config=config(train={"epochs": 6}),
        sinks=[memory],
        directory=directory,
    )
    steps = trainer.steps()
    for _ in range(30):
        next(steps)
    return trainer, steps, memory


def weights(trainer: TolariaTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.job.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_minor_cuts_the_learning_rate_and_makes_careful() -> None:
    trainer, steps, memory = started(scheduler=None)
    before = next(steps).learning_rate
    trainer.emergency.escalate("minor", "restless")
    next(steps)
    assert next(steps).learning_rate == pytest.approx(before / 2)
    metrics = trainer.metrics_snapshot()
    assert metrics["tolaria.emergency.level"] == 1
    assert metrics["tolaria.mode.conservative"] == 1
    list(steps)
    assert memory.events("emergency_acted")
    assert memory.events("emergency_cleared"), "a healthy epoch ends it"
    assert trainer.metrics_snapshot()["tolaria.emergency.level"] == 0


@pytest.mark.parametrize(("level", "tier"), [("severe", "memory"), ("major", "disk")])
def test_severe_and_major_roll_back(tmp_path: Path, level: str, tier: str) -> None:
    trainer, steps, memory = started(tmp_path)
    trainer.emergency.escalate(level, "looks wrong")
    assert next(steps).action == Action.ROLLBACK
    next(steps)
    trainer._parts.hub.flush()
    (event,) = memory.events("rollback")
    assert event.data["tier"] == tier
    assert event.data["to_step"] <= 30 - 8
    assert "looks wrong" in event.message
    (acted,) = memory.events("emergency_acted") + memory.events("emergency_acted_late")
    assert acted.data["level"] == level
    list(steps)
    assert trainer.outcome == "completed"


def test_critical_freezes_the_weights_until_cleared_and_then_all_is_as_if_nothing_had_been() -> (
    None
):
    plain, untouched, _ = started()
    list(untouched)
    trainer, steps, memory = started()
    frozen = weights(trainer)
    seen: list[bool] = []

    def operate() -> None:
        time.sleep(0.3)
        seen.append(same(frozen, weights(trainer)))
        trainer.emergency.reset("repaired")

    operator = threading.Thread(target=operate)
    trainer.emergency.escalate("critical", "power")
    operator.start()
    began = time.monotonic()
    next(steps)
    assert time.monotonic() - began >= 0.3
    operator.join()
    assert seen == [True]
    list(steps)
    assert [event.name for event in memory.events("training_frozen")] == ["training_frozen"]
    assert memory.events("training_resumed")[0].data["seconds"] >= 0.25
    # The guard was stricter for a while; nothing it could have refused has come.
    assert same(weights(trainer), weights(plain))


def test_a_frozen_run_can_be_lowered_to_a_rollback(tmp_path: Path) -> None:
    trainer, steps, _ = started(tmp_path)
    trainer.emergency.escalate("critical", "power")
    operator = threading.Timer(0.2, lambda: trainer.emergency.downgrade("severe", "back a bit"))
    operator.start()
    assert next(steps).action == Action.ROLLBACK
    operator.join()
    list(steps)
    assert trainer.outcome == "completed"


def test_a_frozen_run_can_be_stopped_and_resumed(tmp_path: Path) -> None:
    trainer, steps, _ = started(tmp_path)
    frozen = weights(trainer)
    trainer.emergency.escalate("critical", "power")
    operator = threading.Timer(0.2, trainer.stop)
    operator.start()
    assert [record.action for record in steps] == [Action.SKIP]
    operator.join()
    assert trainer.outcome == "stopped"
    assert same(frozen, weights(trainer))
    again = TolariaTrainer.from_job(
        two_task_job(), config=config(train={"epochs": 6}), directory=tmp_path
    )
    again.resume()
    list(again.steps())
    assert again.outcome == "completed"
    assert again.metrics_snapshot()["tolaria.emergency.level"] == 0


def test_another_process_can_give_the_order(tmp_path: Path) -> None:
    _, steps, _ = started(tmp_path)
    with EmergencyWord(tmp_path / WORD) as theirs:
        sequence = theirs.set(EmergencyLevel.SEVERE, "from outside", "test")
        assert next(steps).action == Action.ROLLBACK
        next(steps)
        assert theirs.acknowledged is not None
        assert theirs.acknowledged[0] == sequence
    list(steps)


def test_a_run_that_is_halted_leaves_a_critical_word(tmp_path: Path) -> None:
    off = {"enabled": False}
    trainer = TolariaTrainer.from_job(
        two_task_job(loss=lambda model, batch: model(batch[0])[0].sum() * torch.nan),
        config=config(snapshots=off, checkpoints=off),
        directory=tmp_path,
    )
    with pytest.raises(Exception, match="halted"):
        list(trainer.steps())
    with EmergencyWord(tmp_path / WORD) as theirs:
        state = theirs.read()
    assert state is not None
    assert state.level is EmergencyLevel.CRITICAL
    assert "training is halted" in state.reason


def test_a_broadcast_that_fails_is_kept_and_succeeds_before_the_run_ends() -> None:
    told: list[EmergencySignal] = []
    failures = iter([True, False])

    async def broadcast(signal: EmergencySignal) -> None:
        await asyncio.sleep(0)
        if next(failures):
            raise ConnectionError("no line")
        told.append(signal)

    trainer, steps, memory = started(broadcast=broadcast)
    trainer.emergency.escalate("minor", "restless")
    next(steps)
    list(steps)
    assert [signal.reason for signal in told] == ["restless"]
    (failed,) = memory.events("emergency_broadcast_failed")
    assert failed.level == "critical"
    assert "no line" in failed.message
    metrics = trainer.metrics_snapshot()
    assert metrics["tolaria.emergency.broadcasts_total"] == 1
    assert metrics["tolaria.emergency.broadcast_failures_total"] == 1
    assert metrics["tolaria.timeout.emergency.error"] == 1
    assert metrics["tolaria.timeout.emergency.success"] == 1


def test_a_broadcast_that_never_succeeds_is_there_after_a_resume(tmp_path: Path) -> None:
    def broken(signal: EmergencySignal) -> None:
        raise ConnectionError("no line")

    trainer, steps, _ = started(tmp_path, broadcast=broken)
    trainer.emergency.escalate("minor", "restless")
    next(steps)
    trainer.stop()
    list(steps)
    told: list[EmergencySignal] = []
    again = TolariaTrainer.from_job(
        two_task_job(broadcast=told.append), config=config(), directory=tmp_path
    )
    again.resume()
    list(again.steps())
    assert [signal.reason for signal in told] == ["restless"]
