"""Carrying out a verdict on the parameters: the optimizer step, or its omission."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.leyline import Action, Verdict
from esper.tolaria.objective import Gradients

# Every key under which a scheduler of torch.optim may keep a rate in a parameter group.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_CLIP_EPSILON = 1e-6
# A schedule that multiplies the rate by this or more, or divides it, has jumped.
_JUMP = 1.5


class Progress:
    """Where the run stands.

    :ivar step: steps taken.
    :ivar rate_cut: product of the lasting learning rate cuts that are in force.
    :ivar rewarm_left: committed steps until a passing cut is over.
    """

    def __init__(self) -> None:
        self.step = 0
        self.rate_cut = 1.0
        self.rewarm_left = 0
        self._rewarm_from = 1.0
        self._rewarm_steps = 1

    @property
    def rate_share(self) -> float:
        """The share of the learning rate that the next step takes; below 1 while it climbs back."""
        missing = self.rewarm_left / self._rewarm_steps
        return 1.0 - (1.0 - self._rewarm_from) * missing

    def rewarm(self, share: float, steps: int) -> None:
        """Let the learning rate begin at a share of itself and climb back, linearly.

        :param share: that the next step takes.
        :param steps: committed steps after which the rate is whole again.
        """
        self._rewarm_from = share
        self._rewarm_steps = max(steps, 1)
        self.rewarm_left = steps

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return {
            "step": self.step,
            "rate_cut": self.rate_cut,
            "rewarm": [self._rewarm_from, self._rewarm_steps, self.rewarm_left],
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the fields."""
        self.step = state_dict["step"]
        self.rate_cut = state_dict["rate_cut"]
        self._rewarm_from, self._rewarm_steps, self.rewarm_left = state_dict["rewarm"]


class Update:
    """Commits or drops the gradients of a step, and moves schedule and step count on.

    :param optimizer: steps on ``.grad``.
    :param scheduler: stepped after every committed step; a skipped one leaves the rate alone.
    :param scaler: unscales the gradients of float16 training and skips infinite ones itself.
    :param clip_norm: largest norm of the combined gradient.
    :ivar on_rate_jump: called when the schedule has changed the rate all at once.
    :ivar on_skip: called when an update is skipped: undoes what else the step has changed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.progress = Progress()
        self.on_rate_jump: Callable[[], None] = _do_nothing
        self.on_skip: Callable[[], None] = _do_nothing
        self.optimizer = optimizer
        self._scheduler = scheduler
        self._scaler = scaler
        self._clip_norm = clip_norm

    @property
    def learning_rate(self) -> float:
        """Rate of the first parameter group, as the next step takes it."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        return rate * self.progress.rate_share if self.progress.rewarm_left else rate

    def carry_out(self, verdict: Verdict, gradients: Gradients) -> None:
        """Commit or skip; any other verdict leaves weights and step count alone."""
        if verdict.action is Action.COMMIT:
            self.commit(gradients)
        elif verdict.action is Action.SKIP:
            self.skip()
        else:
            self.clear()

    def commit(self, gradients: Gradients) -> None:
        """Clip, take the optimizer step and clear the gradients."""
        if self._clip_norm is not None:
            self._clip(gradients.norm)
        if self.progress.rewarm_left:
            self._step_at_share()
        else:
            self._step()
        self.optimizer.zero_grad()
        if self._scheduler is not None:
            self._step_schedule(self._scheduler)
        self.progress.step += 1

    def skip(self) -> None:
        """Clear the gradients without using them."""
        if self._scaler is not None:
            # It has to learn that they were infinite, or it would scale the next ones as high.
            self._scaler.unscale_(self.optimizer)
            self._scaler.update()
        self.optimizer.zero_grad()
        self.on_skip()
        self.progress.step += 1

    def clear(self) -> None:
        """Clear the gradients without counting a step."""
        self.optimizer.zero_grad()

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the rate of every group, and what the schedule computes the next rates from."""
        for group in self.optimizer.param_groups:
            for key in _RATES:
                if key in group:
                    group[key] = group[key] * factor
        if self._scheduler is not None:
            bases = self._scheduler.base_lrs
            self._scheduler.base_lrs = [rate * factor for rate in bases]

    def _step(self) -> None:
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()

    def _step_at_share(self) -> None:
        """Take the step with a part of the rate; schedule and state never see that part."""
        share, groups = self.progress.rate_share, self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * share
        try:
            self._step()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        self.progress.rewarm_left -= 1

    def _step_schedule(self, scheduler: LRScheduler) -> None:
        group = self.optimizer.param_groups[0]
        before = group["lr"]
        scheduler.step()
        after = group["lr"]
        if after >= before * _JUMP or before >= after * _JUMP:
            self.on_rate_jump()

    def _clip(self, norm: float | None) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if norm is None or self._clip_norm is None or norm <= self._clip_norm:
            return
        gradients = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        torch._foreach_mul_(gradients, self._clip_norm / (norm + _CLIP_EPSILON))


def _do_nothing() -> None:
    pass
