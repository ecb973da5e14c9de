import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import psutil
import pytest

from esper.core.worker import AsyncWorker, Outcome, WorkerHandle
from esper.leyline import CallCancelled, DeadlineExceeded
from support.calls import double, echo, sleep, until


@pytest.fixture(scope="module")
def worker() -> Iterator[AsyncWorker]:
    with AsyncWorker(64, preload=()) as made:
        yield made


def tasks_of(worker: AsyncWorker) -> int:
    loop = worker._loop._loop
    assert loop is not None
    return len(asyncio.all_tasks(loop))


async def chain(length: int) -> str:
    """Await futures that are resolved one tick later, and ticks themselves."""
    loop = asyncio.get_running_loop()
    for number in range(length):
        future: asyncio.Future[None] = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future
        if number % 2:
            await asyncio.sleep(0)
    return "end"


async def chain_under_asyncio_timeout(length: int) -> str:
    async with asyncio.timeout(30):
        return await chain(length)


async def chain_under_anyio_scope(length: int) -> str:
    with anyio.fail_after(30):
        return await chain(length)


async def chain_of_tasks(length: int) -> str:
    for _ in range(length):
        await asyncio.create_task(asyncio.sleep(0))
    return "end"


async def chain_in_a_task_group(length: int) -> str:
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(chain, length)
    return "end"


async def cancel_after(handle: WorkerHandle[Any], ticks: int) -> None:
    for _ in range(ticks):
        await asyncio.sleep(0)
    handle.cancel()


CHAINS = [
    chain,
    chain_under_asyncio_timeout,
    chain_under_anyio_scope,
    chain_of_tasks,
    chain_in_a_task_group,
]


@pytest.mark.parametrize("function", CHAINS)
def test_a_cancel_at_any_tick_is_never_lost(
    worker: AsyncWorker, function: Callable[[int], Awaitable[str]]
) -> None:
    outcomes = set()
    for ticks in range(40):

        async def race(ticks: int = ticks) -> Outcome | None:
            # Both on the one loop: the cancel comes at exactly this tick.
            handle = worker.submit(function, 10, timeout_s=15)
            await cancel_after(handle, ticks)
            with contextlib.suppress(CallCancelled):
                assert await handle == "end"
            return handle.outcome

        outcome = worker.call(race, timeout_s=15)
        assert outcome in {Outcome.OK, Outcome.CANCELLED}
        outcomes.add(outcome)
    assert Outcome.CANCELLED in outcomes
    until(lambda: worker.stats().live == ())


def test_a_coroutine_that_goes_on_after_a_lost_cancel_is_still_cancelled(
    worker: AsyncWorker,
) -> None:
    async def wait(ready: threading.Event) -> None:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.02, future.set_result, None)
        ready.set()
        await future
        await asyncio.sleep(60)

    for delay in range(20):
        ready = threading.Event()
        handle = worker.submit(wait, ready, timeout_s=60)
        assert ready.wait(10)
        time.sleep(delay * 0.0015)
        handle.cancel()
        with pytest.raises(CallCancelled):
            handle.result()


def test_a_coroutine_that_swallows_its_cancel_for_a_while_is_late(worker: AsyncWorker) -> None:
    async def swallow(seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(seconds)
        return "done"

    handle = worker.submit(swallow, 0.2, timeout_s=0.02)
    with pytest.raises(DeadlineExceeded, match="still runs"):
        handle.result()
    assert handle.outcome is Outcome.ABANDONED
    assert not handle.ended
    until(lambda: handle.ended)
    assert handle.outcome is Outcome.ABANDONED, "an outcome is final"
    assert worker.call(echo, 1, timeout_s=10) == 1


async def swallow_until(release: threading.Event) -> None:
    while not release.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)


def count_rounds(seconds: float) -> int:
    """Pure Python, to see how much of the interpreter is left; returns rounds of work."""
    rounds, end = 0, time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(200))
        rounds += 1
    return rounds


@pytest.mark.timeout(60)
def test_one_that_swallows_its_cancel_for_ever_costs_the_program_little() -> None:
    release = threading.Event()
    with AsyncWorker(preload=()) as worker:
        handle = worker.submit(swallow_until, release, timeout_s=0.01)
        with pytest.raises(DeadlineExceeded):
            handle.result()
        until(lambda: worker._loop._throttled)
        spent, began = time.process_time(), time.monotonic()
        time.sleep(1)
        share = (time.process_time() - spent) / (time.monotonic() - began)
        assert share < 0.3, f"the loop takes {share:.0%} of a processor"
        assert worker.call(echo, 1, timeout_s=10) == 1, "others go on"
        release.set()
        until(lambda: handle.ended)
        until(lambda: not worker._loop._throttled)


def test_shielded_cleanup_is_completed(worker: AsyncWorker) -> None:
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(0.1)
                cleaned.append("up")

    handle = worker.submit(work, timeout_s=0.02)
    with pytest.raises(DeadlineExceeded):
        handle.result()
    until(lambda: handle.ended)
    assert cleaned == ["up"]

    handle = worker.submit(work, timeout_s=60)
    time.sleep(0.02)
    handle.cancel()
    until(lambda: handle.ended)
    assert handle.outcome is Outcome.CANCELLED
    assert cleaned == ["up", "up"]


def test_a_coroutine_that_raises_at_its_cancel_is_an_error_or_late(worker: AsyncWorker) -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("in cleanup") from None

    handle = worker.submit(work, timeout_s=60)
    time.sleep(0.02)
    handle.cancel()
    with pytest.raises(ValueError, match="in cleanup"):
        handle.result()
    with pytest.raises(DeadlineExceeded) as raised:
        worker.call(work, timeout_s=0.05)
    assert isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
def test_what_ends_a_program_does_not_end_the_loop(
    worker: AsyncWorker, ending: type[BaseException]
) -> None:
    async def stop() -> None:
        raise ending

    async def stop_in_a_task() -> None:
        await asyncio.create_task(stop())

    async def stop_the_loop() -> str:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        return "goes on"

    for function in (stop, stop_in_a_task):
        with pytest.raises(RuntimeError, match=ending.__name__):
            worker.call(function, timeout_s=10)
    assert worker.call(stop_the_loop, timeout_s=10) == "goes on"
    assert worker.call(echo, 1, timeout_s=10) == 1


def test_a_coroutine_that_blocks_the_loop_is_named_and_others_go_on() -> None:
    release = threading.Event()

    async def block() -> None:
        release.wait(15)

    with AsyncWorker(grace_s=0.05, max_loop_lag_s=0.1, preload=()) as worker:
        worker.call(double, 1, timeout_s=20)
        handle = worker.submit(block, timeout_s=0.05, name="blocker")
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="still runs"):
            handle.result()
        assert time.monotonic() - began < 3
        assert worker.call(double, 2, timeout_s=10) == 4
        assert worker.call(double, 3, timeout_s=10, isolation="thread") == 6
        assert time.monotonic() - began < 10
        until(lambda: worker.stats().stalls_total == 1)
        (under_way,) = worker.stats().stalls
        release.set()
        until(lambda: handle.ended)
        until(lambda: bool(worker._watchdog.stalls))
        stats = worker.stats()
    (stall,) = stats.stalls
    assert under_way.culprit == stall.culprit == "blocker"
    assert "release.wait(15)" in stall.stack
    assert stall.seconds > 0.1
    assert stats.stalls_total == 1


def test_a_blocking_coroutine_is_shown_where_it_blocks(worker: AsyncWorker) -> None:
    release = threading.Event()

    async def block() -> None:
        release.wait(10)

    handle = worker.submit(block, timeout_s=20)
    until(lambda: any("release.wait(10)" in live.stack for live in worker.stats().live))
    release.set()
    handle.result()


def test_a_coroutine_with_no_time_left_is_late_and_may_clean_up(worker: AsyncWorker) -> None:
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append("up")

    handle = worker.submit(work, timeout_s=0)
    with pytest.raises(DeadlineExceeded):
        handle.result()
    until(lambda: handle.ended)
    assert cleaned == ["up"]


def time_out(worker: AsyncWorker, calls: int, batch: int, timeout_s: float) -> None:
    for _ in range(calls // batch):
        handles = [worker.submit(sleep, 60, timeout_s=timeout_s) for _ in range(batch)]
        for handle in handles:
            with pytest.raises(DeadlineExceeded):
                handle.result()
        # One that was abandoned under load takes its slot for a moment more.
        while worker.stats().live:
            time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hundred_thousand_timeouts_leave_nothing() -> None:
    with AsyncWorker(64, preload=()) as worker:
        process = psutil.Process()
        time_out(worker, 10_000, 50, 0.0)
        gc.collect()
        threads, before = threading.active_count(), process.memory_info().rss
        for batch, timeout_s, calls in ((8, 0.0, 20_000), (64, 0.0, 48_000), (64, 0.001, 32_000)):
            time_out(worker, calls, batch, timeout_s)
        gc.collect()
        grown = process.memory_info().rss - before
        print(f"100,000 timeouts: {grown / 2**20:.2f} MiB")  # noqa: T201
        assert threading.active_count() == threads
        assert tasks_of(worker) == 0
        assert worker.stats().live == ()
        assert sum(worker.stats().outcomes.values()) == 110_000
        assert grown < 5 * 2**20


def test_a_thousand_timeouts_leave_no_task() -> None:
    with AsyncWorker(64, preload=()) as worker:
        time_out(worker, 1024, 64, 0.001)
        assert tasks_of(worker) == 0
        assert worker.stats().live == ()
        assert sum(worker.stats().outcomes.values()) == 1024
