"""The divergence guard: judges each step between backward pass and optimizer step.

Non-finite values are refused before they reach the weights. The total loss, the loss of each task
and the gradient norm are compared with their own past; what is done about one that is far out is
the ladder's choice.
"""

import math
from collections.abc import Mapping
from typing import Any

from esper.core.config import GuardConfig
from esper.leyline import COMMIT, Action, Verdict
from esper.tolaria.guard.ladder import Ladder, RecoveryHistory
from esper.tolaria.guard.monitor import Grade, Monitor

_ON_PROBATION = Verdict(Action.COMMIT, suspicious=True)


class Guard:
    """Answers whether a step may be committed.

    :param config: thresholds and budgets.
    :ivar strictness: the thresholds are multiplied by this, ``trend_ratio`` by its excess over 1;
        below 1 a divergence is called sooner. Not part of the state.
    :ivar total: the total loss under watch.
    :ivar norm: the gradient norm under watch.
    :ivar tasks: the loss of each task under watch, by name.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.strictness = 1.0
        self.config = config or GuardConfig()
        self.total = Monitor("loss", self.config)
        # Its tails are heavy, and it changes its level for good reasons: it may have updates
        # skipped, but takes nothing back.
        self.norm = Monitor("gradient_norm", self.config, lasting=False)
        self.tasks: dict[str, Monitor] = {}
        self._ladder = Ladder(self.config)
        self._not_finite = 0
        self._calm = 0
        self._suspect_since = -1
        self._pause = 0
        self._pause_reason = ""

    @property
    def history(self) -> RecoveryHistory:
        """What was done so far; a part of the state of its own, that no rollback takes back."""
        return self._ladder.history

    def judge(
        self,
        step: int,
        loss: float,
        gradient_norm: float | None = None,
        losses: Mapping[str, float] | None = None,
    ) -> Verdict:
        """Judge the step that is about to be committed.

        :param step: index of the step.
        :param loss: sum of its task losses.
        :param gradient_norm: norm of the combined gradient, when it was computed.
        :param losses: loss by task. A batch without some task that has been met before is judged
            by the tasks it has: its sum and its gradient are of another kind.
        """
        if not math.isfinite(loss) or not (gradient_norm is None or math.isfinite(gradient_norm)):
            return self._judge_not_finite(step, loss, gradient_norm)
        self._not_finite = 0
        hold = self._suspect_since >= 0
        worst, culprit = self._observe(loss, gradient_norm, losses, hold)
        if self._pause:
            self._pause -= 1
        if worst:
            return self._doubt(step, worst, culprit)
        return self._commit_calm(step) if hold or self.history.in_a_row else COMMIT

    def pause(self, steps: int, reason: str) -> None:
        """Be lenient for a while: something was changed on purpose.

        Values that are not finite are refused as ever. Others are far out only above three times
        the average, and enter the statistics below, so that a new level becomes the normal one.

        :param steps: judged steps that this lasts; a pause that lasts longer goes on.
        :param reason: what was changed; told with every doubt meanwhile.
        """
        if steps > self._pause:
            self._pause, self._pause_reason = steps, reason

    def note_recovered(self, step: int) -> None:
        """Start afresh after a rollback was carried out: the suspicion is over, its count stays."""
        self._ladder.note_recovered(step)
        self._end_suspicion()
        for monitor in self._monitors():
            monitor.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics and counters, the recovery history aside."""
        return {
            "total": self.total.state_dict(),
            "norm": self.norm.state_dict(),
            "tasks": {task: monitor.state_dict() for task, monitor in self.tasks.items()},
            "in_a_row": [self._not_finite, self._calm],
            "suspect_since": self._suspect_since,
            "pause": [self._pause, self._pause_reason],
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`; the tasks are those of the state."""
        self.total.load_state_dict(state_dict["total"])
        self.norm.load_state_dict(state_dict["norm"])
        self.tasks = {task: self._monitor_of(task) for task in state_dict["tasks"]}
        for task, monitor in self.tasks.items():
            monitor.load_state_dict(state_dict["tasks"][task])
        self._not_finite, self._calm = state_dict["in_a_row"]
        self._suspect_since = state_dict["suspect_since"]
        self._pause, self._pause_reason = state_dict["pause"]

    def _observe(
        self,
        loss: float,
        norm: float | None,
        losses: Mapping[str, float] | None,
        hold: bool,
    ) -> tuple[Grade, Monitor]:
        """Show every series its value; return the worst grade and the series that it is of."""
        how = (self.strictness, hold, self._pause > 0)
        worst, culprit = Grade.CALM, self.total
        if losses is None or losses.keys() == self.tasks.keys() or self._meet(losses):
            worst = self.total.observe(loss, *how)
            if norm is not None and (grade := self.norm.observe(norm, *how)) > worst:
                worst, culprit = grade, self.norm
        if losses is not None and len(self.tasks) > 1:
            for task, value in losses.items():
                grade = self.tasks[task].observe(value, *how)
                if grade > worst:
                    worst, culprit = grade, self.tasks[task]
        return worst, culprit

    def _monitors(self) -> list[Monitor]:
        return [self.total, self.norm, *self.tasks.values()]

    def _monitor_of(self, task: str) -> Monitor:
        return Monitor(f"loss.{task}", self.config)

    def _meet(self, losses: Mapping[str, float]) -> bool:
        """Watch tasks that are new; return whether the batch has every task."""
        new = [task for task in losses if task not in self.tasks]
        for task in new:
            self.tasks[task] = self._monitor_of(task)
        if new:
            # The total is a sum of other losses from here on.
            self.total.restart()
            self.norm.restart()
        return len(losses) == len(self.tasks)

    def _doubt(self, step: int, grade: Grade, monitor: Monitor) -> Verdict:
        self._calm = 0
        if self._suspect_since < 0:
            self._suspect_since = step
        reason = monitor.reason()
        if self._pause:
            reason += f", while this settles: {self._pause_reason}"
        if grade is Grade.DIVERGED:
            signal, trigger = monitor.signal, monitor.trigger()
            return self._ladder.call(step, self._suspect_since, reason, signal, trigger)
        self._give_up_old_suspicion(step)
        spiked = grade is Grade.SPIKE
        skip = spiked and monitor.spikes <= self.config.max_skips and self._ladder.may_skip(step)
        # One high loss is common and not worth a word; a spike, or a second one, is.
        worth_telling = spiked or monitor.high > 1
        return Verdict(
            Action.SKIP if skip else Action.COMMIT,
            reason if worth_telling else "",
            suspicious=True,
            signal=monitor.signal,
            trigger=monitor.trigger() if worth_telling else {},
        )

    def _commit_calm(self, step: int) -> Verdict:
        self._ladder.forgive(step)
        if self._suspect_since < 0:
            return COMMIT
        # A bad update may show only some steps later: the suspicion lasts until all has been calm
        # for a while, so that a rollback then still goes back before its cause.
        self._calm += 1
        self._give_up_old_suspicion(step)
        if self._suspect_since >= 0 and self._calm < self.config.margin:
            return _ON_PROBATION
        self._clear()
        return COMMIT

    def _give_up_old_suspicion(self, step: int) -> None:
        """End a suspicion that a whole window has not confirmed: the noise has become larger."""
        if step - self._suspect_since >= self.config.window:
            self._clear()

    def _clear(self) -> None:
        self._end_suspicion()
        for monitor in self._monitors():
            monitor.release()

    def _end_suspicion(self) -> None:
        self._not_finite = self._calm = 0
        self._suspect_since = -1

    def _judge_not_finite(self, step: int, loss: float, norm: float | None) -> Verdict:
        self._not_finite += 1
        signal = self.norm.signal if math.isfinite(loss) else self.total.signal
        trigger = {"loss": loss, "not_finite_in_a_row": self._not_finite}
        if norm is not None:
            trigger["gradient_norm"] = norm
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        reason = f"{what} is not finite"
        if any(monitor.spikes for monitor in self._monitors()):
            reason += ", right after a spike"
        elif self._not_finite > self.config.max_skips:
            self._suspect_since = step - self._not_finite + 1
            reason += f" for {self._not_finite} steps in a row"
        else:
            return Verdict(Action.SKIP, reason, suspicious=True, signal=signal, trigger=trigger)
        return self._ladder.call(step, self._suspect_since, reason, signal, trigger)


class NullGuard:
    """Commits every step.

    :ivar strictness: may be set, and changes nothing.
    """

    def __init__(self) -> None:
        self.strictness = 1.0
        self.history = RecoveryHistory()

    def judge(
        self,
        step: int,  # noqa: ARG002 - Guard's signature
        loss: float,  # noqa: ARG002
        gradient_norm: float | None = None,  # noqa: ARG002
        losses: Mapping[str, float] | None = None,  # noqa: ARG002
    ) -> Verdict:
        """Answer with a commit."""
        return COMMIT

    def pause(self, steps: int, reason: str) -> None:
        """Do nothing."""

    def note_recovered(self, step: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take nothing."""
