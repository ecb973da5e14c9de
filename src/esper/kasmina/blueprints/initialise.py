"""The first weights of a seed."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints.layers import BY_ELEMENT, LINEAR, NORMS, kind_of, patches
from esper.kasmina.blueprints.plain import FeaturesTo, Seed
from esper.kasmina.probe import kept_random
from esper.leyline import GrowthError

_RIDGE = 1e-3
# Root mean square of a solved seed's output, over that of its inputs.
_FIRST_STEP = 0.05
# Samples whose patches are held in memory at a time.
_CHUNK = 8


def initialise(
    name: str,
    seed: nn.Module,
    *,
    inputs: Tensor | None = None,
    gradient: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Set the weights of a seed that was just built.

    :param name: ``zero_out``: the outgoing layer is zero. ``gradmax``: the incoming layer is zero,
        and the outgoing one is what makes its gradient largest (Evci et al., GradMax, ICLR 2022).
        ``small_solve``: the outgoing layer is solved so that the seed goes a small way down the
        gradient (least squares with a ridge).
    :param inputs: of the seed; needed by the last two.
    :param gradient: of the loss at the slot's output, of its shape; needed by the last two.
    :param generator: of what is drawn; by default it follows from the random stream, which is left
        as it is in any case.
    :raises GrowthError: the name is unknown, something is missing, or it would not learn.
    """
    if name == "zero_out":
        _zero(_outgoing(seed))
        return
    if name not in _SOLVED:
        known = ", ".join(("zero_out", *_SOLVED))
        raise GrowthError(f"there is no initialiser {name!r}; give one of: {known}")
    if inputs is None or gradient is None:
        raise GrowthError(f"initialiser {name!r} needs inputs and the loss gradient there")
    if not bool(torch.isfinite(inputs).all() and torch.isfinite(gradient).all()):
        raise GrowthError(
            f"initialiser {name!r} is given inputs or gradients that are not finite; use 'zero_out'"
        )
    with torch.no_grad(), _drawing(generator):
        _SOLVED[name](seed, inputs, gradient)


def needs_gradient(name: str) -> bool:
    """Whether an initialiser needs inputs and a gradient."""
    return name in _SOLVED


@contextmanager
def _drawing(generator: torch.Generator | None) -> Iterator[None]:
    with kept_random():
        if generator is not None:
            start = torch.randint(2**62, (), generator=generator, device=generator.device)
            torch.manual_seed(int(start))
        yield


def _gradmax(seed: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
    before, incoming, behind = _around_incoming(seed)
    outgoing = _outgoing(seed)
    if kind_of(outgoing) is not nn.Linear or outgoing is not seed.get_submodule("last"):
        raise GrowthError("initialiser 'gradmax' is for seeds whose outgoing layer is linear")
    _require_alive(behind, incoming.get_parameter("weight"))
    left, right = _rows(gradient, -1), _rows(before(inputs), -1)
    # Directions of the output along which the incoming weights get the largest gradient.
    directions, _, _ = torch.linalg.svd(left.T @ right, full_matrices=False)
    weight = outgoing.get_parameter("weight")
    width = weight.shape[1]
    best = directions[:, :width]
    # Units beyond the rank would never learn from zeros on both sides.
    others = torch.randn(len(best), width - best.shape[1], dtype=best.dtype).to(best.device)
    columns = torch.cat([best, nn.functional.normalize(others, dim=0)], 1)
    _zero(incoming)
    _zero(outgoing)
    weight.copy_(columns / math.sqrt(width))


def _around_incoming(seed: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return what is before the incoming layer, that layer, and what is behind it."""
    inner = seed.get_submodule("inner")
    steps = list(inner) if type(inner) is nn.Sequential else [inner]
    found = [index for index, step in enumerate(steps) if kind_of(step) is nn.Linear]
    if type(seed) is not Seed or len(found) != 1:
        raise GrowthError(
            "initialiser 'gradmax' is for seeds with one linear layer before the last"
        )
    behind = steps[found[0] + 1 :]
    other = [kind_of(step).__name__ for step in behind if kind_of(step) not in BY_ELEMENT]
    if other:
        raise GrowthError(
            f"initialiser 'gradmax' is for seeds with nothing but an activation between their "
            f"layers; there is a {other[0]}"
        )
    return nn.Sequential(*steps[: found[0]]), steps[found[0]], nn.Sequential(*behind)


def _require_alive(behind: nn.Module, weight: Tensor) -> None:
    """Refuse an activation that passes no gradient at zero, where GradMax begins."""
    with torch.enable_grad():
        zero = torch.zeros_like(weight, requires_grad=True)
        (pulled,) = torch.autograd.grad(_measuring(behind)(zero).sum(), zero)
    if not bool(pulled.abs().sum() > 0):
        raise GrowthError(
            "initialiser 'gradmax' begins with zeros before the activation, where this one passes "
            "no gradient (as ReLU does); the seed would never learn. Use 'zero_out'"
        )


def _small_solve(seed: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
    outgoing = _outgoing(seed)
    dense = kind_of(outgoing) in LINEAR and getattr(outgoing, "groups", 1) == 1
    if type(seed) is not Seed or not dense:
        raise GrowthError(
            "initialiser 'small_solve' is for seeds that end in a linear layer or a convolution "
            f"without groups; this {type(seed).__name__} does not"
        )
    last = seed.get_submodule("last")
    if isinstance(last, FeaturesTo):
        gradient = gradient.movedim(last.channel_dim, -1)
    gram, pull = _normal_equations(
        outgoing, _measuring(seed.get_submodule("inner"))(inputs), gradient
    )
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(gram + ridge * eye, pull)
    # Root mean square of the output that this would give.
    step = ((solved * (gram @ solved)).sum() / gradient.numel()).clamp_min(0).sqrt()
    reach = _FIRST_STEP * inputs.double().square().mean().sqrt() / step.clamp_min(1e-12)
    weight = outgoing.get_parameter("weight")
    _zero(outgoing)
    weight.copy_((solved * reach).T.reshape(weight.shape))


def _normal_equations(layer: nn.Module, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gramian of all that a layer sums up, and its products with the descent."""
    dim = -1 if isinstance(layer, nn.Linear) else 1
    spread = patches(layer)
    gram: Tensor | float = 0.0
    pull: Tensor | float = 0.0
    for part, slope in zip(torch.split(hidden, _CHUNK), torch.split(gradient, _CHUNK), strict=True):
        summed, down = _rows(spread(part), dim), -_rows(slope, dim)
        gram, pull = gram + summed.T @ summed, pull + summed.T @ down
    return torch.as_tensor(gram), torch.as_tensor(pull)


def _measuring(module: nn.Module) -> nn.Module:
    """Return a copy that computes as in training, but drops nothing out."""
    twin = copy.deepcopy(module).eval()
    for part in twin.modules():
        if kind_of(part) in NORMS:
            part.train()
    return twin


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """Return all positions by channels, in double precision."""
    rows = tensor.movedim(dim, -1)
    return rows.reshape(-1, rows.shape[-1]).double()


def _outgoing(seed: nn.Module) -> nn.Module:
    last = getattr(seed, "last", None)
    if not isinstance(last, nn.Module):
        raise GrowthError(f"a {type(seed).__name__} has no outgoing layer 'last'")
    return last.layer if isinstance(last, FeaturesTo) else last


def _zero(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()


_SOLVED: dict[str, Callable[[nn.Module, Tensor, Tensor], None]] = {
    "gradmax": _gradmax,
    "small_solve": _small_solve,
}
