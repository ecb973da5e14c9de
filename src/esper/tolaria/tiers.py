"""Builds what keeps states and what brings them back: both tiers, their schedules, the rollback."""

from pathlib import Path

from esper.core.config import CheckpointConfig, TolariaConfig
from esper.leyline import Level
from esper.tolaria.keeper import CheckpointSchedule, Keeper, SnapshotSchedule
from esper.tolaria.outside import Outside
from esper.tolaria.reading import DependencyReader
from esper.tolaria.recorder import Recorder
from esper.tolaria.recovery import KEPT
from esper.tolaria.rollback import (
    CheckpointStore,
    FastRollbackCache,
    Retention,
    RollbackDeadlines,
    RollbackTiers,
    SharedDeadlineSignal,
    TwoTierRollback,
)
from esper.tolaria.saving import BackgroundSaver
from esper.tolaria.state import TrainState

SIGNAL = "rollback.deadline"


def open_rollback(
    state: TrainState,
    config: TolariaConfig,
    directory: Path | None,
    outside: Outside,
    recorder: Recorder,
) -> TwoTierRollback:
    """Make the tiers that the configuration asks for.

    :param directory: run directory; without one there are no checkpoints.
    """
    memory = disk = None
    if config.snapshots.enabled:
        memory = FastRollbackCache(
            config.snapshots.max_megabytes, max_snapshots=config.snapshots.max_snapshots
        )
    if config.checkpoints.enabled and directory is not None:
        disk = CheckpointStore(directory / "checkpoints", keep=_retention(config.checkpoints))
    return TwoTierRollback(
        state,
        RollbackTiers(memory, disk),
        deadlines=RollbackDeadlines(
            config.rollback.fast_deadline_ms, config.rollback.full_deadline_ms
        ),
        read=DependencyReader(outside.rollback),
        signal=_open_signal(directory, recorder),
        keep=KEPT,
    )


def open_keeper(
    state: TrainState,
    config: TolariaConfig,
    tiers: RollbackTiers,
    outside: Outside,
    recorder: Recorder,
) -> Keeper:
    """Make the schedules of the tiers that there are."""
    snapshots = checkpoints = None
    if tiers.memory is not None:
        snapshots = SnapshotSchedule(tiers.memory, config.snapshots.every)
    if tiers.disk is not None:
        saver = BackgroundSaver(tiers.disk, tiers.memory, outside.checkpoint, recorder)
        checkpoints = CheckpointSchedule(saver, config.checkpoints, recorder)
    return Keeper(state, recorder.update.progress, snapshots, checkpoints)


def warn_of_slow_restore(rollback: TwoTierRollback, recorder: Recorder) -> None:
    """Say so when the first snapshot cannot be restored in time at the measured bandwidth."""
    memory = rollback.tiers.memory
    snapshot = (
        memory.get_nearest(max(memory.steps)) if memory is not None and memory.steps else None
    )
    if memory is None or snapshot is None:
        return
    expected_ms, deadline_ms = memory.predict_ms(snapshot), rollback.deadlines.fast_ms
    if expected_ms <= deadline_ms:
        return
    recorder.event(
        "snapshot_slow",
        f"a snapshot is {snapshot.nbytes / 2**20:.0f} MiB; restoring one would take "
        f"{expected_ms:.0f} ms here, which is over rollback.fast_deadline_ms = {deadline_ms:g}: "
        "rollbacks will be made from checkpoints",
        Level.WARNING,
        bytes=snapshot.nbytes,
        expected_ms=expected_ms,
        deadline_ms=deadline_ms,
    )


def _open_signal(directory: Path | None, recorder: Recorder) -> SharedDeadlineSignal:
    if directory is None:
        return SharedDeadlineSignal()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return SharedDeadlineSignal(directory / SIGNAL)
    except OSError as error:
        message = f"no other process can be told of a rollback's deadline: {error}"
        recorder.event("deadline_signal_failed", message, Level.WARNING, error=str(error))
        return SharedDeadlineSignal()


def _retention(config: CheckpointConfig) -> Retention:
    return Retention(
        config.keep,
        config.keep_every,
        config.best_metric,
        config.keep_best,
        config.best_direction,
    )
