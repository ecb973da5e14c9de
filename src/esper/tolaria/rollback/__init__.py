"""The two tiers of rollback: snapshots in memory, checkpoints on disk."""

from esper.tolaria.rollback.checkpoint import CheckpointReport, CheckpointStore, read_checkpoint
from esper.tolaria.rollback.durable import FileSystem, is_locked
from esper.tolaria.rollback.generation import CheckpointInfo
from esper.tolaria.rollback.retention import Retention
from esper.tolaria.rollback.snapshot import FastRollbackCache, Snapshot, snapshot_bytes

__all__ = [
    "CheckpointInfo",
    "CheckpointReport",
    "CheckpointStore",
    "FastRollbackCache",
    "FileSystem",
    "Retention",
    "Snapshot",
    "is_locked",
    "read_checkpoint",
    "snapshot_bytes",
]
