"""The gradients of several tasks, before they become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper.tolaria.aggregation import kernels
from esper.tolaria.aggregation.factors import Factors

Row = Sequence[Tensor | None]


@dataclass(frozen=True)
class Part:
    """Some columns of the task gradients.

    :ivar columns: which.
    :ivar formed: those of them that are formed, in order.
    :ivar factored: the others, by column.
    """

    columns: Sequence[int]
    formed: kernels.Selection
    factored: Mapping[int, Factors]

    def gramian(self) -> Tensor:
        """Return the inner products of the tasks' gradients; n by n, float64."""
        gram = self.formed.gramian()
        for factors in self.factored.values():
            gram = gram + factors.gramian()
        return gram

    def combine(self, weights: Tensor, into: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Return the weighted sum of each column, added to ``into`` where that is given.

        :param weights: one for each task, float64.
        """
        if not self.factored:
            return self.formed.combine(weights, into)
        targets = [None] * len(self.columns) if into is None else into
        formed = [
            target
            for column, target in zip(self.columns, targets, strict=True)
            if column not in self.factored
        ]
        sums = iter(self.formed.combine(weights, formed))
        return [
            self.factored[column].combine(weights, target)
            if column in self.factored
            else next(sums)
            for column, target in zip(self.columns, targets, strict=True)
        ]


@dataclass
class TaskGradients:
    """One row of gradients for each task, a column for each parameter.

    :ivar rows: by task; None where a task does not reach a parameter, or where ``factored`` holds
        the gradient.
    :ivar factored: gradients in factors, by column.
    """

    rows: dict[str, Row]
    factored: dict[int, Factors] = field(default_factory=dict)

    def reached(self) -> list[int]:
        """Return how many tasks reach each parameter."""
        rows = list(self.rows.values())
        counts = [0] * len(rows[0])
        for row in rows:
            for column, gradient in enumerate(row):
                if gradient is not None:
                    counts[column] += 1
        for column in self.factored:
            counts[column] = len(rows)
        return counts

    def select(self, columns: Sequence[int]) -> Part:
        """Return some columns.

        :param columns: each is reached by some task.
        :raises RuntimeError: the gradients lie on several devices.
        """
        rows = list(self.rows.values())
        factored = {column: self.factored[column] for column in columns if column in self.factored}
        formed = [column for column in columns if column not in factored]
        selection = kernels.select(rows, formed) if formed else kernels.Selection(len(rows), 0, ())
        return Part(columns, selection, factored)

    def extend(self, other: "TaskGradients") -> None:
        """Add the gradients of another micro-batch; a task may be missing from either.

        :param other: all formed, as these are.
        """
        width = len(next(iter(other.rows.values())))
        for task, row in other.rows.items():
            self.rows[task] = _sum(self.rows.get(task, [None] * width), row)
        # What was alike within each micro-batch need not be across them.
        self.rows = dict(zip(self.rows, kernels.dense(list(self.rows.values())), strict=True))


def formed(losses: Mapping[str, Tensor], rows: Sequence[Row]) -> TaskGradients:
    """Return gradients that are all formed.

    :raises RuntimeError: a gradient is sparse.
    """
    return TaskGradients(dict(zip(losses, kernels.dense(rows), strict=True)))


def _sum(first: Row, second: Row) -> Row:
    # Not in place: autograd may have handed out one tensor for two parameters.
    return [
        one if other is None else other if one is None else torch.add(one, other)
        for one, other in zip(first, second, strict=True)
    ]
