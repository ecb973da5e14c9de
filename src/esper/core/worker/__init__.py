"""Calls beside the caller, under deadlines that hold: coroutines, threads, processes."""

from esper.core.worker.call import Isolation, Outcome, WorkerHandle, check_cancelled
from esper.core.worker.child import RemoteError
from esper.core.worker.shared import make_worker, shared_worker
from esper.core.worker.shared_block import allocate_shared
from esper.core.worker.stats import CallStats, LiveCall, LoopStall, ShutdownReport, WorkerStats
from esper.core.worker.worker import AsyncWorker, choose_isolation

__all__ = [
    "AsyncWorker",
    "CallStats",
    "Isolation",
    "LiveCall",
    "LoopStall",
    "Outcome",
    "RemoteError",
    "ShutdownReport",
    "WorkerHandle",
    "WorkerStats",
    "allocate_shared",
    "check_cancelled",
    "choose_isolation",
    "make_worker",
    "shared_worker",
]
