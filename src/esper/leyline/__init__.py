"""Leyline: the contracts. Messages, enums, protocols and errors; knows nothing else of Esper."""

from esper.leyline.commands import (
    AdaptationCommand,
    FieldReport,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
)
from esper.leyline.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    EsperError,
    JobError,
    LossError,
    RunError,
    StateError,
)
from esper.leyline.protocols import Executor, Policy, Sink, Stateful
from esper.leyline.records import Event, Level, Record, StepRecord, SystemState
from esper.leyline.verdict import COMMIT, Action, Tier, Verdict

__all__ = [
    "COMMIT",
    "Action",
    "AdaptationCommand",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "EsperError",
    "Event",
    "Executor",
    "FieldReport",
    "JobError",
    "Level",
    "LossError",
    "Policy",
    "Record",
    "RunError",
    "ScaleLearningRate",
    "SeedCommand",
    "SeedOperation",
    "Sink",
    "StateError",
    "Stateful",
    "StepRecord",
    "SystemState",
    "Tier",
    "Verdict",
]
