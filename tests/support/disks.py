"""Disks that fail, and disks that lose power.

What a checkpoint store does is recorded call by call, and the states that a crash may leave are
made from the record.

The model is POSIX's, not a file system's: what was written is safe when its file was synced, a
name (made, changed, taken away) when its directory was. Everything else may or may not have
arrived, in any order, and a write may have arrived in half.
"""

import errno
import io
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from esper.tolaria.rollback import FileSystem


class FailingDisk(FileSystem):
    """Counts every operation and lets one of them fail, and those after it if asked to.

    :param at: which operation, from 0; -1 for none.
    :param error: with what.
    :param lasting: whether all later ones fail, too.
    :param torn: whether a write that fails has written half.
    """

    def __init__(
        self, at: int = -1, error: int = errno.EIO, *, lasting: bool = False, torn: bool = False
    ) -> None:
        self.count = 0
        self._at, self._error, self._lasting, self._torn = at, error, lasting, torn

    def may(self, data: bytes = b"", write: Any = None) -> None:
        """Count an operation, and fail if it is the one."""
        index, self.count = self.count, self.count + 1
        if index == self._at or (self._lasting and 0 <= self._at < index):
            if self._torn and write is not None:
                write(data[: len(data) // 2])
            raise OSError(self._error, os.strerror(self._error))

    def make_directory(self, path: Path) -> None:
        self.may()
        super().make_directory(path)

    def create(self, path: Path, size: int = 0) -> BinaryIO:
        self.may()
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any, /) -> int:
                disk.may(bytes(data), super().write)
                return super().write(data)

        return io.BufferedWriter(Raw(path, "xb"), 4096)  # type: ignore[return-value]

    def append(self, path: Path, data: bytes) -> None:
        def half(part: bytes) -> None:
            FileSystem.append(self, path, part)

        self.may(data, half)
        super().append(path, data)

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        self.may()
        super().sync(file)

    def sync_directory(self, path: Path) -> None:
        self.may()
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self.may()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.may()
        super().unlink(path)

    def remove_directory(self, path: Path) -> None:
        self.may()
        super().remove_directory(path)


@dataclass
class Op:
    """One change.

    :param kind: ``write``, ``link`` (a name for a node), ``unlink`` (a name taken away), ``move``.
    :param where: node of the file written, or of the directory whose names change.
    :param safe_at: index of the first operation by which it is on the disk for certain.
    """

    kind: str
    where: int
    name: str = ""
    node: int = -1
    new_name: str = ""
    data: bytes = b""
    safe_at: float = float("inf")


@dataclass
class Recording(FileSystem):
    """Does everything for real below one directory, and keeps a record of it.

    :param root: the directory.
    """

    root: Path
    ops: list[Op] = field(default_factory=list)
    acknowledged: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._nodes: dict[Path, int] = {self.root: 0}
        self.directories = {0}
        self._ids = itertools.count(1)

    def acknowledge(self, step: int) -> None:
        """Note that a save has returned."""
        self.acknowledged.append((len(self.ops), step))

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.directories.add(self._link(path))

    def create(self, path: Path, size: int = 0) -> BinaryIO:
        recording, node = self, self._link(path)

        class Raw(io.FileIO):
            def write(self, data: Any, /) -> int:
                recording.ops.append(Op("write", node, data=bytes(data)))
                return super().write(data)

        return io.BufferedWriter(Raw(path, "xb"), 4096)  # type: ignore[return-value]

    def append(self, path: Path, data: bytes) -> None:
        node = self._nodes[path] if path in self._nodes else self._link(path)
        self.ops.append(Op("write", node, data=data))
        super().append(path, data)
        self._make_safe("write", node)

    def sync(self, file: BinaryIO) -> None:
        super().sync(file)
        self._make_safe("write", self._nodes[Path(file.name)])

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        if path in self._nodes:
            self._make_safe("link unlink move", self._nodes[path])

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        node = self._nodes[source]
        moved = {p: n for p, n in self._nodes.items() if source in (p, *p.parents)}
        for path, inner in moved.items():
            del self._nodes[path]
            self._nodes[target / path.relative_to(source)] = inner
        where = self._nodes[source.parent]
        self.ops.append(Op("move", where, source.name, node, target.name))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.ops.append(Op("unlink", self._nodes[path.parent], path.name, self._nodes.pop(path)))

    def remove_directory(self, path: Path) -> None:
        super().remove_directory(path)
        self.ops.append(Op("unlink", self._nodes[path.parent], path.name, self._nodes.pop(path)))

    def _link(self, path: Path) -> int:
        node = next(self._ids)
        self._nodes[path] = node
        self.ops.append(Op("link", self._nodes[path.parent], path.name, node))
        return node

    def _make_safe(self, kinds: str, node: int) -> None:
        for op in self.ops:
            if op.where == node and op.kind in kinds and op.safe_at == float("inf"):
                op.safe_at = len(self.ops)

    def newest_acknowledged(self, cut: int) -> int | None:
        """Return the step that was last acknowledged before an operation."""
        steps = [step for index, step in self.acknowledged if index <= cut]
        return steps[-1] if steps else None

    def crashes(self, cut: int, seed: random.Random) -> Iterator[list[Op]]:
        """Yield, for a crash before operation ``cut``, sets of operations that may have arrived."""
        done = self.ops[:cut]
        pending = [op for op in done if op.safe_at > cut]
        yield done
        yield [op for op in done if op not in pending]
        for one in pending:
            yield [op for op in done if op is not one]
            yield [op for op in done if op not in pending or op is one]
            if one.kind == "write" and len(one.data) > 1:
                half = Op("write", one.where, data=one.data[: len(one.data) // 2])
                yield [half if op is one else op for op in done]
        if len(pending) > 2:
            for _ in range(4):
                lost = [op for op in pending if seed.random() < 0.5]
                yield [op for op in done if op not in lost]

    def materialise(self, ops: list[Op], target: Path) -> None:
        """Make the directory as it would be found."""
        names: dict[int, dict[str, int]] = {node: {} for node in self.directories}
        content: dict[int, bytes] = {}
        for op in ops:
            if op.kind == "write":
                content[op.where] = content.get(op.where, b"") + op.data
            elif op.kind == "link":
                names[op.where][op.name] = op.node
            elif op.kind == "unlink":
                names[op.where].pop(op.name, None)
            elif names[op.where].pop(op.name, None) is not None:
                names[op.where][op.new_name] = op.node

        def build(node: int, path: Path) -> None:
            path.mkdir(exist_ok=True)
            for name, inner in names[node].items():
                if inner in names:
                    build(inner, path / name)
                else:
                    (path / name).write_bytes(content.get(inner, b""))

        build(0, target)
