"""What a great many missed deadlines leave behind."""

import gc
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from functools import partial

import psutil
from anyio.from_thread import start_blocking_portal

from calls import functions, peers
from calls.late import LONG_S, scratch
from calls.measures import show
from esper.core import AsyncWorker, DeadlineExceeded, WorkerFull, WorkerHandle

TIMEOUT_S = 0.001
SLOTS = 8
MOST_THREADS = 2_000
MOST_PROCESSES = 100
MEMORY_GOAL_MIB = 5

# Misses deadlines; returns which slots are free then, and how many functions have not ended.
Way = Callable[[], tuple[str, int]]


def leftovers(count: int, linger_s: float) -> None:
    """Count threads, functions, slots and memory after many missed deadlines.

    :param linger_s: how long a function lasts that cannot be stopped.
    """
    threads, processes = min(count, MOST_THREADS), min(count, MOST_PROCESSES)
    with scratch() as root:

        def stubborn(way: Callable[[int, str, float], tuple[str, int]]) -> Way:
            return partial(way, threads, tempfile.mkdtemp(dir=root), linger_s)

        ways: dict[str, tuple[int, Way]] = {
            "Esper, coroutines": (count, partial(_ours, count)),
            "event loop by hand, cancel": (count, partial(_loop, count)),
            "ThreadPoolExecutor for each": (threads, stubborn(_executors)),
            f"one ThreadPoolExecutor of {SLOTS}": (threads, stubborn(_shared)),
            "anyio portal, to_thread, abandon_on_cancel": (threads, stubborn(_abandoned)),
        }
        if peers.pebble is not None:
            ways["pebble, ProcessPool"] = (
                processes,
                partial(_pebble, processes, tempfile.mkdtemp(dir=root)),
            )
        rows = [(name, f"{misses:,}", *_after(way)) for name, (misses, way) in ways.items()]
    show(
        f"After so many missed deadlines of {TIMEOUT_S * 1e3:g} ms (Esper's goals: 0 threads, "
        f"{SLOTS} slots, < {MEMORY_GOAL_MIB} MiB)",
        ("way", "missed", "threads more", "functions that run on", "slots free", "memory more"),
        rows,
    )


def _after(miss: Way) -> tuple[str, str, str, str]:
    process = psutil.Process()
    gc.collect()
    threads, memory = process.num_threads(), process.memory_info().rss
    free, running = miss()
    # A thread that has been joined is still about to go.
    time.sleep(0.05)
    gc.collect()
    more = process.num_threads() - threads
    grown = (process.memory_info().rss - memory) / 2**20
    # What cannot be stopped ends by itself, before the next way is tried.
    end = time.monotonic() + 60.0
    while process.num_threads() > threads and time.monotonic() < end:
        time.sleep(0.1)
    return f"{more:+d}", str(running), free, f"{grown:+.1f} MiB"


def _ours(count: int) -> tuple[str, int]:
    inside: set[object] = set()
    with AsyncWorker(SLOTS) as worker:
        refused = sum(_batch(worker, inside) for _ in range(count // SLOTS))
        time.sleep(0.01)
        free, running = SLOTS - len(worker.stats().live), len(inside)
    return f"{free} of {SLOTS}, {refused} refusals", running


def _batch(worker: AsyncWorker, inside: set[object]) -> int:
    """Miss a deadline for each slot; return how often none was free.

    On a busy machine a call is abandoned, and its slot taken for a moment longer, when the loop has
    not come round within deadline and grace.
    """
    handles: list[WorkerHandle[None]] = []
    refused = 0
    while len(handles) < SLOTS:
        try:
            handle = worker.submit(functions.await_inside, inside, LONG_S, timeout_s=TIMEOUT_S)
            handles.append(handle)
        except WorkerFull:
            refused += 1
            time.sleep(0.001)
    for handle in handles:
        with suppress(DeadlineExceeded):
            handle.result()
    return refused


def _loop(count: int) -> tuple[str, int]:
    inside: set[object] = set()
    loop = peers.LoopThread()
    for _ in range(count // SLOTS):
        futures = [loop.submit(functions.await_inside(inside, LONG_S)) for _ in range(SLOTS)]
        for future in futures:
            with suppress(FutureTimeoutError):
                future.result(TIMEOUT_S)
            future.cancel()
    time.sleep(0.01)
    running = len(inside)
    loop.close()
    return "no limit", running


def _executors(count: int, folder: str, linger_s: float) -> tuple[str, int]:
    for _ in range(count):
        peers.late_in_executor(functions.sleep, folder, linger_s, deadline_s=TIMEOUT_S, wait=False)
    return "no limit", functions.running(folder)


def _shared(count: int, folder: str, linger_s: float) -> tuple[str, int]:
    executor = ThreadPoolExecutor(SLOTS)
    futures: list[Future[None]] = []
    for _ in range(count):
        future = executor.submit(functions.sleep, folder, linger_s)
        futures.append(future)
        with suppress(FutureTimeoutError):
            future.result(TIMEOUT_S)
        future.cancel()
    taken, running = sum(future.running() for future in futures), functions.running(folder)
    executor.shutdown(wait=False, cancel_futures=True)
    return f"{SLOTS - taken} of {SLOTS}", running


def _abandoned(count: int, folder: str, linger_s: float) -> tuple[str, int]:
    with start_blocking_portal() as portal:
        for _ in range(count):
            portal.call(peers.late_in_anyio_thread, folder, linger_s, TIMEOUT_S)
        return "no limit", functions.running(folder)


def _pebble(count: int, folder: str) -> tuple[str, int]:
    with peers.pebble_processes(1) as pool:
        for _ in range(count):
            with suppress(FutureTimeoutError):
                pool.schedule(functions.sleep, [folder, LONG_S], timeout=TIMEOUT_S).result()
        pool.schedule(functions.nothing).result(60.0)
        return "1 of 1", functions.running(folder)
