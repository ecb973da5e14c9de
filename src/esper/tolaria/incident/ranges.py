"""What values a tensor holds, and what is usual for the output of an operation."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# An output breaks the trend when its root mean square exceeds the highest of the steps before by
# this factor, and by more than what those steps span among themselves.
FACTOR = 8.0
# The factor where there are fewer steps than _ENOUGH, or where the guard saw nothing to doubt.
_LARGE_FACTOR = 64.0
_ENOUGH = 4

# Phase, path of the module, operation, how many of the same came before it, number of the output.
Place = tuple[str, str, str, int, int]


@dataclass(frozen=True)
class Range:
    """The values of one tensor.

    :param name: of a parameter or of a part of the batch; empty for what is in between.
    :param low: lowest finite value; not a number without any.
    :param high: highest finite value.
    :param mean: of the finite values.
    :param rms: root mean square of the finite values.
    :param not_finite: how many are not finite.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    mean: float
    rms: float
    not_finite: int

    def __str__(self) -> str:
        name = f"{self.name} " if self.name else ""
        kind = f"{name}{self.dtype} {self.shape}"
        if math.isnan(self.low):
            values = "no finite value" if self.not_finite else "no values"
        else:
            values = f"{self.low:.4g} to {self.high:.4g}, mean {self.mean:.4g}"
        odd = f", {self.not_finite} not finite" if self.not_finite else ""
        return f"{kind}: {values}{odd}"


def range_of(tensor: Tensor, name: str = "") -> Range:
    """Return the range of a tensor's values; of no numbers, an empty one."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if tensor.numel() == 0 or not can_measure(tensor, also_whole=True):
        return Range(name, dtype, shape, math.nan, math.nan, math.nan, math.nan, 0)
    values = _as_real(tensor.detach()).double().reshape(-1)
    finite = values[torch.isfinite(values)]
    odd = values.numel() - finite.numel()
    if finite.numel() == 0:
        return Range(name, dtype, shape, math.nan, math.nan, math.nan, math.nan, odd)
    # Adding zero turns -0 into 0.
    low, high = (bound.item() + 0.0 for bound in torch.aminmax(finite))
    rms = finite.square().mean().sqrt().item()
    return Range(name, dtype, shape, low, high, finite.mean().item(), rms, odd)


def can_measure(tensor: Tensor, *, also_whole: bool = False) -> bool:
    """Whether a tensor has values to look at.

    :param also_whole: take whole numbers and truth values, too.
    """
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return also_whole or tensor.is_floating_point() or tensor.is_complex()


def rms_of(tensor: Tensor) -> float:
    """Return the root mean square of all values; it is not finite when one of them is not."""
    values = _as_real(tensor.detach())
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm / math.sqrt(values.numel())


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Baseline:
    """What was usual in the steps before: the root mean square of each operation's output.

    :ivar steps: how many steps it was taken from.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._logs: dict[Place, list[float]] = defaultdict(list)
        self._not_finite: set[Place] = set()

    def take_in(self, values: Iterable[tuple[Place, float]]) -> None:
        """Take in the outputs of a step that went well."""
        self.steps += 1
        for place, rms in values:
            if not math.isfinite(rms):
                self._not_finite.add(place)
            elif rms > 0:
                self._logs[place].append(math.log(rms))

    def often_not_finite(self, place: Place) -> bool:
        """Whether values that are not finite are usual there, as in the mask of an attention."""
        return place in self._not_finite

    def broken_by(self, place: Place, rms: float, *, doubtful: bool) -> bool:
        """Whether an output lies so far above what is usual that it breaks the trend.

        :param doubtful: the guard doubted the step; of another one, more is asked.
        """
        logs = self._logs.get(place)
        if not logs or not 0 < rms < math.inf:
            return False
        factor = FACTOR if doubtful and len(logs) >= _ENOUGH else _LARGE_FACTOR
        limit = max(math.log(factor), max(logs) - min(logs))
        return math.log(rms) - max(logs) > limit

    def usual(self, place: Place) -> tuple[float, float] | None:
        """Return the lowest and the highest root mean square; None when nothing is known."""
        logs = self._logs.get(place)
        return (math.exp(min(logs)), math.exp(max(logs))) if logs else None
