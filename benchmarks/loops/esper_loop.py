"""Esper with every duty idle, and with guard, snapshots and telemetry on."""

import tempfile
from pathlib import Path

from esper.core.config import GuardConfig, SnapshotConfig, TelemetryConfig, TrainConfig
from esper.nissa import JsonlSink
from esper.tolaria import TolariaConfig, TolariaTrainer, TrainingJob
from loops.task import Task, loss_of


def _job(task: Task) -> TrainingJob:
    return TrainingJob(model=task.model, optimizer=task.optimizer, data=task.loader, loss=loss_of)


def run_idle(task: Task) -> None:
    config = TolariaConfig(
        train=TrainConfig(epochs=1, device="cpu"),
        guard=GuardConfig(enabled=False),
        snapshots=SnapshotConfig(enabled=False),
        telemetry=TelemetryConfig(enabled=False),
    )
    for _ in TolariaTrainer.from_job(_job(task), config=config).steps():
        pass


def run_protected(task: Task) -> None:
    config = TolariaConfig(
        train=TrainConfig(epochs=1, device="cpu"), snapshots=SnapshotConfig(every=10)
    )
    with tempfile.TemporaryDirectory() as folder:
        sinks = [JsonlSink(Path(folder) / "events.jsonl")]
        for _ in TolariaTrainer.from_job(_job(task), config=config, sinks=sinks).steps():
            pass
