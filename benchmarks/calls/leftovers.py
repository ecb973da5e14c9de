"""What a great many missed deadlines leave behind."""

import gc
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
from esper.core import AsyncWorker, DeadlineExceeded

TIMEOUT_S = 0.001
SLOTS = 8
MOST_THREADS = 2_000
MOST_PROCESSES = 100
MEMORY_GOAL = 5 * 2**20

# Misses so many deadlines; the folder is for functions to sign in to.
Way = Callable[[int, str], str]


def leftovers(count: int, linger_s: float) -> None:
    """Count threads, functions, slots and memory after many missed deadlines.

    :param linger_s: how long a function lasts that cannot be stopped.
    """
    ways: dict[str, tuple[Way, int]] = {
        "Esper, coroutines": (_ours, count),
        "event loop by hand, cancel": (_loop, count),
        "ThreadPoolExecutor for each": (partial(_executors, linger_s), min(count, MOST_THREADS)),
        "one ThreadPoolExecutor of 8": (partial(_shared, linger_s), min(count, MOST_THREADS)),
        "anyio, abandon_on_cancel": (partial(_abandoned, linger_s), min(count, MOST_THREADS)),
    }
    if peers.pebble is not None:
        ways["pebble, ProcessPool"] = (_pebble, min(count, MOST_PROCESSES))
    rows = []
    for name, (way, misses) in ways.items():
        with scratch() as root:
            rows.append((name, f"{misses:,}", *_after(partial(way, misses, root), root)))
    show(
        f"After so many missed deadlines of {TIMEOUT_S * 1e3:g} ms (Esper's goals: 0 threads, "
        f"{SLOTS} slots, < {MEMORY_GOAL / 2**20:g} MiB)",
        ("way", "missed", "threads more", "functions that run on", "slots free", "memory more"),
        rows,
    )


def _after(miss: Callable[[], str], root: str) -> tuple[str, str, str, str]:
    process = psutil.Process()
    gc.collect()
    threads, memory = process.num_threads(), process.memory_info().rss
    free = miss()
    # A thread that has been joined is still about to go.
    time.sleep(0.05)
    gc.collect()
    more = process.num_threads() - threads
    grown = (process.memory_info().rss - memory) / 2**20
    outcome = (f"{more:+d}", str(functions.running(root)), free, f"{grown:+.1f} MiB")
    # What cannot be stopped ends by itself, before the next way is tried.
    end = time.monotonic() + 60.0
    while process.num_threads() > threads and time.monotonic() < end:
        time.sleep(0.1)
    return outcome


def _ours(count: int, root: str) -> str:
    with AsyncWorker(SLOTS) as worker:

        def batch() -> None:
            handles = [
                worker.submit(functions.nothing_for, LONG_S, timeout_s=TIMEOUT_S)
                for _ in range(SLOTS)
            ]
            for handle in handles:
                with suppress(DeadlineExceeded):
                    handle.result()

        for _ in range(count // SLOTS):
            batch()
        time.sleep(0.1)
        free = SLOTS - len(worker.stats().live)
    return f"{free} of {SLOTS}"


def _loop(count: int, root: str) -> str:
    loop = peers.LoopThread()
    for _ in range(count // SLOTS):
        futures = [loop.submit(functions.nothing_for(LONG_S)) for _ in range(SLOTS)]
        for future in futures:
            with suppress(FutureTimeoutError):
                future.result(TIMEOUT_S)
            future.cancel()
    loop.close()
    return "no limit"


def _executors(linger_s: float, count: int, root: str) -> str:
    for _ in range(count):
        peers.late_in_executor(functions.sleep, root, linger_s, deadline_s=TIMEOUT_S, wait=False)
    return "no limit"


def _shared(linger_s: float, count: int, root: str) -> str:
    executor = ThreadPoolExecutor(SLOTS)
    futures: list[Future[None]] = []
    for _ in range(count):
        future = executor.submit(functions.sleep, root, linger_s)
        futures.append(future)
        with suppress(FutureTimeoutError):
            future.result(TIMEOUT_S)
        future.cancel()
    taken = sum(future.running() for future in futures)
    executor.shutdown(wait=False, cancel_futures=True)
    return f"{SLOTS - taken} of {SLOTS}"


def _abandoned(linger_s: float, count: int, root: str) -> str:
    with start_blocking_portal() as portal:
        for _ in range(count):
            portal.call(peers.late_in_anyio_thread, root, linger_s, TIMEOUT_S)
    return "no limit"


def _pebble(count: int, root: str) -> str:
    with peers.pebble_processes(1) as pool:
        for _ in range(count):
            with suppress(FutureTimeoutError):
                pool.schedule(functions.sleep, [root, LONG_S], timeout=TIMEOUT_S).result()
        free = "1 of 1" if pool.schedule(functions.nothing).result(60.0) is None else "0 of 1"
    return free
