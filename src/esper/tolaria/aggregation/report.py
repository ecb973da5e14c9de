"""What the gradients of several tasks say about each other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConflictReport:
    """The conflicts between the task gradients of one step.

    Nothing here reads from the device before a property is used.

    :ivar tasks: names of the tasks that had a loss, in order.
    :ivar gramian: inner products of the original task gradients, unscaled, over the parameters
        that were projected; n by n, float64.
    :ivar weights: weight of each task gradient in the update; n, float64. With groups, a row for
        each group.
    :ivar mode: how the Gramian was obtained; see :func:`~esper.tolaria.aggregation.backward`.
        In mode ``features`` it is that of the gradients at the shared representation.
    :ivar age: calls since the gradients were compared; above 0 only in between the comparisons of
        a :class:`~esper.tolaria.aggregation.Refreshed`, where the Gramian is an estimate.
    :ivar absent: names of the tasks that had no loss.
    :ivar groups: a report for each group of parameters; empty without groups.
    :ivar squares_apart: squared norm of each task's gradient over its own parameters, which are in
        no Gramian; n, float64. Only with a gradient scaler.
    """

    tasks: tuple[str, ...]
    gramian: Tensor
    weights: Tensor
    mode: str = "sequential"
    age: int = 0
    absent: tuple[str, ...] = ()
    groups: Mapping[str, "ConflictReport"] = field(default_factory=dict)
    squares_apart: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        """Number of tasks that had a loss."""
        return len(self.tasks)

    @cached_property
    def conflicts(self) -> int:
        """Unordered pairs of tasks whose gradients have a negative inner product."""
        rows: list[list[float]] = self.gramian.tolist()
        return sum(product < 0 for index, row in enumerate(rows) for product in row[:index])

    @property
    def conflict_rate(self) -> float:
        """``conflicts / max(1, n - 1)``; exceeds 1 when more than two tasks all disagree."""
        return self.conflicts / max(1, self.num_tasks - 1)

    @property
    def conflict_share(self) -> float:
        """Conflicting pairs as a share of all pairs, 0 to 1."""
        return self.conflicts / max(1, self.num_tasks * (self.num_tasks - 1) // 2)

    @cached_property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the tasks whose gradient holds an infinity or NaN.

        Over the parameters in the Gramian, and with a gradient scaler over all.
        """
        squares = self.gramian.diagonal()
        if self.squares_apart is not None:
            squares = squares + self.squares_apart
        finite = cast("list[bool]", squares.isfinite().tolist())
        return tuple(task for task, good in zip(self.tasks, finite, strict=True) if not good)

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each task gradient; n, float64."""
        return self.gramian.diagonal().sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine between the task gradients; n by n, float64; 0 where one of them is zero.

        NaN where one of them is not finite.
        """
        norms = self.norms
        scale = torch.outer(norms, norms)
        return torch.where(scale == 0, 0.0, self.gramian / scale).clamp(-1, 1)

    @property
    def amplification(self) -> Tensor:
        """Sum of the norms of the weighted gradients over the norm of their sum; a scalar, float64.

        By how much rounding errors of the gradients are enlarged in the result: 1 for parallel
        gradients, the root of n for orthogonal ones, large where nearly opposed ones leave little.
        """
        weights = self.weights if self.weights.dim() == 1 else self.weights.mean(0)
        result = (weights @ self.gramian @ weights).clamp(min=0).sqrt()
        terms = weights.abs() @ self.norms
        return torch.where(terms == 0, 1.0, terms / result)

    def cosines(self) -> dict[str, float]:
        """Return the cosine of each pair of tasks, keyed ``"first|second"``."""
        rows: list[list[float]] = self.cosine.tolist()
        return {
            f"{self.tasks[first]}|{self.tasks[second]}": rows[first][second]
            for first in range(self.num_tasks)
            for second in range(first + 1, self.num_tasks)
        }
