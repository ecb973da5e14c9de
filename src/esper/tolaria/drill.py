"""The fire drill: poisoned batches, so that a run shows what it does about a divergence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper.leyline import DataError
from esper.tolaria.batch_tree import map_tensors

SCALE = 30.0
# Far enough into the run for the guard to be armed and a trusted snapshot to exist.
POSITION = 0.55


class Drill:
    """Poisons two batches in a row: their inputs are scaled up, negated and shuffled.

    One alone would be a spike, whose update is skipped; two are a divergence. They are poisoned
    whenever training comes by, as bad batches in real data would be, until they are skipped.

    :param epoch: epoch of the batches.
    :param number: position of the first one in the epoch.
    :param announce: called whenever the first poison is given.
    """

    def __init__(self, epoch: int, number: int, announce: Callable[[], None]) -> None:
        self._identity = (epoch, number)
        self._announce = announce

    def apply(self, epoch: int, number: int, content: Any) -> Any:  # noqa: ANN401
        """Return the content of a batch, poisoned if it is one of the two.

        :raises DataError: the batch holds no floating-point tensor to poison.
        """
        first, second = self._identity, (self._identity[0], self._identity[1] + 1)
        if (epoch, number) not in (first, second):
            return content
        if (epoch, number) == first:
            self._announce()
        return poison(content)

    def state_dict(self) -> dict[str, Any]:
        """Return which batch comes first: it stays the same when a run is resumed for longer."""
        return {"identity": list(self._identity)}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set which batch comes first."""
        epoch, number = state_dict["identity"]
        self._identity = (epoch, number)


class NoDrill:
    """Leaves every batch as it is."""

    def apply(self, epoch: int, number: int, content: Any) -> Any:  # noqa: ANN401, ARG002
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
    poisoned = 0

    def spoil(tensor: Tensor) -> Tensor:
        nonlocal poisoned
        if not tensor.is_floating_point():
            return tensor
        poisoned += 1
        return torch.roll(tensor, 1, dims=0) * -SCALE

    spoilt = map_tensors(content, spoil)
    if not poisoned:
        raise DataError(
            "the drill found no floating-point tensor in the batch to poison; "
            "use --no-drill for this job"
        )
    return spoilt
