"""What every aggregator is: a map from the Gramian of the task gradients to task weights."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Aggregator(Protocol):
    """Turns conflicting task gradients into one update, in task space.

    With ``J`` the matrix whose rows are the task gradients, the update is ``weights @ J``, and the
    weights depend on ``J`` through its Gramian ``J @ J.T`` alone.
    """

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the weight of each task gradient.

        :param gramian: inner products of the task gradients, n by n, float64.
        :returns: n weights, float64, on the device of the Gramian.
        """
        ...


@runtime_checkable
class ByName(Protocol):
    """An aggregator with a setting for each task, which it has to find by name."""

    def for_tasks(self, tasks: Sequence[str]) -> Aggregator:
        """Return the aggregator for the tasks that are present."""
        ...


def like(values: Sequence[float], gramian: Tensor) -> Tensor:
    """Return values where a Gramian lies, in its dtype, without waiting for its device."""
    return torch.tensor(values, dtype=gramian.dtype, device="cpu").to(
        gramian.device, non_blocking=True
    )


def finite_weights(aggregator: Aggregator, gramian: Tensor, tasks: Sequence[str]) -> Tensor:
    """Return the aggregator's weights; NaN for all where a gradient is not finite.

    An update in which one gradient is infinite has to be seen as such by whatever guards the
    optimizer step. Projections could hide it, and solvers need finite input.

    :param gramian: n by n, float64.
    :returns: n weights, float64, on the device of the Gramian.
    :raises RuntimeError: the aggregator returned something else than a weight for each task.
    """
    if isinstance(aggregator, ByName):
        aggregator = aggregator.for_tasks(tasks)
    finite = gramian.isfinite().all()
    if gramian.device.type == "cpu":
        if not finite:
            return torch.full_like(gramian.diagonal(), torch.nan)
        return _checked(aggregator, aggregator.weights(gramian), gramian)
    # Elsewhere the decision stays on the device, so that nothing has to wait for it.
    asked = gramian.nan_to_num(0.0, 0.0, 0.0)
    weights = _checked(aggregator, aggregator.weights(asked), gramian)
    return torch.where(finite, weights, torch.nan)


def _checked(aggregator: Aggregator, weights: object, gramian: Tensor) -> Tensor:
    """Return weights as the kernels take them: one for each task, float64, without gaps."""
    if not isinstance(weights, Tensor) or weights.shape != gramian.shape[:1]:
        found = tuple(weights.shape) if isinstance(weights, Tensor) else weights
        raise RuntimeError(
            f"{type(aggregator).__qualname__} returned weights {found} for {len(gramian)} tasks; "
            "return a tensor with one for each"
        )
    return weights.detach().to(gramian).contiguous()
