import dataclasses
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esper.leyline import (
    AdaptationCommand,
    CheckpointError,
    DivergenceError,
    Event,
    FieldReport,
    LossError,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    StepRecord,
    SystemState,
)
from esper.tolaria import CheckpointStore, TolariaConfig, TolariaTrainer
from support.jobs import config, two_task_data, two_task_job
from support.sinks import Memory


def weights(trainer: TolariaTrainer) -> list[Tensor]:
    return [tensor.clone() for tensor in trainer.job.model.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def test_a_run_yields_one_state_per_epoch_and_learns() -> None:
    trainer = TolariaTrainer.from_job(two_task_job(), config=config())
    states = list(trainer.run())
    assert [state.epoch for state in states] == [0, 1, 2]
    assert [state.step for state in states] == [16, 32, 48]
    assert states[-1].losses["first"] < states[0].losses["first"] / 2
    assert set(states[0].validation) == {"first", "second"}
    assert trainer.outcome == "completed"


def test_steps_yield_one_record_per_step_with_the_conflict_of_the_tasks() -> None:
    records = list(TolariaTrainer.from_job(two_task_job(), config=config()).steps())
    assert [record.step for record in records] == list(range(48))
    assert [(r.epoch, r.batch) for r in records[15:17]] == [(0, 15), (1, 0)]
    assert all(set(r.losses) == {"first", "second"} for r in records)
    assert all(r.loss == pytest.approx(sum(r.losses.values())) for r in records)
    assert any(r.conflicts == 1 for r in records)
    assert all((r.conflicts == 1) == (r.cosines["first|second"] < 0) for r in records)
    assert all(r.learning_rate > 0 and r.gradient_norm for r in records)
    assert set(records[0].timings_ms) == {
        "keep", "data", "forward", "backward", "judge", "commit"
    }  # fmt: skip


def test_a_single_loss_trains_exactly_like_a_plain_loop() -> None:
    dataset = two_task_data()

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]).squeeze(1) - batch[1]).square().mean()

    model, optimizer = build()
    # torch's DataLoader draws from the global generator at each epoch unless it has its own.
    loader = DataLoader(dataset, batch_size=16, generator=torch.Generator())
    torch.manual_seed(2)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    expected = [p.clone() for p in model.parameters()]
    model, optimizer = build()
    torch.manual_seed(2)
    trainer = TolariaTrainer(model, optimizer, loader, loss, config=config(train={"epochs": 2}))
    list(trainer.run())
    assert same(list(model.parameters()), expected)


def test_the_parts_that_protect_do_not_change_what_is_learnt() -> None:
    bare = {"enabled": False}
    trainers = [
        TolariaTrainer.from_job(two_task_job(), config=config()),
        TolariaTrainer.from_job(two_task_job(), config=config(guard=bare, snapshots=bare)),
    ]
    for trainer in trainers:
        torch.manual_seed(0)
        list(trainer.run())
    assert same(weights(trainers[0]), weights(trainers[1]))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("cut", [10, 20, 32])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, optimizer: str, cut: int
) -> None:
    def start(directory: Path, sinks: tuple[Memory, ...] = ()) -> TolariaTrainer:
        torch.manual_seed(9)
        random.seed(9)
        job = two_task_job(optimizer)
        torch.manual_seed(9)
        return TolariaTrainer.from_job(job, config=config(), directory=directory, sinks=sinks)

    whole = start(tmp_path / "whole")
    expected_records = list(whole.steps())
    first = start(tmp_path / "cut")
    for record in first.steps():
        if record.step == cut - 1:
            first.stop()
    assert first.outcome == "stopped"
    torch.manual_seed(1234)
    second = start(tmp_path / "cut")
    torch.manual_seed(4321)
    assert second.resume() == cut
    records = list(second.steps())
    assert [r.losses for r in records] == [r.losses for r in expected_records[cut:]]
    assert same(weights(second), weights(whole))
    assert {r.attempt for r in records} == {1}


def test_epoch_means_do_not_depend_on_an_interruption(tmp_path: Path) -> None:
    whole = list(TolariaTrainer.from_job(two_task_job(), config=config()).run())
    torch.manual_seed(5)
    first = TolariaTrainer.from_job(two_task_job(), config=config(), directory=tmp_path)
    torch.manual_seed(5)
    trainers = [TolariaTrainer.from_job(two_task_job(), config=config()), first]
    states = []
    for trainer in trainers:
        torch.manual_seed(7)
        if trainer is first:
            for record in trainer.steps():
                if record.step == 20:
                    trainer.stop()
            states = trainer._parts.run.epochs.take_finished()
            again = TolariaTrainer.from_job(two_task_job(), config=config(), directory=tmp_path)
            again.resume()
            states += list(again.run())
        else:
            whole = list(trainer.run())
    assert [s.losses for s in states] == [s.losses for s in whole]
    assert [s.validation for s in states] == [s.validation for s in whole]


def drill_config() -> TolariaConfig:
    return config(train={"epochs": 8}, snapshots={"every": 5}, guard={"warmup": 10})


def test_a_poisoned_batch_is_taken_back_and_skipped(tmp_path: Path) -> None:
    memory = Memory()
    trainer = TolariaTrainer.from_job(
        two_task_job(), config=drill_config(), sinks=[memory], drill=True
    )
    records = list(trainer.steps())
    rollbacks = memory.events("rollback")
    assert len(memory.events("drill_injected")) == 1
    assert len(rollbacks) == 1
    data = rollbacks[0].data
    poisoned = memory.events("drill_injected")[0].data["step"]
    assert data["to_step"] < poisoned <= data["from_step"]
    assert [4, 6] in data["skipped_batches"], "int(0.55 * 8 * 16) is batch 6 of epoch 4"
    assert len(data["skipped_samples"]) == 16 * len(data["skipped_batches"])
    kept = [r for r in records if r.attempt == 1]
    assert not any([r.epoch, r.batch] in data["skipped_batches"] for r in kept)
    assert all(math.isfinite(r.loss) for r in records)
    assert records[-1].loss < 0.5
    assert trainer.outcome == "completed"
    assert trainer.metrics_snapshot()["tolaria.rollback.total"] == 1


def test_a_rollback_restores_the_exact_course() -> None:
    """Up to the restored step the second attempt must repeat the first, but for skipped batches."""
    memory = Memory()
    # The learning rate is part of the course: it is not cut here.
    settings = config(
        train={"epochs": 8}, snapshots={"every": 5}, guard={"warmup": 10, "rate_cut": 1.0}
    )
    trainer = TolariaTrainer.from_job(two_task_job(), config=settings, sinks=[memory], drill=True)
    records = list(trainer.steps())
    back_to = memory.events("rollback")[0].data["to_step"]
    skipped = [tuple(batch) for batch in memory.events("rollback")[0].data["skipped_batches"]]
    before = {(r.epoch, r.batch): r.losses for r in records if r.attempt == 0}
    again = [r for r in records if r.attempt == 1][:4]
    assert again[0].step == back_to
    until = next((i for i, r in enumerate(again) if (r.epoch, r.batch) in skipped), 4)
    for record in again[:until]:
        assert record.losses == before[record.epoch, record.batch]


def test_training_that_cannot_be_saved_halts_with_the_reason(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]).squeeze(1) - batch[1]).square().mean() * math.nan

    model = nn.Linear(8, 1)
    data = DataLoader(two_task_data(), batch_size=8)
    trainer = TolariaTrainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data, loss, config=config()
    )
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DivergenceError, match="not finite"):
        list(trainer.run())
    assert trainer.outcome == "halted"
    assert same(list(model.parameters()), before), "no non-finite update may reach the weights"


def test_a_nan_batch_is_skipped_and_counted() -> None:
    dataset = two_task_data()
    dataset.tensors[0][3] = math.nan
    memory = Memory()
    job = two_task_job(data=dataset, validation=None)
    trainer = TolariaTrainer.from_job(job, config=config(train={"epochs": 1}), sinks=[memory])
    states = list(trainer.run())
    assert states[0].skipped == 1
    assert states[0].validation == {}
    assert len(memory.events("step_skipped")) == 1
    assert all(p.isfinite().all() for p in job.model.parameters())


def test_a_failing_loss_ends_the_run_as_failed() -> None:
    class BrokenError(Exception):
        pass

    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise BrokenError

    memory = Memory()
    trainer = TolariaTrainer.from_job(two_task_job(loss=loss), config=config(), sinks=[memory])
    with pytest.raises(BrokenError):
        list(trainer.run())
    assert trainer.outcome == "failed"
    assert memory.events("run_ended")[0].data["error"].startswith("BrokenError")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: {"left": x}, "'left' has shape"),
        (lambda x: x.detach().sum(), "carries no gradient"),
        (lambda x: 3.0, "returned a float"),
        (lambda x: {}, "no loss"),
        (lambda x: {"left": 1.0}, "'left' is a float"),
    ],
)
def test_a_loss_that_is_no_scalar_is_named(returned: Any, message: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        return returned(model(batch[0])[0])

    trainer = TolariaTrainer.from_job(two_task_job(loss=loss), config=config())
    with pytest.raises(LossError, match=message):
        list(trainer.run())


def test_leaving_the_generator_saves_and_counts_as_stopped(tmp_path: Path) -> None:
    trainer = TolariaTrainer.from_job(two_task_job(), config=config(), directory=tmp_path)
    for record in trainer.steps():
        if record.step == 6:
            break
    del record
    assert trainer.outcome == "stopped"
    again = TolariaTrainer.from_job(two_task_job(), config=config(), directory=tmp_path)
    assert again.resume() == 7


def test_resuming_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keeps no checkpoints"):
        TolariaTrainer.from_job(two_task_job(), config=config()).resume()
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        TolariaTrainer.from_job(two_task_job(), config=config(), directory=tmp_path).resume()


class HalvesOnce:
    """A policy that asks for one change of the learning rate."""

    def __init__(self, command: AdaptationCommand | None = None) -> None:
        self.command = command or ScaleLearningRate(0.5)
        self.asked: list[SystemState] = []

    def decide(self, state: SystemState) -> AdaptationCommand | None:
        self.asked.append(state)
        return self.command if state.epoch == 0 else None


def test_a_policy_changes_the_learning_rate_an_epoch_later() -> None:
    policy, memory = HalvesOnce(), Memory()
    job = two_task_job(policy=policy, scheduler=None)
    records = list(TolariaTrainer.from_job(job, config=config(), sinks=[memory]).steps())
    rates = {record.epoch: record.learning_rate for record in records}
    assert rates == {0: 0.02, 1: 0.02, 2: 0.01}
    assert "0.02 -> 0.01" in memory.events("policy_answered")[0].message


class Widening:
    def __init__(self) -> None:
        self.commands: list[AdaptationCommand] = []

    def apply(self, command: AdaptationCommand) -> FieldReport:
        self.commands.append(command)
        return FieldReport("seed", applied=True, detail="grown")


def test_a_seed_command_goes_to_the_executor_and_is_refused_without_one() -> None:
    command = SeedCommand("trunk", SeedOperation.GERMINATE, "mlp")
    executor, with_it, without = Widening(), Memory(), Memory()
    job = two_task_job(policy=HalvesOnce(command))
    list(
        TolariaTrainer.from_job(
            dataclasses.replace(job, executor=executor), config=config(), sinks=[with_it]
        ).steps()
    )
    assert executor.commands == [command]
    job = two_task_job(policy=HalvesOnce(command))
    list(TolariaTrainer.from_job(job, config=config(), sinks=[without]).steps())
    answers = [memory.events("policy_answered")[0].data["applied"] for memory in (with_it, without)]
    assert answers == [True, False]


def test_telemetry_holds_every_step_and_the_ending(tmp_path: Path) -> None:
    memory = Memory()
    list(TolariaTrainer.from_job(two_task_job(), config=config(), sinks=[memory]).run())
    assert len([r for r in memory.records if isinstance(r, StepRecord)]) == 48
    assert memory.events("run_started")[0].data["steps_per_epoch"] == 16
    ended = memory.events("run_ended")[0].data
    assert ended["outcome"] == "completed"
    assert ended["steps"] == 48
    assert isinstance(memory.records[-1], Event)


def test_integer_batches_cannot_be_drilled_and_say_so() -> None:
    from esper.leyline import DataError

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].float()).square().mean()

    job = two_task_job(data=TensorDataset(torch.arange(64).reshape(8, 8)), loss=loss)
    job = two_task_job(
        model=nn.Linear(8, 1),
        data=TensorDataset(torch.ones(64, 8, dtype=torch.long)),
        loss=loss,
        validation=None,
    )
    with pytest.raises(DataError, match="--no-drill"):
        list(TolariaTrainer.from_job(job, config=config(), drill=True).run())


def test_a_program_that_ends_in_the_middle_of_a_run_saves_it_and_ends_well(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from esper.tolaria import TolariaTrainer\n"
        "from support.jobs import config, two_task_job\n"
        "job, directory = two_task_job(), Path(sys.argv[1])\n"
        "trainer = TolariaTrainer.from_job(job, config=config(), directory=directory)\n"
        "steps = trainer.steps()\n"
        "for _ in range(17): next(steps)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=19,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert CheckpointStore(tmp_path / "checkpoints").list()[0].step == 17
