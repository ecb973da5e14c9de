"""When steps have become slow, compared with the steps before."""

import math
from collections import deque

_HISTORY = 64
_ENOUGH = 16
# Less than this is the noise of a busy machine, whatever its ratio to a short step.
_NOTICEABLE_MS = 25.0


class SlowSteps:
    """Tells when several steps in a row are slower than a multiple of the median.

    After an alarm the history starts anew, so that a run that stays slow is told of it once.

    :ivar healthy: milliseconds of the latest steps that were not slow.
    :ivar limit_ms: a step above it is slow; infinite until enough is known.
    :param factor: a step this many times slower than the median is slow.
    :param patience: so many in a row raise an alarm.
    :param cooldown: steps after an alarm in which there is no other.
    """

    def __init__(self, factor: float, patience: int, cooldown: int) -> None:
        self.alarms = 0
        self.healthy: deque[float] = deque(maxlen=_HISTORY)
        self.limit_ms = math.inf
        self.median_ms = math.inf
        self._factor = factor
        self._patience = patience
        self._cooldown = cooldown
        self._in_a_row = 0
        self._calm_until = 0

    @property
    def suspicious(self) -> bool:
        """Whether the newest step was slow."""
        return self._in_a_row > 0

    def judge(self, step: int, milliseconds: float) -> bool:
        """Take in one step; return whether it raises the alarm."""
        if milliseconds <= self.limit_ms:
            self.healthy.append(milliseconds)
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        if self._in_a_row < self._patience:
            return False
        self.alarms += 1
        self._calm_until = step + self._cooldown
        self.forget()
        return True

    def learn(self, step: int) -> None:
        """Work out the limit from the steps that were healthy."""
        if step < self._calm_until or len(self.healthy) < _ENOUGH:
            self.limit_ms = math.inf
            return
        ordered = sorted(self.healthy)
        self.median_ms = ordered[len(ordered) // 2]
        self.limit_ms = max(self._factor * self.median_ms, self.median_ms + _NOTICEABLE_MS)

    def forget(self) -> None:
        """Start the history anew."""
        self.healthy.clear()
        self.limit_ms = math.inf
        self._in_a_row = 0
