import gc
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest

from esper.core.worker import AsyncWorker, Isolation, Outcome, choose_isolation
from esper.leyline import CallCancelled, DeadlineExceeded, WorkerClosed, WorkerFull
from support.calls import (
    Adder,
    BreaksWhenSent,
    LateAdder,
    double,
    echo,
    fail,
    loop_for_ever,
    obey,
    own_pid,
    sleep,
    until,
    work_of_its_own,
)


@pytest.fixture(scope="module")
def shared() -> Iterator[AsyncWorker]:
    with AsyncWorker(preload=()) as made:
        yield made


@pytest.fixture
def single() -> Iterator[AsyncWorker]:
    """A worker of one slot, on which a submission from inside a call could wait for itself."""
    with AsyncWorker(1, preload=()) as made:
        yield made


def test_each_function_runs_where_it_can_be_stopped(shared: AsyncWorker) -> None:
    assert shared.call(own_pid, timeout_s=20) != os.getpid()
    assert shared.call(own_pid, timeout_s=20, isolation="thread") == os.getpid()
    assert shared.call(sleep, 0.0, timeout_s=20, isolation=Isolation.PROCESS) == 0.0


def test_all_kinds_of_functions_are_told_apart(shared: AsyncWorker) -> None:
    adder, late = Adder(3), LateAdder(3)
    coroutines = [adder.add_later, late, partial(adder.add_later), partial(late), partial(late, 4)]
    assert {choose_isolation(each) for each in coroutines} == {Isolation.ASYNC}
    assert {choose_isolation(each) for each in (adder.add, partial(adder.add), len, Adder)} == {
        Isolation.PROCESS
    }
    for each in (adder.add_later, late, partial(adder.add_later)):
        assert shared.call(each, 4, timeout_s=20) == 7
        assert shared.call(each, 4, timeout_s=20, isolation="process") == 7
    for isolation in ("thread", "process"):
        assert shared.call(adder.add, 4, timeout_s=20, isolation=isolation) == 7
        assert shared.call(partial(adder.add, 5), timeout_s=20, isolation=isolation) == 8


def test_a_function_that_does_not_suit_the_isolation_is_refused(shared: AsyncWorker) -> None:
    with pytest.raises(TypeError, match="is no coroutine function; use 'thread' or 'process'"):
        shared.submit(double, 1, timeout_s=1, isolation="async")
    with pytest.raises(TypeError, match="is a coroutine function; use 'async' or 'process'"):
        shared.submit(echo, 1, timeout_s=1, isolation="thread")
    with pytest.raises(ValueError, match="isolation is 'fibre'; known are async, thread, process"):
        shared.submit(echo, 1, timeout_s=1, isolation="fibre")  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, -1.0, -math.inf])
def test_a_timeout_is_a_number_of_seconds(shared: AsyncWorker, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="give a finite number of seconds >= 0"):
        shared.submit(echo, 1, timeout_s=timeout_s)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_concurrency": 0},
        {"shutdown_timeout_s": math.nan},
        {"grace_s": -1.0},
        {"max_loop_lag_s": math.inf},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        AsyncWorker(**settings)


def test_a_call_is_counted_under_the_name_of_its_function() -> None:
    with AsyncWorker(preload=()) as worker:
        late = LateAdder(1)
        for function in (echo, partial(echo), late.add_later, late):
            worker.call(function, 1, timeout_s=10)
        worker.call(echo, 1, timeout_s=10, name="question")
        counts = {name: each.outcomes[Outcome.OK] for name, each in worker.stats().calls.items()}
    assert counts == {"echo": 2, "Adder.add_later": 1, "LateAdder": 1, "question": 1}


def test_names_made_up_for_each_call_do_not_eat_the_memory() -> None:
    with AsyncWorker(preload=()) as worker:
        for number in range(300):
            worker.call(echo, 1, timeout_s=10, name=str(number))
        stats = worker.stats()
    assert len(stats.calls) == 257
    assert stats.calls["(others)"].outcomes == {Outcome.OK: 44}
    assert stats.outcomes == {Outcome.OK: 300}


def test_a_full_worker_refuses_at_once_and_names_who_is_there(single: AsyncWorker) -> None:
    handle = single.submit(obey, timeout_s=60, isolation="thread")
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(WorkerFull, match="echo was refused: all 1 slots are taken by obey"):
            single.submit(echo, 1, timeout_s=60)
    assert time.monotonic() - began < 5
    handle.cancel()
    with pytest.raises(CallCancelled):
        handle.result()
    assert single.call(echo, 1, timeout_s=10) == 1
    assert single.stats().outcomes == {
        Outcome.CANCELLED: 1,
        Outcome.REFUSED: 100,
        Outcome.OK: 1,
    }


def test_a_slot_is_taken_until_the_function_has_ended(single: AsyncWorker) -> None:
    release = threading.Event()
    handle = single.submit(release.wait, timeout_s=0.01, isolation="thread")
    with pytest.raises(DeadlineExceeded):
        handle.result()
    with pytest.raises(WorkerFull):
        single.submit(echo, 1, timeout_s=1)
    release.set()
    until(lambda: handle.ended)
    assert single.call(echo, 1, timeout_s=10) == 1


def test_what_cannot_be_sent_is_told_at_once_and_frees_its_slot(single: AsyncWorker) -> None:
    for argument in (lambda: None, threading.Lock(), BreaksWhenSent()):
        with pytest.raises(TypeError, match=r"double cannot be sent to another process: .*; or"):
            single.submit(double, argument, timeout_s=10)
    with pytest.raises(TypeError, match="cannot be sent"):
        single.submit(lambda: None, timeout_s=10, isolation="process")
    assert single.call(echo, 1, timeout_s=10) == 1
    assert single.stats().outcomes == {Outcome.ERROR: 4, Outcome.OK: 1}


def test_a_thread_may_wait_for_any_other_call(single: AsyncWorker) -> None:
    def ask() -> list[int]:
        return [
            single.call(double, 1, timeout_s=20, isolation="thread"),
            single.call(double, 2, timeout_s=20, isolation="process"),
            single.call(echo, 6, timeout_s=20),
        ]

    assert single.call(ask, timeout_s=30, isolation="thread") == [2, 4, 6]


def test_a_coroutine_may_await_any_other_call(single: AsyncWorker) -> None:
    async def ask() -> list[int]:
        return [
            await single.submit(double, 1, timeout_s=20, isolation="thread"),
            await single.submit(double, 2, timeout_s=20, isolation="process"),
            await single.submit(echo, 6, timeout_s=20),
        ]

    assert single.call(ask, timeout_s=30) == [2, 4, 6]


def test_calls_may_nest_deeply_on_one_slot(single: AsyncWorker) -> None:
    def descend(depth: int) -> int:
        if depth == 0:
            return 0
        return 1 + single.call(descend, depth - 1, timeout_s=30, isolation="thread")

    async def sink(depth: int) -> int:
        return 0 if depth == 0 else 1 + await single.submit(sink, depth - 1, timeout_s=30)

    assert single.call(descend, 20, timeout_s=30, isolation="thread") == 20
    assert single.call(sink, 20, timeout_s=30) == 20


def test_a_call_lends_its_slot_to_one_at_a_time(single: AsyncWorker) -> None:
    async def ask() -> str:
        first = single.submit(sleep, 60, timeout_s=60)
        with pytest.raises(WorkerFull):
            single.submit(echo, 1, timeout_s=60)
        first.cancel()
        with pytest.raises(CallCancelled):
            await first
        return await single.submit(echo, "again", timeout_s=60)

    assert single.call(ask, timeout_s=60) == "again"


def test_a_coroutine_that_would_block_its_own_loop_is_told(single: AsyncWorker) -> None:
    async def block() -> None:
        single.call(echo, 1, timeout_s=10)

    with pytest.raises(RuntimeError, match="inside a coroutine, await the handle"):
        single.call(block, timeout_s=10)


def test_the_deadline_of_a_nested_call_is_no_later_than_that_of_the_outer(
    shared: AsyncWorker,
) -> None:
    def ask() -> None:
        inner.append(shared.submit(obey, timeout_s=60, isolation="thread"))
        inner[0].result()

    inner: list = []
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        shared.call(ask, timeout_s=0.1, isolation="thread")
    until(inner[0].done)
    assert inner[0].outcome is Outcome.TIMEOUT
    assert time.monotonic() - began < 10


def test_cancelling_a_coroutine_cancels_the_call_that_it_awaits(shared: AsyncWorker) -> None:
    async def ask() -> None:
        inner.append(shared.submit(sleep, 60, timeout_s=60))
        await inner[0]

    inner: list = []
    outer = shared.submit(ask, timeout_s=60)
    until(lambda: bool(inner))
    outer.cancel()
    with pytest.raises(CallCancelled):
        outer.result()
    until(inner[0].done)
    assert inner[0].outcome is Outcome.CANCELLED


def test_calls_of_two_workers_do_not_borrow_from_each_other(single: AsyncWorker) -> None:
    with AsyncWorker(1, preload=()) as other:

        def ask() -> int:
            taken = other.submit(obey, timeout_s=60, isolation="thread")
            with pytest.raises(WorkerFull):
                other.submit(echo, 1, timeout_s=60)
            taken.cancel()
            return single.call(double, 2, timeout_s=60, isolation="thread")

        assert single.call(ask, timeout_s=60, isolation="thread") == 4


def test_a_call_may_use_and_close_a_worker_of_its_own(shared: AsyncWorker) -> None:
    for isolation in ("thread", "process"):
        assert shared.call(work_of_its_own, 5, timeout_s=30, isolation=isolation) == 5


def test_an_error_leaves_no_cycle_that_keeps_the_arguments_alive(shared: AsyncWorker) -> None:
    class Large:
        pass

    async def raise_soon(_: Large) -> None:
        raise ValueError

    def raise_now(_: Large) -> None:
        raise ValueError

    gc.collect()
    gc.disable()
    try:
        for function, isolation in ((raise_soon, "async"), (raise_now, "thread")):
            large = Large()
            kept = weakref.ref(large)
            handle = shared.submit(function, large, timeout_s=10, isolation=isolation)
            until(handle.done)
            del handle, large
            until(lambda kept=kept: kept() is None)
    finally:
        gc.enable()


def test_a_forked_process_is_refused_and_does_not_hang(shared: AsyncWorker) -> None:
    handle = shared.submit(obey, timeout_s=60, isolation="thread")
    # A lock that is held at the time of the fork stays so in the child.
    with shared._ledger._lock:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                shared.submit(echo, 1, timeout_s=1)
            except WorkerClosed:
                shared.stats()
                shared.shutdown()
                status = 0 if shared.closed else 2
            finally:
                os._exit(status)
    _, status = os.waitpid(child, 0)
    handle.cancel()
    assert os.waitstatus_to_exitcode(status) == 0
    assert shared.call(double, 2, timeout_s=20) == 4, "the parent goes on"


def test_stats_show_where_a_call_is(shared: AsyncWorker) -> None:
    handles = [
        shared.submit(obey, timeout_s=60, isolation="thread"),
        shared.submit(sleep, 60, timeout_s=60),
        shared.submit(loop_for_ever, timeout_s=60),
    ]

    def stacks() -> dict[str, str]:
        return {each.name: each.stack for each in shared.stats().live}

    until(lambda: "await asyncio.sleep" in stacks()["sleep"])
    until(lambda: "in obey" in stacks()["obey"])
    live = {each.name: each for each in shared.stats().live}
    assert live["loop_for_ever"].stack == ""
    assert live["sleep"].overdue_s < 0 < live["sleep"].age_s
    assert str(live["sleep"]).startswith("sleep (async, ")
    for handle in handles:
        handle.cancel()
        with pytest.raises(CallCancelled):
            handle.result()


def test_an_error_does_not_take_the_slot(single: AsyncWorker) -> None:
    for _ in range(5):
        for isolation in ("thread", "process"):
            with pytest.raises(ValueError, match="no"):
                single.call(fail, "no", timeout_s=20, isolation=isolation)
    assert single.stats().live == ()


# An interrupt in a destructor of Python's own is not ours to handle.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_moment_of_a_submission_costs_no_slot_for_ever() -> None:
    rounds, interrupted, main = 300, 0, threading.get_ident()
    kicks: SimpleQueue[float | None] = SimpleQueue()

    def kick() -> None:
        while (delay := kicks.get()) is not None:
            end = time.perf_counter() + delay
            while time.perf_counter() < end:
                pass
            signal.pthread_kill(main, signal.SIGUSR1)

    kicker = threading.Thread(target=kick)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    kicker.start()
    try:
        with AsyncWorker(4, preload=()) as worker:
            # From here on no thread is made: Python's own start of one is no match for Ctrl-C.
            worker.call(echo, 1, timeout_s=10)
            for number in range(rounds):
                try:
                    kicks.put(number % 50 * 4e-6)
                    worker.submit(sleep, 0, timeout_s=0.001)
                    for _ in range(1000):
                        time.sleep(0.01)
                except KeyboardInterrupt:
                    interrupted += 1
                until(lambda: not worker.stats().live)
            assert [worker.call(echo, x, timeout_s=10) for x in range(4)] == [0, 1, 2, 3]
    finally:
        kicks.put(None)
        kicker.join(10)
        signal.signal(signal.SIGUSR1, before)
    assert interrupted == rounds
