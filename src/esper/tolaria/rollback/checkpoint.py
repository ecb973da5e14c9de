"""Tier 2: durable checkpoints that survive kills and power cuts, and are verified before use."""

import json
import re
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.leyline import CheckpointError, ConfigError
from esper.tolaria.rollback.durable import (
    WriterLock,
    committed_directory,
    discard_directory,
    make_directory,
    sweep,
    synced_file,
)
from esper.tolaria.rollback.manifest import (
    Manifest,
    UnknownFormatError,
    entry_of,
    read_manifest,
    verify_files,
    write_manifest,
)
from esper.tolaria.rollback.tensor_file import read_tensors, write_tensors
from esper.tolaria.state import Capturable, Capture

_TENSORS = "tensors.safetensors"
_VALUES = "state.json"
_NAME = re.compile(r"step-(\d{9,})(?:\.(\d{3,}))?")
_DAMAGED = ".damaged"
_REASON_LENGTH = 48


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
    :raises ConfigError: ``keep`` is below 1.
    """

    def __init__(self, directory: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ConfigError(f"keep is {keep}; at least 1 checkpoint must be kept")
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
        if step < 0:
            raise CheckpointError(f"cannot save step {step}; give the number of steps taken")
        try:
            self._acquire()
            older = [path for path in self._paths() if _step_of(path) == step]
            final = self.directory / _name(step, older)
            with committed_directory(final) as directory:
                manifest = self._fill(directory, state.capture(), step, healthy)
                # Whatever is deleted below, this checkpoint is known to be good by then.
                self._read_back(directory)
            for path in older:
                discard_directory(path)
            self._retire(final)
        except OSError as error:
            raise CheckpointError(
                f"cannot save a checkpoint in {self.directory}: {error}"
            ) from error
        return _describe(final, manifest, (time.perf_counter() - began) * 1e3)

    def load_latest(self, state: Capturable, *, before_step: int | None = None) -> CheckpointInfo:
        """Restore the newest valid checkpoint; damaged ones are set aside and passed over.

        Everything is verified before the live state is touched.

        :param before_step: only checkpoints of this step or an earlier one are considered.
        :raises CheckpointError: there is none, naming what was tried.
        :raises StateError: the checkpoint is of another model or optimizer.
        """
        info, capture = self.read_latest(before_step=before_step)
        state.restore(capture)
        return info

    def read_latest(self, *, before_step: int | None = None) -> tuple[CheckpointInfo, Capture]:
        """Read the newest valid checkpoint without restoring it; see :meth:`load_latest`.

        :raises CheckpointError: there is none, naming what was tried.
        """
        began = time.perf_counter()
        problems: dict[Path, str] = {}
        while path := self._newest(before_step, problems):
            try:
                manifest, capture = self._read(path)
                _require_own_step(path, manifest)
            except CheckpointError as error:
                # What a newer Esper wrote is not ours to move; only damage is set aside.
                foreign = isinstance(error, UnknownFormatError)
                problems[path] = str(error) + ("" if foreign else self._set_aside(path, error))
                continue
            return _describe(path, manifest, (time.perf_counter() - began) * 1e3), capture
        tried = "; ".join(problems.values()) or "there is none"
        limit = "" if before_step is None else f" of step {before_step} or earlier"
        raise CheckpointError(f"no valid checkpoint{limit} in {self.directory}: {tried}")

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: they belong to a course that was taken back.

        :raises CheckpointError: one cannot be deleted.
        """
        try:
            self._acquire()
            for path in self._paths():
                if _step_of(path) > step:
                    discard_directory(path)
        except OSError as error:
            raise CheckpointError(
                f"cannot delete the checkpoints after step {step} in {self.directory}: {error}"
            ) from error

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
                infos.append(_describe(path, read_manifest(path), 0.0))
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
            make_directory(self.directory)
            self._lock = WriterLock(self.directory)
            sweep(self.directory)

    def _fill(self, directory: Path, capture: Capture, step: int, healthy: bool) -> Manifest:
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
        return manifest

    def _read_back(self, directory: Path) -> None:
        try:
            self._read(directory)
        except CheckpointError as error:
            raise CheckpointError(
                f"what was written in {self.directory} cannot be read back: {error}"
            ) from error

    def _read(self, path: Path) -> tuple[Manifest, Capture]:
        manifest = read_manifest(path)
        verify_files(path, manifest)
        tensors = read_tensors(path / _TENSORS, manifest.tensors)
        try:
            values: dict[str, Any] = json.loads((path / _VALUES).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / _VALUES} cannot be read: {error}") from error
        return manifest, Capture(tensors, values)

    def _problem(self, path: Path) -> str:
        try:
            manifest, _ = self._read(path)
            _require_own_step(path, manifest)
        except CheckpointError as error:
            return str(error)
        return ""

    def _retire(self, saved: Path) -> None:
        """Delete what is not kept.

        :param saved: the checkpoint just written, which stays even if later steps exist: after a
            rollback the new one is not of the highest step.
        """
        infos = self.list()
        healthy = next((info.path for info in infos if info.healthy), None)
        for info in infos[self._keep :]:
            if info.path not in (saved, healthy):
                discard_directory(info.path)

    def _set_aside(self, path: Path, problem: CheckpointError) -> str:
        """Rename a damaged checkpoint; return what to add to its problem if that fails."""
        text = str(problem).replace(str(path), "").lower()
        reason = re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:_REASON_LENGTH].strip("-")
        name = f"{path.name}{_DAMAGED}"
        try:
            earlier = sum(entry.name.startswith(name) for entry in self.directory.iterdir())
            path.rename(path.with_name(f"{name}-{reason}" + (f"-{earlier}" if earlier else "")))
        except OSError as error:
            return f" (and it cannot be set aside: {error})"
        return ""

    def _newest(self, before_step: int | None, tried: Container[Path]) -> Path | None:
        """Look for the next candidate in the directory as it is: a writer may be at work."""
        return next(
            (
                path
                for path in self._paths()
                if path not in tried and (before_step is None or _step_of(path) <= before_step)
            ),
            None,
        )

    def _paths(self) -> Sequence[Path]:
        if not self.directory.is_dir():
            return []
        entries = [entry for entry in self.directory.iterdir() if _NAME.fullmatch(entry.name)]
        return sorted(entries, key=_place_of, reverse=True)


def read_checkpoint(directory: Path, before_step: int) -> tuple[CheckpointInfo, Capture]:
    """Read a checkpoint as :meth:`CheckpointStore.read_latest` does, for another process."""
    return CheckpointStore(directory).read_latest(before_step=before_step)


def _require_own_step(path: Path, manifest: Manifest) -> None:
    if manifest.step != _step_of(path):
        raise CheckpointError(f"{path} holds step {manifest.step}; it was renamed")


def _describe(path: Path, manifest: Manifest, latency_ms: float) -> CheckpointInfo:
    size = sum(entry.size for entry in manifest.files.values())
    return CheckpointInfo(manifest.step, path, size, latency_ms, manifest.healthy)


def _place_of(path: Path) -> tuple[int, int]:
    """Return the step of a checkpoint, and its number among those of the same step."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _step_of(path: Path) -> int:
    return _place_of(path)[0]


def _name(step: int, older: Sequence[Path]) -> str:
    """Return a name that sorts after those of older checkpoints of the same step."""
    serial = max((_place_of(path)[1] + 1 for path in older), default=0)
    return f"step-{step:09d}" + (f".{serial:03d}" if serial else "")


def _encode_values(values: dict[str, Any]) -> bytes:
    try:
        _require_json(values, "values")
        return json.dumps(values, indent=1).encode()
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"cannot save the values as JSON: {error}") from error


def _require_json(value: object, name: str) -> None:
    """Refuse what would come back as something else, such as a tuple or a key that is a number."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"cannot save {name}: key {key!r} is no string, as JSON asks")
            _require_json(item, f"{name}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_json(item, f"{name}/{index}")
    elif not isinstance(value, str | int | float | None):
        kind = type(value).__qualname__
        raise CheckpointError(f"cannot save {name}: JSON has no {kind}; use its plain types")
