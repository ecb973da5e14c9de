import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from esper.core.worker import AsyncWorker, Outcome, check_cancelled
from esper.leyline import CallCancelled, DeadlineExceeded
from support.calls import double, echo, exit_softly, fail, fail_in_a_coroutine, obey, sleep, until


@pytest.fixture
def worker() -> Iterator[AsyncWorker]:
    with AsyncWorker(preload=()) as made:
        yield made


def test_a_handle_tells_result_outcome_and_latency(worker: AsyncWorker) -> None:
    handle = worker.submit(sleep, 0.01, timeout_s=10)
    assert handle.result() == 0.01
    assert handle.result() == 0.01, "a result can be read twice"
    assert handle.done()
    assert handle.ended
    assert handle.outcome is Outcome.OK
    assert handle.latency_s is not None
    assert 0.01 <= handle.latency_s < 10


def test_a_handle_says_nothing_before_the_end(worker: AsyncWorker) -> None:
    handle = worker.submit(sleep, 60, timeout_s=60)
    assert not handle.done()
    assert handle.outcome is None
    assert handle.latency_s is None
    assert not handle.ended
    assert repr(handle) == "<WorkerHandle sleep async running>"
    handle.cancel()
    with pytest.raises(CallCancelled, match="sleep was cancelled"):
        handle.result()
    assert repr(handle) == "<WorkerHandle sleep async cancelled>"


def test_an_error_is_the_one_that_was_raised(worker: AsyncWorker) -> None:
    for isolation in ("thread", "process"):
        with pytest.raises(ValueError, match="wrong"):
            worker.call(fail, "wrong", timeout_s=20, isolation=isolation)
    handle = worker.submit(fail_in_a_coroutine, "wrong", timeout_s=10)
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            handle.result()
    assert handle.outcome is Outcome.ERROR


def test_what_ends_a_program_does_not_end_that_of_the_caller(worker: AsyncWorker) -> None:
    for isolation in ("thread", "process"):
        handle = worker.submit(exit_softly, 3, timeout_s=20, isolation=isolation)
        with pytest.raises(RuntimeError, match=r"exit_softly raised SystemExit\(3\)"):
            handle.result()
        assert handle.outcome is Outcome.ERROR


def test_a_call_that_nobody_waits_for_is_abandoned_when_it_is_asked_about() -> None:
    release = threading.Event()
    with AsyncWorker(grace_s=0.01, preload=()) as worker:
        handle = worker.submit(release.wait, timeout_s=0.01, isolation="thread")
        until(handle.done)
        assert handle.outcome is Outcome.ABANDONED
        assert not handle.ended
        with pytest.raises(DeadlineExceeded, match="did not end within 10 ms and still runs"):
            handle.result()
        assert [call.name for call in worker.stats().live] == ["Event.wait"]
        release.set()
        until(lambda: handle.ended)
        assert worker.stats().live == ()
        assert worker.stats().outcomes == {Outcome.ABANDONED: 1}


def test_a_call_that_nobody_asks_about_is_abandoned_too() -> None:
    release = threading.Event()
    with AsyncWorker(grace_s=0.01, preload=()) as worker:
        worker.submit(release.wait, timeout_s=0.01, isolation="thread")
        until(lambda: worker.stats().outcomes == {Outcome.ABANDONED: 1})
        release.set()


def test_a_handle_can_be_awaited_in_any_event_loop(worker: AsyncWorker) -> None:
    async def ask() -> list[int]:
        handles = [worker.submit(double, x, timeout_s=20, isolation="thread") for x in range(5)]
        return [await handle for handle in handles]

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8]


def test_awaiting_gives_up_at_deadline_and_grace() -> None:
    release = threading.Event()

    async def ask(worker: AsyncWorker) -> None:
        await worker.submit(release.wait, timeout_s=0.05, isolation="thread")

    with AsyncWorker(grace_s=0.05, preload=()) as worker:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="still runs"):
            asyncio.run(ask(worker))
        assert time.monotonic() - began < 5
        release.set()


def test_cancelling_who_awaits_cancels_the_call(worker: AsyncWorker) -> None:
    async def ask() -> None:
        handles.append(worker.submit(obey, timeout_s=60, isolation="thread"))
        async with asyncio.timeout(0.05):
            await handles[0]

    handles: list = []
    with pytest.raises(TimeoutError):
        asyncio.run(ask())
    # The event loop that waited is closed by now, which must not matter to the count.
    until(lambda: handles[0].outcome is Outcome.CANCELLED)
    assert worker.stats().outcomes == {Outcome.CANCELLED: 1}


def test_a_loop_that_is_closed_while_it_awaits_is_no_loss() -> None:
    release = threading.Event()
    with AsyncWorker(preload=()) as worker:
        loop = asyncio.new_event_loop()
        handle = worker.submit(release.wait, timeout_s=60, isolation="thread")

        async def ask() -> None:
            await handle

        task = loop.create_task(ask())
        loop.run_until_complete(asyncio.sleep(0.01))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        release.set()
        assert handle.result() is True
        assert worker.stats().outcomes == {Outcome.OK: 1}


def test_many_may_wait_for_one_call(worker: AsyncWorker) -> None:
    handle = worker.submit(sleep, 0.05, timeout_s=10)
    seen: list[float] = []
    threads = [threading.Thread(target=lambda: seen.append(handle.result())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == [0.05] * 8


def test_outside_of_a_call_nothing_is_cancelled() -> None:
    check_cancelled()


def test_cancelling_a_call_that_has_ended_changes_nothing(worker: AsyncWorker) -> None:
    handle = worker.submit(echo, 1, timeout_s=10)
    assert handle.result() == 1
    handle.cancel()
    assert handle.result() == 1
    assert handle.outcome is Outcome.OK
