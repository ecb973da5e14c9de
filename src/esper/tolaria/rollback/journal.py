"""What happened to the checkpoints of a directory, in order: an append-only file of lines.

The directories are the truth; the journal is the story of how they came and went. A line is
``crc32 json``. What a crash tears off the end is cut away when the next writer opens it, and a
journal that is lost is begun anew from what is there.
"""

import time
import zlib
from pathlib import Path
from typing import Any

import msgspec

from esper.tolaria.rollback.durable import DISK, FileSystem

NAME = "JOURNAL"
_CRC = 8


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line.

    :param event: ``saved``, ``failed``, ``deleted``, ``found``, ``missing``, ``pinned``,
        ``unpinned`` or ``set aside``.
    :param time: seconds since the Unix epoch.
    :param name: directory of the checkpoint, where there is one.
    :param step: steps taken in it.
    :param reason: why.
    :param data: further values.
    """

    event: str
    time: float
    name: str = ""
    step: int = -1
    reason: str = ""
    data: dict[str, Any] = {}


class Journal:
    """The journal of one directory. Only the holder of the directory's lock may write it.

    :param directory: holds the file.
    :param disk: carries out what is written.
    """

    def __init__(self, directory: Path, disk: FileSystem = DISK) -> None:
        self._path = directory / NAME
        self._disk = disk

    def read(self) -> list[Entry]:
        """Return the lines up to the first that is torn or damaged.

        :raises OSError: it is there and cannot be read.
        """
        return self._read_valid()[0]

    def open(self, names: dict[str, int]) -> None:
        """Make ready for appending: cut a torn end off, and note what came or went unseen.

        :param names: step by name of each checkpoint that is there.
        :raises OSError: it cannot be written.
        """
        entries, valid, size = self._read_valid()
        if valid < size:
            self._rewrite(entries)
        known = _present(entries)
        lines = [
            self._line(Entry("found", time.time(), name, step))
            for name, step in names.items()
            if name not in known
        ]
        lines += [
            self._line(Entry("missing", time.time(), name, step))
            for name, step in known.items()
            if name not in names
        ]
        if lines:
            self._disk.append(self._path, b"".join(lines))

    def append(self, event: str, name: str = "", step: int = -1, **more: Any) -> None:  # noqa: ANN401
        """Add a line; it is on the disk when this returns.

        :param more: other fields of :class:`Entry`.
        :raises OSError: it cannot be written.
        """
        self._disk.append(self._path, self._line(Entry(event, time.time(), name, step, **more)))

    def _read_valid(self) -> tuple[list[Entry], int, int]:
        """Return the valid lines, the bytes that they take, and the bytes of the file."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return [], 0, 0
        entries, valid = [], 0
        for line in content.splitlines(keepends=True):
            entry = _decode(line)
            if entry is None:
                break
            entries.append(entry)
            valid += len(line)
        return entries, valid, len(content)

    def _rewrite(self, entries: list[Entry]) -> None:
        temporary = self._path.with_name(f".tmp-{NAME}")
        temporary.unlink(missing_ok=True)
        self._disk.append(temporary, b"".join(self._line(entry) for entry in entries))
        self._disk.rename(temporary, self._path)
        self._disk.sync_directory(self._path.parent)

    @staticmethod
    def _line(entry: Entry) -> bytes:
        text = msgspec.json.encode(entry)
        return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _decode(line: bytes) -> Entry | None:
    crc, separator, text = line[:_CRC], line[_CRC : _CRC + 1], line[_CRC + 1 : -1]
    if separator != b" " or not line.endswith(b"\n") or crc != f"{zlib.crc32(text):08x}".encode():
        return None
    try:
        return msgspec.json.decode(text, type=Entry)
    except msgspec.MsgspecError:
        return None


def _present(entries: list[Entry]) -> dict[str, int]:
    """Return the checkpoints that are there by the journal, with their steps."""
    present: dict[str, int] = {}
    for entry in entries:
        if entry.event in ("saved", "found"):
            present[entry.name] = entry.step
        elif entry.event in ("deleted", "missing", "set aside"):
            present.pop(entry.name, None)
    return present
