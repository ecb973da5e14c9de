"""Leyline: the contracts. Messages, enums, protocols and errors; knows nothing else of Esper."""

from esper.leyline.commands import (
    AdaptationCommand,
    FieldReport,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
)
from esper.leyline.emergency import EmergencyLevel, EmergencySignal
from esper.leyline.errors import (
    CallCancelled,
    CheckpointError,
    ChildDied,
    ConfigError,
    DataError,
    DeadlineExceeded,
    DivergenceError,
    EsperError,
    JobError,
    LossError,
    RunError,
    StateError,
    WorkerClosed,
    WorkerFull,
)
from esper.leyline.protocols import Executor, Policy, PreparingExecutor, Sink, Stateful
from esper.leyline.records import Event, Level, Record, StepRecord, SystemState
from esper.leyline.verdict import COMMIT, Action, Tier, Verdict

__all__ = [
    "COMMIT",
    "Action",
    "AdaptationCommand",
    "CallCancelled",
    "CheckpointError",
    "ChildDied",
    "ConfigError",
    "DataError",
    "DeadlineExceeded",
    "DivergenceError",
    "EmergencyLevel",
    "EmergencySignal",
    "EsperError",
    "Event",
    "Executor",
    "FieldReport",
    "JobError",
    "Level",
    "LossError",
    "Policy",
    "PreparingExecutor",
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
    "WorkerClosed",
    "WorkerFull",
]
