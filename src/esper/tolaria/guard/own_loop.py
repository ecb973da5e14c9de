"""The guard, its snapshots and its remedies for a training loop that is not Esper's."""

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.core.config import GuardConfig, SnapshotConfig
from esper.leyline import Action, DivergenceError, Stateful, Verdict
from esper.tolaria.data import Batch, ResumableLoader
from esper.tolaria.guard.guard import Guard
from esper.tolaria.guard.running import RunningStatistics
from esper.tolaria.objective import SINGLE_TASK, Gradients
from esper.tolaria.recovery import Trail
from esper.tolaria.rollback import FastRollbackCache
from esper.tolaria.state import TrainState
from esper.tolaria.state.random_state import capture_random, restore_random
from esper.tolaria.update import Update

_log = logging.getLogger("esper.guard")


class GuardedTraining:
    """Takes the place of ``optimizer.step()`` in a loop of your own.

    Each step is judged before its update is committed; suspicious ones are skipped, divergences
    rolled back. Snapshots are taken on the way. Everything that is done is logged as a warning of
    the logger ``esper.guard`` and counted.

    A rollback takes back the model, the optimizer and what is given besides, but not the data: the
    loop goes on with the next batches and so leaves those behind that led astray. A
    :class:`~esper.tolaria.data.ResumableLoader` among the components is taken back, too, and leaves
    them out from then on. The random generators go on.

    :param model: trained in place.
    :param optimizer: steps on ``.grad``.
    :param scheduler: stepped after every committed step; leave that to this class.
    :param scaler: of float16 training; ``scale(loss).backward()`` is the loop's.
    :param components: anything else that a rollback should take back, by name.
    :param config: thresholds and budgets.
    :param snapshots: how often the state is kept, and in how much memory.
    :ivar skipped: updates that were refused.
    :ivar rollbacks: rollbacks that were carried out.
    :ivar guard: to judge with; ``guard.pause(steps, reason)`` declares a change.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        scaler: torch.amp.GradScaler | None = None,
        components: Mapping[str, Stateful] | None = None,
        config: GuardConfig | None = None,
        snapshots: SnapshotConfig | None = None,
    ) -> None:
        self.guard = Guard(config)
        self.skipped = self.rollbacks = 0
        kept = snapshots or SnapshotConfig()
        self._update = Update(optimizer, scheduler=scheduler, scaler=scaler)
        self._update.on_rate_jump = self._note_rate_jump
        self._scaler = scaler
        self._running = RunningStatistics(model)
        self._update.on_skip = self._running.put_back
        self._rate_cut = 1.0
        self._every = kept.every
        self._cache = FastRollbackCache(kept.max_megabytes, max_snapshots=kept.max_snapshots)
        parts = {"scheduler": scheduler, "scaler": scaler, "guard": self.guard}
        self._state = TrainState(model, optimizer, {**_present(parts), **(components or {})})
        self._state.add("progress", self._update.progress)
        self._trail = Trail()
        self._state.add("trail", self._trail)
        given = (components or {}).values()
        self._loaders = [part for part in given if isinstance(part, ResumableLoader)]

    def __enter__(self) -> "GuardedTraining":
        """Return this object; a state to roll back to is kept at the first step."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the snapshots' memory back."""
        self._cache.discard_after(-1)

    @property
    def steps(self) -> int:
        """Steps taken; a rollback takes them back."""
        return self._update.progress.step

    @property
    def learning_rate(self) -> float:
        """Rate that the next step takes."""
        return self._update.learning_rate

    def step(
        self, loss: Tensor | float | Mapping[str, Tensor | float], batch: Batch | None = None
    ) -> Verdict:
        """Commit the update, skip it, or roll training back; clear the gradients.

        :param loss: what ``backward()`` was called on: one loss, or the loss of each task.
        :param batch: what a resumable loader gave; needed if there is one.
        :returns: what was done, and why.
        :raises DivergenceError: no remedy is left. The model is in its last trusted state.
        :raises TypeError: there is a resumable loader, but no batch was given.
        :raises StateError: the state does not fit the memory for snapshots.
        """
        step = self.steps
        if not self._cache.steps:
            self._cache.put(step, self._state)
        if batch is not None:
            self._trail.note(step, batch)
        elif self._loaders:
            raise TypeError("step() lacks the batch; a rollback has to know which to leave out")
        losses = dict(loss) if isinstance(loss, Mapping) else {SINGLE_TASK: loss}
        values = [
            value.detach().item() if isinstance(value, Tensor) else float(value)
            for value in losses.values()
        ]
        gradients = Gradients(
            dict(zip(losses, values, strict=True)), sum(values), self._norm(), None
        )
        verdict = self.guard.judge(step, gradients.total, gradients.norm, gradients.losses)
        self._update.carry_out(verdict, gradients)
        if verdict.action is Action.COMMIT:
            self._committed(step, verdict)
        elif verdict.action is Action.SKIP:
            self._skip(step, verdict)
        else:
            self._take_back(step, verdict)
        self._running.remember()
        return verdict

    def _committed(self, step: int, verdict: Verdict) -> None:
        if verdict.reason:
            _log.warning("step %d: suspicious, %s", step, verdict.reason)
        if not verdict.suspicious and self.steps % self._every == 0:
            self._cache.put(self.steps, self._state)

    def _skip(self, step: int, verdict: Verdict) -> None:
        self.skipped += 1
        _log.warning("step %d: update skipped (%d so far), %s", step, self.skipped, verdict.reason)

    def _take_back(self, step: int, verdict: Verdict) -> None:
        oldest = self._cache.steps[0]
        snapshot = self._cache.get_nearest(max(verdict.before_step, oldest))
        if snapshot is None:
            raise DivergenceError(f"step {step}: {verdict.reason}; there is no snapshot")
        suspects = self._trail.since(verdict.first_suspect - 1)
        random = {name: state.clone() for name, state in capture_random().items()}
        self._cache.restore(snapshot, self._state)
        restore_random(random)
        for loader in self._loaders:
            for epoch, number in suspects:
                loader.skip(epoch, number)
        if verdict.action is Action.HALT:
            raise DivergenceError(
                f"step {step}: {verdict.reason}. The model is as it was after step {self.steps}; "
                "lower the learning rate or look at the last batches"
            )
        self.rollbacks += 1
        self._cut_rate(verdict)
        self.guard.note_recovered(step)
        _log.warning(
            "diverged at step %d (%s); rolled back to step %d", step, verdict.reason, self.steps
        )

    def _cut_rate(self, verdict: Verdict) -> None:
        progress = self._update.progress
        self._rate_cut *= verdict.rate_factor
        if progress.rate_cut != self._rate_cut:
            self._update.scale_learning_rate(self._rate_cut / progress.rate_cut)
            progress.rate_cut = self._rate_cut
        if verdict.rewarm_steps:
            progress.rewarm(verdict.rewarm_from, verdict.rewarm_steps)

    def _norm(self) -> float:
        norms = torch._foreach_norm(
            [
                parameter.grad
                for group in self._update.optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            ]
        )
        if not norms:
            return 0.0
        norm = float(torch.linalg.vector_norm(torch.stack([n.float() for n in norms])))
        return norm if self._scaler is None else norm / self._scaler.get_scale()

    def _note_rate_jump(self) -> None:
        self.guard.pause(
            self.guard.config.pause_steps, "the schedule has changed the learning rate"
        )


def _present(parts: Mapping[str, Any]) -> dict[str, Stateful]:
    return {name: part for name, part in parts.items() if isinstance(part, Stateful)}
