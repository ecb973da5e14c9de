"""Esper trains PyTorch models that change while they train, and never loses a run."""

from importlib import import_module
from typing import TYPE_CHECKING

from esper._version import __version__

if TYPE_CHECKING:
    from esper.core.config import TolariaConfig
    from esper.leyline import StepRecord, SystemState
    from esper.tolaria import (
        CheckpointStore,
        FastRollbackCache,
        Guard,
        GuardedTraining,
        TolariaTrainer,
        TrainingJob,
        TrainState,
    )
    from esper.tolaria.aggregation import PCGrad, backward

_HOMES = {
    "CheckpointStore": "esper.tolaria",
    "FastRollbackCache": "esper.tolaria",
    "Guard": "esper.tolaria",
    "GuardedTraining": "esper.tolaria",
    "PCGrad": "esper.tolaria.aggregation",
    "StepRecord": "esper.leyline",
    "SystemState": "esper.leyline",
    "TolariaConfig": "esper.core.config",
    "TolariaTrainer": "esper.tolaria",
    "TrainState": "esper.tolaria",
    "TrainingJob": "esper.tolaria",
    "backward": "esper.tolaria.aggregation",
}

__all__ = [
    "CheckpointStore",
    "FastRollbackCache",
    "Guard",
    "GuardedTraining",
    "PCGrad",
    "StepRecord",
    "SystemState",
    "TolariaConfig",
    "TolariaTrainer",
    "TrainState",
    "TrainingJob",
    "__version__",
    "backward",
]


def __getattr__(name: str) -> object:
    # Looked up when first used, so that importing esper does not import torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'esper' has no attribute {name!r}")
