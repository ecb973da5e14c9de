"""The shapes that the engine asks of its companions."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from esper.leyline.commands import AdaptationCommand
from esper.leyline.growth import FieldReport, GrowthState, Stage
from esper.leyline.records import Record, SystemState


class Policy(Protocol):
    """Decides how training should adapt. Tamiyo's policies are such objects.

    One that answers at once may declare ``mode = "wait"``: training then waits for its answer, at
    most until the deadline, instead of going on meanwhile. It may declare where it runs by an
    attribute ``isolation``: ``"thread"`` for one that is sure to return or asks
    :func:`esper.core.check_cancelled`, ``"process"`` for one that may hang. In a process ``decide``
    works on a copy; state is brought back when the policy is ``Stateful``.
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


@runtime_checkable
class Grower(PreparingExecutor, Protocol):
    """An executor of seeds that train beside the model. Kasmina is such an object."""

    @property
    def version(self) -> int:
        """Version of the architecture; every structural change counts it up."""
        ...

    @property
    def stages(self) -> dict[str, Stage]:
        """The stage of every slot by name."""
        ...

    def configure(self, config: Any) -> None:  # noqa: ANN401 - esper.core's GrowthConfig
        """Take over the engine's configuration of growth."""
        ...

    def train_seeds(self, loss: Callable[[], Any], scale: Callable[[Any], Any] | None) -> None:
        """Fill the gradients of seeds in isolation, between backward pass and optimizer step.

        :param loss: runs the model on the batch of this step and returns its losses.
        :param scale: the loss scale of mixed precision; None without one.
        """
        ...

    def settle(self) -> list[FieldReport]:
        """After a step: let stages follow that follow by themselves."""
        ...

    def survey(
        self, loss: Callable[[Any], Any], batches: Sequence[Any], steps_left: int | None
    ) -> GrowthState:
        """Measure on held-out batches what each seed gains."""
        ...

    def structure(self) -> dict[str, Any]:
        """Return how the model was changed so far, of JSON types."""
        ...

    def rebuild(self, structure: dict[str, Any]) -> bool:
        """Change the model until it is built so; return whether anything had to be changed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything else that is needed to continue."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Continue from what :meth:`state_dict` returned, in a model that was rebuilt."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return the newest values by name."""
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
