"""How the share of a seed changes, step by step."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from esper.leyline import GrowthError

Curve = Literal["linear", "cosine", "sigmoid"]
# The sigmoid is cut off at plus and minus this, and stretched to meet both ends.
_REACH = 6.0


@dataclass(frozen=True)
class Ramp:
    """A share that goes from one value to another and stays there.

    :param start: share at step 0, from 0 to 1.
    :param target: share from step ``steps`` on, from 0 to 1.
    :param steps: optimizer steps in between, at least 1.
    :param curve: ``linear``, ``cosine`` or ``sigmoid``.
    :raises GrowthError: a value is of another type or out of range.
    """

    start: float
    target: float
    steps: int
    curve: Curve | str = "cosine"

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("target", self.target)):
            if not _is(value, Real) or not 0.0 <= value <= 1.0:
                raise GrowthError(f"{name} of a ramp is {value!r}; give a number from 0 to 1")
        if not _is(self.steps, Integral):
            raise GrowthError(f"steps of a ramp is {self.steps!r}; give a whole number")
        if self.steps < 1:
            raise GrowthError(f"steps of a ramp is {self.steps!r}; give 1 or more")
        if self.curve not in get_args(Curve):
            known = ", ".join(get_args(Curve))
            raise GrowthError(f"curve of a ramp is {self.curve!r}; give one of {known}")

    def value(self, step: int) -> float:
        """Return the share after so many steps; monotone, and exact at both ends."""
        if step <= 0:
            return self.start
        if step >= self.steps:
            return self.target
        done = _SHAPES[self.curve](step / self.steps)
        value = self.start + (self.target - self.start) * done
        low, high = sorted((self.start, self.target))
        return min(max(value, low), high)


def _is(value: object, kind: type) -> bool:
    """Whether a value is of a type; it may come from outside, whatever its annotation says."""
    return isinstance(value, kind)


def _linear(part: float) -> float:
    return part


def _cosine(part: float) -> float:
    return (1.0 - math.cos(math.pi * part)) / 2.0


def _sigmoid(part: float) -> float:
    low, high = _logistic(-_REACH), _logistic(_REACH)
    return (_logistic(_REACH * (2.0 * part - 1.0)) - low) / (high - low)


def _logistic(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


_SHAPES = {"linear": _linear, "cosine": _cosine, "sigmoid": _sigmoid}
