"""The emergency word: a few bytes of shared memory by which processes of one host tell each other.

It is a memory-mapped file of its own. Python's ``SharedMemory`` is not used: any reader of it that
exits deletes it for everybody.
"""

import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from esper.leyline import EmergencyLevel

_MAGIC = 0x45535052  # "ESPR"
_VERSION = 1
# sequence, magic, version, level, process, time of issue; then a checksum of those and the text
_HEAD = struct.Struct("<QIHHIQ")
_CHECKSUM = struct.Struct("<I")
_WORD_SIZE = _HEAD.size + _CHECKSUM.size
_LARGEST = 2**64 - 1
_ORIGIN, _REASON = 32, 352
_TEXT_AT = 64
_ACKNOWLEDGED_AT = _TEXT_AT + _ORIGIN + _REASON
_ACKNOWLEDGEMENT = struct.Struct("<QQI")
_SIZE = 512
_TRIES = 50
_REWRITES = 5
_JUMP_BYTES = 4
_PATIENCE_S = 0.005
_LOCK_PAUSE_S = 0.001


@dataclass(frozen=True, slots=True)
class WordState:
    """What the word says.

    :param level: present level.
    :param sequence: number of the writing that set it; even, and rising.
    :param issued_ns: when, on ``time.monotonic_ns``, which is the host's.
    :param process: id of the process that set it.
    :param origin: who set it, in a word.
    :param reason: why.
    """

    level: EmergencyLevel
    sequence: int
    issued_ns: int
    process: int
    origin: str
    reason: str


class EmergencyWord:
    """The present level with its reason, to be read and set by any process of the host.

    The sequence is odd while a writing is under way, and rises by two with each: one number tells
    whether anything is new. A checksum tells readers a word that is torn or damaged. Nothing that
    another process does to the content, also dying or being stopped in the middle of a writing,
    makes a method fail or wait; but the file must not be made shorter while it is mapped.

    :param path: the file, made when it is missing or no emergency word; None for memory that only
        this process has.
    :raises OSError: the file cannot be made, or is a link.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = -1 if path is None else _open(path)
        self._map = mmap.mmap(self._file, _SIZE)
        # Eight aligned bytes are read at once, by a processor and by this view.
        self._numbers = memoryview(self._map).cast("Q")
        self._threads = threading.RLock()
        self._turns = 0
        self._alone = False
        self._unreadable = -1
        if path is None:
            self._map[:_SIZE] = _blank()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sequence(self) -> int:
        """Number of the last writing; odd while one is under way."""
        return self._numbers[0]

    def set(self, level: EmergencyLevel, reason: str, origin: str) -> int:
        """Write level and reason; return the number of this writing.

        Writers take turns. One that has been stopped does not hold up this one for longer than a
        few milliseconds; when it goes on, it sees that it was overtaken, and writes again. At
        worst the number falls then, to one that was never used.
        """
        text = _encode(origin, _ORIGIN) + _encode(reason, _REASON)
        with self.turn() as alone:
            # Out of turn, it keeps away from the numbers of the one whose turn it is.
            jump = 0 if alone else 2 * int.from_bytes(os.urandom(_JUMP_BYTES), "little")
            for _ in range(_REWRITES):
                under_way = (self._numbers[0] + jump + 1 | 1) & _LARGEST
                done = under_way + 1 & _LARGEST
                self._numbers[0] = under_way
                head = _HEAD.pack(done, _MAGIC, _VERSION, level, os.getpid(), time.monotonic_ns())
                self._map[_TEXT_AT:_ACKNOWLEDGED_AT] = text
                self._map[8:_WORD_SIZE] = head[8:] + _checksum(head, text)
                if self._numbers[0] == under_way:
                    break
            self._numbers[0] = done
        return done

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Keep other writers off, so that nothing comes between a look and a writing.

        For some milliseconds: others go on when this takes longer, and so does this. The value is
        whether it is this one's turn.
        """
        end = time.monotonic() + _PATIENCE_S
        mine = self._threads.acquire(timeout=_PATIENCE_S)
        if mine and self._turns == 0:
            self._alone = self._lock(end)
        self._turns += mine
        try:
            yield mine and self._alone
        finally:
            self._turns -= mine
            if mine and self._turns == 0:
                self._unlock()
            if mine:
                self._threads.release()

    def read(self) -> WordState | None:
        """Return what the word says; None when it cannot be told at present."""
        before = self._numbers[0]
        # What could not be told a moment ago is looked at once, until there is another writing.
        for _ in range(1 if before == self._unreadable else _TRIES):
            before = self._numbers[0]
            if before % 2:
                continue
            data = self._map[:_ACKNOWLEDGED_AT]
            if self._numbers[0] == before and (state := _decode(data)) is not None:
                return state
        self._unreadable = before
        return None

    def acknowledge(self, sequence: int) -> None:
        """Say that a writing has been acted on. Only the run itself does this."""
        now = time.monotonic_ns()
        checksum = zlib.crc32(struct.pack("<QQ", sequence, now))
        packed = _ACKNOWLEDGEMENT.pack(sequence, now, checksum)
        self._map[_ACKNOWLEDGED_AT : _ACKNOWLEDGED_AT + len(packed)] = packed

    @property
    def acknowledged(self) -> tuple[int, int] | None:
        """Number of the writing that was acted on, and when; None when there is none to be read."""
        sequence, when, checksum = _ACKNOWLEDGEMENT.unpack_from(self._map, _ACKNOWLEDGED_AT)
        if not sequence or checksum != zlib.crc32(struct.pack("<QQ", sequence, when)):
            return None
        return sequence, when

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._numbers.release()
        self._map.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self, end: float) -> bool:
        """Lock the file for this one; memory of this process needs no lock besides."""
        while self._file >= 0:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= end:
                    return False
                time.sleep(_LOCK_PAUSE_S)
            else:
                break
        return True

    def _unlock(self) -> None:
        # Another thread may have closed the file meanwhile, and that has unlocked it.
        if self._alone and self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        file = os.open(path, flags)
        if _is_word(file):
            return file
        os.close(file)
    # Made under another name first: nobody ever sees half a file.
    made = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    made.unlink(missing_ok=True)
    file = os.open(made, flags | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if os.write(file, _blank()) < _SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(made))
        made.replace(path)
    except OSError:
        os.close(file)
        made.unlink(missing_ok=True)
        raise
    return file


def _is_word(file: int) -> bool:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_size != _SIZE:
        return False
    _, magic, version, *_ = _HEAD.unpack_from(os.pread(file, _HEAD.size, 0))
    return bool(magic == _MAGIC and version == _VERSION)


def _blank() -> bytes:
    text = bytes(_ORIGIN + _REASON)
    head = _HEAD.pack(0, _MAGIC, _VERSION, EmergencyLevel.NONE, 0, 0)
    word = (head + _checksum(head, text)).ljust(_TEXT_AT, b"\0")
    return (word + text).ljust(_SIZE, b"\0")


def _checksum(head: bytes, text: bytes) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(text, zlib.crc32(head)))


def _decode(data: bytes) -> WordState | None:
    head, text = data[: _HEAD.size], data[_TEXT_AT:]
    sequence, magic, version, level, process, issued_ns = _HEAD.unpack(head)
    known = magic == _MAGIC and version == _VERSION and level <= EmergencyLevel.CRITICAL
    if not known or data[_HEAD.size : _WORD_SIZE] != _checksum(head, text):
        return None
    return WordState(
        level=EmergencyLevel(level),
        sequence=sequence,
        issued_ns=issued_ns,
        process=process,
        origin=_text(text[:_ORIGIN]),
        reason=_text(text[_ORIGIN:]),
    )


def _encode(text: str, size: int) -> bytes:
    """Cut to so many bytes, between characters."""
    data = text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore").encode()
    return data.ljust(size, b"\0")


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "replace")
