"""Tensors in the safetensors layout: streamed out with a digest each, read back without pickle."""

import json
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esper.leyline import CheckpointError
from esper.tolaria.rollback.durable import synced_file

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
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write tensors one after the other; only one of them is in host memory twice.

    :param tensors: any shape and device; of the dtypes that safetensors has.
    :returns: the xxh3-128 digest of each tensor's bytes.
    :raises CheckpointError: a dtype has no place in the format.
    """
    with synced_file(path) as file:
        file.write(_header(tensors))
        return {name: _write_tensor(file, tensor) for name, tensor in tensors.items()}


def read_tensors(path: Path, digests: dict[str, str]) -> dict[str, Tensor]:
    """Read all tensors and check each against its digest.

    :raises CheckpointError: the file is damaged, or a tensor is missing or differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if tensors.keys() != digests.keys():
        odd = min(tensors.keys() ^ digests.keys())
        raise CheckpointError(f"{path} and its manifest disagree about tensor {odd!r}")
    for name, tensor in tensors.items():
        if xxhash.xxh3_128_hexdigest(_bytes_of(tensor)) != digests[name]:
            raise CheckpointError(f"{path}: tensor {name!r} does not match its digest")
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
    return len(body).to_bytes(8, "little") + body


def _write_tensor(file: BinaryIO, tensor: Tensor) -> str:
    content = _bytes_of(tensor)
    file.write(content)
    return xxhash.xxh3_128_hexdigest(content)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
