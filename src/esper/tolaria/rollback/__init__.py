"""The two tiers of rollback: snapshots in memory, checkpoints on disk."""

from esper.tolaria.rollback.checkpoint import CheckpointReport, CheckpointStore, read_checkpoint
from esper.tolaria.rollback.deadline_signal import DeadlineTrip, SharedDeadlineSignal
from esper.tolaria.rollback.durable import FileSystem, is_locked
from esper.tolaria.rollback.generation import CheckpointInfo
from esper.tolaria.rollback.retention import Retention
from esper.tolaria.rollback.snapshot import FastRollbackCache, Snapshot, snapshot_bytes
from esper.tolaria.rollback.two_tier import (
    ProcessReader,
    RollbackDeadlines,
    RollbackResult,
    RollbackTiers,
    TwoTierRollback,
    attempt_two_tier_rollback,
)

__all__ = [
    "CheckpointInfo",
    "CheckpointReport",
    "CheckpointStore",
    "DeadlineTrip",
    "FastRollbackCache",
    "FileSystem",
    "ProcessReader",
    "Retention",
    "RollbackDeadlines",
    "RollbackResult",
    "RollbackTiers",
    "SharedDeadlineSignal",
    "Snapshot",
    "TwoTierRollback",
    "attempt_two_tier_rollback",
    "is_locked",
    "read_checkpoint",
    "snapshot_bytes",
]
