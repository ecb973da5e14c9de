"""What is done about a divergence, rung by rung, and how often each rung may be used.

Skip the update; roll back to the newest trusted snapshot, and let the learning rate climb back;
roll back further, and leave the rate cut; roll back to a checkpoint on disk; stop.
"""

from typing import Any

import msgspec

from esper.core.config import GuardConfig
from esper.leyline import Action, Tier, Verdict


class RecoveryHistory(msgspec.Struct):
    """What the guard has done so far; a rollback does not take this back.

    :param in_a_row: rollbacks without a full recovery in between.
    :param last_rollback_step: step at which the last rollback was asked for.
    :param skips: updates skipped because of a spike in the present window of steps.
    :param skips_since: step that this window began at.
    """

    in_a_row: int = 0
    last_rollback_step: int = -1
    skips: int = 0
    skips_since: int = -1

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return msgspec.structs.asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the fields."""
        for name, value in state_dict.items():
            setattr(self, name, value)


class Ladder:
    """Chooses the rung.

    :param config: budgets.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.history = RecoveryHistory()
        self._config = config

    def may_skip(self, step: int) -> bool:
        """Use up one skipped update of the window's budget, if there is one left."""
        history = self.history
        if history.skips_since < 0 or step - history.skips_since >= self._config.recovery_steps:
            history.skips, history.skips_since = 0, step
        if history.skips >= self._config.skip_budget:
            return False
        history.skips += 1
        return True

    def call(
        self, step: int, first_suspect: int, reason: str, signal: str, trigger: dict[str, float]
    ) -> Verdict:
        """Return the remedy for a divergence.

        :param step: index of the step that it was called at.
        :param first_suspect: index of the step that the suspicion began at.
        :param reason: one sentence.
        :param signal: the series that gave it away.
        :param trigger: the values that did.
        """
        self.forgive(step)
        config, attempt = self._config, self.history.in_a_row
        if attempt >= config.max_rollbacks:
            reason = f"{reason}; {attempt} rollbacks did not help (guard.max_rollbacks)"
            return Verdict(
                Action.HALT,
                reason,
                suspicious=True,
                first_suspect=first_suspect,
                before_step=first_suspect - config.margin,
                signal=signal,
                trigger=trigger,
            )
        last_resort = attempt > 0 and attempt == config.max_rollbacks - 1
        return Verdict(
            Action.ROLLBACK,
            reason,
            suspicious=True,
            first_suspect=first_suspect,
            # Each further attempt goes back twice as far: the newest state may carry the cause.
            before_step=first_suspect - config.margin * 2**attempt,
            tier=Tier.DISK if last_resort else Tier.MEMORY,
            rate_factor=1.0 if attempt == 0 else config.rate_cut,
            rewarm_from=config.rate_cut if attempt == 0 else 1.0,
            rewarm_steps=config.rewarm_steps if attempt == 0 else 0,
            signal=signal,
            trigger=trigger,
        )

    def forgive(self, step: int) -> None:
        """Forget earlier rollbacks when the last one is long enough ago."""
        history = self.history
        if history.in_a_row and step - history.last_rollback_step >= self._config.recovery_steps:
            history.in_a_row = 0

    def note_recovered(self, step: int) -> None:
        """Count a rollback that was carried out."""
        self.history.in_a_row += 1
        self.history.last_rollback_step = step
