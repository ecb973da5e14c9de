"""The gradients of several tasks, before they become one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper.tolaria.aggregation import kernels
from esper.tolaria.aggregation.layer import Factors

Row = list[Tensor | None]


@dataclass
class TaskGradients:
    """One row of gradients for each task, a column for each parameter.

    :ivar rows: by task; None where a task does not reach a parameter, or where ``factored`` holds
        the gradient.
    :ivar factored: gradients in factors, by column.
    """

    rows: dict[str, Row]
    factored: dict[int, Factors] = field(default_factory=dict)

    def reached(self, column: int) -> int:
        """Return how many tasks reach a parameter."""
        if column in self.factored:
            return len(self.rows)
        return sum(row[column] is not None for row in self.rows.values())

    def gramian(self, columns: Iterable[int]) -> Tensor:
        """Return the inner products of the tasks' gradients over some columns; n by n, float64."""
        columns = list(columns)
        formed = [column for column in columns if column not in self.factored]
        gram = kernels.gramian(self._listed(), formed)
        for column in columns:
            if column in self.factored:
                gram = gram + self.factored[column].gramian()
        return gram

    def combine(
        self, columns: Sequence[int], weights: Tensor, into: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Return the weighted sum of each of some columns, added to ``into`` where it is given."""
        targets = dict(zip(columns, into, strict=True))
        formed = [column for column in columns if column not in self.factored]
        sums = kernels.combine(
            self._listed(), formed, weights, [targets[column] for column in formed]
        )
        results = dict(zip(formed, sums, strict=True))
        for column in columns:
            if column in self.factored:
                results[column] = self.factored[column].combine(weights, targets[column])
        return [results[column] for column in columns]

    def extend(self, other: "TaskGradients") -> None:
        """Add the gradients of another micro-batch; a task may be missing from either.

        :raises RuntimeError: a gradient is in factors for one micro-batch and formed for the other.
        """
        width = len(next(iter(other.rows.values())))
        for task in other.rows:
            self.rows.setdefault(task, [None] * width)
        for task, row in other.rows.items():
            _add(self.rows[task], row)
        if not self.factored and not other.factored:
            return
        if self.factored.keys() != other.factored.keys() or list(self.rows) != list(other.rows):
            raise RuntimeError(
                "the micro-batches differ in their tasks or in the shape of their batches; "
                "accumulate them with mode='sequential'"
            )
        for column, factors in other.factored.items():
            self.factored[column] = self.factored[column].extend(factors)

    def _listed(self) -> list[Row]:
        return list(self.rows.values())


def formed(losses: Mapping[str, Tensor], rows: Sequence[Sequence[Tensor | None]]) -> TaskGradients:
    """Return gradients that are all formed, checked for what can't be combined.

    :raises RuntimeError: a gradient is sparse, or shapes, dtypes or devices don't match.
    """
    for task, row in zip(losses, rows, strict=True):
        for column, gradient in enumerate(row):
            if gradient is not None and gradient.is_sparse:
                raise RuntimeError(
                    f"task {task!r} has a sparse gradient for parameter {column}; build its "
                    "embedding with sparse=False to aggregate several tasks"
                )
    return TaskGradients(dict(zip(losses, kernels.dense(rows), strict=True)))


def _add(row: Row, other: Row) -> None:
    for column, gradient in enumerate(other):
        held = row[column]
        if held is None:
            row[column] = gradient
        elif gradient is not None:
            # Not in place: autograd may have handed out one tensor for two parameters.
            row[column] = torch.add(held, gradient)
