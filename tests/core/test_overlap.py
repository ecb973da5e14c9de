import threading
import time
from collections.abc import Callable

import pytest

from esper.core.deadline import Deadline
from esper.core.overlap import Answer, CallOutcome, OverlappedCall


def answer_of(call: OverlappedCall[int, int]) -> Answer[int]:
    answer = call.wait()
    assert answer is not None
    return answer


def test_an_answer_in_time_is_given_once() -> None:
    call = OverlappedCall[int, int](lambda x: x * 2, name="double")
    assert call.submit(21, Deadline.after(10))
    assert answer_of(call) == Answer(CallOutcome.OK, 42)
    assert call.poll() is None
    assert not call.pending
    call.close()


def test_an_error_is_handed_over() -> None:
    call = OverlappedCall[int, float](lambda x: 1 / x, name="divide")
    call.submit(0, Deadline.after(10))
    answer = call.wait()
    assert answer is not None
    assert answer.outcome is CallOutcome.ERROR
    assert isinstance(answer.error, ZeroDivisionError)
    call.close()


@pytest.fixture
def stuck() -> tuple[OverlappedCall[int, int], threading.Event]:
    release = threading.Event()

    def wait(x: int) -> int:
        release.wait()
        return x

    return OverlappedCall[int, int](wait, name="stuck"), release


Stuck = tuple[OverlappedCall[int, int], threading.Event]


def test_a_call_that_hangs_is_late_and_refuses_more(stuck: Stuck) -> None:
    call, release = stuck
    began = time.monotonic()
    assert call.submit(1, Deadline.after(0.02))
    assert call.poll() is None
    assert answer_of(call).outcome is CallOutcome.LATE
    assert time.monotonic() - began < 5
    assert not call.submit(2, Deadline.after(1)), "the thread is still taken"
    release.set()
    until(lambda: call.submit(3, Deadline.after(10)))
    assert answer_of(call) == Answer(CallOutcome.OK, 3)
    call.close()


def test_a_late_answer_is_dropped(stuck: Stuck) -> None:
    call, release = stuck
    call.submit(1, Deadline.after(0))
    release.set()
    answer = call.poll()
    assert answer == Answer(CallOutcome.LATE)
    assert call.poll() is None
    call.close()


def test_thousands_of_calls_use_one_thread() -> None:
    call = OverlappedCall[int, int](lambda x: x, name="echo-often")
    for number in range(2000):
        until(lambda number=number: call.submit(number, Deadline.after(10)))
        assert answer_of(call).reply == number
    assert [t.name for t in threading.enumerate()].count("echo-often") == 1
    thread = call._thread
    call.close()
    assert thread is not None
    thread.join(5)
    assert not thread.is_alive()


def test_without_a_question_there_is_no_answer() -> None:
    call = OverlappedCall[int, int](lambda x: x, name="echo")
    assert call.poll() is None
    assert call.wait() is None
    call.close()


def test_a_deadline_passes() -> None:
    assert Deadline.after(-1).passed
    assert Deadline.after(-1).remaining < 0
    assert not Deadline.after(60).passed


def until(condition: Callable[[], bool]) -> None:
    deadline = Deadline.after(10)
    while not condition():
        assert not deadline.passed, "the condition never came true"
