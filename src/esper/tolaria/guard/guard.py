"""The divergence guard: judges each step between backward pass and optimizer step.

Non-finite values are refused before they reach the weights. A divergence is called by either of two
rules on the loss. A spike lies far above the median, in median absolute deviations (MAD), for two
steps in a row. A trend lies a quarter above the exponential average for three, and also clearly
outside the noise: without that, three unlucky batches in a row would do.

Positive losses are compared by their logarithm. Late in training a loss is small and its noise
spans factors, not differences; on a linear scale ordinary batches would lie many MADs out. A
suspicious loss enters the statistics only when the suspicion has proved wrong, so that a divergence
cannot raise the bar it is measured with, nor ordinary noise be left out of the bar.
"""

import math
from typing import Any

import msgspec

from esper.core.config import GuardConfig
from esper.leyline import COMMIT, Action, Tier, Verdict
from esper.tolaria.guard.statistics import RobustStatistics

_ON_PROBATION = Verdict(Action.COMMIT, suspicious=True)


class RecoveryHistory(msgspec.Struct):
    """What the guard has done so far; a rollback does not take this back.

    :param in_a_row: rollbacks without a full recovery in between.
    :param last_rollback_step: step at which the last rollback was asked for.
    """

    in_a_row: int = 0
    last_rollback_step: int = -1

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return msgspec.structs.asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the fields."""
        for name, value in state_dict.items():
            setattr(self, name, value)


class Guard:
    """Answers whether a step may be committed.

    :param config: thresholds and budgets.
    :ivar strictness: the thresholds are multiplied by this, ``trend_ratio`` by its excess over 1;
        below 1 a divergence is called sooner. Not part of the state.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.strictness = 1.0
        self.config = config or GuardConfig()
        self.history = RecoveryHistory()
        self.statistics = RobustStatistics(self.config.window)
        self._spikes = 0
        self._high = 0
        self._not_finite = 0
        self._calm = 0
        self._suspect_since = -1
        self._doubted: list[float] = []

    def judge(self, step: int, loss: float, gradient_norm: float | None = None) -> Verdict:
        """Judge the step that is about to be committed.

        :param step: index of the step.
        :param loss: sum of its task losses.
        :param gradient_norm: norm of the combined gradient, when it was computed.
        """
        if not math.isfinite(loss) or (
            gradient_norm is not None and not math.isfinite(gradient_norm)
        ):
            return self._judge_not_finite(step, loss, gradient_norm)
        self._not_finite = 0
        if len(self.statistics) < self.config.warmup:
            self.statistics.add(loss)
            return COMMIT
        return self._judge_finite(step, loss)

    def note_recovered(self, step: int) -> None:
        """Start afresh after a rollback was carried out: the suspicion is over, its count stays."""
        self.history.in_a_row += 1
        self.history.last_rollback_step = step
        self._clear_suspicion()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics and counters, the recovery history aside."""
        return {
            "statistics": self.statistics.state_dict(),
            "in_a_row": [self._spikes, self._high, self._not_finite, self._calm],
            "suspect_since": self._suspect_since,
            "doubted": self._doubted,
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self.statistics.load_state_dict(state_dict["statistics"])
        self._spikes, self._high, self._not_finite, self._calm = state_dict["in_a_row"]
        self._suspect_since = state_dict["suspect_since"]
        self._doubted = list(state_dict["doubted"])

    def _judge_finite(self, step: int, loss: float) -> Verdict:
        config, statistics = self.config, self.statistics
        distance = statistics.distance(loss)
        self._count(loss, distance)
        if not self._spikes and not self._high:
            statistics.add(loss)
            return self._commit_calm(step)
        self._calm = 0
        self._doubted.append(loss)
        if self._suspect_since < 0:
            self._suspect_since = step
        reason = (
            f"loss {loss:.4g} lies {distance:.3g} MADs above the median of "
            f"{statistics.median:.4g}; the average is {statistics.average:.4g}"
        )
        if self._spikes >= config.spike_patience or self._high >= config.trend_patience:
            return self._call_divergence(step, reason)
        # One high loss is common and not worth a word; a spike, or a second one, is.
        worth_telling = self._spikes or self._high > 1
        return Verdict(Action.COMMIT, reason if worth_telling else "", suspicious=True)

    def _count(self, loss: float, distance: float) -> None:
        config, strictness = self.config, self.strictness
        spiked = distance > strictness * config.spike_deviations
        self._spikes = self._spikes + 1 if spiked else 0
        raised = loss > (1 + strictness * (config.trend_ratio - 1)) * self.statistics.average
        high = raised and distance > strictness * config.trend_deviations
        self._high = self._high + 1 if high else 0

    def _commit_calm(self, step: int) -> Verdict:
        self._forget_old_rollbacks(step)
        if self._suspect_since < 0:
            return COMMIT
        # A bad update may show only some steps later: the suspicion lasts until the loss has been
        # calm for a while, so that a rollback then still goes back before its cause.
        self._calm += 1
        if self._calm < self.config.margin:
            return _ON_PROBATION
        for doubted in self._doubted:
            self.statistics.add(doubted, ceiling=self.config.trend_ratio * self.statistics.average)
        self._clear_suspicion()
        return COMMIT

    def _judge_not_finite(self, step: int, loss: float, norm: float | None) -> Verdict:
        self._not_finite += 1
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        reason = f"{what} is not finite"
        if self._suspect_since >= 0:
            return self._call_divergence(step, f"{reason}, right after a spike of the loss")
        if self._not_finite > self.config.max_skips:
            self._suspect_since = step - self._not_finite + 1
            return self._call_divergence(step, f"{reason} for {self._not_finite} steps in a row")
        return Verdict(Action.SKIP, reason, suspicious=True)

    def _call_divergence(self, step: int, reason: str) -> Verdict:
        self._forget_old_rollbacks(step)
        attempt = self.history.in_a_row
        if attempt >= self.config.max_rollbacks:
            return Verdict(
                Action.HALT,
                f"{reason}; {attempt} rollbacks did not help (guard.max_rollbacks)",
                suspicious=True,
            )
        last_resort = attempt > 0 and attempt == self.config.max_rollbacks - 1
        return Verdict(
            Action.ROLLBACK,
            reason,
            suspicious=True,
            first_suspect=self._suspect_since,
            # Each further attempt goes back twice as far: the newest state may carry the cause.
            before_step=self._suspect_since - self.config.margin * 2**attempt,
            tier=Tier.DISK if last_resort else Tier.MEMORY,
            rate_factor=1.0 if attempt == 0 else self.config.rate_cut,
        )

    def _forget_old_rollbacks(self, step: int) -> None:
        history = self.history
        if history.in_a_row and step - history.last_rollback_step >= self.config.recovery_steps:
            history.in_a_row = 0

    def _clear_suspicion(self) -> None:
        self._spikes = self._high = self._not_finite = self._calm = 0
        self._suspect_since = -1
        self._doubted = []


class NullGuard:
    """Commits every step.

    :ivar strictness: may be set, and changes nothing.
    """

    def __init__(self) -> None:
        self.strictness = 1.0
        self.history = RecoveryHistory()

    def judge(self, step: int, loss: float, gradient_norm: float | None = None) -> Verdict:  # noqa: ARG002 - Guard's signature
        """Answer with a commit."""
        return COMMIT

    def note_recovered(self, step: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take nothing."""
