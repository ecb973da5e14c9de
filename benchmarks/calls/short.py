"""Calls that are over at once: round trips, looks, submissions."""

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from anyio.from_thread import start_blocking_portal

from calls import functions, peers
from calls.measures import Arm, against, duration, medians, show, times_of
from esper.core import AsyncWorker

BASELINE = "event loop by hand, run_coroutine_threadsafe (baseline)"
OURS = "Esper, coroutine"
MOST_OVER_BASELINE = 1.2
LOOK_GOAL_S = 1e-6


def round_trips(worker: AsyncWorker, rounds: int) -> None:
    """Time no-ops there and back."""
    with ExitStack() as stack:
        found = medians(times_of(_round_trip_arms(worker, stack), rounds))
    base = found[BASELINE]
    rows = []
    for name, seconds in found.items():
        goal = f"<= {MOST_OVER_BASELINE}: " if name == OURS else ""
        if goal:
            goal += "kept" if seconds <= MOST_OVER_BASELINE * base else "MISSED"
        rows.append((name, duration(seconds), f"{seconds / base:.2f} x", goal))
    show("Round trip of a call that does nothing", ("way", "median", "to baseline", "goal"), rows)


def _round_trip_arms(worker: AsyncWorker, stack: ExitStack) -> dict[str, Arm]:
    loop, shared = peers.LoopThread(), stack.enter_context(ThreadPoolExecutor(4))
    stack.callback(loop.close)
    portal = stack.enter_context(start_blocking_portal())
    spawned = stack.enter_context(
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    )
    arms: dict[str, Arm] = {
        BASELINE: loop.nothing,
        OURS: lambda: worker.call(functions.nothing_async, timeout_s=1.0),
        "anyio portal, call": lambda: portal.call(functions.nothing_async),
        "anyio portal, start_task_soon": lambda: portal.start_task_soon(
            functions.nothing_async
        ).result(1.0),
        "ThreadPoolExecutor for each call, asyncio.run": lambda: peers.in_executor(
            lambda: asyncio.run(functions.nothing_async())
        ),
        "Esper, thread": lambda: worker.call(functions.nothing, timeout_s=1.0, isolation="thread"),
        "shared ThreadPoolExecutor": lambda: shared.submit(functions.nothing).result(1.0),
        "ThreadPoolExecutor for each call": lambda: peers.in_executor(functions.nothing),
    }
    if peers.pebble is not None:
        threads = stack.enter_context(peers.pebble_threads())
        arms["pebble, ThreadPool"] = lambda: threads.schedule(functions.nothing).result(1.0)
    arms["Esper, process"] = lambda: worker.call(functions.nothing, timeout_s=60.0)
    arms["ProcessPoolExecutor, spawn"] = lambda: spawned.submit(functions.nothing).result(60.0)
    if peers.pebble is not None:
        processes = stack.enter_context(peers.pebble_processes())
        arms["pebble, ProcessPool"] = lambda: processes.schedule(functions.nothing).result(60.0)
    return arms


def submissions(worker: AsyncWorker, rounds: int) -> None:
    """Time a submission alone, and a look whether a running call is done."""
    with ExitStack() as stack:
        arms = _submit_arms(worker, stack)
        found = medians(times_of(arms, rounds, after=_result_of))
    base = found["submit: event loop by hand (baseline)"]
    rows = [(name, duration(s), f"{s / base:.2f} x", "") for name, s in found.items()]

    handle = worker.submit(functions.await_inside, set(), 60.0, timeout_s=60.0)
    future: Future[None] = Future()
    looks = {
        "look: Future.done (baseline)": _many(future.done),
        "look: Esper, handle.done, call under way": _many(handle.done),
    }
    times = times_of(looks, max(5, rounds // 10))
    handle.cancel()
    found = {name: seconds / _LOOKS for name, seconds in medians(times).items()}
    base = found["look: Future.done (baseline)"]
    for name, seconds in found.items():
        goal = LOOK_GOAL_S if "Esper" in name else None
        rows.append((name, duration(seconds), f"{seconds / base:.2f} x", against(seconds, goal)))
    show("Submitting, and looking", ("what", "median", "to baseline", "goal"), rows)


def _submit_arms(worker: AsyncWorker, stack: ExitStack) -> dict[str, Arm]:
    loop, shared = peers.LoopThread(), stack.enter_context(ThreadPoolExecutor(4))
    stack.callback(loop.close)
    portal = stack.enter_context(start_blocking_portal())
    arms: dict[str, Arm] = {
        "submit: event loop by hand (baseline)": lambda: loop.submit(functions.nothing_async()),
        "submit: Esper, coroutine": lambda: worker.submit(functions.nothing_async, timeout_s=1.0),
        "submit: anyio portal, start_task_soon": lambda: portal.start_task_soon(
            functions.nothing_async
        ),
        "submit: Esper, thread": lambda: worker.submit(
            functions.nothing, timeout_s=1.0, isolation="thread"
        ),
        "submit: shared ThreadPoolExecutor": lambda: shared.submit(functions.nothing),
        "submit: Esper, process": lambda: worker.submit(functions.nothing, timeout_s=60.0),
    }
    if peers.pebble is not None:
        pool = stack.enter_context(peers.pebble_processes())
        arms["submit: pebble, ProcessPool"] = lambda: pool.schedule(functions.nothing)
    return arms


def _result_of(future: Any) -> None:
    future.result()
    time.sleep(1e-4)  # the other thread comes to rest


_LOOKS = 2_000


def _many(look: Callable[[], bool]) -> Arm:
    def arm() -> None:
        for _ in range(_LOOKS):
            look()

    return arm
