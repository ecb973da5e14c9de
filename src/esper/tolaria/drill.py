"""The fire drill: one poisoned batch, so that a run shows what it does about a divergence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper.leyline import DataError

SCALE = 30.0
# Far enough into the run for the guard to be armed and a trusted snapshot to exist.
POSITION = 0.55


class Drill:
    """Poisons the batch of one step: its inputs are scaled up, negated and shuffled.

    The identity of the poisoned batch is fixed when its step is first reached, so that the same
    batch stays poisoned when training comes by again, unless it is skipped.

    :param step: the step whose batch is poisoned.
    :param announce: called once, with the step, when the poison is given.
    """

    def __init__(self, step: int, announce: Callable[[int], None]) -> None:
        self.step = step
        self._announce = announce
        self._poisoned: tuple[int, int] | None = None

    def apply(self, step: int, identity: tuple[int, int], content: Any) -> Any:  # noqa: ANN401
        """Return the content of a batch, poisoned if it is the one.

        :param step: index of the step that the batch is for.
        :param identity: epoch and number of the batch.
        :raises DataError: the batch holds no floating-point tensor to poison.
        """
        if self._poisoned is None and step == self.step:
            self._poisoned = identity
            self._announce(step)
        return poison(content) if identity == self._poisoned else content

    def state_dict(self) -> dict[str, Any]:
        """Return which batch is poisoned."""
        return {"poisoned": self._poisoned}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set which batch is poisoned."""
        poisoned = state_dict["poisoned"]
        self._poisoned = None if poisoned is None else (poisoned[0], poisoned[1])


class NoDrill:
    """Leaves every batch as it is."""

    def apply(self, step: int, identity: tuple[int, int], content: Any) -> Any:  # noqa: ANN401, ARG002
        """Return the content."""
        return content

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take nothing."""


def poison(content: Any) -> Any:  # noqa: ANN401 - the user's batch
    """Return a batch whose floating-point tensors are scaled, negated and out of order.

    :raises DataError: there is no floating-point tensor in it.
    """
    poisoned, found = _poison(content)
    if not found:
        raise DataError(
            "the drill found no floating-point tensor in the batch to poison; "
            "use --no-drill for this job"
        )
    return poisoned


def _poison(content: Any) -> tuple[Any, bool]:  # noqa: ANN401 - the user's batch
    if isinstance(content, Tensor):
        if not content.is_floating_point():
            return content, False
        return torch.roll(content, 1, dims=0) * -SCALE, True
    if isinstance(content, dict):
        parts = {key: _poison(value) for key, value in content.items()}
        found = any(hit for _, hit in parts.values())
        return {key: value for key, (value, _) in parts.items()}, found
    if isinstance(content, list | tuple):
        items = [_poison(value) for value in content]
        values = [value for value, _ in items]
        found = any(hit for _, hit in items)
        return (values if isinstance(content, list) else tuple(values)), found
    return content, False
