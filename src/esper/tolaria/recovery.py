"""Taking a divergence back: restore a trusted state, skip what led to it, cut the rate."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from esper.leyline import Tier, Verdict
from esper.tolaria.data import Batch, ResumableLoader
from esper.tolaria.growth import Growth, NoGrowth
from esper.tolaria.guard import Guard, NullGuard
from esper.tolaria.recovery_log import RecoveryLog
from esper.tolaria.rollback import RollbackResult, TwoTierRollback
from esper.tolaria.update import Update

# What a rollback must not take back: the memory of what recovery has done.
KEPT = frozenset({"recovery", "guard_history", "caution", "emergency", "field_reports"})
_TRAIL = 64


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    :param rollback: where the state came from, and how long that took.
    :param skipped: (epoch, number) of the batches that are left out from here on.
    """

    rollback: RollbackResult
    skipped: tuple[tuple[int, int], ...] = ()


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


class Recovery:
    """Rolls training back to a trusted state and keeps it off the batches that led astray.

    :param rollback: restores the state in place.
    :param data: its position is part of the state; skipped batches are told to it.
    :param update: its learning rate is cut on request.
    :param guard: told that the suspicion is over.
    :param log: counts what is done.
    :param growth: told of seeds that are taken back.
    """

    def __init__(
        self,
        rollback: TwoTierRollback,
        data: ResumableLoader,
        update: Update,
        guard: Guard | NullGuard,
        log: RecoveryLog,
        growth: Growth | NoGrowth,
    ) -> None:
        self.growth = growth
        self.log = log
        self.trail = Trail()
        self.rollback = rollback
        self._data = data
        self._update = update
        self._guard = guard

    def roll_back(self, verdict: Verdict) -> Recovered:
        """Carry out a rollback verdict.

        The batches from the one before the first suspicion on are skipped: the update of either
        may be what broke training, and which one cannot be told from the loss.
        """
        began = time.perf_counter()
        self._update.clear()
        step = self._update.progress.step
        suspects = self.trail.since(verdict.first_suspect - 1)
        stages = self.growth.stages
        result = self._restore(verdict, began)
        if result.tier is None:
            return Recovered(result)
        for epoch, number in suspects:
            self._data.skip(epoch, number)
        self.cut_rate(verdict.rate_factor)
        if verdict.rewarm_steps:
            self._update.progress.rewarm(verdict.rewarm_from, verdict.rewarm_steps)
        self._guard.note_recovered(step)
        self.growth.note_rollback(stages)
        self.log.attempt += 1
        self.log.rollbacks += 1
        self.log.skipped_batches += len(suspects)
        return Recovered(result, tuple(suspects))

    def samples_of(self, epoch: int, number: int) -> list[int]:
        """Return the sample indices of a batch that was left out."""
        return self._data.samples_of(epoch, number)

    def cut_rate(self, factor: float) -> None:
        """Multiply the learning rate, for good: a rollback does not take it back."""
        self.log.rate_cut *= factor
        progress = self._update.progress
        if self.log.rate_cut != progress.rate_cut:
            self._update.scale_learning_rate(self.log.rate_cut / progress.rate_cut)
            progress.rate_cut = self.log.rate_cut

    def _restore(self, verdict: Verdict, began: float) -> RollbackResult:
        """Roll back as the verdict asks; when that fails, to whatever state there is."""
        result = self.rollback.attempt(verdict.before_step, first=verdict.tier)
        if result.tier is not None:
            return result
        # A state that is too young, or late, beats none.
        step = self.rollback.take_any()
        latency_ms = (time.perf_counter() - began) * 1e3
        tier = None if step < 0 else Tier.MEMORY
        return RollbackResult(tier, step, latency_ms, result.deadline_exceeded, result.error)
