"""PCGrad: projecting conflicting gradients, after Yu et al. 2020.

Algorithm 1 of "Gradient Surgery for Multi-Task Learning" (arXiv 2001.06782). Each task gradient is
projected, in random order, onto the normal plane of every other task's original gradient that it
conflicts with; the results are added. Every vector in this stays in the span of the original
gradients, so the whole algorithm runs on coefficients and inner products: n numbers for a gradient
in place of one for each parameter.
"""

from typing import Any, Literal

import torch
from torch import Tensor


class PCGrad:
    """Projects conflicting task gradients before adding them.

    :param generator: draws the order of the projections; a CPU generator. Without one, a generator
        with seed 0 is made, so that two equal runs give equal results.
    :param reduction: ``"sum"``, as in the paper, or ``"mean"``, which divides by the tasks.
    :param epsilon: a partner whose norm is at most this share of a gradient's norm is not
        projected against. The default lies beyond the whole range of float32 and only keeps
        squares from underflowing; raise it to ignore partners that are mostly noise.
    :raises RuntimeError: the reduction is unknown.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        *,
        reduction: Literal["sum", "mean"] = "sum",
        epsilon: float = 1e-100,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise RuntimeError(f"reduction is {reduction!r}; give 'sum' or 'mean'")
        self._generator = generator or torch.Generator().manual_seed(0)
        self._reduction = reduction
        self._epsilon_squared = epsilon**2

    def weights(self, gramian: Tensor) -> Tensor:
        """Return the weight of each original gradient in the sum of the projected ones."""
        inner: list[list[float]] = gramian.tolist()
        weights = [0.0] * len(inner)
        for task, order in enumerate(self._orders(len(inner))):
            for index, coefficient in enumerate(self._project(inner, task, order)):
                weights[index] += coefficient
        if self._reduction == "mean":
            weights = [weight / len(inner) for weight in weights]
        return torch.tensor(weights, dtype=gramian.dtype, device=gramian.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the generator's state."""
        self._generator.set_state(state_dict["generator"].cpu())

    def _orders(self, tasks: int) -> list[list[int]]:
        if tasks <= 2:
            return [[other for other in range(tasks) if other != task] for task in range(tasks)]
        keys = torch.rand(tasks, tasks, generator=self._generator, device=self._generator.device)
        shuffled: list[list[int]] = keys.argsort(dim=1).tolist()
        return [[other for other in row if other != task] for task, row in enumerate(shuffled)]

    def _project(self, inner: list[list[float]], task: int, order: list[int]) -> list[float]:
        """Return the coefficients of one projected gradient in terms of the original ones."""
        coefficients = [0.0] * len(inner)
        coefficients[task] = 1.0
        smallest = self._epsilon_squared * inner[task][task]
        products = inner[task][:]
        for other in order:
            if products[other] < 0 and inner[other][other] > smallest:
                share = products[other] / inner[other][other]
                coefficients[other] -= share
                products = [
                    product - share * row
                    for product, row in zip(products, inner[other], strict=True)
                ]
        return coefficients
