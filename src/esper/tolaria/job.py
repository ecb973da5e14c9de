"""A training job: everything that is the user's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

from esper.leyline import EmergencySignal, Executor, JobError, Policy
from esper.tolaria.aggregation import Aggregator

# Both are called with the job's own model and batch, whatever their types are.
LossFunction = Callable[[Any, Any], Tensor | Mapping[str, Tensor | None]]
MetricFunction = Callable[[Any, Any], Mapping[str, Tensor | float]]


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What is trained, on what, and how.

    :param model: any module; it is moved to the configured device.
    :param optimizer: over the model's parameters.
    :param data: training data: a map-style data set, or a DataLoader over one. The order of the
        samples is Esper's own, so that a run can resume in the middle of an epoch.
    :param loss: called with the model and one batch; returns one scalar, or one for each task,
        None for a task that is absent from the batch.
    :param validation: data that metrics are computed on at the end of each epoch.
    :param metrics: called with the model and one validation batch, without gradients; returns
        means over the batch by name. Without it, the losses are what is validated.
    :param scheduler: stepped after every committed step; its lengths count steps, not epochs.
    :param aggregator: combines the gradients of several tasks; PCGrad by default.
    :param scaler: for mixed precision with float16.
    :param policy: asked at epoch boundaries how training should adapt.
    :param executor: carries out what concerns the model, such as :class:`esper.kasmina.Kasmina`.
    :param broadcast: called with each emergency of the run, beside training, until it succeeds.
    :param batch_size: samples in a batch, where ``data`` is a data set.
    :param name: names the run.
    :raises JobError: a part is of the wrong type.
    """

    model: nn.Module
    optimizer: Optimizer
    data: Dataset[Any] | DataLoader[Any]
    loss: LossFunction
    validation: Dataset[Any] | DataLoader[Any] | None = None
    metrics: MetricFunction | None = None
    scheduler: LRScheduler | None = None
    aggregator: Aggregator | None = None
    scaler: torch.amp.GradScaler | None = None
    policy: Policy | None = None
    executor: Executor | None = None
    broadcast: Callable[[EmergencySignal], Any] | None = None
    batch_size: int = 64
    name: str = "job"

    def __post_init__(self) -> None:
        _expect(self.model, nn.Module, "model")
        _expect(self.optimizer, Optimizer, "optimizer")
        if not callable(self.loss):
            raise JobError(f"loss is a {_kind(self.loss)}; give a function of (model, batch)")
        if self.metrics is not None and not callable(self.metrics):
            raise JobError(f"metrics is a {_kind(self.metrics)}; give a function of (model, batch)")
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise JobError(
                "scheduler is a ReduceLROnPlateau, which needs a metric at each step; "
                "give policy=esper.tamiyo.PlateauPolicy() instead"
            )
        if self.scheduler is not None:
            _expect(self.scheduler, LRScheduler, "scheduler")
        if self.aggregator is not None and not hasattr(self.aggregator, "weights"):
            raise JobError(
                f"aggregator is a {_kind(self.aggregator)}, which has no weights(gramian); "
                "give one of esper.tolaria.aggregation"
            )
        if self.batch_size < 1:
            raise JobError(f"batch_size is {self.batch_size}; give 1 or more")


def _expect(value: object, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise JobError(f"{name} is a {_kind(value)}; give a {kind.__module__}.{kind.__qualname__}")


def _kind(value: object) -> str:
    return type(value).__qualname__
