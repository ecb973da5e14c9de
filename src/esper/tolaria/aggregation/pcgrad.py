"""PCGrad: projecting conflicting gradients, after Yu et al. 2020.

Algorithm 1 of "Gradient Surgery for Multi-Task Learning" (arXiv 2001.06782). Each task gradient is
projected, in random order, onto the normal plane of every other task's original gradient that it
conflicts with; the results are added. Every vector in this stays in the span of the original
gradients, so the whole algorithm runs on coefficients and inner products: n numbers for a gradient
in place of one for each parameter.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from esper.tolaria.aggregation import native
from esper.tolaria.aggregation.base import like
from esper.tolaria.aggregation.linear import check_weights, select_by_name


class PCGrad:
    """Projects conflicting task gradients before adding them.

    :param generator: draws the order of the projections; a CPU generator. Without one, a generator
        with seed 0 is made, so that two equal runs give equal results.
    :param reduction: ``"sum"``, as in the paper, or ``"mean"``, which divides by the tasks.
    :param epsilon: a partner whose norm is at most this share of a gradient's norm is not
        projected against. The default lies beyond the whole range of float32 and only keeps
        squares from underflowing; raise it to ignore partners that are mostly noise.
    :param preferences: how much each projected gradient counts, in the order of the losses; they
        are taken as they are, not normalised. Given by name, they also serve batches that some
        tasks are absent from. Scaling the losses instead changes nothing of what
        they are projected against, so that both come to the same.
    :raises RuntimeError: the reduction is unknown, epsilon out of range, a preference negative or
        not finite, or all of them zero.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        *,
        reduction: Literal["sum", "mean"] = "sum",
        epsilon: float = 1e-100,
        preferences: Sequence[float] | Mapping[str, float] | None = None,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise RuntimeError(f"reduction is {reduction!r}; give 'sum' or 'mean'")
        if not 0 <= epsilon < 1:
            raise RuntimeError(
                f"epsilon is {epsilon}; give a share of the norm, 0 or more, below 1"
            )
        self._generator = generator or torch.Generator().manual_seed(0)
        self._reduction = reduction
        self._epsilon = epsilon
        self._named = dict(preferences) if isinstance(preferences, Mapping) else None
        self._preferences: list[float] | None = None
        if preferences is not None:
            values = preferences.values() if isinstance(preferences, Mapping) else preferences
            self._preferences = list(values)
            check_weights(self._preferences)

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the weight of each original gradient in the sum of the projected ones.

        On the CPU one compiled loop does it; elsewhere all tasks are projected at once, without
        reading anything from the device.
        """
        tasks = len(gramian)
        preferences = self._preferences_for(gramian)
        if tasks <= 1:
            return preferences
        orders = self._orders(tasks)
        if gramian.device.type == "cpu" and native.available(tasks):
            array = native.pcgrad_weights(
                gramian.numpy(), orders.numpy(), self._epsilon, preferences.numpy()
            )
            weights = torch.from_numpy(array)
        else:
            # The orders are copied without waiting for the device.
            orders = orders.to(gramian.device, non_blocking=True)
            weights = project_all(gramian, orders, self._epsilon, preferences)
        weights = weights.to(gramian)
        return weights / tasks if self._reduction == "mean" else weights

    def for_tasks(self, tasks: Sequence[str]) -> "PCGrad":
        """Return the aggregator for the tasks that are present; it draws from the same generator.

        :raises RuntimeError: a task has no preference.
        """
        if self._named is None or tuple(self._named) == tuple(tasks):
            return self
        return PCGrad(
            self._generator,
            reduction=self._reduction,
            epsilon=self._epsilon,
            preferences=select_by_name(self._named, tasks, "preference"),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the generator's state."""
        self._generator.set_state(state_dict["generator"].cpu())

    def _preferences_for(self, gramian: Tensor) -> Tensor:
        if self._preferences is None:
            return torch.ones(len(gramian), dtype=gramian.dtype, device=gramian.device)
        if len(self._preferences) != len(gramian):
            raise RuntimeError(
                f"{len(self._preferences)} preferences were given for {len(gramian)} tasks"
            )
        return like(self._preferences, gramian)

    def _orders(self, tasks: int) -> Tensor:
        """Return the partners of each task in random order; its own place in it means nothing."""
        if tasks == 2:
            return torch.tensor([[0, 1], [0, 1]], device=self._generator.device)
        keys = torch.rand(tasks, tasks, generator=self._generator, device=self._generator.device)
        return keys.argsort(dim=1)


def project_all(gramian: Tensor, orders: Tensor, epsilon: float, preferences: Tensor) -> Tensor:
    """Return PCGrad's weights, the k-th projection of all gradients in one step.

    Row ``t`` of ``coefficients`` holds projected gradient ``t`` in terms of the original ones, row
    ``t`` of ``products`` its inner products with them.

    :param gramian: n by n, float64.
    :param orders: n by n; row ``t`` lists the partners of task ``t``, itself included.
    :param epsilon: see :class:`PCGrad`.
    :param preferences: n; how much each projected gradient counts.
    :returns: n weights, float64.
    """
    tasks = torch.arange(len(gramian), device=gramian.device)
    squares = gramian.diagonal()
    coefficients = torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
    products = gramian.clone()
    for others in orders.T:
        inner = products[tasks, others]
        partner = squares[others]
        conflicts = (inner < 0) & (partner > epsilon**2 * squares) & (others != tasks)
        share = torch.where(conflicts, inner / partner, 0.0)
        coefficients[tasks, others] -= share
        products -= share.unsqueeze(1) * gramian[others]
    return preferences @ coefficients
