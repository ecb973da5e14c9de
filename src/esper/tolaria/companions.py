"""The policy, asked at epoch boundaries; its commands, applied at epoch boundaries.

The policy runs beside training: it is asked at the end of one epoch and its command is applied at
the end of a later one, so that a run is repeatable as long as answers are in time. An answer that
misses its deadline is dropped and counted.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from esper.core.config import PolicyConfig
from esper.core.deadline import Deadline
from esper.core.overlap import CallOutcome, OverlappedCall
from esper.leyline import (
    AdaptationCommand,
    Executor,
    FieldReport,
    Level,
    Policy,
    ScaleLearningRate,
    Stateful,
    SystemState,
)
from esper.tolaria.recorder import Recorder
from esper.tolaria.update import Update


class Companions:
    """Asks a policy and carries out what it answers.

    :param policy: decides; its state is saved with the run when it has any.
    :param executor: carries out commands that change the model; the engine itself carries out
        those that concern the learning rate.
    :param config: when to ask, and for how long to wait.
    :param update: its learning rate is what a policy may scale.
    :param recorder: told of answers and of their absence.
    :ivar on_model_change: called after the executor has changed the model.
    """

    def __init__(
        self,
        policy: Policy,
        executor: Executor | None,
        config: PolicyConfig,
        update: Update,
        recorder: Recorder,
    ) -> None:
        self.answered = self.late = self.failed = 0
        self.on_model_change: Callable[[], None] = _do_nothing
        self._policy = policy
        self._executor = executor
        self._config = config
        self._update = update
        self._recorder = recorder
        self._call: OverlappedCall[SystemState, AdaptationCommand | None]
        self._call = OverlappedCall(policy.decide, name="esper-policy")
        self._question: SystemState | None = None
        self._policy_state: dict[str, Any] = self._state_of_policy()

    def attend(self, state: SystemState) -> None:
        """At an epoch boundary: apply an answer that is ready, then ask when it is time to."""
        self._collect()
        if not self._call.pending and (state.epoch + 1) % self._config.every == 0:
            self._ask(state)

    def close(self) -> None:
        """Stop asking."""
        self._call.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the open question, and the policy's state from before it was asked."""
        question = None if self._question is None else msgspec.json.encode(self._question).decode()
        return {"question": question, "policy": self._policy_state}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Put the policy's state back and ask the open question again."""
        self._policy_state = state_dict["policy"]
        if isinstance(self._policy, Stateful):
            self._policy.load_state_dict(self._policy_state)
        question = state_dict["question"]
        self._question = None
        if question is not None:
            self._ask(msgspec.json.decode(question, type=SystemState))

    def _ask(self, state: SystemState) -> None:
        self._policy_state = self._state_of_policy()
        deadline = Deadline.after(self._config.deadline_ms / 1e3)
        if self._call.submit(state, deadline):
            self._question = state
        else:
            self._note_late("the policy still works on an earlier question")

    def _collect(self) -> None:
        answer = self._call.poll()
        if answer is None:
            return
        self._question = None
        self._policy_state = self._state_of_policy()
        if answer.outcome is CallOutcome.OK:
            self.answered += 1
            if answer.reply is not None:
                self._apply(answer.reply)
        elif answer.outcome is CallOutcome.LATE:
            self._note_late(f"no answer within {self._config.deadline_ms:g} ms; it is dropped")
        else:
            self.failed += 1
            message = f"the policy failed: {type(answer.error).__name__}: {answer.error}"
            self._recorder.event("policy_failed", message, Level.WARNING)

    def _apply(self, command: AdaptationCommand) -> None:
        if isinstance(command, ScaleLearningRate):
            before = self._update.learning_rate
            self._update.scale_learning_rate(command.factor)
            detail = f"learning rate {before:.4g} -> {self._update.learning_rate:.4g}"
            report = FieldReport("scale_learning_rate", applied=True, detail=detail)
        elif self._executor is not None:
            report = self._executor.apply(command)
            self.on_model_change()
        else:
            detail = f"there is no executor to {command.operation} seed {command.seed!r}"
            report = FieldReport("seed", applied=False, detail=detail)
        level = Level.INFO if report.applied else Level.WARNING
        message = f"policy: {report.detail}"
        self._recorder.event("policy_answered", message, level, **msgspec.to_builtins(report))

    def _note_late(self, why: str) -> None:
        self.late += 1
        self._recorder.event("policy_late", f"policy: {why}", Level.WARNING, late=self.late)

    def _state_of_policy(self) -> dict[str, Any]:
        return self._policy.state_dict() if isinstance(self._policy, Stateful) else {}


class NoCompanions:
    """Nobody to ask."""

    def attend(self, state: SystemState) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take nothing."""


def _do_nothing() -> None:
    pass
