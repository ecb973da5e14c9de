"""Gradients as vectors: for whoever holds them already and wants one combined."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from esper.tolaria.aggregation import kernels
from esper.tolaria.aggregation.base import like
from esper.tolaria.aggregation.linear import check_weights
from esper.tolaria.aggregation.pcgrad import PCGrad
from esper.tolaria.aggregation.report import ConflictReport

_NOTHING = "no gradients available for aggregation"


def grads_to_flat(grads: Sequence[Tensor]) -> tuple[Tensor, list[torch.Size]]:
    """Lay the gradients of several parameters end to end.

    :param grads: of any shapes, all of one dtype and on one device.
    :returns: one vector, a copy, and the shapes that :func:`flat_to_grads` needs.
    :raises RuntimeError: there is no gradient, or dtypes or devices differ.
    """
    if not grads:
        raise RuntimeError(_NOTHING)
    for index, grad in enumerate(grads):
        if (grad.dtype, grad.device) != (grads[0].dtype, grads[0].device):
            raise RuntimeError(
                f"gradient {index} is {grad.dtype} on {grad.device}, but gradient 0 is "
                f"{grads[0].dtype} on {grads[0].device}; give them one dtype and one device"
            )
    return torch.cat([grad.reshape(-1) for grad in grads]), [grad.shape for grad in grads]


def flat_to_grads(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Cut a vector into gradients: views of it, in order.

    :raises RuntimeError: the shapes do not hold as many elements as the vector.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) != flat.numel():
        raise RuntimeError(
            f"the shapes hold {sum(sizes)} elements, but the vector has {flat.numel()}; "
            "give the shapes that grads_to_flat returned"
        )
    pieces = torch.split(flat.reshape(-1), sizes)
    return [piece.view(tuple(shape)) for piece, shape in zip(pieces, shapes, strict=True)]


def aggregate_weighted(grads: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """Return the average of the gradients, weighted; in their dtype, summed in float32 or better.

    Normalised weights shrink the gradient of parts that only few tasks reach; see
    :class:`~esper.tolaria.aggregation.Weighted`.

    :param grads: all of one shape, of any rank.
    :param weights: one for each gradient, finite, not negative; normalised by their sum.
    :raises RuntimeError: there is no gradient; shapes, dtypes or devices differ; a weight is
        negative or not finite, all are zero, or there are not as many as gradients.
    """
    if not grads:
        raise RuntimeError(_NOTHING)
    if isinstance(weights, Tensor) and weights.dim() != 1:
        raise RuntimeError(f"weights have shape {tuple(weights.shape)}; give one for each gradient")
    values = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    normalised = torch.tensor(check_weights(values, len(grads)), dtype=torch.float64, device="cpu")
    return _stack(grads).combine(normalised.to(grads[0].device))[0]


def combine_flat_grads(
    flats: Sequence[Tensor],
    *,
    use_pcgrad: bool = True,
    weights: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """Combine one gradient vector for each task.

    :param flats: all of one shape; nothing is changed in them.
    :param use_pcgrad: whether to project conflicting gradients before they are added.
    :param weights: preferences, one for each task, normalised by their sum: each projected
        gradient counts with its weight. Without them all are added.
    :param generator: draws the order of projections; without one, the order of seed 0.
    :returns: the combined vector, and the number of pairs of tasks in conflict.
    :raises RuntimeError: as :func:`aggregate_weighted` does.
    """
    if not flats:
        raise RuntimeError(_NOTHING)
    shares = None if weights is None else check_weights(weights, len(flats))
    stack = _stack(flats)
    gram = stack.gramian()
    if use_pcgrad:
        result = PCGrad(generator, preferences=shares).weights(gram)
    else:
        result = like([1.0] * len(flats) if shares is None else shares, gram)
    report = ConflictReport(tuple(str(index) for index in range(len(flats))), gram, result)
    return stack.combine(result)[0], report.conflicts


def _stack(grads: Sequence[Tensor]) -> kernels.Selection:
    """Check that the gradients match, and prepare them."""
    first = grads[0]
    for index, grad in enumerate(grads):
        if (grad.shape, grad.dtype, grad.device) != (first.shape, first.dtype, first.device):
            raise RuntimeError(
                f"gradient {index} is {kernels.describe(grad)}, but gradient 0 is "
                f"{kernels.describe(first)}; give all one shape, one dtype and one device"
            )
    return kernels.select(kernels.dense([[grad] for grad in grads]), [0])
