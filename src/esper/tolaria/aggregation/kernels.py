"""The two passes over all task gradients: their Gramian, and their weighted sum.

Gradients are rows: tasks by parameters, None where a task does not reach a parameter. On the CPU
the compiled kernels stream them; elsewhere, and where nothing was compiled, torch does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esper.tolaria.aggregation import bucket, native

Row = Sequence[Tensor | None]
_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Stack:
    """Gradients of one dtype on one device, dense and alike in each column; see :func:`dense`.

    :ivar rows: tasks by columns.
    :ivar places: where each column stands in the selection that the stack is part of.
    :ivar samples: a gradient of each column.
    """

    rows: Sequence[Row]
    places: Sequence[int]
    samples: Sequence[Tensor]
    lengths: Sequence[int]
    table: native.Table | None

    @classmethod
    def of(cls, rows: Sequence[Row], places: Sequence[int], samples: Sequence[Tensor]) -> "Stack":
        """Prepare both passes.

        :raises RuntimeError: the gradients are not floating-point numbers.
        """
        first = samples[0]
        if not first.dtype.is_floating_point:
            raise RuntimeError(f"a gradient is {describe(first)}; give real gradients")
        lengths = [sample.numel() for sample in samples]
        compiled = (
            first.device.type == "cpu"
            and first.dtype in native.TYPES
            and native.available(len(rows))
        )
        table = native.Table.of(rows, lengths, first.dtype) if compiled else None
        return cls(rows, places, samples, lengths, table)

    def gramian(self) -> Tensor:
        """Return the inner products of the rows; n by n, float64."""
        if self.table is None:
            return bucket.gramian(self.rows, self.lengths)
        return torch.from_numpy(self.table.gramian())

    def combine(self, weights: Tensor, into: Sequence[Tensor | None] | None) -> list[Tensor]:
        """Return the weighted sum of each column, added to ``into`` where that is given."""
        into = into or [None] * len(self.samples)
        add = [
            target is not None and _alike(target, sample)
            for target, sample in zip(into, self.samples, strict=True)
        ]
        targets = [
            target if adds and target is not None else torch.empty_like(sample)
            for target, sample, adds in zip(into, self.samples, add, strict=True)
        ]
        self._write(weights, targets, add)
        return [_settle(total, target) for total, target in zip(targets, into, strict=True)]

    def _write(self, weights: Tensor, targets: Sequence[Tensor], add: Sequence[bool]) -> None:
        if self.table is None:
            bucket.combine(self.rows, weights, targets, add)
            return
        # torch does not see these writes, but whoever saved a tensor has to hear of them.
        changed = [target for target, adds in zip(targets, add, strict=True) if adds]
        torch.autograd.graph.increment_version(changed)
        self.table.combine(np.ascontiguousarray(weights.numpy(), np.float64), targets, add)


@dataclass(frozen=True)
class Selection:
    """Some columns of the task gradients."""

    tasks: int
    width: int
    stacks: Sequence[Stack]

    def gramian(self) -> Tensor:
        """Return the inner products of the rows.

        Within 4096 elements, float32 gradients are multiplied and added in float32; across, and
        for all other types, in float64. Where the scale of a gradient would make float32 over- or
        underflow, all is computed in float64.

        :returns: n by n, float64, on the device of the gradients.
        """
        if not self.stacks:
            return torch.zeros(self.tasks, self.tasks, dtype=torch.float64, device="cpu")
        result = self.stacks[0].gramian()
        for stack in self.stacks[1:]:
            result = result + stack.gramian()
        return result

    def combine(self, weights: Tensor, into: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Return the weighted sum of each column.

        :param weights: one for each task, float64.
        :param into: a tensor for each column that the sum is added to, or None for a new one.
        """
        if len(self.stacks) == 1:
            return self.stacks[0].combine(weights, into)
        targets = into or [None] * self.width
        results: list[Tensor | None] = [None] * self.width
        for stack in self.stacks:
            sums = stack.combine(weights, [targets[place] for place in stack.places])
            for place, total in zip(stack.places, sums, strict=True):
                results[place] = total
        return [total for total in results if total is not None]


def select(rows: Sequence[Row], columns: Sequence[int]) -> Selection:
    """Return some columns of dense gradients.

    :param columns: each has at least one gradient.
    :raises RuntimeError: the gradients lie on several devices, or are not real.
    """
    chosen = [[row[column] for column in columns] for row in rows]
    samples = _samples(chosen, columns)
    _check_kinds(samples, columns)
    dtypes = {sample.dtype for sample in samples}
    if len(dtypes) == 1:
        stacks = [Stack.of(chosen, range(len(columns)), samples)]
    else:
        stacks = [_stack_of(dtype, chosen, samples) for dtype in dtypes]
    return Selection(len(rows), len(columns), stacks)


def _stack_of(dtype: torch.dtype, rows: Sequence[Row], samples: Sequence[Tensor]) -> Stack:
    places = [place for place, sample in enumerate(samples) if sample.dtype is dtype]
    part = [[row[place] for place in places] for row in rows]
    return Stack.of(part, places, [samples[place] for place in places])


def _check_kinds(samples: Sequence[Tensor], columns: Sequence[int]) -> None:
    device = samples[0].device
    for sample, column in zip(samples, columns, strict=True):
        if type(sample) not in _PLAIN:
            raise RuntimeError(
                f"the gradient of parameter {column} is a {type(sample).__qualname__}; only plain "
                "tensors can be aggregated, not sharded or otherwise wrapped ones"
            )
        if sample.device != device:
            raise RuntimeError(
                f"the gradient of parameter {column} is {describe(sample)}, that of parameter "
                f"{columns[0]} on {device}; aggregate the parameters of each device apart"
            )


def dense(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows with gradients that lie in memory without gaps, alike in each column.

    :param rows: gradients that autograd returned: alike in shape and dtype in each column.
    :raises RuntimeError: a gradient is sparse.
    """
    if all(
        gradient is None
        or (gradient.layout is torch.strided and gradient.is_contiguous() and not gradient.is_neg())
        for row in rows
        for gradient in row
    ):
        return rows
    columns = [
        _align(column, gradients) for column, gradients in enumerate(zip(*rows, strict=True))
    ]
    return list(zip(*columns, strict=True))


def describe(tensor: Tensor) -> str:
    """Name dtype, shape and device, for errors."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} of shape {tuple(tensor.shape)} on {tensor.device}"


def _align(column: int, gradients: Row) -> Row:
    for gradient in _present(gradients):
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {column} is sparse; build its embedding with "
                "sparse=False to aggregate several tasks"
            )
    # The memory of some views, such as the imaginary part of a conjugate, holds the opposite.
    gradients = _each(gradients, Tensor.resolve_neg)
    present = _present(gradients)
    if all(gradient.is_contiguous() for gradient in present):
        return gradients
    # Without gaps and in one order, such as channels last: as good as contiguous.
    strides = {gradient.stride() for gradient in present}
    if len(strides) == 1 and _is_channels_last(present[0]):
        return gradients
    return _each(gradients, Tensor.contiguous)


def _present(gradients: Row) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def _each(gradients: Row, change: Callable[[Tensor], Tensor]) -> Row:
    return [None if gradient is None else change(gradient) for gradient in gradients]


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _alike(target: Tensor, gradient: Tensor) -> bool:
    return (
        target.dtype == gradient.dtype
        and target.device == gradient.device
        and target.stride() == gradient.stride()
    )


def _settle(result: Tensor, target: Tensor | None) -> Tensor:
    return result if target is None or target is result else target.add_(result)


def _samples(rows: Sequence[Row], columns: Sequence[int]) -> list[Tensor]:
    """Return a gradient of each column."""
    samples: list[Tensor] = []
    for place, (gradient, column) in enumerate(zip(rows[0], columns, strict=True)):
        sample = gradient if gradient is not None else _first([row[place] for row in rows])
        if sample is None:
            raise RuntimeError(f"no gradients available for aggregation of parameter {column}")
        samples.append(sample)
    return samples


def _first(gradients: Row) -> Tensor | None:
    return next((gradient for gradient in gradients if gradient is not None), None)
