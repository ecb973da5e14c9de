"""Widening: a branch beside two layers, which becomes new units of both."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints.base import Blueprint, Flow, Pair, Value, WidenedPair, chosen
from esper.kasmina.blueprints.layers import (
    BY_CHANNEL,
    BY_ELEMENT,
    LINEAR,
    NORMS,
    blank,
    copy_of,
    inputs_of,
    kind_of,
    like,
    norm_like,
    outputs_of,
    peculiarity,
)
from esper.kasmina.blueprints.plain import Seed
from esper.leyline import GrowthError

_CONVOLVED = {nn.Conv1d: 3, nn.Conv2d: 4}
_ON_MAPS = (*BY_CHANNEL, *NORMS)


class _Layout(Enum):
    """Where the channels of what lies between two layers are."""

    ROWS = "batch by features"
    TOKENS = "features last"
    MAP = "channels in dimension 1"


class Widen(Blueprint):
    """New units between two layers: a branch ``in -> between -> out`` that folds exactly.

    Where a layer of the pair is frozen, the new units' weights in it are so after folding. Dropout
    in between draws masks of its own for the branch.
    """

    name = "widen"
    defaults: ClassVar[Mapping[str, Value]] = {"width": 0}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        pair = flow.pair
        if pair is None:
            return "it needs a slot over a pair of layers, such as 'fc1>fc2'"
        return _obstacle_of(pair.first) or _obstacle_of(pair.second) or _obstacle_between(pair)

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        pair = flow.pair
        if pair is None:
            raise GrowthError(f"blueprint 'widen' does not fit: {self.fits(flow)}")
        units = outputs_of(pair.first)
        width = chosen(arguments["width"], units)
        between = [
            norm_like(module, _features(module) // units * width)
            if kind_of(module) in NORMS
            else copy_of(module)
            for module in pair.between
        ]
        inputs = inputs_of(pair.second) // units * width
        inner = nn.Sequential(like(pair.first, outputs=width), *between)
        return Seed(inner, like(pair.second, inputs=inputs, bias=False))

    def fold_pair(self, pair: Pair, seed: nn.Module, alpha: float) -> WidenedPair:
        """See :class:`Blueprint`."""
        entry, *middle = seed.get_submodule("inner").children()
        last = seed.get_submodule("last")
        first = blank(pair.first, outputs=outputs_of(pair.first) + outputs_of(entry))
        second = blank(pair.second, inputs=inputs_of(pair.second) + inputs_of(last))
        replaced: dict[Tensor, Tensor] = {}
        with torch.no_grad():
            _join(first, pair.first, entry, replaced)
            outgoing = alpha * last.get_parameter("weight")
            _fill(second, pair.second, "weight", (outgoing,), 1, replaced)
            if pair.second.bias is not None:
                _fill(second, pair.second, "bias", (), 0, replaced)
            between = tuple(
                _joined_norm(old, new, replaced) if kind_of(old) in NORMS else old
                for old, new in zip(pair.between, middle, strict=True)
            )
        old = (pair.first, *pair.between, pair.second)
        for before, after in zip(old, (first, *between, second), strict=True):
            after.training = before.training
        return WidenedPair(first, second, between, replaced)


def _obstacle_of(layer: nn.Module) -> str:
    kind, own = kind_of(layer), peculiarity(layer)
    if kind not in LINEAR:
        return f"a {kind.__name__} cannot be made wider"
    if getattr(layer, "groups", 1) != 1:
        return f"a grouped {kind.__name__} cannot be made wider"
    return f"a {kind.__name__} of the pair has {own}, which wider layers would lose" if own else ""


def _obstacle_between(pair: Pair) -> str:
    """Follow the channels from one layer to the other: the branch's have to come behind them."""
    first, dimensions = kind_of(pair.first), len(pair.source_shape)
    if first in _CONVOLVED:
        layout = _Layout.MAP
        if dimensions != _CONVOLVED[first]:
            return f"a {first.__name__} is given {pair.source_shape}, which has no batch dimension"
    else:
        layout = _Layout.ROWS if dimensions == 2 else _Layout.TOKENS
    for module in pair.between:
        problem = _obstacle_at(module, layout)
        if problem:
            return problem
        if kind_of(module) is nn.Flatten:
            layout = _Layout.ROWS
    if (kind_of(pair.second) is nn.Linear) == (layout is _Layout.MAP):
        name = kind_of(pair.second).__name__
        return f"a {name} is given {layout.value}, and does not sum over these"
    return ""


def _obstacle_at(module: nn.Module, layout: _Layout) -> str:
    kind, own = kind_of(module), peculiarity(module)
    if kind is nn.Flatten:
        return _obstacle_of_flatten(module, layout)
    known = kind in BY_ELEMENT or (kind in _ON_MAPS and layout is _Layout.MAP)
    if not known and not (kind in NORMS and layout is _Layout.ROWS):
        return f"a {kind.__name__} between the layers mixes channels, or is not known"
    return f"a {kind.__name__} between the layers has {own}" if own else ""


def _obstacle_of_flatten(module: nn.Module, layout: _Layout) -> str:
    if not isinstance(module, nn.Flatten) or (module.start_dim, module.end_dim) != (1, -1):
        return "a Flatten between the layers has to begin at dimension 1 and take in all others"
    if layout is _Layout.TOKENS:
        return "a Flatten mixes features in the last dimension with tokens"
    return ""


def _features(norm: nn.Module) -> int:
    return int(getattr(norm, "num_features"))  # noqa: B009 - of two classes that share no base


def _join(
    target: nn.Module, old: nn.Module, new: nn.Module, replaced: dict[Tensor, Tensor]
) -> None:
    """Fill all parameters with the old ones and, behind them, the new ones."""
    for name, parameter in new.named_parameters():
        _fill(target, old, name, (parameter,), 0, replaced)


def _fill(
    target: nn.Module,
    old: nn.Module,
    name: str,
    more: tuple[Tensor, ...],
    dim: int,
    replaced: dict[Tensor, Tensor],
) -> None:
    """Fill one parameter with the old one, and what comes behind it."""
    parameter, before = target.get_parameter(name), old.get_parameter(name)
    parameter.copy_(torch.cat([before, *more], dim))
    parameter.requires_grad_(before.requires_grad)
    replaced[before] = parameter


def _joined_norm(old: nn.Module, new: nn.Module, replaced: dict[Tensor, Tensor]) -> nn.Module:
    norm = norm_like(old, _features(old) + _features(new))
    for tensor in (*old.parameters(), *old.buffers()):
        if tensor.is_floating_point():
            norm.to(tensor.device, tensor.dtype)
            break
    _join(norm, old, new, replaced)
    for name, buffer in norm.named_buffers():
        before = old.get_buffer(name)
        # How many batches were seen is one number for all channels: the host's goes on.
        buffer.copy_(torch.cat([before, new.get_buffer(name)]) if before.ndim else before)
    return norm
