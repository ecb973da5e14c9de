"""Hugging Face's Trainer with reports, saves and progress off; it reads the same order."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from loops.task import BATCH_SIZE, Task


class _Model(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": functional.cross_entropy(self.network(images), labels)}


class _Sequential(Trainer):
    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def _collate(samples: list[Any]) -> dict[str, Tensor]:
    images, labels = torch.utils.data.default_collate(samples)
    return {"images": images, "labels": labels}


def run(task: Task) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            lr_scheduler_type="constant",
        )
        trainer = _Sequential(
            model=_Model(task.model),
            args=arguments,
            train_dataset=task.loader.dataset,
            data_collator=_collate,
            optimizers=(task.optimizer, None),
        )
        trainer.train()
