"""Tier 2: durable checkpoints that survive kills and power cuts, and are verified before use."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.leyline import CheckpointError
from esper.tolaria.rollback.durable import (
    WriterLock,
    committed_directory,
    discard_directory,
    sweep,
    sync_directory,
    synced_file,
)
from esper.tolaria.rollback.manifest import (
    Manifest,
    entry_of,
    read_manifest,
    verify_files,
    write_manifest,
)
from esper.tolaria.rollback.tensor_file import read_tensors, write_tensors
from esper.tolaria.state import Capturable, Capture

_TENSORS = "tensors.safetensors"
_VALUES = "state.json"
_NAME = re.compile(r"step-(\d{9,})(?:\.(\d{3}))?")
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint.

    :param step: steps taken in its state.
    :param path: its directory.
    :param bytes: size of its files.
    :param latency_ms: milliseconds that saving or loading it took; 0 when it was only listed.
    :param healthy: whether the divergence guard had no doubt about it.
    """

    step: int
    path: Path
    bytes: int
    latency_ms: float
    healthy: bool


@dataclass(frozen=True)
class CheckpointReport:
    """Whether one checkpoint can be trusted.

    :param problem: what is wrong with it; empty when nothing is.
    """

    step: int
    path: Path
    problem: str

    @property
    def valid(self) -> bool:
        """Whether everything in it matches its digest."""
        return not self.problem


class CheckpointStore:
    """A directory of checkpoints with one writer.

    :param directory: made when the first checkpoint is saved.
    :param keep: newest checkpoints that are kept; the newest healthy one always is.
    """

    def __init__(self, directory: Path, *, keep: int = 3) -> None:
        self.directory = directory
        self._keep = keep
        self._lock: WriterLock | None = None

    def save(self, state: Capturable, *, step: int, healthy: bool = True) -> CheckpointInfo:
        """Write a checkpoint; when this returns, it is on the disk and was read back.

        :param step: steps taken so far; a checkpoint of the same step is replaced.
        :param healthy: False when the divergence guard doubts the state.
        :raises CheckpointError: it could not be written; older checkpoints are untouched.
        """
        began = time.perf_counter()
        try:
            self._acquire()
            older = [path for path in self._paths() if _step_of(path) == step]
            final = self.directory / _name(step, older)
            with committed_directory(final) as directory:
                self._fill(directory, state.capture(), step, healthy)
            for path in older:
                discard_directory(path)
            self._retire()
        except OSError as error:
            raise CheckpointError(
                f"cannot save a checkpoint in {self.directory}: {error}"
            ) from error
        return self._info(final, (time.perf_counter() - began) * 1e3)

    def load_latest(self, state: Capturable, *, before_step: int | None = None) -> CheckpointInfo:
        """Restore the newest valid checkpoint; damaged ones are set aside and passed over.

        Everything is verified before the live state is touched.

        :param before_step: only checkpoints of this step or an earlier one are considered.
        :raises CheckpointError: there is none, naming what was tried.
        :raises StateError: the checkpoint is of another model or optimizer.
        """
        began = time.perf_counter()
        problems = []
        for path in self._paths():
            if before_step is not None and _step_of(path) > before_step:
                continue
            try:
                capture = self._read(path)
            except CheckpointError as error:
                problems.append(str(error) + self._set_aside(path))
                continue
            state.restore(capture)
            return self._info(path, (time.perf_counter() - began) * 1e3)
        tried = "; ".join(problems) or "there is none"
        limit = "" if before_step is None else f" of step {before_step} or earlier"
        raise CheckpointError(f"no valid checkpoint{limit} in {self.directory}: {tried}")

    def verify(self) -> list[CheckpointReport]:
        """Check every checkpoint against its digests, newest first; nothing is changed."""
        return [
            CheckpointReport(_step_of(path), path, self._problem(path)) for path in self._paths()
        ]

    def list(self) -> list[CheckpointInfo]:
        """List the checkpoints whose manifest can be read, newest first."""
        infos = []
        for path in self._paths():
            try:
                infos.append(self._info(path, 0.0))
            except CheckpointError:
                # verify() is what tells about damage.
                continue
        return infos

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _acquire(self) -> None:
        if self._lock is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self.directory.parent)
            self._lock = WriterLock(self.directory)
            sweep(self.directory)

    def _fill(self, directory: Path, capture: Capture, step: int, healthy: bool) -> None:
        digests = write_tensors(directory / _TENSORS, capture.tensors)
        with synced_file(directory / _VALUES) as file:
            file.write(_encode_values(capture.values))
        manifest = Manifest(
            step=step,
            healthy=healthy,
            created=time.time(),
            files={name: entry_of(directory / name) for name in (_TENSORS, _VALUES)},
            tensors=digests,
        )
        write_manifest(directory, manifest)

    def _read(self, path: Path) -> Capture:
        manifest = read_manifest(path)
        verify_files(path, manifest)
        tensors = read_tensors(path / _TENSORS, manifest.tensors)
        try:
            values: dict[str, Any] = json.loads((path / _VALUES).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / _VALUES} cannot be read: {error}") from error
        return Capture(tensors, values)

    def _problem(self, path: Path) -> str:
        try:
            self._read(path)
        except CheckpointError as error:
            return str(error)
        return ""

    def _retire(self) -> None:
        """Delete what is not kept; only after the newest checkpoint was read back and is valid."""
        paths = list(self._paths())
        surplus = paths[self._keep :]
        if not surplus or self._problem(paths[0]):
            return
        healthy = next((info.path for info in self.list() if info.healthy), None)
        for path in surplus:
            if path != healthy:
                discard_directory(path)

    def _set_aside(self, path: Path) -> str:
        """Rename a damaged checkpoint; return what to add to its problem if that fails."""
        try:
            path.rename(path.with_name(f"{path.name}{_DAMAGED}-{int(time.time() * 1e3)}"))
        except OSError as error:
            return f" (and it cannot be set aside: {error})"
        return ""

    def _paths(self) -> Iterator[Path]:
        if not self.directory.is_dir():
            return
        entries = [entry for entry in self.directory.iterdir() if _NAME.fullmatch(entry.name)]
        yield from sorted(entries, reverse=True)

    def _info(self, path: Path, latency_ms: float) -> CheckpointInfo:
        manifest = read_manifest(path)
        size = sum(entry.size for entry in manifest.files.values())
        return CheckpointInfo(manifest.step, path, size, latency_ms, manifest.healthy)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _name(step: int, older: list[Path]) -> str:
    """Return a name that sorts after those of older checkpoints of the same step."""
    serials = [int(match[2] or 0) for path in older if (match := _NAME.fullmatch(path.name))]
    return f"step-{step:09d}" + (f".{max(serials) + 1:03d}" if serials else "")


def _encode_values(values: dict[str, Any]) -> bytes:
    try:
        return json.dumps(values, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state holds a value that JSON cannot: {error}") from error
