"""Other ways to make calls beside oneself."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import anyio.to_thread

try:
    import pebble
except ImportError:
    pebble = None

from calls import functions


def missing() -> list[str]:
    """Return a line for each peer that is not installed."""
    lines = []
    if pebble is None:
        lines.append("pebble is not installed and left out; the bench extra has it.")
    return lines


class LoopThread:
    """An event loop on a thread, used by hand: the baseline."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def nothing(self) -> object:
        return self.submit(functions.nothing_async()).result(1.0)

    def overrun(self, work: Coroutine[Any, Any, Any], deadline_s: float) -> None:
        future = self.submit(work)
        with suppress(FutureTimeoutError):
            future.result(deadline_s)
        future.cancel()

    def close(self) -> None:
        self.submit(self._cancel_all()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def pebble_processes(workers: int = 1) -> Iterator[Any]:
    """Give pebble's pool of processes, which it forks from this one."""
    pool = pebble.ProcessPool(max_workers=workers)
    try:
        yield pool
    finally:
        close_pebble(pool)


@contextmanager
def pebble_threads(workers: int = 1) -> Iterator[Any]:
    """Give pebble's pool of threads."""
    pool = pebble.ThreadPool(max_workers=workers)
    try:
        yield pool
    finally:
        close_pebble(pool)


def close_pebble(pool: Any) -> None:
    pool.stop()
    pool.join()


def in_executor(function: Callable[..., Any], *arguments: Any) -> object:
    """Make one call in an executor of its own."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *arguments).result(1.0)


def late_in_executor(
    function: Callable[..., Any], *arguments: Any, deadline_s: float, wait: bool
) -> None:
    """Give up waiting for a call in an executor of its own, and close that."""
    executor = ThreadPoolExecutor(1)
    with suppress(FutureTimeoutError):
        executor.submit(function, *arguments).result(deadline_s)
    executor.shutdown(wait=wait)


async def late_in_anyio_thread(folder: str, seconds: float, deadline_s: float) -> None:
    """Abandon a thread when a scope's deadline passes."""
    with anyio.move_on_after(deadline_s):
        await anyio.to_thread.run_sync(functions.sleep, folder, seconds, abandon_on_cancel=True)


async def late_in_anyio_scope(folder: str, seconds: float, deadline_s: float) -> None:
    """Cancel a coroutine when a scope's deadline passes."""
    with anyio.move_on_after(deadline_s):
        await functions.await_long(folder, seconds)
