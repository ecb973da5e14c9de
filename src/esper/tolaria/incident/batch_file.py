"""The content of a batch on disk: its tensors in one file, its structure in another."""

import json
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from esper.leyline import CheckpointError, RunError, StateError
from esper.tolaria.batch_tree import map_tensors
from esper.tolaria.incident.record import BatchEntry
from esper.tolaria.rollback.durable import DISK, FileSystem, synced_file
from esper.tolaria.rollback.tensor_file import read_tensors, write_tensors
from esper.tolaria.state.tree import join, split

_ROOT = "batch"


def tensors_of(content: Any) -> list[Tensor]:  # noqa: ANN401 - the user's batch
    """Return the tensors of a batch, in the order of its structure."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(content, note)
    return found


def write_batch(
    directory: Path,
    entry: BatchEntry,
    content: Any,  # noqa: ANN401 - the user's batch
    max_bytes: int,
    disk: FileSystem = DISK,
) -> BatchEntry:
    """Write a batch's content if it is small enough and can be written at all.

    :param entry: its identity.
    :param max_bytes: largest content that is kept.
    :returns: the entry with shapes, and with a file or the reason why there is none.
    :raises OSError: the disk refuses it.
    """
    tensors = tensors_of(content)
    size = sum(tensor.nbytes for tensor in tensors)
    described = msgspec.structs.replace(
        entry,
        tensors=[f"{_kind(tensor)} {tuple(tensor.shape)}" for tensor in tensors],
        bytes=size,
    )
    if size > max_bytes:
        note = (
            f"its {size / 2**20:.1f} MiB are more than incidents.max_batch_megabytes leaves "
            f"({max_bytes / 2**20:g})"
        )
        return msgspec.structs.replace(described, note=note)
    named: dict[str, Tensor] = {}
    file = f"batch-{entry.step:06d}.safetensors"
    try:
        tree = split(content, _ROOT, named)
        digests = write_tensors(directory / file, named, disk)
    except (StateError, CheckpointError) as error:
        return msgspec.structs.replace(described, note=str(error))
    text = {"tree": tree, "digest": digests.file, "tensors": digests.tensors}
    with synced_file((directory / file).with_suffix(".json"), disk) as out:
        out.write(json.dumps(text, indent=1).encode())
    return msgspec.structs.replace(described, file=file)


def read_batch(directory: Path, entry: BatchEntry) -> Any:  # noqa: ANN401 - the user's batch
    """Return a batch's content; named tuples come back as plain ones.

    :raises RunError: it was not kept, or is damaged.
    """
    if not entry.file:
        raise RunError(f"the content of the batch of step {entry.step} was not kept: {entry.note}")
    path = directory / entry.file
    try:
        text = json.loads(path.with_suffix(".json").read_bytes())
        return join(text["tree"], read_tensors(path, text["tensors"], text["digest"]))
    except (OSError, ValueError, KeyError, TypeError, CheckpointError, StateError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
