"""Calls that do not end by themselves: what a missed deadline costs, and what it leaves."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio.from_thread import start_blocking_portal

from calls import functions, peers
from calls.measures import Arm, against, duration, no_op, show
from esper.core import AsyncWorker, DeadlineExceeded, Outcome

DEADLINE_S = 0.02
# What cannot be stopped lasts so long; what can would last for a minute.
STUBBORN_S = 0.3
LONG_S = 60.0


@dataclass
class Late:
    """One way to miss a deadline.

    :param miss: makes the call; given a folder for the function to sign in to. May return whether
        the caller was told that the function runs on.
    :param goal_s: seconds past the deadline that it may take.
    :param prepare: has the pool ready, untimed.
    """

    miss: Callable[[str], object]
    goal_s: float | None = None
    prepare: Arm = no_op


def overruns(worker: AsyncWorker, rounds: int) -> None:
    """Time how long after its deadline a caller is let go, and count what runs on."""
    with ExitStack() as stack:
        root = stack.enter_context(scratch())
        ways = _ours(worker) | _theirs(stack)
        found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in ways}
        untold = dict.fromkeys(ways, 0)
        names = list(ways)
        for turn in range(rounds + 1):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                folder = tempfile.mkdtemp(dir=root)
                ways[name].prepare()
                began = time.perf_counter()
                told = ways[name].miss(folder)
                seconds = time.perf_counter() - began - DEADLINE_S
                time.sleep(0.01)
                if turn:
                    outcome = (seconds, functions.began(folder), functions.running(folder))
                    found[name].append(outcome)
                    untold[name] += outcome[2] > 0 and told is not True
        time.sleep(STUBBORN_S)
    rows = []
    for name, outcomes in found.items():
        late = statistics.median(seconds for seconds, _, _ in outcomes)
        left = sum(running for _, _, running in outcomes)
        began_times = sum(count for _, count, _ in outcomes)
        still = f"{left or 'none'} of {began_times}"
        if left and "Esper" in name:
            still += f", {untold[name] or 'none'} untold"
        rows.append((name, duration(late), against(late, ways[name].goal_s), still))
    title = f"Past a deadline of {duration(DEADLINE_S)}, of a call that would take longer"
    show(title, ("way", "median late", "to goal", "functions that run on"), rows)


def _ours(worker: AsyncWorker) -> dict[str, Late]:
    def miss(function: Callable[..., object], isolation: Any, seconds: float, folder: str) -> bool:
        handle = worker.submit(
            function, folder, seconds, timeout_s=DEADLINE_S, name="late", isolation=isolation
        )
        with suppress(DeadlineExceeded):
            handle.result()
        return handle.outcome is Outcome.ABANDONED

    def child_waits() -> None:
        worker.call(functions.nothing, timeout_s=60.0)

    return {
        "Esper, coroutine": Late(partial(miss, functions.await_long, "async", LONG_S), 0.002),
        "Esper, thread that asks each ms": Late(partial(miss, functions.ask, "thread", LONG_S)),
        "Esper, thread that never asks": Late(partial(miss, functions.sleep, "thread", STUBBORN_S)),
        "Esper, process that spins, killed": Late(
            partial(miss, functions.spin, "process", LONG_S), 0.015, child_waits
        ),
    }


def _theirs(stack: ExitStack) -> dict[str, Late]:
    loop = peers.LoopThread()
    stack.callback(loop.close)
    portal = stack.enter_context(start_blocking_portal())
    executor = partial(peers.late_in_executor, functions.sleep, deadline_s=DEADLINE_S)
    ways = {
        "event loop by hand, result(timeout), cancel": Late(
            lambda folder: loop.overrun(functions.await_long(folder, LONG_S), DEADLINE_S)
        ),
        "anyio portal, move_on_after, coroutine": Late(
            lambda folder: portal.call(peers.late_in_anyio_scope, folder, LONG_S, DEADLINE_S)
        ),
        "anyio portal, to_thread, abandon_on_cancel": Late(
            lambda folder: portal.call(peers.late_in_anyio_thread, folder, STUBBORN_S, DEADLINE_S)
        ),
        f"ThreadPoolExecutor in with ({duration(STUBBORN_S)} call)": Late(
            lambda folder: executor(folder, STUBBORN_S, wait=True)
        ),
        "ThreadPoolExecutor, shutdown(wait=False)": Late(
            lambda folder: executor(folder, STUBBORN_S, wait=False)
        ),
    }
    if peers.pebble is not None:
        threads = stack.enter_context(peers.pebble_threads(4))
        processes = stack.enter_context(peers.pebble_processes())

        def thread(folder: str) -> None:
            future = threads.schedule(functions.sleep, [folder, STUBBORN_S])
            with suppress(FutureTimeoutError):
                future.result(DEADLINE_S)
            future.cancel()

        def process(folder: str) -> None:
            with suppress(FutureTimeoutError):
                processes.schedule(functions.spin, [folder, LONG_S], timeout=DEADLINE_S).result()

        ways["pebble, ThreadPool, result(timeout), cancel"] = Late(thread)
        ways["pebble, ProcessPool, timeout, killed"] = Late(
            process, prepare=lambda: processes.schedule(functions.nothing).result(60.0)
        )
    return ways


@contextmanager
def scratch() -> Iterator[str]:
    """Give a folder for functions to sign in to."""
    with tempfile.TemporaryDirectory(
        prefix="worker-benchmark-", ignore_cleanup_errors=True
    ) as root:
        yield root
