"""Low-rank seeds, which a linear layer or a convolution before them takes into its weights."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from esper.kasmina.blueprints.base import Blueprint, Flow, Value, chosen, no_pair
from esper.kasmina.blueprints.layers import LINEAR, blank, kind_of, peculiarity
from esper.kasmina.blueprints.plain import AddBlend, Blend, Seed

_POINTWISE = {3: nn.Conv1d, 4: nn.Conv2d}


class LowRank(Blueprint):
    """``B A h`` with a small rank, at each position (as Hu et al., LoRA, ICLR 2022, on outputs).

    Behind a linear layer, or a convolution without groups, it is merged into the weights.
    """

    name = "low_rank"
    defaults: ClassVar[Mapping[str, Value]] = {"rank": 4}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        if flow.pair:
            return no_pair(flow)
        if _dense(flow) or len(flow.shape) in _POINTWISE:
            return ""
        return f"{flow.shape} has channels in dimension 1 and more than two dimensions behind"

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        rank, channels = chosen(arguments["rank"], 4), flow.channels
        if _dense(flow):
            inner = nn.Linear(channels, rank, bias=False)
            return Seed(inner, nn.Linear(rank, channels, bias=False))
        pointwise = _POINTWISE[len(flow.shape)]
        return Seed(
            pointwise(channels, rank, 1, bias=False), pointwise(rank, channels, 1, bias=False)
        )

    def fold(self, host: nn.Module, seed: nn.Module, blend: Blend, alpha: float) -> nn.Module:
        """See :class:`Blueprint`: ``h + a B A h`` with ``h = W x + b`` is a layer like the host."""
        if not isinstance(blend, AddBlend) or not _merges(host, seed):
            return super().fold(host, seed, blend, alpha)
        down, up = (
            seed.get_parameter(f"{name}.weight").double().flatten(1) for name in ("inner", "last")
        )
        merged = blank(host)
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                before = host.get_parameter(name)
                # A row for each output of the host, whatever its kernel or bias.
                rows = before.double().reshape(len(before), -1)
                mixed = rows + alpha * (up @ (down @ rows))
                parameter.copy_(mixed.reshape(before.shape))
                parameter.requires_grad_(before.requires_grad)
        return merged.train(host.training)


def _dense(flow: Flow) -> bool:
    return flow.channel_dim == -1 or len(flow.shape) == 2


def _merges(host: nn.Module, seed: nn.Module) -> bool:
    """Whether the host's own outputs are what the seed mixes, by weights and nothing else."""
    alike = kind_of(host) in LINEAR and kind_of(host) is kind_of(seed.get_submodule("inner"))
    return alike and getattr(host, "groups", 1) == 1 and not peculiarity(host)
