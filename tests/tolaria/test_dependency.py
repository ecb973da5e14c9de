import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from esper.core.config import BreakerConfig
from esper.core.worker import AsyncWorker, Isolation, Outcome
from esper.leyline import Level
from esper.tolaria.dependency import Dependency, Surroundings
from support.calls import until
from support.calls_out import double, fail, sleep, spin


class Listener:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.trouble: list[str] = []

    def announce(self, name: str, message: str, level: Level, data: dict[str, Any]) -> None:
        assert message
        self.events.append(name)


@pytest.fixture
def worker() -> Iterator[AsyncWorker]:
    with AsyncWorker(2, 0.0, grace_s=0.01) as made:
        yield made


@pytest.fixture
def listener() -> Listener:
    return Listener()


def make(
    worker: AsyncWorker, listener: Listener, timeout_s: float = 20.0, **breaker: float
) -> Dependency:
    config = BreakerConfig.model_validate({"cooldown_s": 0.05, **breaker})
    surroundings = Surroundings(worker, config, listener.announce, listener.trouble.append)
    return Dependency("tamiyo", timeout_s, surroundings)


@pytest.mark.parametrize("isolation", [None, Isolation.THREAD, Isolation.PROCESS])
def test_an_answer_is_polled_once(
    worker: AsyncWorker, listener: Listener, isolation: Isolation | None
) -> None:
    dependency = make(worker, listener)
    assert dependency.poll() is None
    assert dependency.submit_async(double, 21, isolation=isolation)
    assert dependency.pending
    while (answer := dependency.poll()) is None:
        time.sleep(0.001)
    assert answer.ok
    assert answer.reply == 42
    assert answer.latency_ms is not None
    assert answer.latency_ms > 0
    assert not dependency.pending
    assert dependency.poll() is None
    assert dependency.metrics()["tolaria.timeout.tamiyo.success"] == 1
    assert dependency.metrics()["tolaria.timeout.tamiyo.p95_ms"] > 0
    assert listener.events == []


def test_what_was_not_measured_is_absent(worker: AsyncWorker, listener: Listener) -> None:
    assert "tolaria.timeout.tamiyo.last_ms" not in make(worker, listener).metrics()


def test_asking_twice_at_a_time_is_a_mistake(worker: AsyncWorker, listener: Listener) -> None:
    dependency = make(worker, listener)
    dependency.submit_async(double, 1, isolation=Isolation.THREAD)
    with pytest.raises(RuntimeError, match="an answer is expected"):
        dependency.submit_async(double, 1, isolation=Isolation.THREAD)


def test_an_error_is_contained_and_told(worker: AsyncWorker, listener: Listener) -> None:
    dependency = make(worker, listener)
    dependency.submit_async(fail, "no idea", isolation=Isolation.THREAD)
    answer = dependency.wait()
    assert answer is not None
    assert answer.outcome is Outcome.ERROR
    assert answer.detail == "ValueError: no idea"
    assert listener.events == ["tamiyo_error"]


def test_a_missed_deadline_is_told_repeated_it_is_trouble_and_the_third_opens_the_breaker(
    worker: AsyncWorker, listener: Listener
) -> None:
    worker.call(double, 1, timeout_s=20)
    dependency = make(worker, listener, timeout_s=0.02, cooldown_s=60)
    for count in (1, 2, 3):
        assert dependency.submit_async(spin)
        answer = dependency.wait()
        assert answer is not None
        assert not answer.ok
        assert dependency.counts["timeout"] == count
        assert len(listener.trouble) == [0, 1, 2][count - 1]
        until(lambda: not worker.stats().live)  # nothing is asked before the process is gone
    assert listener.events == ["tamiyo_timeout"] * 3 + ["breaker_opened"]
    assert listener.trouble == [
        "tamiyo missed its deadline 2 times in a row",
        "the breaker of tamiyo opened",
    ]
    assert not dependency.submit_async(spin)
    assert dependency.counts["refused"] == 1
    assert dependency.held_open() == "the breaker of tamiyo is open"
    assert dependency.metrics()["tolaria.timeout.tamiyo.breaker_open"] == 1


def test_after_the_cooldown_one_success_closes_the_breaker(
    worker: AsyncWorker, listener: Listener
) -> None:
    dependency = make(worker, listener, failures=1, cooldown_s=0.05)
    dependency.submit_async(fail, "once", isolation=Isolation.THREAD)
    dependency.wait()
    assert not dependency.submit_async(double, 1, isolation=Isolation.THREAD)
    time.sleep(0.06)
    assert dependency.submit_async(double, 1, isolation=Isolation.THREAD)
    dependency.wait()
    assert dependency.held_open() == ""
    assert listener.events == ["tamiyo_error", "breaker_opened", "breaker_closed"]


def test_while_a_function_that_was_abandoned_still_runs_nothing_is_asked(
    worker: AsyncWorker, listener: Listener
) -> None:
    release = threading.Event()
    dependency = make(worker, listener, timeout_s=0.02)
    dependency.submit_async(release.wait, isolation=Isolation.THREAD)
    dependency.wait()
    assert not dependency.submit_async(double, 1, isolation=Isolation.THREAD)
    assert dependency.counts["timeout"] == 2
    assert len(worker.stats().live) == 1
    release.set()
    while worker.stats().live:
        time.sleep(0.001)
    assert dependency.submit_async(double, 1, isolation=Isolation.THREAD)


def test_a_full_worker_says_nothing_about_the_dependency(
    worker: AsyncWorker, listener: Listener
) -> None:
    release = threading.Event()
    for _ in range(2):
        worker.submit(release.wait, timeout_s=20, isolation="thread")
    dependency = make(worker, listener, failures=1)
    assert not dependency.submit_async(double, 1, isolation=Isolation.THREAD)
    assert listener.events == ["tamiyo_refused"]
    assert dependency.held_open() == ""
    release.set()


def test_what_cannot_be_sent_to_a_process_is_an_error_that_says_so(
    worker: AsyncWorker, listener: Listener
) -> None:
    dependency = make(worker, listener)
    assert not dependency.submit_async(lambda: None)
    assert listener.events == ["tamiyo_error"]
    assert dependency.counts["error"] == 1


def test_a_cancelled_call_counts_as_that_and_for_nothing_else(
    worker: AsyncWorker, listener: Listener
) -> None:
    dependency = make(worker, listener, failures=1)
    dependency.submit_async(sleep, 10.0)
    dependency.cancel()
    dependency.cancel()
    assert not dependency.pending
    assert dependency.counts["cancelled"] == 1
    assert dependency.held_open() == ""


def test_what_only_the_calling_thread_may_do_is_counted_and_contained(
    worker: AsyncWorker, listener: Listener
) -> None:
    dependency = make(worker, listener, failures=2, cooldown_s=60)
    assert dependency.call_here(threading.current_thread).reply is threading.current_thread()
    for _ in range(2):
        assert dependency.call_here(fail, "no").detail == "ValueError: no"
    refused = dependency.call_here(double, 1)
    assert refused.outcome is Outcome.REFUSED
    assert refused.reply is None
    assert dependency.counts == {"success": 1, "error": 2, "refused": 1}
