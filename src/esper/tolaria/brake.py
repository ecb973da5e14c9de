"""Acting on an emergency, at the seam between verdict and optimizer step."""

import time

from esper.core.config import GuardConfig
from esper.leyline import Action, EmergencyLevel, Level, Tier, Verdict
from esper.tolaria.caution import Caution
from esper.tolaria.emergency import EmergencyController, Order
from esper.tolaria.ending import Ending
from esper.tolaria.recorder import Recorder
from esper.tolaria.recovery import Recovery

_LOOK_EVERY_S = 0.01


class Brake:
    """Takes orders from this process and others, and carries each out once.

    Minor: the learning rate is cut. Major and severe: training is rolled back, to a checkpoint or
    to a snapshot. Critical: training stands still before its next optimizer step, until the level
    is cleared or lowered, and then goes on as if nothing had been.

    :param controller: where orders come from.
    :param recovery: cuts the rate; rolls back by way of the verdict.
    :param caution: told of every order.
    :param ending: a frozen run can be ended.
    :param recorder: told of standing still.
    :param config: how far to go back, and by how much the rate is cut.
    """

    def __init__(
        self,
        controller: EmergencyController,
        recovery: Recovery,
        caution: Caution,
        ending: Ending,
        recorder: Recorder,
        config: GuardConfig,
    ) -> None:
        self.controller = controller
        self._recovery = recovery
        self._caution = caution
        self._ending = ending
        self._recorder = recorder
        self._config = config
        self._under_way: Order | None = None

    def review(self, step: int, verdict: Verdict) -> Verdict:
        """Return the verdict on a step as the present emergency leaves it.

        :param step: index of the step.
        :param verdict: the guard's.
        """
        self.controller.pump()
        order = self.controller.take_order()
        while order is not None:
            verdict = self._carry_out(order, step, verdict)
            order = self.controller.take_order()
        return verdict

    def settle(self) -> None:
        """After the verdict has been carried out: say so to who gave the order."""
        if self._under_way is not None:
            self.controller.acted(self._under_way)
            self._under_way = None

    def _carry_out(self, order: Order, step: int, verdict: Verdict) -> Verdict:
        level = order.level
        if level is EmergencyLevel.NONE:
            self.controller.acted(order)
            return verdict
        self._caution.enter(f"emergency {level.name.lower()}: {order.reason}")
        if level is EmergencyLevel.CRITICAL:
            return self._stand_still(order, step, verdict)
        if level is EmergencyLevel.MINOR:
            self._cut_rate(order)
            return verdict
        self._under_way = order
        return verdict if verdict.action is Action.HALT else self._back(order, step)

    def _cut_rate(self, order: Order) -> None:
        before = self._recorder.update.learning_rate
        self._recovery.cut_rate(self._config.rate_cut)
        after = self._recorder.update.learning_rate
        self._recorder.event(
            "emergency_tuned",
            f"emergency minor: learning rate {before:.4g} -> {after:.4g}",
            Level.WARNING,
            before=before,
            after=after,
        )
        self.controller.acted(order)

    def _back(self, order: Order, step: int) -> Verdict:
        margin = self._config.margin
        return Verdict(
            Action.ROLLBACK,
            f"emergency {order.level.name.lower()}: {order.reason}",
            suspicious=True,
            first_suspect=step - margin,
            before_step=step - margin,
            tier=Tier.DISK if order.level is EmergencyLevel.MAJOR else Tier.MEMORY,
        )

    def _stand_still(self, order: Order, step: int, verdict: Verdict) -> Verdict:
        """Wait until the level is lowered; the step then goes on with the verdict it had."""
        self.controller.acted(order)
        self._recorder.event(
            "training_frozen",
            f"training stands still: {order.reason}; 'esper emergency RUN --clear' lets it go on",
            Level.CRITICAL,
            reason=order.reason,
        )
        began = time.monotonic()
        while (then := self._lowered()) is None:
            if self._ending.asked:
                return Verdict(Action.SKIP, "ended while it stood still", suspicious=True)
            time.sleep(_LOOK_EVERY_S)
        seconds = time.monotonic() - began
        message = f"training goes on after {seconds:.3g} s of standing still"
        self._recorder.event("training_resumed", message, Level.WARNING, seconds=seconds)
        return self._carry_out(then, step, verdict)

    def _lowered(self) -> Order | None:
        """Return the order that ends the standstill; None while it lasts."""
        self.controller.pump()
        order = self.controller.take_order()
        if order is None or order.level is not EmergencyLevel.CRITICAL:
            return order
        self.controller.acted(order)
        return None
