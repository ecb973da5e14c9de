"""Small jobs that exercise everything a real one does: dropout, batch norm, momentum, schedule."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper.core.config import (
    CheckpointConfig,
    GuardConfig,
    RollbackConfig,
    SnapshotConfig,
    TolariaConfig,
    TrainConfig,
)
from esper.tolaria.job import TrainingJob


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16)
        )
        self.first = nn.Linear(16, 1)
        self.second = nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(inputs).relu()
        return self.first(hidden), self.second(hidden)


def two_task_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    inputs, target = batch
    first, second = model(inputs)
    return {
        "first": (first.squeeze(1) - target).square().mean(),
        "second": (second.squeeze(1) + inputs[:, 3:].sum(1).tanh()).square().mean(),
    }


def two_task_data(samples: int = 256) -> TensorDataset:
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(samples, 8, generator=generator)
    return TensorDataset(inputs, inputs[:, :4].sum(1).tanh())


def two_task_job(optimizer: str = "sgd", seed: int = 0, **changes: Any) -> TrainingJob:
    torch.manual_seed(seed)
    model = TwoTasks()
    if optimizer == "sgd":
        chosen: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    else:
        chosen = torch.optim.AdamW(model.parameters(), lr=0.01)
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": chosen,
        "data": two_task_data(),
        "loss": two_task_loss,
        "validation": two_task_data(64),
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(chosen, T_max=200),
        "batch_size": 16,
        "name": "two-tasks",
    }
    return TrainingJob(**(parts | changes))


def config(**sections: dict[str, Any]) -> TolariaConfig:
    return TolariaConfig(
        train=TrainConfig(**({"epochs": 3, "device": "cpu"} | sections.get("train", {}))),
        guard=GuardConfig(**sections.get("guard", {})),
        snapshots=SnapshotConfig(**sections.get("snapshots", {})),
        checkpoints=CheckpointConfig(
            # Waited for, so that each lies at the step that a test expects.
            **({"every": 10, "mode": "wait"} | sections.get("checkpoints", {}))
        ),
        rollback=RollbackConfig(**sections.get("rollback", {})),
    )
