"""The shapes that the engine asks of its companions."""

from collections.abc import Awaitable
from typing import Any, Protocol, runtime_checkable

from esper.leyline.commands import AdaptationCommand
from esper.leyline.growth import FieldReport
from esper.leyline.records import Record, SystemState


class Policy(Protocol):
    """Decides how training should adapt. Tamiyo's policies are such objects.

    It may declare where it runs by an attribute ``isolation``: ``"thread"`` for one that is sure to
    return or asks :func:`esper.core.check_cancelled`, ``"process"`` for one that may hang. In a
    process ``decide`` works on a copy; state is brought back when the policy is ``Stateful``.
    """

    def decide(
        self, state: SystemState
    ) -> AdaptationCommand | Awaitable[AdaptationCommand | None] | None:
        """Answer with a command, or None to leave training as it is. May be a coroutine."""
        ...


class Executor(Protocol):
    """Carries out commands that change the model. Kasmina is such an object."""

    def apply(self, command: AdaptationCommand) -> FieldReport:
        """Carry out one command at a step boundary, wholly or not at all."""
        ...


@runtime_checkable
class PreparingExecutor(Executor, Protocol):
    """An executor that does the long part of a command beside training."""

    def prepare(self, command: AdaptationCommand) -> Any:  # noqa: ANN401
        """Do what takes long and does not touch the model.

        It runs on a thread: it must return, or ask :func:`esper.core.check_cancelled`.
        """
        ...

    def apply_prepared(self, command: AdaptationCommand, prepared: Any) -> FieldReport:  # noqa: ANN401
        """Carry out a command with what :meth:`prepare` returned, at a step boundary."""
        ...


class Sink(Protocol):
    """Takes records away from the loop: a file, a terminal, a metrics endpoint."""

    def write(self, record: Record) -> None:
        """Take one record. May raise: the hub isolates and counts it."""
        ...

    def close(self) -> None:
        """Write what is left and release what is held."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """Whatever has to be saved for a resume to be exact."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, of plain values and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Continue from what :meth:`state_dict` returned."""
        ...
