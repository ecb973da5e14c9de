"""Carrying out a verdict on the parameters: the optimizer step, or its omission."""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.leyline import Action, Verdict
from esper.tolaria.objective import Gradients

# Every key under which a scheduler of torch.optim may keep a rate in a parameter group.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_CLIP_EPSILON = 1e-6


class Progress:
    """Where the run stands.

    :ivar step: steps taken.
    :ivar rate_cut: product of the learning rate cuts that are in force.
    """

    def __init__(self) -> None:
        self.step = 0
        self.rate_cut = 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return {"step": self.step, "rate_cut": self.rate_cut}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the fields."""
        self.step = state_dict["step"]
        self.rate_cut = state_dict["rate_cut"]


class Update:
    """Commits or drops the gradients of a step, and moves schedule and step count on.

    :param optimizer: steps on ``.grad``.
    :param scheduler: stepped after every committed step; a skipped one leaves the rate alone.
    :param scaler: unscales the gradients of float16 training and skips infinite ones itself.
    :param clip_norm: largest norm of the combined gradient.
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
        self.optimizer = optimizer
        self._scheduler = scheduler
        self._scaler = scaler
        self._clip_norm = clip_norm

    @property
    def learning_rate(self) -> float:
        """Rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

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
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.optimizer.zero_grad()
        if self._scheduler is not None:
            self._scheduler.step()
        self.progress.step += 1

    def skip(self) -> None:
        """Clear the gradients without using them."""
        self.optimizer.zero_grad()
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
