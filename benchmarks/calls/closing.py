"""Closing with calls under way."""

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from anyio.from_thread import start_blocking_portal

from calls import functions, peers
from calls.late import LONG_S, scratch
from calls.measures import Arm, against, duration, show
from esper.core import AsyncWorker

LIVE = 8
# What closing waits for, or leaves behind, lasts so long.
STUBBORN_S = 0.5
GOAL_S = 0.005

# Starts eight calls that sign in to a folder, and returns what closes.
Opening = Callable[[str], Arm]


def closings(rounds: int) -> None:
    """Time closing with eight live calls."""
    ways = _ways()
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    with scratch() as root:
        for _ in range(rounds):
            for name, opening in ways.items():
                folder = tempfile.mkdtemp(dir=root)
                close = opening(folder)
                _wait_until(lambda folder=folder: functions.began(folder) == LIVE)
                time.sleep(0.05)
                began = time.perf_counter()
                close()
                seconds = time.perf_counter() - began
                time.sleep(0.01)
                found[name].append((seconds, functions.running(folder)))
                _wait_until(lambda folder=folder: functions.running(folder) == 0)
    rows = []
    for name, outcomes in found.items():
        seconds = statistics.median(taken for taken, _ in outcomes)
        left = max(running for _, running in outcomes)
        goal = GOAL_S if "Esper" in name else None
        rows.append((name, duration(seconds), against(seconds, goal), str(left or "none")))
    show(
        f"Closing with {LIVE} calls under way",
        ("way", "median", "to goal", "functions that run on"),
        rows,
    )


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60.0
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("calls did not begin, or did not end, within a minute")
        time.sleep(0.01)


def _ways() -> dict[str, Opening]:
    ways: dict[str, Opening] = {
        "Esper, coroutines": partial(_ours, functions.await_long, "async"),
        "Esper, threads that ask each ms": partial(_ours, functions.ask, "thread"),
        "Esper, processes": partial(_ours, functions.sleep, "process"),
        "event loop by hand, cancel all, stop": _loop,
        "anyio portal, stop(cancel_remaining=True)": _portal,
        f"ThreadPoolExecutor, shutdown ({duration(STUBBORN_S)} calls)": partial(
            _executor, wait=True
        ),
        "ThreadPoolExecutor, shutdown(wait=False)": partial(_executor, wait=False),
    }
    if peers.pebble is not None:
        ways["pebble, ProcessPool, stop, join"] = _pebble_processes
        ways[f"pebble, ThreadPool, stop, join ({duration(STUBBORN_S)} calls)"] = _pebble_threads
    return ways


def _ours(function: Callable[..., Any], isolation: Any, folder: str) -> Arm:
    worker = AsyncWorker(LIVE)
    for _ in range(LIVE):
        worker.submit(function, folder, LONG_S, timeout_s=LONG_S, isolation=isolation)
    return worker.shutdown


def _loop(folder: str) -> Arm:
    loop = peers.LoopThread()
    for _ in range(LIVE):
        loop.submit(functions.await_long(folder, LONG_S))
    return loop.close


def _portal(folder: str) -> Arm:
    stack = ExitStack()
    portal = stack.enter_context(start_blocking_portal())
    for _ in range(LIVE):
        portal.start_task_soon(functions.await_long, folder, LONG_S)

    def close() -> None:
        portal.call(portal.stop, True)
        stack.close()

    return close


def _executor(folder: str, *, wait: bool) -> Arm:
    executor = ThreadPoolExecutor(LIVE)
    for _ in range(LIVE):
        executor.submit(functions.sleep, folder, STUBBORN_S)
    return partial(executor.shutdown, wait=wait, cancel_futures=True)


def _pebble_processes(folder: str) -> Arm:
    pool = peers.pebble.ProcessPool(max_workers=LIVE)
    for _ in range(LIVE):
        pool.schedule(functions.sleep, [folder, LONG_S])
    return partial(peers.close_pebble, pool)


def _pebble_threads(folder: str) -> Arm:
    pool = peers.pebble.ThreadPool(max_workers=LIVE)
    for _ in range(LIVE):
        pool.schedule(functions.sleep, [folder, STUBBORN_S])
    return partial(peers.close_pebble, pool)
