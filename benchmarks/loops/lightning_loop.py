"""Lightning's trainer with logger, bar, checkpoints and summary off."""

import logging
from typing import Any

import lightning
import torch
from torch import Tensor

from loops.task import Task, loss_of

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class _Module(lightning.LightningModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.network = task.model
        self._optimizer = task.optimizer

    def training_step(self, batch: Any, _: int) -> Tensor:
        return loss_of(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer


def run(task: Task) -> None:
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(_Module(task), task.loader)
