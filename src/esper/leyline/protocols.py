"""The shapes that the engine asks of its companions."""

from typing import Any, Protocol, runtime_checkable

from esper.leyline.commands import AdaptationCommand, FieldReport
from esper.leyline.records import Record, SystemState


class Policy(Protocol):
    """Decides how training should adapt. Tamiyo's policies are such objects."""

    def decide(self, state: SystemState) -> AdaptationCommand | None:
        """Answer with a command, or None to leave training as it is."""
        ...


class Executor(Protocol):
    """Carries out commands that change the model. Kasmina is such an object."""

    def apply(self, command: AdaptationCommand) -> FieldReport:
        """Carry out one command at a step boundary, wholly or not at all."""
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
