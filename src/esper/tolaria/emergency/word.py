"""The emergency word: a few bytes of shared memory by which processes of one host tell each other.

It is a memory-mapped file of its own. Python's ``SharedMemory`` is not used: any reader of it that
exits deletes it for everybody.
"""

import fcntl
import mmap
import os
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from esper.leyline import EmergencyLevel

_MAGIC = 0x45535052  # "ESPR"
_VERSION = 1
# sequence; magic, version, level, process, time of issue, checksum of those and the text
_WORD = struct.Struct("<Q IHHI Q I")
_ORIGIN, _REASON = 32, 352
_TEXT_AT = 64
_ACKNOWLEDGED_AT = _TEXT_AT + _ORIGIN + _REASON
_ACKNOWLEDGEMENT = struct.Struct("<QQI")
_SIZE = 512
_TRIES = 50
_LOCK_TRIES = 5
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
        few milliseconds; what both then write at the same time, the checksum refuses.
        """
        locked = self._lock()
        try:
            before = self._numbers[0]
            under_way = before + 1 if before % 2 == 0 else before + 2
            self._numbers[0] = under_way
            text = _encode(origin, _ORIGIN) + _encode(reason, _REASON)
            head = (_MAGIC, _VERSION, int(level), os.getpid(), time.monotonic_ns())
            checksum = _checksum(head, text)
            self._map[_TEXT_AT : _TEXT_AT + len(text)] = text
            self._map[8 : _WORD.size] = _WORD.pack(under_way, *head, checksum)[8:]
            self._numbers[0] = under_way + 1
            return under_way + 1
        finally:
            if locked:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def read(self) -> WordState | None:
        """Return what the word says; None when it cannot be told at present."""
        for _ in range(_TRIES):
            before = self._numbers[0]
            data = bytes(self._map[:_ACKNOWLEDGED_AT])
            if before % 2 == 0 and self._numbers[0] == before:
                state = _decode(data)
                if state is not None:
                    return state
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

    def _lock(self) -> bool:
        for _ in range(_LOCK_TRIES if self._file >= 0 else 0):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(_LOCK_PAUSE_S)
            else:
                return True
        return False


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        file = os.open(path, flags)
        if _is_word(file):
            return file
        os.close(file)
    # Made under another name first: nobody ever sees half a file.
    made = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        made.unlink()
    file = os.open(made, flags | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(file, _blank())
    made.replace(path)
    return file


def _is_word(file: int) -> bool:
    data = os.pread(file, _SIZE + 1, 0)
    if len(data) != _SIZE:
        return False
    _, magic, version, *_ = _WORD.unpack_from(data)
    return bool(magic == _MAGIC and version == _VERSION)


def _blank() -> bytes:
    text = bytes(_ORIGIN + _REASON)
    head = (_MAGIC, _VERSION, 0, 0, 0)
    word = _WORD.pack(0, *head, _checksum(head, text)).ljust(_TEXT_AT, b"\0")
    return (word + text).ljust(_SIZE, b"\0")


def _checksum(head: tuple[int, ...], text: bytes) -> int:
    return zlib.crc32(repr(head).encode() + text)


def _decode(data: bytes) -> WordState | None:
    sequence, *head, checksum = _WORD.unpack_from(data)
    text = data[_TEXT_AT:]
    magic, version, level, process, issued_ns = head
    known = magic == _MAGIC and version == _VERSION and level <= EmergencyLevel.CRITICAL
    if not known or checksum != _checksum(tuple(head), text):
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
