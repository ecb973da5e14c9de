"""Taking a divergence back: restore a trusted state, skip what led to it, cut the rate."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from esper.core.worker import Isolation
from esper.leyline import CheckpointError, StateError, Tier, Verdict
from esper.tolaria.data import Batch, ResumableLoader
from esper.tolaria.dependency import Answer, Dependency
from esper.tolaria.guard import Guard, NullGuard
from esper.tolaria.rollback import (
    CheckpointInfo,
    CheckpointStore,
    FastRollbackCache,
    read_checkpoint,
)
from esper.tolaria.state import Capture, TrainState
from esper.tolaria.update import Update

# What a rollback must not take back: the memory of what recovery has done.
KEPT = frozenset({"recovery", "guard_history", "caution", "emergency"})
_TRAIL = 64


@dataclass(frozen=True)
class RollbackResult:
    """What a rollback did.

    :param tier: where the state came from; None when no trusted state was found.
    :param step: steps taken in the restored state; -1 without one.
    :param latency_ms: milliseconds from the call to the restored state.
    :param skipped: (epoch, number) of the batches that are left out from here on.
    :param error: why a tier did not serve; empty when the first one did.
    """

    tier: Tier | None
    step: int
    latency_ms: float
    skipped: tuple[tuple[int, int], ...] = ()
    error: str = ""


class RecoveryLog:
    """Counts what recovery did in this run."""

    def __init__(self) -> None:
        self.attempt = 0
        self.rollbacks = 0
        self.skipped_batches = 0
        self.skipped_updates = 0
        self.rate_cut = 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the counters."""
        vars(self).update(state_dict)


class Trail:
    """Remembers which batch each of the last steps used."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, int, int]] = deque(maxlen=_TRAIL)

    def note(self, step: int, batch: Batch) -> None:
        """Remember the batch of a step."""
        self._steps.append((step, batch.epoch, batch.number))

    def since(self, step: int) -> list[tuple[int, int]]:
        """Return (epoch, number) of the batches of ``step`` and of all later steps."""
        return [(epoch, number) for taken, epoch, number in self._steps if taken >= step]

    def state_dict(self) -> dict[str, Any]:
        """Return the trail."""
        return {"steps": [list(entry) for entry in self._steps]}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the trail."""
        self._steps = deque((tuple(entry) for entry in state_dict["steps"]), maxlen=_TRAIL)


@dataclass(frozen=True)
class RollbackTiers:
    """Where states to roll back to are kept; either may be absent."""

    memory: FastRollbackCache | None
    disk: CheckpointStore | None


class Recovery:
    """Rolls training back to a trusted state and keeps it off the batches that led astray.

    :param state: restored in place.
    :param tiers: snapshots and checkpoints.
    :param reader: how checkpoints are read.
    :param data: its position is part of the state; skipped batches are told to it.
    :param update: its learning rate is cut on request.
    :param guard: told that the suspicion is over.
    :param log: counts what is done.
    """

    def __init__(
        self,
        state: TrainState,
        tiers: RollbackTiers,
        reader: Dependency,
        data: ResumableLoader,
        update: Update,
        guard: Guard | NullGuard,
        log: RecoveryLog,
    ) -> None:
        self.log = log
        self.trail = Trail()
        self._state = state
        self._tiers = tiers
        self._reader = reader
        self._data = data
        self._update = update
        self._guard = guard

    def roll_back(self, verdict: Verdict) -> RollbackResult:
        """Carry out a rollback verdict.

        The batches from the one before the first suspicion on are skipped: the update of either
        may be what broke training, and which one cannot be told from the loss.
        """
        began = time.perf_counter()
        self._update.clear()
        step = self._update.progress.step
        suspects = self.trail.since(verdict.first_suspect - 1)
        tier, errors = self._restore(verdict)
        if tier is None:
            latency = (time.perf_counter() - began) * 1e3
            return RollbackResult(None, -1, latency, error="; ".join(errors))
        for epoch, number in suspects:
            self._data.skip(epoch, number)
        self.cut_rate(verdict.rate_factor)
        if verdict.rewarm_steps:
            self._update.progress.rewarm(verdict.rewarm_from, verdict.rewarm_steps)
        self._guard.note_recovered(step)
        self.log.attempt += 1
        self.log.rollbacks += 1
        self.log.skipped_batches += len(suspects)
        latency = (time.perf_counter() - began) * 1e3
        restored = self._update.progress.step
        return RollbackResult(tier, restored, latency, tuple(suspects), "; ".join(errors))

    def cut_rate(self, factor: float) -> None:
        """Multiply the learning rate, for good: a rollback does not take it back."""
        self.log.rate_cut *= factor
        progress = self._update.progress
        if self.log.rate_cut != progress.rate_cut:
            self._update.scale_learning_rate(self.log.rate_cut / progress.rate_cut)
            progress.rate_cut = self.log.rate_cut

    def _restore(self, verdict: Verdict) -> tuple[Tier | None, list[str]]:
        """Try the tiers in the order that the verdict asks for; return the one that served."""
        errors: list[str] = []
        order = (
            [Tier.MEMORY, Tier.DISK] if verdict.tier is Tier.MEMORY else [Tier.DISK, Tier.MEMORY]
        )
        for tier in order:
            attempt = self._from_memory if tier is Tier.MEMORY else self._from_disk
            error = attempt(verdict.before_step)
            if not error:
                return tier, errors
            errors.append(error)
        if self._oldest_from_memory():
            return Tier.MEMORY, errors
        return None, errors

    def _from_memory(self, before_step: int) -> str:
        cache = self._tiers.memory
        snapshot = cache.get_nearest(before_step) if cache is not None else None
        if cache is None or snapshot is None:
            return f"no healthy snapshot of step {before_step} or earlier"
        try:
            cache.restore(snapshot, self._state, keep=KEPT)
        except StateError as error:
            return str(error)
        return ""

    def _oldest_from_memory(self) -> bool:
        cache = self._tiers.memory
        steps = cache.steps if cache is not None else []
        return bool(steps) and not self._from_memory(steps[0])

    def _from_disk(self, before_step: int) -> str:
        store = self._tiers.disk
        if store is None:
            return "no checkpoint directory"
        try:
            info, capture = self._read(store, before_step)
            self._state.restore(capture, keep=KEPT)
        except (CheckpointError, StateError) as error:
            return str(error)
        if self._tiers.memory is not None:
            self._tiers.memory.discard_after(info.step)
        return ""

    def _read(self, store: CheckpointStore, before_step: int) -> tuple[CheckpointInfo, Capture]:
        """Read a checkpoint in a process that can be killed: a file system may hang for ever.

        The live state is touched here, when everything has arrived, and nowhere else.
        """
        asked = self._reader.submit_async(
            read_checkpoint, store.directory, before_step, isolation=Isolation.PROCESS
        )
        answer: Answer[tuple[CheckpointInfo, Capture]] | None
        answer = self._reader.wait() if asked else None
        if answer is None:
            # No process is to be had: then without one, which is better than not at all.
            return store.read_latest(before_step=before_step)
        if answer.reply is None:
            raise CheckpointError(answer.detail)
        return answer.reply
