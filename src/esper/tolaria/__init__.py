"""Tolaria: the training engine."""

from esper.core.config import TolariaConfig
from esper.tolaria.guard import Guard
from esper.tolaria.guard.own_loop import GuardedTraining
from esper.tolaria.job import TrainingJob
from esper.tolaria.rollback import CheckpointStore, FastRollbackCache
from esper.tolaria.state import TrainState
from esper.tolaria.trainer import TolariaTrainer

__all__ = [
    "CheckpointStore",
    "FastRollbackCache",
    "Guard",
    "GuardedTraining",
    "TolariaConfig",
    "TolariaTrainer",
    "TrainState",
    "TrainingJob",
]
