"""Core: shared foundations. Configuration and its sources, deadlines, the worker; no torch."""

from esper.core.breaker import BreakerState, CircuitBreaker
from esper.core.deadline import Deadline
from esper.core.settings import EsperSettings
from esper.core.worker import (
    AsyncWorker,
    Isolation,
    Outcome,
    WorkerHandle,
    check_cancelled,
    shared_worker,
)
from esper.leyline import (
    CallCancelled,
    ChildDied,
    DeadlineExceeded,
    WorkerClosed,
    WorkerFull,
)

__all__ = [
    "AsyncWorker",
    "BreakerState",
    "CallCancelled",
    "ChildDied",
    "CircuitBreaker",
    "Deadline",
    "DeadlineExceeded",
    "EsperSettings",
    "Isolation",
    "Outcome",
    "WorkerClosed",
    "WorkerFull",
    "WorkerHandle",
    "check_cancelled",
    "shared_worker",
]
