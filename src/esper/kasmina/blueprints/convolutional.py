"""Seeds for feature maps, with channels in dimension 1, and gains and attention for any layout."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from esper.kasmina.blueprints.base import Blueprint, Flow, Value, chosen, no_pair
from esper.kasmina.blueprints.plain import Seed, SqueezeExcite, TokenAttention, ToShapeOf
from esper.leyline import GrowthError

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d}


def _no_map(flow: Flow) -> str:
    if flow.pair:
        return no_pair(flow)
    if flow.channel_dim == 1 and len(flow.shape) in _CONVOLUTIONS:
        return ""
    return f"{flow.shape} is no feature map: batch, channels, one or two dimensions"


class ConvResidual(Blueprint):
    """Two convolutions of kernel 3 with GELU in between; positions stay as they are."""

    name = "conv"
    defaults: ClassVar[Mapping[str, Value]] = {"width": 0, "kernel": 3}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        return _no_map(flow)

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        convolution, kernel = _CONVOLUTIONS[len(flow.shape)], arguments["kernel"] | 1
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
        convolution, kernel = _CONVOLUTIONS[len(flow.shape)], arguments["kernel"] | 1
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
        sizes = list(flow.shape[1:])
        del sizes[flow.channel_dim - 1 if flow.channel_dim == 1 else -1]
        out = ToShapeOf(nn.Linear(features, features), flow.channel_dim, tuple(sizes))
        return Seed(TokenAttention(features, heads, flow.channel_dim), out)
