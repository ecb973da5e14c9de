"""Seeds for feature maps, with channels in dimension 1, and gains and attention for any layout."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from esper.kasmina.blueprints.base import Blueprint, Flow, Value, chosen, no_pair
from esper.kasmina.blueprints.plain import FeaturesTo, Seed, SqueezeExcite, TokenAttention
from esper.leyline import GrowthError

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d}


def _no_map(flow: Flow) -> str:
    if flow.pair:
        return no_pair(flow)
    if flow.channel_dim == 1 and len(flow.shape) in _CONVOLUTIONS:
        return ""
    return f"{flow.shape} is no feature map: batch, channels, one or two dimensions"


def _odd(name: str, given: int) -> int:
    kernel = chosen(given, 3)
    if kernel % 2 == 0:
        raise GrowthError(
            f"argument 'kernel' of blueprint {name!r} is {kernel}; positions stay as they are with "
            "an odd number only"
        )
    return kernel


class ConvResidual(Blueprint):
    """Two convolutions with GELU in between, of kernel 3 by default; positions stay as they are."""

    name = "conv"
    defaults: ClassVar[Mapping[str, Value]] = {"width": 0, "kernel": 3}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        return _no_map(flow)

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        convolution, kernel = _CONVOLUTIONS[len(flow.shape)], _odd(self.name, arguments["kernel"])
        width = chosen(arguments["width"], flow.channels)
        inner = nn.Sequential(
            convolution(flow.channels, width, kernel, padding=kernel // 2), nn.GELU()
        )
        return Seed(inner, convolution(width, flow.channels, kernel, padding=kernel // 2))


class Depthwise(Blueprint):
    """A convolution of each channel by itself, then one that mixes channels at each position."""

    name = "depthwise"
    defaults: ClassVar[Mapping[str, Value]] = {"kernel": 3}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        return _no_map(flow)

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        convolution, kernel = _CONVOLUTIONS[len(flow.shape)], _odd(self.name, arguments["kernel"])
        channels = flow.channels
        inner = nn.Sequential(
            convolution(channels, channels, kernel, padding=kernel // 2, groups=channels),
            nn.GELU(),
        )
        return Seed(inner, convolution(channels, channels, 1))


class Excitation(Blueprint):
    """A gain for each channel from the mean of all (Hu et al. 2018, squeeze and excitation)."""

    name = "squeeze_excite"
    defaults: ClassVar[Mapping[str, Value]] = {"width": 0}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        return no_pair(flow)

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        width = chosen(arguments["width"], flow.channels // 4)
        return SqueezeExcite(flow.channels, width, flow.channel_dim)


class Attention(Blueprint):
    """Self-attention over tokens or positions, behind a layer normalisation."""

    name = "attention"
    defaults: ClassVar[Mapping[str, Value]] = {"heads": 0}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        if flow.pair:
            return no_pair(flow)
        if len(flow.shape) < 3:
            return f"{flow.shape} has neither tokens nor positions to attend to"
        return ""

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        features = flow.channels
        heads = chosen(arguments["heads"], 4 if features % 4 == 0 else 1)
        if features % heads:
            raise GrowthError(
                f"argument 'heads' of blueprint 'attention' is {heads}, which does not divide "
                f"the {features} features"
            )
        inner = TokenAttention(features, heads, flow.channel_dim)
        out = nn.Linear(features, features)
        return Seed(inner, out if flow.channel_dim == -1 else FeaturesTo(out, flow.channel_dim))
