"""What both rollback tiers store: named tensors and plain values."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Capture:
    """One view of the training state.

    :param tensors: tensors by slash-separated name, such as ``model/trunk.0.weight``,
        ``optimizer/trunk.0.weight/exp_avg`` or ``rng/torch``; any shape, dtype and device.
    :param values: everything that is no tensor, of JSON types only.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Capturable(Protocol):
    """An object whose whole state can be taken out and put back."""

    def capture(self) -> Capture:
        """Return the state. Its tensors are the live ones: copy them before training goes on."""
        ...

    def restore(self, capture: Capture, *, keep: Container[str] = ()) -> None:
        """Put a state back, by copying into the live tensors; the capture is left untouched.

        :param keep: names of components that stay as they are.
        :raises StateError: the capture does not fit; nothing was changed then.
        """
        ...
