"""The policy and the executor, attended to at epoch boundaries.

The policy runs beside training: it is asked at the end of one epoch and its command is applied at
the end of a later one, so that a run is repeatable as long as answers are in time. An answer that
misses its deadline is dropped and counted. In ``wait`` mode training stands still meanwhile.
"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from esper.core.config import PolicyConfig
from esper.core.worker import Isolation
from esper.leyline import (
    AdaptationCommand,
    Executor,
    FieldReport,
    Level,
    NoChange,
    Policy,
    PreparingExecutor,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    Stateful,
    SystemState,
)
from esper.tolaria.conservative import ConservativeMode
from esper.tolaria.dependency import Answer
from esper.tolaria.isolation import isolation_of
from esper.tolaria.outside import Outside
from esper.tolaria.recorder import Recorder

_COMMAND: Any = AdaptationCommand
_START_S = 60.0


class Companions:
    """Asks a policy and carries out what it answers.

    :param policy: decides; its state is saved with the run when it has any.
    :param executor: carries out commands that change the model; the engine itself carries out
        those that concern the learning rate.
    :param outside: how both are reached.
    :param config: when to ask, and whether to wait.
    :param recorder: told of answers; its update is what a policy may scale the rate of.
    :param mode: may forbid a command.
    :ivar on_model_change: called after the executor has changed the model.
    :ivar on_change: called with what was changed, be it the model or the learning rate.
    :ivar on_report: called with what came of each command that concerned a seed.
    :raises ConfigError: the policy cannot run where the configuration wants it.
    """

    def __init__(
        self,
        policy: Policy,
        executor: Executor | None,
        outside: Outside,
        config: PolicyConfig,
        recorder: Recorder,
        mode: ConservativeMode,
    ) -> None:
        self.on_model_change: Callable[[], None] = _do_nothing
        self.on_change: Callable[[str], None] = _ignore
        self.on_report: Callable[[FieldReport], None] = self._tell_report
        self.isolation, self.warning = isolation_of(policy, "decide", config.isolation)
        self._policy = policy
        self._executor = executor
        self._worker = outside.worker
        self._tamiyo, self._kasmina = outside.tamiyo, outside.kasmina
        self._config = config
        declared = getattr(policy, "mode", "overlap") if config.mode == "auto" else config.mode
        self._waits = declared == "wait"
        self._update = recorder.update
        self._recorder = recorder
        self._mode = mode
        self._question: SystemState | None = None
        self._command: AdaptationCommand | None = None
        self._policy_state: dict[str, Any] = self._state_of_policy()

    def prepare(self) -> None:
        """Before the first step: wait for the policy's process to be there.

        The first question would otherwise spend its deadline on imports.
        """
        if self.isolation is not Isolation.PROCESS:
            return
        try:
            self._worker.call(
                _be_there,
                self._policy,
                timeout_s=_START_S,
                name="tolaria.start",
                isolation="process",
            )
        except Exception as error:  # noqa: BLE001 - whatever the policy's imports raise is told
            message = f"no process for the policy yet: {type(error).__name__}: {error}"
            self._recorder.event("policy_start_failed", message, Level.WARNING)

    def attend(self, state: SystemState) -> None:
        """At an epoch boundary: apply what is ready, then ask when it is time to."""
        self._take_prepared()
        self._take_answer()
        if not self._tamiyo.pending and (state.epoch + 1) % self._config.every == 0:
            self._ask(state)
            if self._waits:
                self._take_answer()

    def close(self) -> None:
        """Expect no answers any more."""
        self._tamiyo.cancel()
        self._kasmina.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Return what is under way, and the policy's state from before it was asked."""
        # Not as text: msgspec's JSON has no word for NaN.
        question, command = msgspec.to_builtins([self._question, self._command])
        return {"question": question, "command": command, "policy": self._policy_state}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Put the policy's state back and ask anew for what was under way."""
        self.close()
        self._policy_state = state_dict["policy"]
        if isinstance(self._policy, Stateful):
            self._policy.load_state_dict(self._policy_state)
        question, command = state_dict["question"], state_dict["command"]
        self._question = self._command = None
        if command is not None:
            self._prepare(msgspec.convert(command, _COMMAND))
        if question is not None:
            self._ask(msgspec.convert(question, SystemState))

    def _ask(self, state: SystemState) -> None:
        self._policy_state = self._state_of_policy()
        if self.isolation is Isolation.PROCESS:
            asked = self._tamiyo.submit_async(
                _decide_apart, self._policy, state, isolation=self.isolation
            )
        else:
            asked = self._tamiyo.submit_async(self._policy.decide, state, isolation=self.isolation)
        if asked:
            self._question = state

    def _take_answer(self) -> None:
        answer = self._tamiyo.wait() if self._waits else self._tamiyo.poll()
        if answer is None:
            return
        question, self._question = self._question, None
        epoch = -1 if question is None else question.epoch
        if answer.ok:
            reply = self._adopt(answer.reply)
            command, problem = _checked(reply)
            if command is not None:
                self._consider(_addressed(command, question))
            elif reply is not None:
                self._report(FieldReport(_tag(reply), applied=False, detail=problem))
        elif answer.outcome.value in ("timeout", "abandoned"):
            self._recorder.event(
                "timeout_inference",
                f"the policy has not answered about epoch {epoch + 1}; training goes on without",
                epoch=epoch,
                deadline_ms=self._config.deadline_ms,
            )
        self._policy_state = self._state_of_policy()

    def _adopt(self, reply: Any) -> Any:  # noqa: ANN401 - a policy may answer anything
        """Take over the state that the policy has come to in a process; return its command."""
        if self.isolation is not Isolation.PROCESS:
            return reply
        command, copy = reply
        if isinstance(self._policy, Stateful):
            self._policy.load_state_dict(copy.state_dict())
        elif hasattr(self._policy, "__dict__"):
            vars(self._policy).update(vars(copy))
        return command

    def _consider(self, command: AdaptationCommand) -> None:
        self._explain(command)
        refusal = self._mode.allows(command)
        if refusal:
            self._report(_refused(command, refusal))
        elif isinstance(command, NoChange):
            return
        elif isinstance(command, ScaleLearningRate):
            before = self._update.learning_rate
            self._update.scale_learning_rate(command.factor)
            detail = f"learning rate {before:.4g} -> {self._update.learning_rate:.4g}"
            self.on_change(detail)
            self._report(FieldReport("scale_learning_rate", applied=True, detail=detail))
        elif isinstance(self._executor, PreparingExecutor) and _takes_long(command):
            self._prepare(command)
            if self._waits:
                self._take_prepared()
        elif self._executor is not None:
            self._change_model(command, self._executor.apply, command)
        else:
            detail = f"there is no executor to {command.operation} seed {command.seed!r}"
            self._report(_refused(command, detail))

    def _prepare(self, command: AdaptationCommand) -> None:
        if not isinstance(self._executor, PreparingExecutor):
            return
        asked = not self._kasmina.pending and self._kasmina.submit_async(
            self._executor.prepare, command, isolation=Isolation.THREAD
        )
        if asked:
            self._command = command
        else:
            self._report(_refused(command, "the executor does not take commands at present"))

    def _take_prepared(self) -> None:
        answer = self._kasmina.wait() if self._waits else self._kasmina.poll()
        command = self._command
        if answer is None or command is None:
            return
        self._command = None
        # What has changed since the command was given may forbid it now.
        refusal = self._mode.allows(command) or answer.detail
        if refusal:
            self._report(_refused(command, refusal))
        elif isinstance(self._executor, PreparingExecutor):
            self._change_model(command, self._executor.apply_prepared, command, answer.reply)

    def _change_model(
        self,
        command: AdaptationCommand,
        change: Callable[..., FieldReport],
        *arguments: Any,  # noqa: ANN401
    ) -> None:
        answer: Answer[FieldReport] = self._kasmina.call_here(change, *arguments)
        report = answer.reply
        if report is None or report.applied:
            # One that raised may have changed something.
            self.on_model_change()
            self.on_change(f"the model was changed by {_tag(command)}")
        self._report(report or _refused(command, answer.detail))

    def _explain(self, command: AdaptationCommand) -> None:
        """Tell why the policy decided as it did."""
        explanation = command.explanation
        if explanation is not None:
            self._recorder.event(
                "policy_decided",
                f"policy, rule {explanation.rule}: {explanation.reason}",
                decision=_tag(command),
                **msgspec.to_builtins(explanation),
            )

    def _report(self, report: FieldReport) -> None:
        if report.command == "seed":
            self.on_report(report)
        else:
            self._tell_report(report)

    def _tell_report(self, report: FieldReport) -> None:
        level = Level.INFO if report.applied else Level.WARNING
        message = f"policy: {report.detail}"
        self._recorder.event("policy_answered", message, level, **msgspec.to_builtins(report))

    def _state_of_policy(self) -> dict[str, Any]:
        return self._policy.state_dict() if isinstance(self._policy, Stateful) else {}


class NoCompanions:
    """Nobody to ask."""

    warning = ""

    def prepare(self) -> None:
        """Do nothing."""

    def attend(self, state: SystemState) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take nothing."""


def _decide_apart(policy: Policy, state: SystemState) -> Any:  # noqa: ANN401
    """In a process: let a copy of the policy decide, and return the copy as well."""
    command = policy.decide(state)
    if inspect.isawaitable(command):
        command = asyncio.run(_arrival_of(command))
    return command, policy


async def _arrival_of(awaitable: Awaitable[Any]) -> Any:  # noqa: ANN401
    return await awaitable


def _be_there(policy: Policy) -> None:
    """In a process: do nothing; whatever the policy needs has been imported by now."""


def _checked(reply: object) -> tuple[AdaptationCommand | None, str]:
    """Return an answer as a command of the right types, or what is wrong with it."""
    if not isinstance(reply, SeedCommand | NoChange | ScaleLearningRate):
        return None, f"{reply!r} is no command"
    try:
        command = msgspec.convert(msgspec.to_builtins(reply), type(reply))
    except (msgspec.ValidationError, TypeError) as error:
        return None, f"{reply!r} is no sound command: {error}"
    if isinstance(command, ScaleLearningRate) and not 0 < command.factor < math.inf:
        return None, f"the learning rate cannot be multiplied by {command.factor!r}"
    return command, ""


def _takes_long(command: SeedCommand) -> bool:
    return command.operation is SeedOperation.GERMINATE


def _addressed(command: AdaptationCommand, question: SystemState | None) -> AdaptationCommand:
    """Say what an unsigned command was an answer to, where it does not say so itself."""
    growth = None if question is None else question.growth
    if not isinstance(command, SeedCommand) or question is None or growth is None:
        return command
    if command.signature:
        return command
    version = growth.version if command.version == -1 else command.version
    name = command.id or f"{question.attempt}.{question.step}.{command.seed}"
    return msgspec.structs.replace(command, id=name, version=version)


def _refused(command: AdaptationCommand, reason: str) -> FieldReport:
    if not isinstance(command, SeedCommand):
        return FieldReport(_tag(command), applied=False, detail=reason)
    return FieldReport(
        "seed",
        applied=False,
        detail=reason,
        id=command.id,
        seed=command.seed,
        operation=command.operation.value,
        blueprint=command.blueprint,
    )


def _tag(command: object) -> str:
    config = getattr(command, "__struct_config__", None)
    return type(command).__name__ if config is None else str(config.tag)


def _do_nothing() -> None:
    pass


def _ignore(change: object) -> None:
    pass
