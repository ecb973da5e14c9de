"""The compiled kernels of ``native.c`` on CPU tensors; where they were not built, torch serves."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_LIBRARIES = ("libnative.so", "libnative_serial.so")
_NUMBER, _ADDRESS, _INT, _DOUBLE = (
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_double,
)
_TABLE = [_NUMBER, _NUMBER, _ADDRESS, _ADDRESS, _INT, _INT]
_BLOCK = 4


@dataclass(frozen=True)
class Table:
    """Addresses of dense CPU gradients of one dtype, tasks by columns; the owner keeps them alive.

    :ivar addresses: tasks by columns; 0 is a gradient of zeros.
    :ivar lengths: elements of each column.
    """

    addresses: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, rows: Sequence[Sequence[Tensor | None]], lengths: Sequence[int], dtype: torch.dtype
    ) -> "Table":
        """Describe gradients that are dense, with equal strides in each column."""
        addresses = [[0 if g is None else g.data_ptr() for g in row] for row in rows]
        return cls(np.array(addresses, np.uint64), np.array(lengths, np.int64), dtype)

    def _arguments(self) -> tuple[int, ...]:
        tasks, columns = self.addresses.shape
        return (
            tasks,
            columns,
            self.addresses.ctypes.data,
            self.lengths.ctypes.data,
            TYPES[self.dtype],
            torch.get_num_threads(),
        )

    def gramian(self, *, wide: bool) -> NDArray[np.float64]:
        """Return the inner products of the rows.

        :param wide: multiply in float64 too, not only add; half the speed, no overflow.
        """
        tasks = len(self.addresses)
        padded = 2 if tasks <= 2 else -(-tasks // _BLOCK) * _BLOCK
        threads = torch.get_num_threads()
        partial = np.zeros((threads, padded, padded))
        scratch = None
        if self.dtype is not torch.float64 and (wide or self.dtype is not torch.float32):
            scratch = np.empty((threads, padded, _library().chunk))
        _library().gramian(
            *self._arguments(),
            None if scratch is None else scratch.ctypes.data,
            partial.ctypes.data,
        )
        lower: NDArray[np.float64] = np.tril(partial.sum(0)[:tasks, :tasks])
        return lower + np.tril(lower, -1).T

    def combine(
        self, weights: NDArray[np.float64], targets: Sequence[Tensor], add: Sequence[bool]
    ) -> None:
        """Write the weighted sum of each column to its target, or add it.

        :param weights: one for each task.
        :param targets: dense like the column's gradients, of their dtype.
        :param add: whether to add to what a target holds, by column.
        """
        addresses = np.array([target.data_ptr() for target in targets], np.uint64)
        flags = np.array(add, np.int8)
        _library().combine(
            *self._arguments(), weights.ctypes.data, addresses.ctypes.data, flags.ctypes.data
        )


def pcgrad_weights(
    gramian: NDArray[np.float64],
    orders: NDArray[np.int64],
    epsilon: float,
    preferences: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return PCGrad's weights; see :class:`~esper.tolaria.aggregation.PCGrad`."""
    tasks = len(gramian)
    products, weights = np.empty(tasks), np.zeros(tasks)
    gramian, orders = np.ascontiguousarray(gramian), np.ascontiguousarray(orders)
    _library().pcgrad(
        tasks,
        gramian.ctypes.data,
        orders.ctypes.data,
        epsilon,
        preferences.ctypes.data,
        products.ctypes.data,
        weights.ctypes.data,
    )
    return weights


def available(tasks: int = 2) -> bool:
    """Return whether there are kernels for so many tasks."""
    kernels = _load()
    return kernels is not None and tasks <= kernels.max_tasks


def describe() -> str:
    """Say which kernels serve on the CPU."""
    kernels = _load()
    if kernels is None:
        return "torch's own; Esper's were not compiled when it was installed"
    return f"compiled, {'on all threads' if kernels.name == _LIBRARIES[0] else 'on one thread'}"


class _Kernels:
    def __init__(self, name: str) -> None:
        # The OpenMP symbols that the first needs are found in torch, which is loaded already.
        library = ctypes.CDLL(str(Path(__file__).with_name(name)))
        self.name = name
        self.gramian = _void(library.esper_gramian, [*_TABLE, *[_ADDRESS] * 2])
        self.combine = _void(library.esper_combine, [*_TABLE, *[_ADDRESS] * 3])
        self.pcgrad = _void(
            library.esper_pcgrad, [_NUMBER, _ADDRESS, _ADDRESS, _DOUBLE, *[_ADDRESS] * 3]
        )
        library.esper_chunk.restype = library.esper_max_tasks.restype = _NUMBER
        self.chunk: int = library.esper_chunk()
        self.max_tasks: int = library.esper_max_tasks()


def _void(function: Any, arguments: list[Any]) -> Any:  # noqa: ANN401 - ctypes has no better type
    function.argtypes, function.restype = arguments, None
    return function


@cache
def _load() -> _Kernels | None:
    for name in _LIBRARIES:
        try:
            return _Kernels(name)
        except OSError:
            continue
    return None


def _library() -> _Kernels:
    kernels = _load()
    if kernels is None:
        raise RuntimeError("the compiled kernels are not there; ask available() first")
    return kernels
