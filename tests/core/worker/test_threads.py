import asyncio
import threading
import time

import pytest

from esper.core.worker import AsyncWorker, Outcome
from esper.core.worker.threads import DaemonThreads
from esper.leyline import CallCancelled, DeadlineExceeded
from support.calls import double, late_by, obey, until


def test_a_function_that_obeys_ends_at_its_deadline() -> None:
    with AsyncWorker(preload=()) as worker:
        handle = worker.submit(obey, timeout_s=0.05, isolation="thread")
        with pytest.raises(DeadlineExceeded):
            handle.result()
        until(lambda: handle.ended)


def test_a_function_that_obeys_can_be_cancelled() -> None:
    with AsyncWorker(preload=()) as worker:
        handle = worker.submit(obey, timeout_s=60, isolation="thread")
        handle.cancel()
        with pytest.raises(CallCancelled):
            handle.result()
        assert worker.stats().outcomes == {Outcome.CANCELLED: 1}


def test_an_answer_after_the_deadline_is_late_though_it_came() -> None:
    with AsyncWorker(grace_s=10, preload=()) as worker:
        handle = worker.submit(late_by, 0.1, timeout_s=0.02, isolation="thread")
        with pytest.raises(DeadlineExceeded):
            handle.result()
        assert handle.outcome is Outcome.TIMEOUT
        assert handle.ended


def test_threads_are_used_again_and_end_with_the_worker() -> None:
    before = set(threading.enumerate())
    with AsyncWorker(4, preload=()) as worker:
        for x in range(200):
            assert worker.call(double, x, timeout_s=20, isolation="thread") == 2 * x
        made = [t.name for t in threading.enumerate() if t not in before]
        assert len(made) <= 1 + 4, "a thread or few, and the watchdog"
        assert all(thread.daemon for thread in threading.enumerate() if thread not in before)
    until(lambda: set(threading.enumerate()) <= before)


def test_a_thread_that_is_idle_for_long_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.core.worker.threads._IDLE_S", 0.02)
    threads, seen = DaemonThreads("brief"), []
    for _ in range(3):
        threads.run(lambda: seen.append(threading.current_thread().name))
        until(lambda: not any(t.name.startswith("brief") for t in threading.enumerate()))
    assert seen == ["brief-1", "brief-2", "brief-3"]
    threads.close()


def test_a_job_that_comes_as_its_thread_retires_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.core.worker.threads._IDLE_S", 0.001)
    threads, done = DaemonThreads("brief"), []
    for number in range(500):
        threads.run(lambda number=number: done.append(number))
        time.sleep(0.001)
    until(lambda: len(done) == 500)
    threads.close()


def test_what_asyncio_gives_to_threads_runs_on_daemons() -> None:
    seen: list[threading.Thread] = []

    def look(fail: bool) -> str:
        seen.append(threading.current_thread())
        if fail:
            raise LookupError("no such name")
        return "found"

    async def ask() -> str:
        with pytest.raises(LookupError):
            await asyncio.to_thread(look, True)
        return await asyncio.to_thread(look, False)

    with AsyncWorker(preload=()) as worker:
        assert worker.call(ask, timeout_s=10) == "found"
    assert all(thread.daemon and thread.name.startswith("esper-call") for thread in seen)
    until(lambda: not any(thread.is_alive() for thread in seen))
