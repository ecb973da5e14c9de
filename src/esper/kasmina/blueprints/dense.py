"""Seeds for features in the last dimension: linear bottleneck, MLP."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from esper.kasmina.blueprints.base import Blueprint, Flow, Value, chosen, no_pair
from esper.kasmina.blueprints.plain import Seed


def _not_last(flow: Flow) -> str:
    if flow.pair:
        return no_pair(flow)
    if flow.channel_dim == -1 or len(flow.shape) == 2:
        return ""
    return f"features are in dimension {flow.channel_dim} of {flow.shape}, not in the last one"


class LinearBottleneck(Blueprint):
    """Normalised, squeezed linearly and spread again; cheap, and stable at a high rate."""

    name = "linear"
    defaults: ClassVar[Mapping[str, Value]] = {"width": 0}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        return _not_last(flow)

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        width = chosen(arguments["width"], flow.channels // 2)
        inner = nn.Sequential(nn.LayerNorm(flow.channels), nn.Linear(flow.channels, width))
        return Seed(inner, nn.Linear(width, flow.channels))


class Mlp(Blueprint):
    """One hidden layer with GELU, as wide as the features unless told otherwise."""

    name = "mlp"
    defaults: ClassVar[Mapping[str, Value]] = {"width": 0}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        return _not_last(flow)

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        width = chosen(arguments["width"], flow.channels)
        inner = nn.Sequential(nn.Linear(flow.channels, width), nn.GELU())
        return Seed(inner, nn.Linear(width, flow.channels))
