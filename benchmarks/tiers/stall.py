"""How long training stands still while a checkpoint is written beside it."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from calls.measures import Arm
from esper.core import AsyncWorker
from esper.core.config import BreakerConfig
from esper.tolaria.dependency import Dependency, Surroundings
from esper.tolaria.rollback import CheckpointStore, FastRollbackCache, Snapshot
from esper.tolaria.saving import BackgroundSaver, Label
from tiers.disk import remove
from tiers.figures import Goal, report, times_of
from tiers.workload import Training, memcpy

FLOOR = "memcpy"
OURS, SHARED = "Esper, copied for it", "Esper, a snapshot was due anyway"
GOALS = {OURS: [Goal(1.5, FLOOR)], SHARED: [Goal(1.5, FLOOR)]}
THEIRS = "distributed.checkpoint.async_save"
KEPT = "... with a stager that keeps its memory"
DEADLINE_S = 120.0

# What remains to be waited for when training goes on.
Rest = Callable[[], object]


class Nobody:
    """Is told of checkpoints, and keeps nothing."""

    def validation_at(self, step: int) -> dict[str, float]:
        del step
        return {}

    def event(self, name: str, message: str, *level: object, **data: object) -> None:
        del level, data
        if name != "checkpoint_saved":
            raise RuntimeError(message)


class Saving:
    """Esper's saver beside training."""

    def __init__(self, directory: Path, training: Training, worker: AsyncWorker) -> None:
        surroundings = Surroundings(worker, BreakerConfig(), _ignore, _ignore)
        self.store = CheckpointStore(directory, keep=1)
        writer = Dependency("rollback", DEADLINE_S, surroundings)
        recorder: Any = Nobody()
        self._saver = BackgroundSaver(self.store, None, writer, recorder)
        self._cache = FastRollbackCache(2**40, max_snapshots=2)
        self._state = training.state
        self._steps = itertools.count(1)
        self._fresh: Snapshot | None = None

    def snapshot(self) -> None:
        self._fresh = self._cache.put(next(self._steps), self._state)

    def start(self) -> Rest:
        self._saver.start(self._state, Label(next(self._steps)))
        return self._finish

    def start_shared(self) -> Rest:
        self._saver.start(self._state, Label(next(self._steps)), self._fresh)
        return self._finish

    def _finish(self) -> None:
        while self._saver.busy:
            self._saver.poll()
            time.sleep(0.002)


class Distributed:
    """torch.distributed.checkpoint beside training."""

    def __init__(self, directory: Path, training: Training) -> None:
        self._path = directory / "peer.async"
        self._training = training
        # Neither pinned nor shared memory is of use without an accelerator.
        self._stager = DefaultStager(StagingOptions(False, False, False, False))

    def start(self) -> Rest:
        return dcp.async_save(self._training.dicts(), checkpoint_id=self._path, no_dist=True).result

    def start_kept(self) -> Rest:
        return dcp.async_save(
            self._training.dicts(),
            checkpoint_id=self._path,
            no_dist=True,
            async_stager=self._stager,
        ).result

    def clear(self) -> None:
        remove(self._path)


def stalls(training: Training, rounds: int, directory: Path) -> None:
    """Time what a save costs before training goes on; its end is waited for, and not timed."""
    with AsyncWorker(1) as worker:
        ours = Saving(directory / "beside", training, worker)
        theirs = Distributed(directory, training)
        arms: dict[str, Arm] = {
            FLOOR: memcpy(training.nbytes),
            OURS: ours.start,
            SHARED: ours.start_shared,
            THEIRS: theirs.start,
            KEPT: theirs.start_kept,
        }
        before: dict[str, Arm] = {
            SHARED: ours.snapshot,
            THEIRS: theirs.clear,
            KEPT: theirs.clear,
        }
        times = times_of(arms, rounds, training.nbytes, before=before, after=_await)
        ours.store.close()
    title = f"Stall of a save beside training, {training.describe()}"
    report(title, times, training.nbytes, [FLOOR], GOALS)


def _await(rest: object) -> None:
    if callable(rest):
        rest()


def _ignore(*_: object) -> None:
    """Take what nobody waits for."""
