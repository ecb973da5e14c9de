"""Memory that a function fills in a child process and that its caller gets without a copy."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import NamedTuple


class _Place(NamedTuple):
    """The memory file of a block, and where it is mapped."""

    file: int
    address: int
    size: int


_blocks: "weakref.WeakKeyDictionary[mmap.mmap, _Place]" = weakref.WeakKeyDictionary()


def allocate_shared(size: int) -> memoryview:
    """Return memory that can go to another process as it is.

    When everything large that a function returns lies in it, the memory itself goes to the caller
    of :meth:`~esper.core.worker.AsyncWorker.call`; otherwise it is copied like any other. Whoever
    keeps it shares it with that caller.

    :param size: bytes, at least 1.
    :raises OSError: there is not enough memory.
    """
    file = os.memfd_create("esper-block", os.MFD_CLOEXEC)
    try:
        os.truncate(file, size)
        block = mmap.mmap(file, size)
    except BaseException:
        os.close(file)
        raise
    weakref.finalize(block, os.close, file)
    _blocks[block] = _Place(file, _address_of(memoryview(block)), size)
    return memoryview(block)


def find_block(buffers: Sequence[memoryview]) -> tuple[int, int, list[int]] | None:
    """Return file and size of the block that all buffers lie in, and where in it they begin."""
    if not buffers or not _blocks or any(buffer.readonly for buffer in buffers):
        return None
    starts = [_address_of(buffer) for buffer in buffers]
    last = max(start + buffer.nbytes for start, buffer in zip(starts, buffers, strict=True))
    place = _around(min(starts), last)
    if place is None:
        return None
    return place.file, place.size, [start - place.address for start in starts]


def _around(first: int, last: int) -> _Place | None:
    for place in list(_blocks.values()):
        if place.address <= first and last <= place.address + place.size:
            return place
    return None


def _address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
