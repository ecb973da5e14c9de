"""Tensors in the safetensors layout: streamed out with digests, read back without pickle."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from torch import Tensor

from esper.leyline import CheckpointError
from esper.tolaria.rollback.durable import DISK, FileSystem, synced_file

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_ALIGNMENT = 8
_LENGTH = 8
# Small enough to be hashed while it is still in the processor's cache.
_CHUNK = 1 << 20
_MALFORMED = (ValueError, KeyError, TypeError, RecursionError)


class Digests(NamedTuple):
    """What was written.

    :param size: bytes of the file.
    :param file: xxh3-128 digest of the whole file.
    :param tensors: xxh3-128 digest of each tensor's bytes, by name.
    """

    size: int
    file: str
    tensors: dict[str, str]


def write_tensors(path: Path, tensors: dict[str, Tensor], disk: FileSystem = DISK) -> Digests:
    """Write tensors one after the other; only one of them is in host memory twice.

    :param tensors: any shape and device; of the dtypes that safetensors has.
    :raises CheckpointError: a dtype has no place in the format.
    """
    # The widest first: then each lies on a multiple of its own width, and is read without a copy.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header = _header({name: tensors[name] for name in ordered})
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    whole = xxhash.xxh3_128(header)
    with synced_file(path, disk, size=size) as file:
        file.write(header)
        digests = {name: _write_tensor(file, tensors[name], whole) for name in ordered}
    return Digests(size, whole.hexdigest(), digests)


def read_tensors(path: Path, digests: dict[str, str], whole: str) -> dict[str, Tensor]:
    """Read all tensors into one block of memory, and check it before anything is made of it.

    :param digests: of each tensor, to name the one that is damaged.
    :param whole: digest of the file.
    :returns: tensors by name; they share the block.
    :raises CheckpointError: the file is damaged, or a tensor is missing or differs.
    """
    try:
        block, found = _read_block(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if found != whole:
        raise CheckpointError(f"{path} does not match its digest{_culprit(block, digests)}")
    try:
        tensors = dict(_slice(block))
    except _MALFORMED as error:
        raise CheckpointError(f"{path} is no safetensors file: {_what(error)}") from error
    if tensors.keys() != digests.keys():
        odd = min(tensors.keys() ^ digests.keys())
        raise CheckpointError(f"{path} and its manifest disagree about tensor {odd!r}")
    return tensors


def _header(tensors: dict[str, Tensor]) -> bytes:
    entries = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"cannot save {name}: {tensor.dtype} has no place in safetensors")
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    body = json.dumps(entries).encode()
    body += b" " * (-len(body) % _ALIGNMENT)
    return len(body).to_bytes(_LENGTH, "little") + body


def _write_tensor(file: BinaryIO, tensor: Tensor, whole: Any) -> str:  # noqa: ANN401 - a hash
    content = _bytes_of(tensor)
    own = xxhash.xxh3_128()
    for start in range(0, len(content), _CHUNK):
        chunk = content[start : start + _CHUNK]
        own.update(chunk)
        whole.update(chunk)
        file.write(chunk)
    return own.hexdigest()


def _read_block(path: Path) -> tuple[Tensor, str]:
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        file.seek(0, 2)
        size = file.tell()
        file.seek(0)
        block = torch.empty(size, dtype=torch.uint8)
        view, start = block.numpy().data, 0
        while count := file.readinto(view[start : start + _CHUNK]):
            state.update(view[start : start + count])
            start += count
    if start < size:
        raise OSError(f"it ended after {start} of {size} bytes")
    return block, state.hexdigest()


def _slice(block: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a file holds, as parts of its block."""
    if len(block) < _LENGTH:
        raise ValueError("it has no header")
    start = _LENGTH + int.from_bytes(block[:_LENGTH].numpy().tobytes(), "little")
    if start > len(block):
        raise ValueError(f"its header would have {start} bytes; the file has {len(block)}")
    entries = json.loads(block[_LENGTH:start].numpy().tobytes())
    if not isinstance(entries, dict):
        raise TypeError("its header is no JSON object")
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
        first, last = (start + int(offset) for offset in entry["data_offsets"])
        if not start <= first <= last <= len(block):
            raise ValueError(f"tensor {name!r} lies outside of it")
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} has {last - first} bytes, which {shape} does not")
        part = block[first:last]
        if first % dtype.itemsize:
            part = part.clone()
        yield name, part.view(dtype).reshape(shape)


def _culprit(block: Tensor, digests: dict[str, str]) -> str:
    try:
        for name, tensor in _slice(block):
            if xxhash.xxh3_128_hexdigest(_bytes_of(tensor)) != digests.get(name):
                return f": tensor {name!r} differs"
    except _MALFORMED as error:
        return f": its header is damaged ({_what(error)})"
    return ""


def _what(error: Exception) -> str:
    return f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
