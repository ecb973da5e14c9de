"""What the gradients of several tasks say about each other."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConflictReport:
    """The conflicts between the task gradients of one step.

    Nothing here reads from the device before a property is used.

    :ivar tasks: names of the tasks that had a loss, in order.
    :ivar gramian: inner products of the original task gradients over the parameters that more
        than one task reaches; n by n, float64.
    :ivar weights: weight of each task gradient in the update; n, float64.
    """

    tasks: tuple[str, ...]
    gramian: Tensor
    weights: Tensor

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

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each task gradient; n, float64."""
        return self.gramian.diagonal().sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine between the task gradients; n by n, float64; 0 where one of them is zero."""
        norms = self.norms
        scale = torch.outer(norms, norms)
        return torch.where(scale > 0, self.gramian / scale, 0.0).clamp(-1, 1)

    def cosines(self) -> dict[str, float]:
        """Return the cosine of each pair of tasks, keyed ``"first|second"``."""
        rows: list[list[float]] = self.cosine.tolist()
        return {
            f"{self.tasks[first]}|{self.tasks[second]}": rows[first][second]
            for first in range(self.num_tasks)
            for second in range(first + 1, self.num_tasks)
        }
