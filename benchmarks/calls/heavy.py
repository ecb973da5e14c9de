"""Tensors there and back, and what a hanging call costs a thread that trains."""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.multiprocessing

from calls import functions, peers
from calls.late import scratch
from calls.measures import Arm, duration, medians, show, times_of
from esper.core import AsyncWorker

ELEMENTS = 10_000_000
FLOOR = "floor: copy, double, copy in one thread (baseline)"


def tensors(worker: AsyncWorker, rounds: int) -> None:
    """Time a tensor of 40 MB to a process and back, doubled there."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        arms, before = _tensor_arms(worker, stack)
        found = medians(times_of(arms, rounds, before=before))
    base = found[FLOOR]
    rows = [(name, duration(s), f"{s / base:.2f} x") for name, s in found.items()]
    title = f"{ELEMENTS * 4 / 1e6:g} MB to a process, doubled there, and back"
    show(title, ("way", "median", "to baseline"), rows)


def _tensor_arms(worker: AsyncWorker, stack: ExitStack) -> tuple[dict[str, Arm], dict[str, Arm]]:
    tensor, shared = torch.ones(ELEMENTS), torch.ones(ELEMENTS).share_memory_()
    array = tensor.numpy()
    fresh = [tensor]
    spawned = stack.enter_context(torch.multiprocessing.get_context("spawn").Pool(1))

    def ours(function: Callable[[Any], Any], value: Any) -> Arm:
        return lambda: worker.call(function, value, timeout_s=60.0, isolation="process")

    arms: dict[str, Arm] = {
        FLOOR: lambda: functions.double(tensor.clone()).clone(),
        "Esper, tensor": ours(functions.double, tensor),
        "Esper, numpy array": ours(functions.double, array),
        "Esper, tensor, not doubled": ours(functions.same, tensor),
        "torch.multiprocessing, tensor new": lambda: spawned.apply(functions.double, (fresh[0],)),
        "torch.multiprocessing, tensor shared before": lambda: spawned.apply(
            functions.double, (shared,)
        ),
        "multiprocessing, numpy array pickled": lambda: spawned.apply(functions.double, (array,)),
    }
    if peers.pebble is not None:
        pool = stack.enter_context(peers.pebble_processes())
        arms["pebble, numpy array pickled"] = lambda: pool.schedule(
            functions.double, [array]
        ).result()
    # torch moves a tensor to shared memory the first time that it is sent.
    before: dict[str, Arm] = {
        "torch.multiprocessing, tensor new": lambda: fresh.__setitem__(0, torch.ones(ELEMENTS))
    }
    return arms, before


Hang = Callable[[str], Callable[[], object]]


def training(worker: AsyncWorker, rounds: int, seconds: float) -> None:
    """Measure what calls that hang cost a thread that trains, in slices of so many seconds."""
    torch.set_num_threads(1)
    # The child of a process call is there before anything is measured.
    worker.call(functions.nothing, timeout_s=60.0)
    hangs = _hangs(worker, seconds)
    rates: dict[str, list[float]] = {name: [] for name in hangs}
    for turn in range(rounds):
        names = list(hangs)
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            with _hanging(hangs[name]):
                rates[name].append(_steps(seconds))
    rows = []
    alone = rates["nothing hangs"]
    for name, found in rates.items():
        change = statistics.median(a / b - 1 for a, b in zip(found, alone, strict=True))
        rows.append((name, f"{statistics.median(found):,.0f} /s", f"{change * 100:+.1f} %"))
    show("A thread that trains, beside a call that hangs", ("call", "steps", "change"), rows)


def _hangs(worker: AsyncWorker, seconds: float) -> dict[str, Hang]:
    # Long enough for the pause before the slice and the slice.
    lasts = seconds + 0.5

    def ours(
        function: Callable[..., Any], isolation: Any, timeout_s: float, folder: str
    ) -> Callable[[], object]:
        handle = worker.submit(
            function, folder, lasts, timeout_s=timeout_s, name="hangs", isolation=isolation
        )
        return handle.cancel

    def executor(function: Callable[..., Any], folder: str) -> Callable[[], object]:
        pool = ThreadPoolExecutor(1)
        pool.submit(function, folder, lasts)
        return partial(pool.shutdown, wait=False)

    return {
        "nothing hangs": lambda _: lambda: None,
        "Esper, coroutine that awaits": partial(ours, functions.await_long, "async", 60.0),
        "Esper, coroutine that swallows its cancellation": partial(
            ours, functions.swallow, "async", 0.01
        ),
        "Esper, thread that sleeps past its deadline": partial(
            ours, functions.sleep, "thread", 0.01
        ),
        "Esper, process that sleeps": partial(ours, functions.sleep, "process", 60.0),
        "Esper, process that spins": partial(ours, functions.spin, "process", 60.0),
        "Esper, process that spun past its deadline": partial(
            ours, functions.spin, "process", 0.05
        ),
        "ThreadPoolExecutor, function that sleeps": partial(executor, functions.sleep),
        "ThreadPoolExecutor, function that spins": partial(executor, functions.spin),
    }


@contextmanager
def _hanging(hang: Hang) -> Iterator[None]:
    with scratch() as folder:
        stop = hang(folder)
        # Past the deadline and the grace, if it has one.
        time.sleep(0.25)
        yield
        stop()
        while functions.running(folder):
            time.sleep(0.01)


def _steps(seconds: float) -> float:
    """Return how many steps of a tiny network were done in a second."""
    weight, batch = torch.randn(128, 128), torch.randn(64, 128)
    done, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        for _ in range(10):
            torch.relu(batch @ weight).sum()
        done += 10
    return done / (time.perf_counter() - began)
