"""Seeds for features in the last dimension: low-rank, linear bottleneck, MLP."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from esper.kasmina.blueprints.base import Blueprint, Flow, Value, chosen, no_pair
from esper.kasmina.blueprints.layers import blank, kind_of, peculiarity
from esper.kasmina.blueprints.plain import AddBlend, Blend, Seed


def _not_last(flow: Flow) -> str:
    if flow.pair:
        return no_pair(flow)
    if flow.channel_dim == -1 or len(flow.shape) == 2:
        return ""
    return f"features are in dimension {flow.channel_dim} of {flow.shape}, not in the last one"


class LowRank(Blueprint):
    """``B A h`` with a small rank; behind a linear layer it is merged into its weights."""

    name = "low_rank"
    defaults: ClassVar[Mapping[str, Value]] = {"rank": 4}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        return _not_last(flow)

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        rank = chosen(arguments["rank"], 4)
        inner = nn.Linear(flow.channels, rank, bias=False)
        return Seed(inner, nn.Linear(rank, flow.channels, bias=False))

    def fold(self, host: nn.Module, seed: nn.Module, blend: Blend, alpha: float) -> nn.Module:
        """See :class:`Blueprint`: ``h + a B A h`` with ``h = W x + b`` is a linear layer."""
        alone = kind_of(host) is nn.Linear and not peculiarity(host)
        if not alone or not isinstance(blend, AddBlend):
            return super().fold(host, seed, blend, alpha)
        down, up = (seed.get_parameter(f"{name}.weight").double() for name in ("inner", "last"))
        merged = blank(host)
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                before = host.get_parameter(name)
                wide = before.double()
                parameter.copy_(wide + alpha * (up @ (down @ wide)))
                parameter.requires_grad_(before.requires_grad)
        return merged


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
