"""Which values that are not finite come from which, so that the one that did harm is named.

Much that is not finite does no harm: the gradient of a norm at zero is computed as 0 / 0 and then
masked, and so is the unused branch of a ``where``. What counts is what reaches a loss or a
gradient. Where the thread is lost, as in compiled code that writes past torch, the newest such
value before is taken for the source.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def memory_of(tensor: Tensor) -> int:
    """Return what a tensor and its views have in common."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        # A tensor of another layout has no storage of its own.
        return id(tensor)


class Trace:
    """Remembers who wrote values that are not finite, and from whose such values they were made."""

    def __init__(self) -> None:
        self._writers: dict[int, int] = {}
        self._parents: list[tuple[int, ...]] = []

    def parents(self, given: Any) -> tuple[int, ...]:  # noqa: ANN401 - arguments of an operation
        """Return the writers of what an operation is given, as far as it is not finite.

        To be called before the operation, which may write over it.
        """
        if not self._writers:
            return ()
        leaves = (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
        found = (self._writers.get(memory_of(leaf)) for leaf in leaves)
        return tuple({writer for writer in found if writer is not None})

    @property
    def newest(self) -> tuple[int, ...]:
        """The last writer, if there is one."""
        return (len(self._parents) - 1,) if self._parents else ()

    def wrote(self, output: Tensor, parents: tuple[int, ...]) -> int:
        """Note an output that is not finite; return the writer's number."""
        number = len(self._parents)
        self._parents.append(parents)
        self._writers[memory_of(output)] = number
        return number

    def cleaned(self, output: Tensor) -> None:
        """Note an output that is finite: what was in its memory before is gone."""
        if self._writers:
            memory = memory_of(output)
            if memory in self._writers and output.nbytes >= output.untyped_storage().nbytes():
                del self._writers[memory]

    def origins(self, results: Iterable[Tensor], *, spoilt_besides: bool) -> set[int]:
        """Return the numbers of all writers that what is not finite in ``results`` comes from.

        :param spoilt_besides: something is not finite that was made of the results.
        """
        spoilt = [result for result in results if not bool(torch.isfinite(result).all())]
        left = list(self.newest) if spoilt_besides and not spoilt else []
        for result in spoilt:
            writer = self._writers.get(memory_of(result))
            left.extend(self.newest if writer is None else (writer,))
        found: set[int] = set()
        while left:
            number = left.pop()
            if number not in found:
                found.add(number)
                left.extend(self._parents[number])
        return found
