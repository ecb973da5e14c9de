"""Gramian and combination with torch's own kernels: on any device, and where nothing was compiled.

Gradients are gathered into one wide block of many columns, so that a model of a thousand small
parameters costs a few kernel launches. Nothing is read from the device.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_Row = Sequence[Tensor | None]
# Numbers in a block: 32 MiB of float64.
_BLOCK = 1 << 22


@torch.no_grad()
def gramian(rows: Sequence[_Row], lengths: Sequence[int]) -> Tensor:
    """Return the inner products of the rows, multiplied and added in float64; n by n."""
    device = next(g.device for row in rows for g in row if g is not None)
    result = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for block in _blocks(lengths, max(1, _BLOCK // len(rows))):
        matrix = _gather(rows, lengths, block, torch.float64, device)
        result.addmm_(matrix, matrix.T)
    return result


@torch.no_grad()
def combine(
    rows: Sequence[_Row], weights: Tensor, targets: Sequence[Tensor], add: Sequence[bool]
) -> None:
    """Write the weighted sum of each column to its target, or add it.

    Added up in float64 on the CPU, and in float32 elsewhere, where float64 can be slow.
    """
    wide = targets[0].device.type == "cpu" or targets[0].dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    totals = [
        target.to(dtype) if adds else torch.zeros_like(target, dtype=dtype)
        for target, adds in zip(targets, add, strict=True)
    ]
    for row, weight in zip(rows, weights.to(dtype), strict=True):
        _add_weighted(totals, row, weight)
    for target, total in zip(targets, totals, strict=True):
        if target is not total:
            target.copy_(total)


def _add_weighted(totals: Sequence[Tensor], row: _Row, weight: Tensor) -> None:
    dtype = totals[0].dtype
    present = {column: g.to(dtype) for column, g in enumerate(row) if g is not None}
    if present:
        weighted = torch._foreach_mul(list(present.values()), weight)
        torch._foreach_add_([totals[column] for column in present], weighted)


def _blocks(lengths: Sequence[int], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield pieces (column, start, stop) that together have at most ``limit`` elements."""
    block: list[tuple[int, int, int]] = []
    room = limit
    for column, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            block.append((column, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield block
                block, room = [], limit
    if block:
        yield block


def _gather(
    rows: Sequence[_Row],
    lengths: Sequence[int],
    block: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    matrix = torch.zeros(
        len(rows), sum(stop - start for _, start, stop in block), dtype=dtype, device=device
    )
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for task, row in enumerate(rows):
        offset = 0
        for column, start, stop in block:
            gradient = row[column]
            if gradient is not None:
                targets.append(matrix[task, offset : offset + stop - start])
                sources.append(gradient.as_strided((lengths[column],), (1,))[start:stop])
            offset += stop - start
    torch._foreach_copy_(targets, sources)
    return matrix
