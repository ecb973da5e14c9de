"""One checkpoint: a directory of a tensor file, plain values, and a manifest that proves both."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from esper.leyline import CheckpointError
from esper.tolaria.rollback.durable import DISK, FileSystem, synced_file
from esper.tolaria.rollback.manifest import (
    FileEntry,
    Manifest,
    read_manifest,
    write_manifest,
)
from esper.tolaria.rollback.tensor_file import Allocate, read_tensors, verify_tensors, write_tensors
from esper.tolaria.state import Capture

TENSORS = "tensors.safetensors"
_VALUES = "state.json"
_PIN = "PINNED"
_NAME = re.compile(r"step-(\d{9,})(?:\.(\d{3,}))?")


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint.

    :param step: steps taken in its state.
    :param path: its directory.
    :param bytes: size of its files.
    :param latency_ms: milliseconds that saving or loading it took; 0 when it was only listed.
    :param healthy: whether the divergence guard had no doubt about it.
    :param created: when it was written, in seconds since the Unix epoch.
    :param pinned: whether it is kept until somebody says otherwise.
    :param metrics: validation metrics of its state, by name.
    :param problem: what went wrong after it was safe, such as an older one that cannot be deleted;
        empty when nothing did.
    """

    step: int
    path: Path
    bytes: int
    latency_ms: float
    healthy: bool
    created: float = 0.0
    pinned: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Label:
    """What is known of a state besides its content.

    :param step: steps taken.
    :param healthy: whether the guard had no doubt.
    :param metrics: validation metrics, by name.
    """

    step: int
    healthy: bool
    metrics: dict[str, float]


def write_generation(
    directory: Path, capture: Capture, label: Label, disk: FileSystem = DISK
) -> Manifest:
    """Fill an empty directory; everything in it is on the disk afterwards.

    :raises CheckpointError: something in the capture cannot be saved.
    :raises OSError: the disk refuses it.
    """
    values = _encode_values(capture.values)
    digests = write_tensors(directory / TENSORS, capture.tensors, disk)
    with synced_file(directory / _VALUES, disk) as file:
        file.write(values)
    manifest = Manifest(
        step=label.step,
        healthy=label.healthy,
        created=time.time(),
        files={
            TENSORS: FileEntry(digests.size, digests.file),
            _VALUES: FileEntry(len(values), xxhash.xxh3_128_hexdigest(values)),
        },
        tensors=digests.tensors,
        metrics=label.metrics,
    )
    write_manifest(directory, manifest, disk)
    return manifest


def verify_generation(path: Path) -> Manifest:
    """Read everything once and compare it with the manifest, without holding it in memory.

    :raises CheckpointError: naming what is damaged.
    """
    manifest = _read_proof(path)
    _read_values(path / _VALUES, manifest.files[_VALUES].xxh3_128)
    verify_tensors(path / TENSORS, manifest.tensors, manifest.files[TENSORS].xxh3_128)
    return manifest


def read_generation(path: Path, allocate: Allocate | None = None) -> tuple[Manifest, Capture]:
    """Read a checkpoint; nothing is returned that does not match its digest.

    :param allocate: gives the memory for the tensors; this process's own by default.
    :raises CheckpointError: naming what is damaged.
    """
    manifest = _read_proof(path)
    values = _read_values(path / _VALUES, manifest.files[_VALUES].xxh3_128)
    whole = manifest.files[TENSORS].xxh3_128
    tensors = read_tensors(path / TENSORS, manifest.tensors, whole, allocate)
    return manifest, Capture(tensors, values)


def describe(
    path: Path, manifest: Manifest, latency_ms: float, problem: str = ""
) -> CheckpointInfo:
    """Return what a list of checkpoints shows of one."""
    return CheckpointInfo(
        step=manifest.step,
        path=path,
        bytes=sum(entry.size for entry in manifest.files.values()),
        latency_ms=latency_ms,
        healthy=manifest.healthy,
        created=manifest.created,
        pinned=is_pinned(path),
        metrics=manifest.metrics,
        problem=problem,
    )


def is_pinned(path: Path) -> bool:
    """Whether a checkpoint is kept until somebody says otherwise."""
    return (path / _PIN).exists()


def set_pin(path: Path, pinned: bool, disk: FileSystem = DISK) -> None:
    """Pin a checkpoint, or let go of it.

    :raises OSError: the disk refuses it.
    """
    mark = path / _PIN
    if pinned and not mark.exists():
        with synced_file(mark, disk):
            pass
    elif not pinned and mark.exists():
        disk.unlink(mark)
    disk.sync_directory(path)


def generations(directory: Path) -> Sequence[Path]:
    """Return the checkpoints of a directory, newest first."""
    if not directory.is_dir():
        return []
    entries = [entry for entry in directory.iterdir() if _NAME.fullmatch(entry.name)]
    return sorted(entries, key=_place_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name tells."""
    return _place_of(path)[0]


def name_of(step: int, older: Sequence[Path]) -> str:
    """Return a name that sorts after those of older checkpoints of the same step."""
    serial = max((_place_of(path)[1] + 1 for path in older), default=0)
    return f"step-{step:09d}" + (f".{serial:03d}" if serial else "")


def _place_of(path: Path) -> tuple[int, int]:
    """Return the step of a checkpoint, and its number among those of the same step."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _read_proof(path: Path) -> Manifest:
    """Read the manifest, and check what can be checked without reading the rest."""
    manifest = read_manifest(path)
    if _NAME.fullmatch(path.name) and manifest.step != step_of(path):
        raise CheckpointError(f"{path} holds step {manifest.step}; it was renamed")
    for name in manifest.files.keys() ^ {TENSORS, _VALUES}:
        raise CheckpointError(f"{path} and its manifest disagree about the file {name}")
    for name, entry in manifest.files.items():
        size = _size_of(path / name)
        if size != entry.size:
            raise CheckpointError(f"{path / name} has {size} bytes instead of {entry.size}")
    return manifest


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_values(path: Path, digest: str) -> dict[str, Any]:
    try:
        text = path.read_bytes()
        if xxhash.xxh3_128_hexdigest(text) != digest:
            raise CheckpointError(f"{path} does not match its digest")
        values: dict[str, Any] = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return values


def _encode_values(values: dict[str, Any]) -> bytes:
    try:
        _require_json(values, "values")
        # Without an indent: only then is it not Python that writes it, character by character.
        return json.dumps(values).encode()
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
