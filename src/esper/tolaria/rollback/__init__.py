"""The two tiers of rollback: snapshots in memory, checkpoints on disk."""

from esper.tolaria.rollback.checkpoint import (
    CheckpointInfo,
    CheckpointReport,
    CheckpointStore,
    read_checkpoint,
)
from esper.tolaria.rollback.durable import is_locked
from esper.tolaria.rollback.snapshot import FastRollbackCache, Snapshot, snapshot_bytes

__all__ = [
    "CheckpointInfo",
    "CheckpointReport",
    "CheckpointStore",
    "FastRollbackCache",
    "Snapshot",
    "is_locked",
    "read_checkpoint",
    "snapshot_bytes",
]
