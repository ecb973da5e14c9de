import asyncio
import contextlib
import threading
import time
from collections import Counter
from typing import Any

import psutil
import pytest

from esper.core.worker import AsyncWorker, Outcome, WorkerHandle
from esper.leyline import CallCancelled, DeadlineExceeded, WorkerClosed, WorkerFull
from support.calls import double, echo, loop_for_ever, obey, own_pid, sleep, until


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_closed_worker_refuses_and_counts_it() -> None:
    worker = AsyncWorker(preload=())
    worker.shutdown()
    assert worker.closed
    for function, isolation in ((echo, "async"), (double, "thread"), (double, "process")):
        with pytest.raises(WorkerClosed, match="was refused: the worker is closed"):
            worker.submit(function, 1, timeout_s=1, isolation=isolation)
    assert worker.stats().outcomes == {Outcome.REFUSED: 3}


def test_closing_ends_all_threads_and_processes() -> None:
    threads, processes = set(threading.enumerate()), children()
    worker = AsyncWorker(preload=())
    assert worker.call(echo, 1, timeout_s=10) == 1
    assert worker.call(double, 1, timeout_s=20) == 2
    assert worker.call(double, 1, timeout_s=20, isolation="thread") == 2
    report = worker.shutdown()
    assert report.left == ()
    assert report.seconds < 5
    assert children() <= processes
    until(lambda: set(threading.enumerate()) <= threads)


@pytest.mark.parametrize(
    ("function", "arguments", "isolation"),
    [(sleep, (60,), "async"), (obey, (60,), "thread"), (loop_for_ever, (), "process")],
)
def test_closing_cancels_what_runs(function: Any, arguments: Any, isolation: Any) -> None:
    processes = children()
    worker = AsyncWorker(8, preload=())
    handles = [
        worker.submit(function, *arguments, timeout_s=60, isolation=isolation) for _ in range(8)
    ]
    time.sleep(0.3)
    report = worker.shutdown()
    assert report.left == ()
    assert report.seconds < 10
    for handle in handles:
        with pytest.raises(CallCancelled):
            handle.result()
        assert handle.ended
    assert worker.stats().outcomes == {Outcome.CANCELLED: 8}
    assert worker.stats().live == ()
    assert worker.stats().children == 0
    until(lambda: children() <= processes)


def test_closing_reports_what_does_not_end_by_name_and_with_its_stack() -> None:
    release = threading.Event()

    def stuck_in_a_thread() -> None:
        release.wait(30)

    async def stuck_in_the_loop() -> None:
        release.wait(31)

    async def swallowing() -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(32)

    for function, line in (
        (stuck_in_a_thread, "release.wait(30)"),
        (stuck_in_the_loop, "release.wait(31)"),
        (swallowing, "asyncio.sleep(32)"),
    ):
        release.clear()
        worker = AsyncWorker(preload=())
        isolation = "thread" if function is stuck_in_a_thread else "async"
        handle = worker.submit(function, timeout_s=60, isolation=isolation)
        until(lambda worker=worker, line=line: line in worker.stats().live[0].stack)
        report = worker.shutdown(0.1)
        assert report.seconds < 5
        (left,) = report.left
        assert left.name == function.__qualname__
        assert line in left.stack
        assert line in str(left)
        with pytest.raises(DeadlineExceeded, match="still runs"):
            handle.result()
        assert handle.outcome is Outcome.ABANDONED
        assert worker.stats().outcomes == {Outcome.ABANDONED: 1}
        release.set()


def test_closing_twice_or_from_two_threads_is_no_error() -> None:
    worker = AsyncWorker(preload=())
    worker.call(echo, 1, timeout_s=10)
    worker.call(double, 1, timeout_s=20)
    worker.submit(obey, timeout_s=60, isolation="thread")
    errors: list[BaseException] = []

    def close() -> None:
        try:
            worker.shutdown()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert not errors
    assert worker.shutdown().left == ()


def test_a_call_cannot_shut_down_its_own_worker() -> None:
    with AsyncWorker(preload=()) as worker, AsyncWorker(preload=()) as other:

        def close_from_within_another() -> None:
            other.call(worker.shutdown, timeout_s=10, isolation="thread")

        async def close() -> None:
            worker.shutdown()

        for function, isolation in (
            (worker.shutdown, "thread"),
            (close, "async"),
            (close_from_within_another, "thread"),
        ):
            with pytest.raises(RuntimeError, match="cannot shut down the worker that carries"):
                worker.call(function, timeout_s=20, isolation=isolation)
        assert not worker.closed
        assert worker.call(echo, 1, timeout_s=10) == 1


def submit_until_closed(
    worker: AsyncWorker, tries: Counter[str], handles: list[WorkerHandle[Any]], lane: int
) -> None:
    choices: list[tuple[Any, tuple[Any, ...], Any]] = [
        (sleep, (0.001,), "async"),
        (double, (1,), "thread"),
        (sleep, (60,), "async"),
        (obey, (60,), "thread"),
    ]
    while True:
        function, arguments, isolation = choices[lane % len(choices)]
        tries["all"] += 1
        lane += 1
        try:
            handles.append(worker.submit(function, *arguments, timeout_s=60, isolation=isolation))
        except WorkerFull:
            tries["refused"] += 1
            time.sleep(0)
        except WorkerClosed:
            tries["refused"] += 1
            return


@pytest.mark.parametrize("timeout_s", [0.0, 5.0])
def test_nothing_escapes_that_is_submitted_while_it_closes(timeout_s: float) -> None:
    before = set(threading.enumerate())
    for number in range(60):
        worker = AsyncWorker(4, grace_s=1.0, preload=())
        tries = [Counter[str]() for _ in range(3)]
        handles: list[list[WorkerHandle[Any]]] = [[] for _ in range(3)]
        threads = [
            threading.Thread(target=submit_until_closed, args=(worker, t, h, lane))
            for lane, (t, h) in enumerate(zip(tries, handles, strict=True))
        ]
        for thread in threads:
            thread.start()
        time.sleep(number % 10 * 3e-4)
        report = worker.shutdown(timeout_s)
        for thread in threads:
            thread.join(10)
        outcomes = Counter(handle.outcome for each in handles for handle in each)
        assert None not in outcomes, "whoever is told of a shutdown knows how all calls ended"
        outcomes[Outcome.REFUSED] += sum(each["refused"] for each in tries)
        assert +outcomes == worker.stats().outcomes
        assert outcomes.total() == sum(each["all"] for each in tries)
        if timeout_s:
            assert report.left == ()
            assert worker.stats().live == ()
    until(lambda: set(threading.enumerate()) <= before)


def test_no_process_escapes_that_is_submitted_while_it_closes() -> None:
    processes = children()
    for number in range(12):
        worker = AsyncWorker(4, preload=())
        if number % 2:
            worker.call(own_pid, timeout_s=20)
        handles: list[WorkerHandle[Any]] = []

        def submit(worker: AsyncWorker = worker, handles: list[Any] = handles) -> None:
            for _ in range(4):
                try:
                    handles.append(worker.submit(loop_for_ever, timeout_s=60))
                except WorkerClosed:
                    return
                time.sleep(0.002)

        thread = threading.Thread(target=submit)
        thread.start()
        time.sleep(number * 1e-3)
        worker.shutdown()
        thread.join(10)
        assert {handle.outcome for handle in handles} <= {Outcome.CANCELLED}
        assert worker.stats().children == 0
    until(lambda: children() <= processes)
