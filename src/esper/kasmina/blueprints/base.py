"""What a blueprint is: it builds seeds for what flows through a slot, and folds them away."""

import copy
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints.layers import LINEAR
from esper.kasmina.blueprints.plain import AddBlend, Blend, FeaturesTo, Grown, Residual, Seed
from esper.leyline import GrowthError

Value = int | float | str


@dataclass(frozen=True)
class Pair:
    """Two layers, whose middle a seed can widen.

    :param first: the layer whose input the seed takes.
    :param second: the layer whose output it joins.
    :param between: the modules in between, in order.
    :param source_shape: of the input of the first one, batch included.
    """

    first: nn.Module
    second: nn.Module
    between: tuple[nn.Module, ...]
    source_shape: tuple[int, ...]


@dataclass(frozen=True)
class Flow:
    """What flows through a slot.

    :param shape: batch first.
    :param dtype: of the module's output.
    :param device: of the module's output.
    :param channel_dim: where the features are: 1 as in images, or -1.
    :param pair: the layers of a slot over a pair.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    channel_dim: int
    pair: Pair | None = None

    @property
    def channels(self) -> int:
        """The number of features."""
        return self.shape[self.channel_dim]


@dataclass(frozen=True)
class WidenedPair:
    """Plain modules in place of a pair and what was between.

    :param replaced: new parameters by the old ones, which are their leading blocks.
    """

    first: nn.Module
    second: nn.Module
    between: tuple[nn.Module, ...]
    replaced: dict[Tensor, Tensor]


class Blueprint(ABC):
    """Builds seeds of one kind.

    :cvar name: by which it is asked for.
    :cvar version: counts up when what it builds for the same arguments changes.
    :cvar defaults: arguments and their values where none are given; 0 lets the blueprint choose.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    defaults: ClassVar[Mapping[str, Value]] = {}

    @abstractmethod
    def fits(self, flow: Flow) -> str:
        """Return why nothing can be built for this flow; empty when something can."""

    @abstractmethod
    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """Return a seed; :meth:`build` has checked the arguments and moves it to its place.

        It names no device: where a seed is only priced, none of it is to take memory.
        """

    def check(self, flow: Flow) -> None:
        """See to it that something can be built for this flow.

        :raises GrowthError: nothing can, or :meth:`fits` fails.
        """
        try:
            problem = self.fits(flow)
        except Exception as error:  # whatever a package's own code may raise
            raise GrowthError(
                f"blueprint {self.name!r} cannot tell whether it fits {flow.shape}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if problem:
            raise GrowthError(f"blueprint {self.name!r} does not fit: {problem}")

    def build(self, flow: Flow, **arguments: Value) -> nn.Module:
        """Return a seed: it maps the slot's source to a tensor of the flow's shape.

        :param arguments: see :attr:`defaults`.
        :raises GrowthError: an argument is unknown or out of range, or the flow does not fit.
        """
        self.check(flow)
        complete = self._complete(arguments)
        try:
            seed = self.make(flow, complete)
        except GrowthError:
            raise
        except Exception as error:  # whatever a package's own code may raise
            raise GrowthError(
                f"blueprint {self.name!r} cannot build a seed for {flow.shape}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return seed.to(flow.device, flow.dtype)

    def fold(self, host: nn.Module, seed: nn.Module, blend: Blend, alpha: float) -> nn.Module:
        """Return plain modules that do what host and seed do together.

        :param host: plain; it becomes a part of the result.
        :param seed: left as it is; its parameters are copied, in their order.
        :param alpha: its share.
        """
        block, joined = copy.deepcopy(seed), copy.deepcopy(blend)
        if isinstance(joined, AddBlend) and scale_last(block, alpha):
            grown: nn.Module = Residual(block)
        else:
            grown = Grown(block, joined, alpha)
        return nn.Sequential(OrderedDict(host=host, grown=grown))

    def fold_pair(self, pair: Pair, seed: nn.Module, alpha: float) -> WidenedPair:
        """Return wider layers that do what the pair and the seed do together.

        :raises GrowthError: this blueprint widens nothing.
        """
        del pair, seed, alpha
        raise GrowthError(f"blueprint {self.name!r} does not widen layers")

    def _complete(self, given: Mapping[str, Value]) -> dict[str, Any]:
        return {**self.defaults, **{name: self._checked(name, given[name]) for name in given}}

    def _checked(self, name: str, value: Value) -> Value:
        if name not in self.defaults:
            known = ", ".join(self.defaults) or "none"
            raise GrowthError(f"blueprint {self.name!r} has no argument {name!r}; it has: {known}")
        kind = type(self.defaults[name])
        if kind is float and type(value) is int:
            value = float(value)
        problem = ""
        if type(value) is not kind:
            problem = f"give a value of type {kind.__name__}"
        elif not isinstance(value, str) and not 0 <= value < math.inf:
            problem = "give 0 or more"
        if problem:
            raise GrowthError(
                f"argument {name!r} of blueprint {self.name!r} is {value!r}; {problem}"
            )
        return value


def scale_last(seed: nn.Module, alpha: float) -> bool:
    """Multiply a seed's output by a share, in its outgoing layer; return whether it can be."""
    last = getattr(seed, "last", None)
    layer = last.layer if isinstance(last, FeaturesTo) else last
    # Only of these is known that the output is linear in the outgoing layer's weights.
    if type(seed) is not Seed or type(layer) not in LINEAR:
        return False
    with torch.no_grad():
        for parameter in seed.get_submodule("last").parameters():
            parameter.mul_(alpha)
    return True


def no_pair(flow: Flow) -> str:
    """Return why a blueprint that takes the module's own output does not fit a pair."""
    return "the slot is over a pair of layers; use 'widen' there" if flow.pair else ""


def chosen(value: int, otherwise: int) -> int:
    """Return an argument, or what the blueprint chooses for 0."""
    return value or max(1, otherwise)
