"""Torch's own layers: their kind and sizes, and others like them."""

from typing import Any

import torch
from torch import nn

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# What treats each element by itself.
BY_ELEMENT = (
    nn.Identity,
    nn.Dropout,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Hardswish,
    nn.Tanh,
    nn.Sigmoid,
)
# What treats each channel of a feature map by itself.
BY_CHANNEL = (
    nn.Dropout1d,
    nn.Dropout2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
)
_OPTIONS = ("stride", "padding", "dilation", "padding_mode")


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's own class, also while a slot, a tap or a memo is at it."""
    kind: type[nn.Module] = getattr(type(module), "_esper_base", type(module))
    return kind


def peculiarity(module: nn.Module) -> str:
    """Return what would be lost if a module like this one took its place; empty for nothing."""
    if "forward" in vars(module):
        return "a forward that was replaced on the object"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "hooks" if any(getattr(module, name) for name in hooks) else ""


def inputs_of(layer: nn.Module) -> int:
    """Return the number of features or channels that a linear layer or a convolution takes."""
    name = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    return int(getattr(layer, name))


def outputs_of(layer: nn.Module) -> int:
    """Return the number of features or channels that it gives."""
    name = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    return int(getattr(layer, name))


def like(
    layer: nn.Module, *, inputs: int = 0, outputs: int = 0, bias: bool | None = None
) -> nn.Module:
    """Return a new layer of the same kind and options, with random weights on torch's own device.

    :param inputs: features or channels; 0 for as many.
    :param outputs: the same.
    :param bias: whether it has one; None for as the layer does.
    """
    return kind_of(layer)(**_recipe(layer, inputs, outputs, bias))


def blank(layer: nn.Module, *, inputs: int = 0, outputs: int = 0) -> nn.Module:
    """Return a layer as of :func:`like`, where the old one is, whose weights are to be filled.

    No random number is drawn for it.
    """
    return _unfilled(layer, **_recipe(layer, inputs, outputs, None))


def norm_like(norm: nn.Module, features: int) -> nn.Module:
    """Return a new batch normalisation of the same kind and options, of another size."""
    names = ("eps", "momentum", "affine", "track_running_stats")
    options = {name: getattr(norm, name) for name in names}
    if options["affine"] and norm._parameters["bias"] is None:
        options["bias"] = False  # an option that older versions of torch do not know
    return kind_of(norm)(features, **options)


def copy_of(module: nn.Module) -> nn.Module:
    """Return another module without weights that does the same, whatever is at the first one."""
    kind = kind_of(module)
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    options = {n: v for n, v in vars(module).items() if not n.startswith(("_", "esper_"))}
    vars(twin).update(options)
    return twin


def patches(layer: nn.Module) -> nn.Module:
    """Return a module whose output holds, for each of a layer's outputs, all that it sums up.

    It has the weights ``layer.weight[0].numel()`` in the place of the output's channels, in order.
    """
    if isinstance(layer, nn.Linear):
        return nn.Identity()
    weight = layer.get_parameter("weight")
    inputs, size = inputs_of(layer), weight[0, 0].numel()
    made = _unfilled(layer, **_recipe(layer, 0, inputs * size, bias=False), groups=inputs)
    single = torch.eye(size, device=weight.device, dtype=weight.dtype)
    single = single.reshape(size, 1, *weight.shape[2:])
    with torch.no_grad():
        made.get_parameter("weight").copy_(single.repeat(inputs, *[1] * (weight.ndim - 1)))
    return made


def _unfilled(layer: nn.Module, **options: Any) -> nn.Module:  # noqa: ANN401 - of any kind
    weight = layer.get_parameter("weight")
    with torch.device("meta"):
        made = kind_of(layer)(**options, dtype=weight.dtype)
    return made.to_empty(device=weight.device)


def _recipe(layer: nn.Module, inputs: int, outputs: int, bias: bool | None) -> dict[str, Any]:
    inputs, outputs = inputs or inputs_of(layer), outputs or outputs_of(layer)
    bias = layer.bias is not None if bias is None else bias
    if isinstance(layer, nn.Linear):
        return {"in_features": inputs, "out_features": outputs, "bias": bias}
    options = {name: getattr(layer, name) for name in _OPTIONS}
    sizes = {"in_channels": inputs, "out_channels": outputs, "kernel_size": layer.kernel_size}
    return {**sizes, **options, "bias": bias}
