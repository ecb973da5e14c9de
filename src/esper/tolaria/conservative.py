"""Conservative mode: after trouble the engine takes no risks until training is healthy again.

Meanwhile the guard is stricter, the model does not grow, and the learning rate is not raised.
"""

from collections.abc import Callable
from typing import Any

from esper.core.config import ConservativeConfig
from esper.leyline import AdaptationCommand, Level, NoChange, ScaleLearningRate, SeedOperation

# Whoever asks for these takes a risk back.
_SAFE = (SeedOperation.CULL, SeedOperation.HOLD)

Announce = Callable[[str, str, Level, dict[str, Any]], None]


class ConservativeMode:
    """Knows whether the engine is in conservative mode, why, and when it may leave it.

    It belongs to the thread of the training loop.

    :param config: when it is left, and how strict the guard is meanwhile.
    :param announce: told of entering and leaving: name, message, level and data of an event.
    :ivar active: whether the mode is on.
    """

    def __init__(self, config: ConservativeConfig, announce: Announce) -> None:
        self.active = False
        self._config = config
        self._announce = announce
        self._conditions: list[Callable[[], str]] = []
        self._reasons: list[str] = []
        self._since_step = 0
        self._streak = 0
        self._lasted = 0
        self._entered = 0

    def keep_while(self, condition: Callable[[], str]) -> None:
        """Do not leave the mode while a condition holds; it does not enter the mode by itself.

        :param condition: returns what holds, or an empty text. It is asked once enough steps in a
            row have been healthy, from then on each step.
        """
        self._conditions.append(condition)

    def enter(self, reason: str, step: int) -> None:
        """Turn the mode on, or add a reason to it and restart the healthy stretch.

        A reason is announced when it is new.

        :param reason: what happened, for instance ``rollback``.
        :param step: index of the step at which it did.
        """
        self._streak = 0
        if not self.active:
            self.active = True
            self._entered += 1
            self._since_step = step
            self._lasted = 0
        if reason in self._reasons:
            return
        self._reasons.append(reason)
        message = (
            f"conservative mode: {reason}; no growth, no higher learning rate and a stricter guard "
            f"until {self._config.healthy_steps} steps are healthy"
        )
        data = {"reason": reason, "reasons": list(self._reasons), "step": step}
        self._announce("conservative_mode_entered", message, Level.WARNING, data)

    def note_step(self, healthy: bool | None, step: int) -> None:
        """Count one step; leave the mode after enough healthy ones, once nothing holds it.

        Steps are counted by calls: their indices may jump back after a rollback.

        :param healthy: False when the guard did not let it pass, which starts the count anew; None
            when it did with doubts, which does not count: single losses that are high are common.
        :param step: its index.
        """
        if not self.active:
            return
        self._lasted += 1
        if healthy is None:
            return
        self._streak = self._streak + 1 if healthy else 0
        if self._streak >= self._config.healthy_steps and not self._held():
            self._leave(step)

    def allows(self, command: AdaptationCommand) -> str:
        """Return why a command must not be carried out now; empty when it may."""
        if not self.active:
            return ""
        why = f"in conservative mode ({'; '.join(self._reasons)})"
        if isinstance(command, ScaleLearningRate):
            if command.factor <= 1:
                return ""
            return f"no higher learning rate {why}: factor {command.factor:g}"
        if isinstance(command, NoChange) or command.operation in _SAFE:
            return ""
        return f"no growth {why}: {command.operation} seed {command.seed!r}"

    @property
    def guard_factor(self) -> float:
        """What the guard's thresholds are to be multiplied by."""
        return self._config.guard_factor if self.active else 1.0

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the mode by name."""
        return {
            "tolaria.mode.conservative": float(self.active),
            "tolaria.mode.conservative_entered_total": float(self._entered),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the conditions, of JSON types."""
        return {
            "active": self.active,
            "reasons": list(self._reasons),
            "since_step": self._since_step,
            "streak": self._streak,
            "lasted": self._lasted,
            "entered_total": self._entered,
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`; nothing is announced."""
        self.active = state_dict["active"]
        self._reasons = list(state_dict["reasons"])
        self._since_step = state_dict["since_step"]
        self._streak = state_dict["streak"]
        self._lasted = state_dict["lasted"]
        self._entered = state_dict["entered_total"]

    def _held(self) -> bool:
        return any(condition() for condition in self._conditions)

    def _leave(self, step: int) -> None:
        reasons, lasted = list(self._reasons), self._lasted
        self.active = False
        self._reasons = []
        self._streak = 0
        message = (
            f"conservative mode left after {lasted} steps; "
            f"it had been entered because of: {'; '.join(reasons)}"
        )
        data = {
            "steps": lasted,
            "reasons": reasons,
            "since_step": self._since_step,
            "step": step,
        }
        self._announce("conservative_mode_left", message, Level.INFO, data)
