"""Widening: a branch beside two layers, which becomes new units of both."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints.base import Blueprint, Flow, Pair, Value, WidenedPair, chosen
from esper.kasmina.blueprints.plain import Seed
from esper.leyline import GrowthError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
# What treats each channel by itself, so that new channels pass it as they would alone.
_BY_CHANNEL = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.LeakyReLU,
    nn.ELU,
    nn.Sigmoid,
    nn.Identity,
    nn.Dropout,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Widen(Blueprint):
    """New units between two layers: a branch ``in -> between -> out`` that folds exactly."""

    name = "widen"
    defaults: ClassVar[Mapping[str, Value]] = {"width": 0}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        pair = flow.pair
        if pair is None:
            return "it needs a slot over a pair of layers, such as 'fc1>fc2'"
        for layer in (pair.first, pair.second):
            if not isinstance(layer, _LAYERS):
                return f"a {type(layer).__name__} cannot be made wider"
            if getattr(layer, "groups", 1) != 1:
                return f"a grouped {type(layer).__name__} cannot be made wider"
        for module in pair.between:
            problem = _obstacle(module)
            if problem:
                return problem
        return ""

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        pair = _pair_of(flow)
        width = chosen(arguments["width"], _out(pair.first) // 2)
        between = [_alike(module, width) for module in pair.between]
        inner = nn.Sequential(_resized(pair.first, outputs=width), *between)
        per_channel = _in(pair.second) // _out(pair.first)
        last = _resized(pair.second, inputs=width * per_channel, bias=False)
        return Seed(inner, last)

    def fold_pair(self, pair: Pair, seed: nn.Module, alpha: float) -> WidenedPair:
        """See :class:`Blueprint`."""
        inner = list(seed.get_submodule("inner").children())
        entry, middle, last = inner[0], inner[1:], seed.get_submodule("last")
        replaced: dict[Tensor, Tensor] = {}
        first = _resized(pair.first, outputs=_out(pair.first) + _out(entry))
        second = _resized(pair.second, inputs=_in(pair.second) + _in(last))
        with torch.no_grad():
            _join(first, pair.first, "weight", [entry.get_parameter("weight")], 0, replaced)
            if pair.first.bias is not None:
                _join(first, pair.first, "bias", [entry.get_parameter("bias")], 0, replaced)
            outgoing = alpha * last.get_parameter("weight")
            _join(second, pair.second, "weight", [outgoing], 1, replaced)
            if pair.second.bias is not None:
                _join(second, pair.second, "bias", [], 0, replaced)
        between = tuple(
            _joined_norm(old, new, replaced) if isinstance(old, _NORMS) else old
            for old, new in zip(pair.between, middle, strict=True)
        )
        return WidenedPair(first, second, between, replaced)


def _obstacle(module: nn.Module) -> str:
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) != (1, -1):
        return "a Flatten between the layers has to begin at dimension 1 and take in all others"
    if type(module) in _BY_CHANNEL or type(module) in _NORMS:
        return ""
    return f"a {type(module).__name__} between the layers mixes channels, or is not known"


def _pair_of(flow: Flow) -> Pair:
    if flow.pair is None:
        raise GrowthError("blueprint 'widen' needs a slot over a pair of layers")
    return flow.pair


def _in(layer: nn.Module) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]


def _out(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _resized(
    layer: nn.Module, *, inputs: int = 0, outputs: int = 0, bias: bool | None = None
) -> nn.Module:
    """Return a layer of the same kind and options, of another size."""
    inputs, outputs = inputs or _in(layer), outputs or _out(layer)
    weight = layer.get_parameter("weight")
    options: dict[str, Any] = {
        "bias": getattr(layer, "bias", None) is not None if bias is None else bias,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        for name in ("stride", "padding", "dilation", "padding_mode"):
            options[name] = getattr(layer, name)
        kind: Any = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
        return kind(inputs, outputs, layer.kernel_size, **options)  # type: ignore[no-any-return]
    return nn.Linear(inputs, outputs, **options)


def _alike(module: nn.Module, width: int) -> nn.Module:
    if not isinstance(module, _NORMS):
        return copy.deepcopy(module)
    return type(module)(
        width,
        eps=module.eps,
        momentum=module.momentum,
        affine=module.affine,
        track_running_stats=module.track_running_stats,
    )


def _join(
    target: nn.Module,
    old: nn.Module,
    name: str,
    more: Sequence[Tensor],
    dim: int,
    replaced: dict[Tensor, Tensor],
) -> None:
    """Fill a parameter with the old one, and what comes behind it."""
    parameter, before = target.get_parameter(name), old.get_parameter(name)
    parameter.copy_(torch.cat([before, *more], dim) if more else before)
    parameter.requires_grad_(before.requires_grad)
    replaced[before] = parameter


def _joined_norm(old: nn.Module, new: nn.Module, replaced: dict[Tensor, Tensor]) -> nn.Module:
    width = len(_statistics(old)) + len(_statistics(new))
    norm = _alike(old, width).to(_statistics(old).device, _statistics(old).dtype)
    with torch.no_grad():
        for name, buffer in norm.named_buffers():
            before = old.get_buffer(name)
            joined = torch.cat([before, new.get_buffer(name)]) if before.ndim else before
            buffer.copy_(joined)
        for name, _ in list(norm.named_parameters()):
            _join(norm, old, name, [new.get_parameter(name)], 0, replaced)
    return norm


def _statistics(norm: nn.Module) -> Tensor:
    for name in ("running_mean", "weight"):
        value = getattr(norm, name, None)
        if isinstance(value, Tensor):
            return value
    return torch.empty(int(norm.num_features))  # type: ignore[arg-type]
