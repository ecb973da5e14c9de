"""What an aggregator remembers belongs to the run: it survives resumes and is rolled back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torchjd.aggregation as torchjd

from esper import TolariaTrainer
from esper.core.config import (
    CheckpointConfig,
    GuardConfig,
    SnapshotConfig,
    TolariaConfig,
    TrainConfig,
)
from esper.tolaria.aggregation import Aggregator, PCGrad, Refreshed, TorchJDWeighting
from support.jobs import two_task_job

CONFIG = TolariaConfig(
    train=TrainConfig(epochs=6),
    snapshots=SnapshotConfig(every=5),
    checkpoints=CheckpointConfig(every=7),
    guard=GuardConfig(margin=2),
)
AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
    "refreshed": lambda: Refreshed(PCGrad(), every=4),
    "GradVac": lambda: TorchJDWeighting(torchjd.GradVacWeighting()),
    "PCD, refreshed": lambda: Refreshed(TorchJDWeighting(torchjd.PCDWeighting()), every=3),
}
every_aggregator = pytest.mark.parametrize("make", AGGREGATORS.values(), ids=list(AGGREGATORS))


def start(
    make: Callable[[], Aggregator], directory: Path, *, drill: bool = False
) -> TolariaTrainer:
    job = two_task_job(aggregator=make())
    return TolariaTrainer.from_job(job, config=CONFIG, directory=directory, drill=drill)


@every_aggregator
@pytest.mark.parametrize("cut", [1, 14])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    make: Callable[[], Aggregator], cut: int, tmp_path: Path
) -> None:
    expected = [record.losses for record in start(make, tmp_path / "whole").steps()]
    first = start(make, tmp_path / "cut")
    for record in first.steps():
        if record.step == cut - 1:
            first.stop()
    second = start(make, tmp_path / "cut")
    assert second.resume() == cut
    assert [record.losses for record in second.steps()] == expected[cut:]


@every_aggregator
def test_a_rollback_takes_it_back(make: Callable[[], Aggregator], tmp_path: Path) -> None:
    trainer = start(make, tmp_path, drill=True)
    records = list(trainer.steps())
    assert trainer.metrics_snapshot()["tolaria.rollback.total"] >= 1
    assert records[-1].loss < records[0].loss
