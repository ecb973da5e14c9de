import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esper.core.worker import AsyncWorker
from esper.core.worker.transport import Packet, encode, receive
from esper.leyline import CallCancelled, DeadlineExceeded, WorkerFull
from support.calls import (
    Pair,
    Record,
    add_one_in_place,
    describe_tensor,
    double,
    identity,
    read_after,
    return_unpicklable,
    sum_of,
    until,
)


@pytest.fixture(scope="module")
def worker() -> Iterator[AsyncWorker]:
    with AsyncWorker() as made:
        yield made


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def shared_memory() -> int:
    """KiB of memory files and the like, of the whole machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1])
    raise AssertionError


def dtypes() -> list[str]:
    names = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64"
    return [*names.split(), "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", dtypes())
def test_tensors_of_every_type_arrive_and_come_back(worker: AsyncWorker, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    kept = getattr(torch, dtype)
    for shape in ((), (0,), (3, 0, 2), (7,), (3, 5), (2, 3, 4, 5)):
        tensor = torch.randint(0, 5, shape).to(kept)
        back = worker.call(identity, tensor, timeout_s=30)
        assert back.dtype is kept
        assert back.shape == tensor.shape
        as_bytes = [t.reshape(-1).contiguous().view(torch.uint8) for t in (back, tensor)]
        assert torch.equal(*as_bytes)


def test_views_arrive_as_what_they_show(worker: AsyncWorker) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(120.0).reshape(2, 3, 4, 5)
    waves = torch.complex(torch.arange(4.0), torch.ones(4))
    views = [
        base.transpose(0, 2),
        base[:, ::2, 1:, ::3],
        base.to(memory_format=torch.channels_last),
        torch.ones(1).expand(4, 4),
        base.flip(0),
        waves.conj(),
        waves.conj().imag,
    ]
    for view, back in zip(views, worker.call(identity, views, timeout_s=30), strict=True):
        assert torch.equal(view, back)
        assert back.is_contiguous()


def test_what_a_tensor_is_beside_its_numbers_arrives(worker: AsyncWorker) -> None:
    torch = pytest.importorskip("torch")
    leaf = torch.ones(3, requires_grad=True)
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    for tensor in (leaf, leaf * 2, torch.nn.Parameter(torch.ones(2)), frozen):
        told = worker.call(describe_tensor, tensor, timeout_s=30)
        assert told == ("torch.float32", tuple(tensor.shape), tensor.requires_grad)
        back = worker.call(identity, tensor, timeout_s=30)
        assert isinstance(back, torch.nn.Parameter) == isinstance(tensor, torch.nn.Parameter)
        assert back.requires_grad == tensor.requires_grad
        assert back.is_leaf


def test_tensors_may_be_in_whatever_can_be_sent(worker: AsyncWorker) -> None:
    torch = pytest.importorskip("torch")
    one, two = torch.arange(3.0), torch.arange(4)
    nested = {"pair": Pair(one, [two]), "record": Record({"x": one}), "again": one}
    back = worker.call(identity, nested, timeout_s=30)
    assert torch.equal(back["pair"].first, one)
    assert torch.equal(back["pair"].second[0], two)
    assert torch.equal(back["record"].inner["x"], one)
    assert back["again"] is back["pair"].first, "what was one object is one again"
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    assert torch.equal(worker.call(identity, model, timeout_s=30)[0].weight, model[0].weight)


def test_neither_side_sees_what_the_other_changes(worker: AsyncWorker) -> None:
    torch = pytest.importorskip("torch")
    for size in (4, 1_000_000):
        tensor = torch.zeros(size)
        assert worker.call(add_one_in_place, tensor, timeout_s=30) == size
        assert tensor.sum() == 0
        handle = worker.submit(read_after, 0.1, tensor, timeout_s=30)
        tensor.fill_(7)
        assert handle.result() == 0
        back = worker.call(identity, tensor, timeout_s=30)
        back.fill_(1)
        assert worker.call(sum_of, tensor, timeout_s=30) == 7 * size


def test_a_large_tensor_is_sent_through_shared_memory(worker: AsyncWorker) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.ones(50_000_000)
    assert len(encode({"weights": tensor}).inline) < 1000
    began = time.monotonic()
    assert worker.call(sum_of, tensor, timeout_s=60) == 50_000_000
    back = worker.call(identity, tensor, timeout_s=60)
    assert time.monotonic() - began < 15
    assert torch.equal(back, tensor)


def test_the_numbers_are_not_in_the_stream() -> None:
    array = np.arange(100_000)
    message = encode([array, {"again": array}])
    assert len(message.inline) < 1000
    assert sum(buffer.nbytes for buffer in message.buffers) == array.nbytes
    assert np.array_equal(message.decode()[0], array)


def test_what_is_not_dense_and_on_the_cpu_is_refused(worker: AsyncWorker) -> None:
    torch = pytest.importorskip("torch")
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta"), nested):
        with pytest.raises(TypeError, match=r"send a dense one on the CPU, for instance"):
            worker.submit(identity, tensor, timeout_s=30)
        with pytest.raises(TypeError, match="cannot be sent"):
            encode({"deep": [tensor]})


def test_arrays_are_sent_as_well() -> None:
    with AsyncWorker(preload=()) as worker:
        for array in (
            np.arange(12).reshape(3, 4),
            np.arange(12).reshape(3, 4).T,
            np.arange(12)[::3],
            np.empty((0, 3)),
            np.array(3.0),
            np.array(["text", None], dtype=object),
            np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        ):
            back = worker.call(identity, array, timeout_s=30)
            assert back.dtype == array.dtype
            assert np.array_equal(back, array)
        frozen = np.ones(3)
        frozen.flags.writeable = False
        assert np.array_equal(worker.call(identity, frozen, timeout_s=30), frozen)


def send_in_all_ways(worker: AsyncWorker, data: Any, rounds: int) -> None:
    for _ in range(rounds):
        worker.call(identity, data, timeout_s=30)
        with pytest.raises(TypeError):
            worker.call(return_unpicklable, timeout_s=30)
        with pytest.raises(TypeError):
            worker.submit(identity, [data, threading.Lock()], timeout_s=30)
        handle = worker.submit(identity, data, timeout_s=30)
        handle.cancel()
        with contextlib.suppress(CallCancelled):
            handle.result()
        until(lambda handle=handle: handle.ended)
        with pytest.raises(DeadlineExceeded):
            worker.call(identity, data, timeout_s=0)
        until(lambda: not worker.stats().live)


def test_nothing_is_left_of_calls_however_they_end() -> None:
    data = np.ones(100_000)
    with AsyncWorker(1, preload=()) as worker:
        send_in_all_ways(worker, data, 2)
        until(lambda: worker.stats().children == 1)
        files, memory = open_files(), shared_memory()
        for _ in range(500):
            worker.call(double, data, timeout_s=30)
        send_in_all_ways(worker, data, 25)
        handle = worker.submit(time.sleep, 1e6, timeout_s=60)
        for _ in range(50):
            with pytest.raises(WorkerFull):
                worker.submit(identity, data, timeout_s=30)
        handle.cancel()
        until(lambda: handle.ended)
        until(lambda: worker.stats().children == 1)
        until(lambda: open_files() <= files)
        # Others use this machine, too: 50 files left behind would be 40 MB.
        assert shared_memory() - memory < 30_000
    assert not [name for name in os.listdir("/dev/shm") if "esper" in name]


def test_nothing_is_left_of_fifty_killed_calls() -> None:
    data = np.ones(100_000)
    with AsyncWorker(4, preload=()) as worker:
        with pytest.raises(DeadlineExceeded):
            worker.call(read_after, 60, data, timeout_s=0.5)
        until(lambda: worker.stats().children == 1 and not worker.stats().live)
        files = open_files()
        for _ in range(50):
            with pytest.raises(DeadlineExceeded):
                worker.call(read_after, 60, data, timeout_s=0.02)
            until(lambda: not worker.stats().live)
        until(lambda: worker.stats().children == 1)
        until(lambda: open_files() <= files)


def test_small_results_that_are_kept_hold_no_descriptor() -> None:
    with AsyncWorker(preload=()) as worker:
        worker.call(double, 1, timeout_s=30)
        files = open_files()
        kept = [worker.call(double, np.ones(100), timeout_s=30) for _ in range(50)]
        assert len(kept) == 50
        assert open_files() <= files + 2


def test_a_packet_that_is_dropped_frees_its_memory() -> None:
    files = open_files()
    packets = [Packet(encode(np.ones(1000))) for _ in range(10)]
    assert open_files() == files + 10
    packets[0].discard()
    packets[0].discard()
    packets.clear()
    assert open_files() == files


def test_whoever_sends_in_trickles_gains_no_time() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()
    data = b"\0\1" + bytes(6) + bytes(12) + bytes(256)

    def trickle() -> None:
        for number in range(len(data)):
            theirs.send(data[number : number + 1])
            if stop.wait(0.05):
                return

    sender = threading.Thread(target=trickle)
    sender.start()
    try:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            receive(ours, began + 0.2)
        assert time.monotonic() - began < 5
    finally:
        stop.set()
        sender.join(10)
        ours.close()
        theirs.close()


def test_whoever_does_not_read_is_given_up_at_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            Packet(encode(bytes(10_000_000))).send(ours, began + 0.1)
        with pytest.raises(TimeoutError):
            receive(theirs, began)
        assert time.monotonic() - began < 5


def test_the_end_of_the_other_side_is_told() -> None:
    for part in (b"", b"\0\0\0"):
        ours, theirs = socket.socketpair()
        theirs.send(part)
        theirs.close()
        with ours, pytest.raises(EOFError, match="the other end is gone"):
            receive(ours)
