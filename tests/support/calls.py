"""What tests of the worker send to it; importable, so that it can be sent to a process."""

import array
import asyncio
import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from esper.core.worker import AsyncWorker, allocate_shared, check_cancelled


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def state_of(process: int) -> str:
    """The state of a process, as one letter; empty when there is none of that number."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(process: int) -> bool:
    """Whether it has ended; who inherits an orphan may leave its entry in the table."""
    return state_of(process) in {"", "Z", "X"}


def double(x: Any) -> Any:
    return x * 2


def own_pid() -> int:
    return os.getpid()


def write_pid_and_hang(path: str) -> None:
    write_pid(path)
    time.sleep(1e6)


def write_pid(path: str) -> None:
    # In one step: who waits for the file must not find it empty.
    Path(f"{path}.new").write_text(str(os.getpid()))
    Path(f"{path}.new").rename(path)


def loop_for_ever() -> NoReturn:
    while True:
        pass


def ignore_sigterm_and_hang(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    write_pid_and_hang(path)


def pause_holding_the_gil() -> None:
    ctypes.PyDLL(None).pause()


def answer_large_then_stop(size: int) -> bytes:
    """Stop, by a helper, when the answer is about to be sent or under way."""
    subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -STOP {os.getpid()}"])
    return bytes(size)


def start_a_helper(path: str) -> None:
    helper = subprocess.Popen(["sleep", "1000"])
    Path(f"{path}.new").write_text(str(helper.pid))
    Path(f"{path}.new").rename(path)
    time.sleep(1e6)


def eat_memory(limit: int) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return len(bytearray(2 * limit))


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_hard(status: int) -> None:
    os._exit(status)


def exit_softly(status: int) -> None:
    sys.exit(status)


def interrupt() -> None:
    raise KeyboardInterrupt


def fail(text: str) -> None:
    raise ValueError(text)


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("holds a function")
        self.function = lambda: None


class NeedsTwoError(Exception):
    """Can be taken apart, but not put together again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class BreaksWhenSent:
    def __reduce__(self) -> Any:
        raise RuntimeError("no parts")


class BreaksOnArrival:
    def __reduce__(self) -> Any:
        return fail, ("cannot be put together",)


def raise_unpicklable() -> None:
    raise UnpicklableError


def raise_that_needs_two() -> None:
    raise NeedsTwoError(1, 2)


def return_unpicklable() -> Any:
    return lambda: None


def return_what_breaks_when_sent() -> Any:
    return BreaksWhenSent()


def return_what_breaks_on_arrival() -> Any:
    return BreaksOnArrival()


def close_standard_streams() -> str:
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    sys.stdout = None
    return "closed"


def say(text: str) -> None:
    print(text)  # noqa: T201


def late_by(seconds: float) -> None:
    time.sleep(seconds)


def obey(seconds: float = 60.0) -> None:
    """Sleep, but stop when asked to."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_cancelled()
        time.sleep(0.002)


async def sleep(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


async def echo(value: Any) -> Any:
    return value


async def fail_in_a_coroutine(text: str) -> None:
    await asyncio.sleep(0)
    raise ValueError(text)


def work_of_its_own(x: int) -> int:
    with AsyncWorker(preload=()) as worker:
        return worker.call(echo, x, timeout_s=10)


@dataclass
class Pair:
    first: Any
    second: Any


class Record(msgspec.Struct):
    inner: Any


def identity(value: Any) -> Any:
    return value


def add_one_in_place(tensor: Any) -> Any:
    tensor.add_(1)
    return tensor.sum().item()


def sum_of(tensor: Any) -> float:
    return float(tensor.sum())


def read_after(seconds: float, tensor: Any) -> float:
    time.sleep(seconds)
    return sum_of(tensor)


def describe_tensor(tensor: Any) -> tuple[str, tuple[int, ...], bool]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad


class Adder:
    def __init__(self, amount: int) -> None:
        self.amount = amount

    def add(self, x: int) -> int:
        return x + self.amount

    async def add_later(self, x: int) -> int:
        await asyncio.sleep(0)
        return x + self.amount


class LateAdder(Adder):
    async def __call__(self, x: int) -> int:
        return await self.add_later(x)


def shared_numbers(count: int) -> tuple[pickle.PickleBuffer, str]:
    """So many numbers, in shared memory that begins with something else."""
    block = allocate_shared(4 * count + 8)
    block[8:] = bytes(array.array("i", range(count)))
    return pickle.PickleBuffer(block[8:]), "whole"


def shared_and_own(count: int) -> tuple[pickle.PickleBuffer, str]:
    """So many numbers in memory of its own."""
    return pickle.PickleBuffer(bytearray(array.array("i", range(count)).tobytes())), "whole"
