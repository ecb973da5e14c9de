import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from esper.tolaria import TolariaTrainer
from esper.tolaria.rollback import CheckpointStore, FileSystem
from esper.tolaria.state import TrainState
from support.calls import until
from support.jobs import config, two_task_job
from support.sinks import Memory

BESIDE = {"mode": "overlap"}


class Gate(FileSystem):
    """A disk whose syncs stand still while it is shut, and fail when they are told to."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.error = 0

    def sync_directory(self, path: Path) -> None:
        self.waiting.set()
        self.open.wait()
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        super().sync_directory(path)


@pytest.fixture
def disk() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def trainer_on(disk: Gate, directory: Path, sink: Memory, **checkpoints: object) -> TolariaTrainer:
    torch.manual_seed(5)
    trainer = TolariaTrainer.from_job(
        two_task_job(),
        config=config(checkpoints=BESIDE | checkpoints),
        directory=directory,
        sinks=[sink],
    )
    store = trainer._parts.rollback.tiers.disk
    assert store is not None
    store._disk = store._journal._disk = disk
    return trainer


def weights(trainer: TolariaTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.job.model.parameters()]


def test_training_goes_on_while_a_checkpoint_is_written_and_gets_what_it_was(
    tmp_path: Path, disk: Gate
) -> None:
    sink = Memory()
    trainer = trainer_on(disk, tmp_path, sink, every=5)
    steps = trainer.steps()
    for _ in range(5):
        next(steps)
    disk.open.clear()
    for _ in range(12):
        next(steps)
    assert disk.waiting.is_set(), "the writer stands still, and training went on"
    assert sink.events("checkpoint_saved") == []
    assert trainer.metrics_snapshot()["tolaria.rollback.checkpoints_deferred_total"] > 0
    disk.open.set()
    list(steps)
    assert trainer.outcome == "completed"
    steps_saved = [event.data["step"] for event in sink.events("checkpoint_saved")]
    assert steps_saved[0] == 5
    assert steps_saved[-1] == trainer._parts.run.update.progress.step
    assert sink.events("checkpoint_failed") == []
    assert len(steps_saved) >= 3, "what fell due meanwhile is made up for"


def test_what_is_written_is_the_state_of_its_step_although_training_has_moved_on(
    tmp_path: Path, disk: Gate
) -> None:
    trainer = trainer_on(disk, tmp_path, Memory(), every=1000)
    steps = trainer.steps()
    for _ in range(7):
        next(steps)
    disk.open.clear()
    saver = trainer._parts.run.keeper._checkpoints
    assert saver is not None
    expected = {n: t.clone() for n, t in trainer.state.capture().tensors.items()}
    assert saver.take(7, trainer.state, None)
    for _ in range(20):
        next(steps)
    disk.open.set()
    saver.saver.wait()
    _, capture = CheckpointStore(tmp_path / "checkpoints").read_latest()
    assert capture.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bytes(capture.tensors[name].numpy()) == bytes(tensor.numpy()), name
    steps.close()


def test_a_disk_that_fails_is_told_and_counted_and_training_is_the_same(
    tmp_path: Path, disk: Gate
) -> None:
    sink, plain = Memory(), Memory()
    disk.error = errno.EIO
    failing = trainer_on(disk, tmp_path / "failing", sink)
    list(failing.steps())
    whole = trainer_on(Gate(), tmp_path / "whole", plain)
    list(whole.steps())
    assert all(torch.equal(a, b) for a, b in zip(weights(failing), weights(whole), strict=True))
    assert failing.outcome == "completed"
    failures = sink.events("checkpoint_failed")
    assert "Input/output error" in failures[0].message
    metrics = failing.metrics_snapshot()
    assert metrics["tolaria.rollback.checkpoint_failures_total"] == len(failures) >= 3
    assert metrics["tolaria.rollback.checkpoints_total"] == 0


def test_a_disk_that_hangs_is_given_up_on_and_never_heard_of_again(
    tmp_path: Path, disk: Gate
) -> None:
    sink = Memory()
    trainer = trainer_on(disk, tmp_path, sink, every=5, save_deadline_ms=200)
    steps = trainer.steps()
    next(steps)
    disk.open.clear()
    began = time.monotonic()
    list(steps)
    assert time.monotonic() - began < 8
    assert trainer.outcome == "completed"
    assert "did not end within 200 ms" in sink.events("checkpoint_failed")[0].message
    assert trainer.metrics_snapshot()["tolaria.timeout.checkpoint.timeout"] >= 1
    disk.open.set()
    until(lambda: not trainer._parts.outside.worker.stats().live)
    assert CheckpointStore(tmp_path / "checkpoints").list() == [], "a late one is never committed"


def test_the_best_epoch_by_a_metric_is_kept(tmp_path: Path) -> None:
    sink = Memory()
    trainer = TolariaTrainer.from_job(
        two_task_job(),
        config=config(
            train={"epochs": 6},
            checkpoints={"every": 1000, "keep": 2, "best_metric": "first"},
        ),
        directory=tmp_path,
        sinks=[sink],
    )
    losses = {state.step: state.validation["first"] for state in trainer.run()}
    kept = CheckpointStore(tmp_path / "checkpoints").list()
    best = min(losses, key=lambda step: losses[step])
    assert best in [info.step for info in kept]
    assert len(kept) <= 3
    assert next(i.metrics["first"] for i in kept if i.step == best) == losses[best]


def test_a_state_on_which_a_checkpoint_waits_takes_memory_of_its_own_without_snapshots(
    tmp_path: Path,
) -> None:
    trainer = TolariaTrainer.from_job(
        two_task_job(),
        config=config(snapshots={"enabled": False}, checkpoints=BESIDE | {"every": 4}),
        directory=tmp_path,
    )
    list(trainer.steps())
    assert trainer.metrics_snapshot()["tolaria.rollback.checkpoints_total"] >= 2
    assert trainer.metrics_snapshot()["tolaria.rollback.save_stall_ms"] > 0
    assert isinstance(trainer.state, TrainState)
