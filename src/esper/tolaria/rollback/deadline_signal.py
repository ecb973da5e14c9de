"""Telling other processes of the host that a rollback missed its deadline: when, and why."""

import mmap
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_MAGIC = 0x45535052_44454144  # "ESPRDEAD"
_HEAD = struct.Struct("<QQQdI")  # magic, count, monotonic ns, deadline ms, process
_CHECKSUM = struct.Struct("<I")
_SIZE = 256
_TEXT = _SIZE - _HEAD.size - _CHECKSUM.size
# A reader that meets the writer in the middle of its few bytes looks again.
_TRIES = 20


@dataclass(frozen=True)
class DeadlineTrip:
    """A deadline that was exceeded.

    :param count: how many there have been so far.
    :param at_ns: when, on ``time.monotonic_ns``, which is the host's.
    :param deadline_ms: the deadline, in milliseconds.
    :param process: id of the process whose deadline it was.
    :param reason: what took so long.
    """

    count: int
    at_ns: int
    deadline_ms: float
    process: int
    reason: str


class SharedDeadlineSignal:
    """The last deadline that was exceeded, in a memory-mapped file that one process writes.

    Any process of the host may read it while it is written: a checksum tells what is torn.

    :param path: the file, made when it is missing; None for memory that only this process has.
    :raises OSError: the file cannot be made.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._map = mmap.mmap(-1, _SIZE)
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(path, flags, 0o644)
        try:
            if os.fstat(file).st_size != _SIZE:
                os.ftruncate(file, _SIZE)
            self._map = mmap.mmap(file, _SIZE)
        finally:
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def trip(self, reason: str, deadline_ms: float) -> DeadlineTrip:
        """Say that a deadline was exceeded just now."""
        last = self.read()
        trip = DeadlineTrip(
            1 if last is None else last.count + 1,
            time.monotonic_ns(),
            deadline_ms,
            os.getpid(),
            reason,
        )
        head = _HEAD.pack(_MAGIC, trip.count, trip.at_ns, deadline_ms, trip.process)
        text = reason.encode("utf-8", "replace")[:_TEXT].decode("utf-8", "ignore").encode()
        body = head + text.ljust(_TEXT, b"\0")
        self._map[:] = body + _CHECKSUM.pack(zlib.crc32(body))
        return trip

    def read(self) -> DeadlineTrip | None:
        """Return the last deadline that was exceeded; None when none was since :meth:`clear`."""
        for _ in range(_TRIES):
            data = bytes(self._map)
            body, (checksum,) = data[: -_CHECKSUM.size], _CHECKSUM.unpack(data[-_CHECKSUM.size :])
            magic, count, at_ns, deadline_ms, process = _HEAD.unpack_from(body)
            if magic == _MAGIC and checksum == zlib.crc32(body):
                reason = body[_HEAD.size :].rstrip(b"\0").decode("utf-8", "replace")
                return DeadlineTrip(count, at_ns, deadline_ms, process, reason)
            if magic == 0:
                return None
        return None

    def clear(self) -> None:
        """Forget it."""
        self._map[:] = bytes(_SIZE)

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._map.close()
