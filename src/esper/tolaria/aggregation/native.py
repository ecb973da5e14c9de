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
# Of the functions' arguments; native.c says the same.
_VERSION = 1
# Products of float32 numbers below 1e-38 vanish. They can't matter to a sum of squares that is this
# many times larger; above it, nothing has overflowed as long as the sum is finite.
_SAFE_MEAN_SQUARE = 1e-30


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

    def _arguments(self, threads: int) -> tuple[int, ...]:
        tasks, columns = self.addresses.shape
        return (
            tasks,
            columns,
            self.addresses.ctypes.data,
            self.lengths.ctypes.data,
            TYPES[self.dtype],
            threads,
        )

    def gramian(self) -> NDArray[np.float64]:
        """Return the inner products of the rows; n by n.

        In float32 first, where that is the gradients' type; if their scale makes it over- or
        underflow, in float64.
        """
        result = np.empty((len(self.addresses), len(self.addresses)))
        wide = self.dtype in (torch.bfloat16, torch.float16)
        if not self._gramian(result, wide=wide) and self.dtype is torch.float32:
            self._gramian(result, wide=True)
        return result

    def _gramian(self, result: NDArray[np.float64], *, wide: bool) -> bool:
        """Compute it, and return whether it can be relied on."""
        tasks, threads = len(self.addresses), torch.get_num_threads()
        padded = 2 if tasks <= 2 else -(-tasks // _BLOCK) * _BLOCK
        partial = np.zeros((threads, padded, padded))
        scratch = np.empty((threads, padded, _library().chunk)) if wide else None
        smallest = _SAFE_MEAN_SQUARE * float(self.lengths.sum())
        sound: int = _library().gramian(
            *self._arguments(threads),
            None if scratch is None else scratch.ctypes.data,
            partial.ctypes.data,
            smallest,
            result.ctypes.data,
        )
        return bool(sound)

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
            *self._arguments(torch.get_num_threads()),
            weights.ctypes.data,
            addresses.ctypes.data,
            flags.ctypes.data,
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
    gramian = np.ascontiguousarray(gramian, np.float64)
    orders = np.ascontiguousarray(orders, np.int64)
    preferences = np.ascontiguousarray(preferences, np.float64)
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
        if library.esper_version() != _VERSION:
            raise OSError(f"{name} belongs to another version; install Esper anew")
        self.name = name
        self.gramian = _typed(
            library.esper_gramian, [*_TABLE, _ADDRESS, _ADDRESS, _DOUBLE, _ADDRESS], _INT
        )
        self.combine = _typed(library.esper_combine, [*_TABLE, *[_ADDRESS] * 3], None)
        self.pcgrad = _typed(
            library.esper_pcgrad, [_NUMBER, _ADDRESS, _ADDRESS, _DOUBLE, *[_ADDRESS] * 3], None
        )
        library.esper_chunk.restype = library.esper_max_tasks.restype = _NUMBER
        self.chunk: int = library.esper_chunk()
        self.max_tasks: int = library.esper_max_tasks()


def _typed(function: Any, arguments: list[Any], result: Any) -> Any:  # noqa: ANN401 - as ctypes
    function.argtypes, function.restype = arguments, result
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
