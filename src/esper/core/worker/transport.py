"""What travels between a process and the child that works for it.

Objects are serialised with Python's own protocol 5, which hands over large buffers apart: arrays
and tensors are copied once into a memory file, whose descriptor is sent along, and the receiver
maps it. Both ends are processes of the same user running the same program, and nothing of this
outlives them; what is kept or comes from elsewhere never goes this way.
"""

import importlib
import io
import math
import mmap
import os
import pickle  # noqa: TID251
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from esper.core.worker.shared_block import find_block

_HEADER = struct.Struct("<QIQ")  # bytes inline, buffers, bytes in the memory file
_SPAN = struct.Struct("<QQ")  # offset, bytes
_ALIGNMENT = 64
# Python keeps a descriptor for each map: many small results that are kept must not use them up.
_COPIED = 2**20
# One call that maps all pages is cheaper than a fault for each.
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)


@dataclass(frozen=True)
class Message:
    """One object, serialised.

    :param inline: what goes through the socket.
    :param buffers: what goes through shared memory.
    """

    inline: bytes
    buffers: Sequence[memoryview]

    def decode(self) -> Any:  # noqa: ANN401
        """Return the object; its arrays and tensors lie in the buffers.

        :raises Exception: whatever a class raises when it is put together.
        """
        return pickle.loads(self.inline, buffers=self.buffers)  # noqa: S301


def encode(value: object) -> Message:
    """Serialise; the buffers are views of the value's own memory.

    :raises TypeError: it holds something that cannot be sent to another process.
    """
    buffers: list[memoryview] = []
    file = io.BytesIO()

    def keep(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes:
            buffers.append(view)
        return not view.nbytes

    try:
        _Pickler(file, protocol=5, buffer_callback=keep).dump(value)
    except MemoryError:
        raise
    except Exception as error:
        # A class may raise anything when it is taken apart.
        raise TypeError(f"cannot be sent to another process: {error}") from error
    return Message(file.getvalue(), buffers)


class Packet:
    """A message whose buffers have been copied into shared memory, ready to be sent.

    :param message: the buffers are copied here and now, so that they may change afterwards.
    """

    def __init__(self, message: Message) -> None:
        self._file, spans, size = _share(message.buffers)
        table = b"".join(_SPAN.pack(offset, length) for offset, length in spans)
        self._head = _HEADER.pack(len(message.inline), len(spans), size) + table + message.inline

    def __del__(self) -> None:
        self.discard()

    def send(self, connection: socket.socket, deadline: float = math.inf) -> None:
        """Send; may be done once.

        :raises TimeoutError: it does not all go out by the deadline.
        :raises OSError: the other end is gone.
        """
        files = [] if self._file < 0 else [self._file]
        _allow(connection, deadline)
        try:
            sent = socket.send_fds(connection, [self._head[: _HEADER.size]], files)
        finally:
            self.discard()
        _allow(connection, deadline)
        connection.sendall(memoryview(self._head)[sent:])

    def discard(self) -> None:
        """Free the shared memory of a packet that is not sent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def receive(connection: socket.socket, deadline: float = math.inf) -> Message:
    """Receive one object, whose buffers are the receiver's alone.

    :raises EOFError: the other end is gone.
    :raises TimeoutError: it has not all come by the deadline.
    :raises OSError: the connection is broken.
    """
    _allow(connection, deadline)
    head, files, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
    try:
        if not head:
            raise EOFError("the other end is gone")
        head += _receive_exactly(connection, _HEADER.size - len(head), deadline)
        inline, count, size = _HEADER.unpack(head)
        table = _receive_exactly(connection, count * _SPAN.size, deadline)
        data = _receive_exactly(connection, inline, deadline)
        shared = _take(files[0], size) if files else memoryview(b"")
    finally:
        for file in files:
            os.close(file)
    spans = _SPAN.iter_unpack(table)
    return Message(data, [shared[offset : offset + length] for offset, length in spans])


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, FunctionType | type) and value.__module__ == "__main__":
            raise TypeError(
                f"{value.__qualname__} is defined in the main script, which a child process does "
                "not run; move it to a module"
            )
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return _reduce_tensor(torch, value)
        return NotImplemented


def _reduce_tensor(torch: Any, tensor: Any) -> Any:  # noqa: ANN401 - torch is optional here
    dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    if tensor.device.type != "cpu" or not dense:
        raise TypeError(
            f"a tensor on {tensor.device} of layout {tensor.layout} cannot be sent; "
            "send a dense one on the CPU, for instance tensor.cpu()"
        )
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy() if flat.numel() else b""
    dtype = str(tensor.dtype).removeprefix("torch.")
    parameter = isinstance(tensor, torch.nn.Parameter)
    kind = "parameter" if parameter else "tensor"
    return _rebuild_tensor, (raw, dtype, tuple(tensor.shape), tensor.requires_grad, kind)


def _rebuild_tensor(
    raw: Any,  # noqa: ANN401
    dtype: str,
    shape: tuple[int, ...],
    requires_grad: bool,
    kind: str,
) -> Any:  # noqa: ANN401
    torch = importlib.import_module("torch")
    kept = getattr(torch, dtype)
    tensor = torch.from_numpy(raw).view(kept) if len(raw) else torch.empty(0, dtype=kept)
    tensor = tensor.reshape(shape)
    if kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def _share(buffers: Sequence[memoryview]) -> tuple[int, list[tuple[int, int]], int]:
    """Return a memory file with the buffers, where they lie in it, and its size; -1 for none."""
    found = find_block(buffers)
    if found is not None:
        file, size, offsets = found
        lengths = [buffer.nbytes for buffer in buffers]
        return os.dup(file), list(zip(offsets, lengths, strict=True)), size
    spans, size = _lay_out(buffers)
    return (_fill(buffers, spans, size) if size else -1), spans, size


def _lay_out(buffers: Sequence[memoryview]) -> tuple[list[tuple[int, int]], int]:
    spans, end = [], 0
    for buffer in buffers:
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        spans.append((offset, buffer.nbytes))
        end = offset + buffer.nbytes
    return spans, end


def _fill(buffers: Sequence[memoryview], spans: list[tuple[int, int]], size: int) -> int:
    file = os.memfd_create("esper-call", os.MFD_CLOEXEC)
    try:
        os.truncate(file, size)
        for buffer, (offset, length) in zip(buffers, spans, strict=True):
            written = 0
            # A single write stops at 2 GiB.
            while written < length:
                written += os.pwrite(file, buffer[written:], offset + written)
    except BaseException:
        os.close(file)
        raise
    return file


def _take(file: int, size: int) -> memoryview:
    """Return the bytes of a memory file, which is closed then."""
    if size <= _COPIED:
        copy = bytearray(size)
        os.preadv(file, [copy], 0)
        return memoryview(copy)
    return memoryview(mmap.mmap(file, size, flags=mmap.MAP_SHARED | _POPULATE))


def _allow(connection: socket.socket, deadline: float) -> None:
    """Let the next operation take until the deadline."""
    if deadline == math.inf:
        connection.settimeout(None)
        return
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    connection.settimeout(remaining)


def _receive_exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    parts = bytearray(size)
    view, received = memoryview(parts), 0
    while received < size:
        _allow(connection, deadline)
        count = connection.recv_into(view[received:])
        if count == 0:
            raise EOFError("the other end is gone")
        received += count
    return bytes(parts)
