"""Tensors in the safetensors layout: streamed out with digests, read back without pickle.

The digest of a file is taken over its header and the digests of its tensors, in their order: one
pass over the bytes proves both the whole and each part.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
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
_CHUNK = 1 << 18
_WRITTEN_AT_ONCE = 1 << 23
_SYNCED_AT_ONCE = 1 << 23


_MALFORMED = (ValueError, KeyError, TypeError, RecursionError)


# Gives so many bytes of memory.
Allocate = Callable[[int], memoryview]


class Digests(NamedTuple):
    """What was written.

    :param size: bytes of the file.
    :param file: xxh3-128 digest of the file's header and of ``tensors``.
    :param tensors: xxh3-128 digest of each tensor's bytes, by name.
    """

    size: int
    file: str
    tensors: dict[str, str]


class _Part(NamedTuple):
    """Where a tensor lies in its file."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    first: int
    last: int


def write_tensors(path: Path, tensors: dict[str, Tensor], disk: FileSystem = DISK) -> Digests:
    """Write tensors one after the other; only one of them is in host memory twice.

    :param tensors: any shape and device; of the dtypes that safetensors has.
    :raises CheckpointError: a dtype has no place in the format.
    """
    # The widest first: then each lies on a multiple of its own width, and is read without a copy.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header = _header({name: tensors[name] for name in ordered})
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with synced_file(path, disk, size=size) as file:
        file.write(header)
        digests, synced = {}, 0
        for name in ordered:
            state = xxhash.xxh3_128()
            for piece in _pieces(tensors[name]):
                state.update(piece)
                file.write(piece)
                if (end := file.tell()) - synced >= _SYNCED_AT_ONCE:
                    disk.start_sync(file, synced, end - synced)
                    synced = end
            digests[name] = state.hexdigest()
    return Digests(size, _combine(header, list(digests.values())), digests)


def verify_tensors(path: Path, digests: dict[str, str], whole: str) -> None:
    """Check a file against its digests, without holding it in memory.

    :param digests: of each tensor, by name.
    :param whole: digest of the file.
    :raises CheckpointError: the file is damaged, or a tensor is missing or differs.
    """
    _scan(path, digests, whole, None)


def read_tensors(
    path: Path, digests: dict[str, str], whole: str, allocate: Allocate | None = None
) -> dict[str, Tensor]:
    """Read all tensors into one block of memory; nothing is returned that differs from its digest.

    :param allocate: gives the block; memory of this process by default.
    :returns: tensors by name; they share the block.
    :raises CheckpointError: the file is damaged, or a tensor is missing or differs.
    """
    memory, parts = _scan(path, digests, whole, allocate or _allocate)
    block = torch.from_numpy(np.frombuffer(memory, np.uint8))
    tensors = {}
    for part in parts:
        piece = block[part.first : part.last]
        if part.first % part.dtype.itemsize:
            piece = piece.clone()
        tensors[part.name] = piece.view(part.dtype).reshape(part.shape)
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


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    content = _bytes_of(tensor)
    for start in range(0, len(content), _WRITTEN_AT_ONCE):
        yield content[start : start + _WRITTEN_AT_ONCE]


def _combine(header: bytes, digests: list[str]) -> str:
    return xxhash.xxh3_128_hexdigest(header + "".join(digests).encode())


def _scan(
    path: Path, digests: dict[str, str], whole: str, allocate: Allocate | None
) -> tuple[memoryview, list[_Part]]:
    """Read a file once and check it; return its bytes, where they are asked for, and its parts."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            header, parts = _read_header(file, size)
            block = memoryview(b"") if allocate is None else allocate(size)
            found = [_digest_part(file.fileno(), part, block) for part in parts]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except _MALFORMED as error:
        raise CheckpointError(f"{path} has a damaged header: {_what(error)}") from error
    for part, digest in zip(parts, found, strict=True):
        if digest != digests.get(part.name):
            raise CheckpointError(f"{path} does not match its digest: tensor {part.name!r} differs")
    if len(parts) != len(digests) or _combine(header, found) != whole:
        raise CheckpointError(f"{path} does not match its digest: its header differs")
    return block, parts


def _read_header(file: BinaryIO, size: int) -> tuple[bytes, list[_Part]]:
    """Return the header, and the parts in their order; they fill the file to the last byte."""
    head = file.read(_LENGTH)
    length = int.from_bytes(head, "little")
    if len(head) < _LENGTH or _LENGTH + length > size:
        raise ValueError(f"it would have {length} bytes; the file has {size}")
    body = file.read(length)
    entries = json.loads(body)
    if not isinstance(entries, dict):
        raise TypeError("it is no JSON object")
    start = end = _LENGTH + length
    parts = []
    for name, entry in entries.items():
        dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
        first, last = (start + int(offset) for offset in entry["data_offsets"])
        if first != end or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} does not lie where it has to")
        parts.append(_Part(name, dtype, shape, first, last))
        end = last
    if end != size:
        raise ValueError(f"the tensors end at byte {end} of {size}")
    return head + body, parts


def _digest_part(descriptor: int, part: _Part, block: memoryview) -> str:
    state = xxhash.xxh3_128()
    scratch = memoryview(bytearray(0 if block else _CHUNK))
    at = part.first
    while at < part.last:
        until = min(at + _CHUNK, part.last)
        piece = block[at:until] if block else scratch[: until - at]
        count = os.preadv(descriptor, [piece], at)
        if count == 0:
            raise OSError(f"it ended at byte {at} while it was read")
        state.update(piece[:count])
        at += count
    return state.hexdigest()


def _allocate(size: int) -> memoryview:
    # numpy asks for huge pages, torch does not: page faults are most of what reading costs.
    return np.empty(size, np.uint8).data


def _what(error: Exception) -> str:
    return f"{error} is missing or unknown" if isinstance(error, KeyError) else str(error)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
