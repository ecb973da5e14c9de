"""The first weights of a seed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from esper.leyline import GrowthError

_RIDGE = 1e-3
# Output of a solved seed, over the norm of what flows through the slot.
_FIRST_STEP = 0.05


def initialise(
    name: str, seed: nn.Module, *, inputs: Tensor | None = None, gradient: Tensor | None = None
) -> None:
    """Set the weights of a seed that was just built.

    :param name: ``zero_out``: the outgoing layer is zero. ``gradmax``: the incoming layer is zero,
        and the outgoing one is what makes its gradient largest (Evci et al., GradMax, ICLR 2022).
        ``small_solve``: the outgoing layer is solved so that the seed goes a small way down the
        gradient (least squares with a ridge).
    :param inputs: of the seed; needed by the last two.
    :param gradient: of the loss at the slot's output, of its shape; needed by the last two.
    :raises GrowthError: the name is unknown, something is missing, or it would not learn.
    """
    if name not in _INITIALISERS:
        known = ", ".join(_INITIALISERS)
        raise GrowthError(f"there is no initialiser {name!r}; give one of: {known}")
    with torch.no_grad():
        if name == "zero_out":
            _zero(_outgoing(seed))
            return
        if inputs is None or gradient is None:
            raise GrowthError(f"initialiser {name!r} needs inputs and the loss gradient there")
        _INITIALISERS[name](seed, inputs, gradient)


def needs_gradient(name: str) -> bool:
    """Whether an initialiser needs inputs and a gradient."""
    return name != "zero_out"


def _zero_out(seed: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
    del inputs, gradient
    _zero(_outgoing(seed))


def _gradmax(seed: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
    incoming, outgoing = _incoming(seed), _outgoing(seed)
    if not isinstance(outgoing, nn.Linear) or not isinstance(incoming, nn.Linear):
        raise GrowthError("initialiser 'gradmax' is for seeds between two linear layers")
    _zero(incoming)
    _require_alive(seed, incoming, inputs)
    left = gradient.reshape(-1, gradient.shape[-1]).double()
    right = inputs.reshape(-1, inputs.shape[-1]).double()
    # Directions of the output along which the incoming weights get the largest gradient.
    directions, _, _ = torch.linalg.svd(left.T @ right, full_matrices=False)
    width = outgoing.in_features
    kept = min(width, directions.shape[1])
    _zero(outgoing)
    outgoing.weight[:, :kept].copy_(directions[:, :kept] / math.sqrt(max(1, kept)))


def _require_alive(seed: nn.Module, incoming: nn.Linear, inputs: Tensor) -> None:
    """Refuse an activation that passes no gradient at zero, where GradMax begins."""
    with torch.enable_grad():
        incoming.weight.requires_grad_(True)
        hidden = seed.hidden(inputs[:4].detach())  # type: ignore[operator]
        (pulled,) = torch.autograd.grad(hidden.sum(), incoming.weight)
    if not bool(pulled.abs().sum() > 0):
        raise GrowthError(
            "initialiser 'gradmax' begins with zeros before the activation, where this one passes "
            "no gradient (as ReLU does); the seed would never learn. Use 'zero_out'"
        )


def _small_solve(seed: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
    outgoing = _outgoing(seed)
    if not isinstance(outgoing, nn.Linear):
        raise GrowthError("initialiser 'small_solve' is for seeds with a linear outgoing layer")
    hidden = seed.hidden(inputs)  # type: ignore[operator]
    features = hidden.reshape(-1, hidden.shape[-1]).double()
    target = -gradient.reshape(-1, gradient.shape[-1]).double()
    gram = features.T @ features
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    gram += ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(gram, features.T @ target)
    step = (features @ solved).norm()
    reach = _FIRST_STEP * inputs.double().norm() / step.clamp_min(1e-12)
    _zero(outgoing)
    outgoing.weight.copy_((solved * reach).T)


def _outgoing(seed: nn.Module) -> nn.Module:
    last = getattr(seed, "last", None)
    if not isinstance(last, nn.Module):
        raise GrowthError(f"a {type(seed).__name__} has no outgoing layer 'last'")
    layer = getattr(last, "layer", last)
    return layer if isinstance(layer, nn.Module) else last


def _incoming(seed: nn.Module) -> nn.Module:
    layers = [m for m in seed.get_submodule("inner").modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise GrowthError("the seed has no incoming linear layer")
    return layers[0]


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


_INITIALISERS: dict[str, Callable[[nn.Module, Tensor, Tensor], None]] = {
    "zero_out": _zero_out,
    "gradmax": _gradmax,
    "small_solve": _small_solve,
}
